"""Causal attention of tokens whose keys lie on several ranks: no score is computed for nothing.

A rank has some runs of every document, and keys and values of its own tokens. They attend to each
other causally, in one call: of tokens in order, whichever they are, each sees those before it. What
lies between two of its runs is on other ranks, and every later query of the document sees all of
it: a call without a mask. Parts are merged by their log-sum-exp (:mod:`.merges`).

Where a kernel is given a late run of queries and all of its prefix, it computes the rectangle of
both; here it is what is below the diagonal, as in ring attention (Liu, Zaharia, Abbeel 2023, arXiv
2310.01889). Keys and values are gathered while a rank's own tokens attend to each other, and in the
backward pass the gradients of others' keys travel meanwhile.

On one H200 two ranks trained by it as near to single precision as stock's, on packed rows and rows
of one document (docs/exactness.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_helix.kernels import sums
from megatron_helix.kernels.collectives import start_exchange, start_gather
from megatron_helix.kernels.merges import merge

ALL = slice(None)


class Packed(NamedTuple):
    """Where the queries and keys of several documents are, each a run of both.

    Attributes:
        queries: how many in the documents before, int32 ``[documents + 1]``.
        keys: the same.
        first_query: the first one of each, and ``t``: int32 ``[documents + 1]``.
        first_key: the same.
        most_queries: of a document.
        most_keys: of a document.
        seen: ``[t]``, the queries that are in a document; None for all.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    first_query: torch.Tensor
    first_key: torch.Tensor
    most_queries: int
    most_keys: int
    seen: torch.Tensor | None


class Block(NamedTuple):
    """Queries and keys of one call.

    Attributes:
        causal: whether a query sees its own key and those before it, of as many keys as queries.
        rows: the queries, of the rank's.
        keys: the keys, of those that are gathered.
        packed: the documents, where there are several; ``rows`` and ``keys`` are then all of them.
    """

    causal: bool
    rows: slice = ALL
    keys: slice = ALL
    packed: Packed | None = None

    @property
    def seen(self) -> torch.Tensor | None:
        """Of ``rows``, those that see a key; None for all."""
        return self.packed and self.packed.seen


@dataclass(frozen=True)
class Others:
    """Keys and values of other ranks, in what is gathered: ``[m, 2, t, ...]``.

    Attributes:
        rank: mine.
        order: (rank, row) of every key in the order of the sequence; None of two ranks, where the
            other one's keys are taken as they lie.
    """

    rank: int
    order: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, gathered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that blocks name."""
        if self.order is None:
            key, value = gathered[1 - self.rank]
            return key, value
        rank, row = self.order
        return gathered[rank, 0, row], gathered[rank, 1, row]

    def to_send(self, gathered: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Zeros like ``gathered``, and those in which gradients of keys and values are added up."""
        sent = torch.zeros_like(gathered)
        if self.order is None:
            return sent, (sent[1 - self.rank, 0], sent[1 - self.rank, 1])
        return sent, tuple(torch.zeros_like(x) for x in self.of(gathered))

    def put(self, made: Sequence[torch.Tensor], sent: torch.Tensor) -> torch.Tensor:
        """What was added up, in the places of its ranks."""
        if self.order is not None:
            rank, row = self.order
            for which, gradient in enumerate(made):
                sent[rank, which, row] = gradient
        return sent


class Gaps(NamedTuple):
    """The calls of a rank.

    Attributes:
        own: of its tokens with each other.
        others: of its tokens with keys between them; no key is in two.
        places: where those keys are.
    """

    own: Block
    others: tuple[Block, ...]
    places: Others


class Kernel(Protocol):
    """A fused kernel that gives its log-sum-exp away.

    Queries ``[t, b, H, d]``, keys and values ``[s, b, K, d]``, without b where they are packed.
    """

    def forward(
        self, block: Block, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, log-sum-exp ``[t, (b,) H]``, and what its backward pass asks for beside them.

        The output is zero for queries that see nothing; their log-sum-exp may be anything.
        """
        ...

    def backward(
        self,
        block: Block,
        grad: torch.Tensor,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        lse: torch.Tensor,
        state: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value, zero where nothing was seen.

        Output and log-sum-exp are those of all parts: the probabilities are then the share that
        these keys have of the whole.
        """
        ...


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gaps: Gaps,
    kernel: Kernel,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """The context of a rank's tokens, like ``query``.

    Args:
        query: of them.
        key: the same.
        value: the same.
        gaps: the calls.
        kernel: that makes them.
        group: the ranks that have the keys, of equal shape.
    """
    return _Gaps.apply(query, key, value, gaps, kernel, group)


class _Gaps(torch.autograd.Function):
    """Forward: as :func:`attend`. Saves query, gathered keys and values, output and log-sum-exp.

    Backward: each call's; gradients of keys and values are sent to their ranks and added up there,
    in fp32, rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gaps: Gaps,
        kernel: Kernel,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        query = query.contiguous()
        mine = torch.stack([key, value])
        gathering = start_gather(mine, group, early=True)
        output, lse, state = kernel.forward(gaps.own, query, *mine)
        states = [state]
        gathered = gathering.wait().view(group.size(), *mine.shape)
        if len(gaps.others) > 1:  # rounded once
            output = output.to(torch.promote_types(output.dtype, torch.float32))
        others = gaps.places.of(gathered)
        for block in gaps.others:
            part, part_lse, state = kernel.forward(
                block, query[block.rows], *(x[block.keys] for x in others)
            )
            merge(output[block.rows], lse[block.rows], part, part_lse, block.seen)
            states.append(state)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, gathered, output, lse, *states)
        ctx.how = gaps, kernel, group
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, gathered, output, lse, own_state, *states = ctx.saved_tensors
        gaps, kernel, group = ctx.how
        grad = grad.contiguous()
        others = gaps.places.of(gathered)
        sent, made = gaps.places.to_send(gathered)
        of_query = []
        for block, state in zip(gaps.others, states, strict=True):
            rows = block.rows
            qkv = (query[rows], *(x[block.keys] for x in others))
            *found, of_key, of_value = kernel.backward(
                block, grad[rows], qkv, output[rows], lse[rows], state
            )
            of_query += found
            for total, part in zip(made, (of_key, of_value), strict=True):
                total[block.keys].add_(part)  # no key is in two blocks
        sending = start_exchange(gaps.places.put(made, sent), group, early=True)
        rank = gaps.places.rank
        own = (query, *gathered[rank])
        query_grad, of_key, of_value = kernel.backward(gaps.own, grad, own, output, lse, own_state)
        if len(of_query) > 1:  # rounded once
            query_grad = query_grad.to(torch.promote_types(query.dtype, torch.float32))
        for block, part in zip(gaps.others, of_query, strict=True):
            query_grad[block.rows].add_(part)
        parts = sending.wait()
        parts[rank, 0], parts[rank, 1] = of_key, of_value
        key_grad, value_grad = sums.total(parts)
        return query_grad.to(query.dtype), key_grad, value_grad, None, None, None
