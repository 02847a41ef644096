"""Which tokens a rank of the dim axis takes, and the order of tokens inside the decoder block.

Under sequence parallelism the residual stream is ``[s/T, b, hidden]``: rank t = i * m + j holds
sequence chunk t of T. The m chunks of the ranks (i, 0), (i, 1), ..., a dim group, are chunk i of n.
Attention on whole heads needs whole sequences, for 1/m of the tokens:

* **batch split**: rank (i, j) takes sequences ``[j * b/m, (j+1) * b/m)``. Inside the decoder block
  the stream is kept as ``[s/n, b/m, hidden]``: sequence chunk i of n, for its own sequences. One
  all-to-all over the dim group converts on entry, its inverse on exit.
* **sequence split**: every chunk of n is cut into 2m pieces, and rank (i, j) takes pieces j and
  2m - 1 - j of all of them. A token attends to those before it, so the rank that has an early piece
  has a late one: all ranks have the same causal work, for any m and n. Under ``weights`` the stream
  is dealt out within the dim group, each rank its two pieces of chunk i; an all-gather over the
  head-axis group then yields them for all chunks. Where tokens enter by an embedding and leave by a
  loss, it is word ids, labels and losses that are put in order, and no stream is sent for it.

What needs stock's order in every layer takes the chunks as the stream has them, ``j, m + j, 2m + j,
...`` of T (``balanced`` false): the rank with most causal work, j = m - 1, then has ``1 + (m-1)/T``
times the mean of it.

Elements a rank sends for one conversion, of its ``s * b * hidden / T``: ``(m-1)/m`` of them with a
batch split; with a sequence split all but what lies in its own chunk of the pieces it takes
(:func:`megatron_helix.exchange.pieces.kept`), which is half of a chunk of even length, or nothing.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_helix.exchange.dealing import QUERIES, Run
from megatron_helix.exchange.pieces import Piece, pieces
from megatron_helix.exchange.plan import Plan
from megatron_helix.kernels.collectives import all_to_all, uneven_all_to_all
from megatron_helix.kernels.copies import on_device, packed
from megatron_helix.partition.layout import HelixLayout


def to_block_order(
    hidden: torch.Tensor,
    plan: Plan,
    layout: HelixLayout,
    dim_group: dist.ProcessGroup,
    head_group: int = 0,
) -> torch.Tensor:
    """The stream as stock has it -> as a plan has it that has its own order.

    ``[s/T, b, hidden] -> [s/n, b/m, hidden]`` (batch split), the same shape (sequence split). Its
    dual is :func:`from_block_order`. Of packed rows, chunk ``head_group`` is not like the others.
    """
    if plan.split == "sequence":
        hand = _hand(
            layout, plan.documents, head_group, dim_group.rank(), len(hidden), hidden.device
        )
        sent = in_order(hidden, hand.order)
        return uneven_all_to_all(sent, hand.given, hand.taken, dim_group)
    chunk, b, width = hidden.shape
    sent = hidden.view(chunk, layout.m, b // layout.m, width).transpose(0, 1)
    received = all_to_all(sent, dim_group)  # [m, s/T, b/m, hidden]: chunk k of my sequences
    return received.view(layout.m * chunk, b // layout.m, width)


def from_block_order(
    hidden: torch.Tensor,
    plan: Plan,
    layout: HelixLayout,
    dim_group: dist.ProcessGroup,
    head_group: int = 0,
) -> torch.Tensor:
    """Undoes :func:`to_block_order`, its dual."""
    if plan.split == "sequence":
        hand = _hand(
            layout, plan.documents, head_group, dim_group.rank(), len(hidden), hidden.device
        )
        back = uneven_all_to_all(hidden, hand.taken, hand.given, dim_group)
        return out_of_order(back, hand.order)
    rows, share, width = hidden.shape
    sent = hidden.view(layout.m, rows // layout.m, share, width)
    received = all_to_all(sent, dim_group)  # [m, s/T, b/m, hidden]: my chunk of rank k's sequences
    return packed(received.transpose(0, 1)).view(rows // layout.m, layout.m * share, width)


class Order(NamedTuple):
    """A permutation: ``x[there]`` puts x in order, ``[back]`` undoes it."""

    there: torch.Tensor
    back: torch.Tensor

    @classmethod
    def of(cls, there: torch.Tensor, device: torch.device) -> "Order":
        """The permutation on a device."""
        back = torch.empty_like(there)
        back[there] = torch.arange(len(there))
        return cls(on_device(there, device), on_device(back, device))


class _Hand(NamedTuple):
    """What a rank gives each segment and takes from each, in tokens; its own tokens by taker."""

    order: Order
    given: list[int]
    taken: list[int]


@lru_cache(maxsize=64)
def _hand(
    layout: HelixLayout,
    documents: tuple[int, ...],
    head_group: int,
    segment: int,
    length: int,
    device: torch.device,
) -> _Hand:
    sequence = layout.size * length
    takers = torch.empty(sequence, dtype=torch.long)
    for j in range(layout.m):
        takers[chunk_positions(layout, j, sequence, documents=documents)] = j
    chunks = takers.view(layout.n, layout.m, length)[head_group]
    given = [int((chunks[segment] == j).sum()) for j in range(layout.m)]
    taken = [int((chunk == segment).sum()) for chunk in chunks]
    return _Hand(Order.of(chunks[segment].argsort(stable=True), device), given, taken)


def runs_of(plan: Plan, layout: HelixLayout, segment: int, tokens: int) -> list[Run]:
    """What dim rank ``segment`` attends for: the pieces of the plan, cut where documents end.

    Of rows that are not packed, ``tokens`` long, each is one document.
    """
    ends = plan.documents or (0, tokens)
    runs, document = [], 0
    for piece in pieces(layout, segment, ends[-1], **plan.dealing):
        start = piece.start
        while start < piece.end:
            while ends[document + 1] <= start:
                document += 1
            end = min(piece.end, ends[document + 1])
            runs.append(Run(start, end, ends[document]))
            start = end
    return runs


def in_calls(piece: Piece) -> list[Piece]:
    """The same tokens in parts of at most :data:`QUERIES`, as even as can be."""
    parts = -(-piece.length // QUERIES)
    edges = [piece.start + piece.length * i // parts for i in range(parts + 1)]
    return [Piece(start, end - start) for start, end in pairwise(edges)]


@lru_cache(maxsize=256)
def chunk_positions(
    layout: HelixLayout,
    segment: int,
    sequence: int,
    *,
    balanced: bool = True,
    documents: tuple[int, ...] = (),
) -> torch.Tensor:
    """Positions in the sequence of the tokens of dim rank ``segment``, ``[s/m]``, ascending."""
    mine = pieces(layout, segment, sequence, balanced=balanced, documents=documents)
    return torch.cat([torch.arange(piece.start, piece.end) for piece in mine])


@lru_cache(maxsize=64)
def stream_order(
    layout: HelixLayout, sequence: int, device: torch.device, documents: tuple[int, ...] = ()
) -> Order:
    """Of a sequence's tokens into the dealt stream, rank t after rank t."""
    positions = [
        chunk_positions(layout, j, sequence, documents=documents).view(layout.n, -1)
        for j in range(layout.m)
    ]
    return Order.of(torch.stack(positions, dim=1).reshape(-1), device)  # [n, m, s/T]


@lru_cache(maxsize=64)
def segment_order(
    layout: HelixLayout, sequence: int, device: torch.device, **dealing: Any
) -> Order:
    """Of a sequence's tokens, dim rank after dim rank; ``dealing`` as in :func:`pieces`."""
    each = [chunk_positions(layout, j, sequence, **dealing) for j in range(layout.m)]
    return Order.of(torch.cat(each), device)


class _Reordered(torch.autograd.Function):
    """Forward: ``x[there]`` along a dimension. Backward: ``[back]``; nothing is added up."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, there: torch.Tensor, back: torch.Tensor, dim: int
    ) -> torch.Tensor:
        ctx.back, ctx.dim = back, dim
        return x.index_select(dim, there)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad.index_select(ctx.dim, ctx.back), None, None, None


def in_order(x: torch.Tensor, order: Order, dim: int = 0) -> torch.Tensor:
    """``x`` with a dimension put in order."""
    return _Reordered.apply(x, order.there, order.back, dim)


def out_of_order(x: torch.Tensor, order: Order, dim: int = 0) -> torch.Tensor:
    """Undoes :func:`in_order`."""
    return _Reordered.apply(x, order.back, order.there, dim)


def in_sequence_order(gathered: torch.Tensor, layout: HelixLayout, **dealing: Any) -> torch.Tensor:
    """What an all-gather over the dim group makes of the ranks' tokens, put in order.

    ``[m * s/m, ...]`` (rank after rank) -> ``[s, ...]``; ``dealing`` as in :func:`pieces`.
    """
    order = segment_order(layout, len(gathered), gathered.device, **dealing)
    return out_of_order(gathered, order)


def by_segment(x: torch.Tensor, layout: HelixLayout, **dealing: Any) -> torch.Tensor:
    """``[s, ...] -> [m, s/m, ...]``, dim rank by dim rank; undoes `in_sequence_order`."""
    taken = in_order(x, segment_order(layout, len(x), x.device, **dealing))
    return taken.view(layout.m, -1, *x.shape[1:])
