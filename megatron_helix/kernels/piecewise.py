"""Attention by library GEMMs, piece of queries by piece, in one autograd function.

For piece p of a head, with the keys ``0..E_p`` that it sees::

    S_p[l, E_p] = Q_p[l, d] K[:E_p, d]^T        P_p = softmax(S_p)        O_p[l, d] = P_p V[:E_p, d]
    dV[:E_p] += P_p^T dO_p      dP_p = dO_p V[:E_p]^T      dS_p = P_p (dP_p - rowsum(P_p dP_p))
    dK[:E_p] += dS_p^T Q_p      dQ_p = dS_p K[:E_p]

The sums over pieces are accumulated in place by the GEMMs, in the gradient's own dtype: a key that
c pieces see has its gradient rounded c times, 8 at most.

S_p and P_p are one tensor, dP_p and dS_p another one, and both are there for some heads at a time
(:mod:`megatron_helix.kernels.parts`). In the backward pass beside the gradients and what was saved
there is so much: two such tensors, or one where probabilities are kept.

A GPU is through with a part's product within 50 to 200 us, and the host has to be as quick to start
them: whatever is the same for all parts is made once, as matrices one below the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megatron_helix.kernels import masked_softmax
from megatron_helix.kernels.masked_softmax import Scores
from megatron_helix.kernels.parts import Part
from megatron_helix.kernels.query_pieces import Piece


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one call computes.

    Attributes:
        parts: in the order to compute them, by pieces.
        scores: how their softmax is made.
        scale: of the product of queries and keys, in it.
        rate: of dropout.
        keep: probabilities for the backward pass; else they are computed again.
    """

    parts: Sequence[Part]
    scores: Scores
    scale: float
    rate: float
    keep: bool


class Given(NamedTuple):
    """What goes in, or its gradients.

    Attributes:
        query: ``[sq, b, H, d]``.
        key: ``[sk, b, K, d]``.
        value: like ``key``.
        offset: of the softmax, ``[H]``.
        mask: ``[b or 1, 1, sq, sk]``, true where hidden beside what a position hides.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    offset: torch.Tensor | None
    mask: torch.Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether nothing but positions and scores makes the probabilities."""
        return self.mask is None and self.offset is None


class _Matrices(NamedTuple):
    """One for each query group of each sequence: views of what is given, or of its gradients.

    Attributes:
        query: ``[b * K, H/K, sq, d]``.
        key: ``[b * K, sk, d]``.
        value: like ``key``.
        all: what they are of.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    all: Given

    @classmethod
    def of(cls, given: Given) -> "_Matrices":
        key, value = (x.flatten(1, 2).transpose(0, 1) for x in (given.key, given.value))
        return cls(_by_group(given.query, given.key.size(2)), key, value, given)

    def offset_of(self, part: Part) -> torch.Tensor | None:
        """Of the part's heads."""
        return None if self.all.offset is None else self.all.offset[self._heads(part)]

    def mask_of(self, part: Part) -> torch.Tensor | None:
        """Of the part's sequences and queries, and the keys that they need."""
        mask, piece = self.all.mask, part.piece
        if mask is None:
            return None
        own = mask[part.sequences] if mask.size(0) > 1 else mask
        return own[..., piece.rows, piece.start : piece.end]

    def by_head(self, scores: torch.Tensor, part: Part) -> torch.Tensor:
        """``[matrices, H/K * length, columns] -> [b, H, length, columns]``, a view."""
        sequences = part.sequences.stop - part.sequences.start
        return scores.view(sequences, -1, part.piece.length, scores.size(2))

    def _heads(self, part: Part) -> slice:
        shared = self.query.size(1)
        return slice(part.groups.start * shared, part.groups.stop * shared)


def attend(work: Work, given: Given) -> torch.Tensor:
    """``[sq, b, H, d]``, with gradients of all but the mask."""
    return _Attention.apply(work, *given)


class _Attention(torch.autograd.Function):
    """Forward: the tensors of :class:`Given` ``-> [sq, b, H, d]``, as above.

    Backward: gradients of query, key, value and offset. Saves what goes in; of every part what
    dropout kept (one byte a score) and, with ``keep``, the probabilities.
    """

    @staticmethod
    def forward(ctx: Any, work: Work, *tensors: torch.Tensor | None) -> torch.Tensor:
        given = Given(*tensors)  # type: ignore[arg-type]  # the first three are there
        context = given.query.new_empty(*given.query.shape[:3], given.value.size(3))
        matrices, out = _Matrices.of(given), _by_group(context, given.key.size(2))
        saved: list[torch.Tensor | None] = []
        for part in work.parts:
            saved += _part_forward(out, matrices, part, work)
        ctx.work = work
        ctx.save_for_backward(*given, *saved)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        work: Work = ctx.work
        tensors = ctx.saved_tensors
        given, saved = Given(*tensors[:5]), tensors[5:]
        offset = given.offset
        made = Given(
            *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[:3]),
            offset=None
            if offset is None
            else torch.zeros_like(offset, dtype=torch.promote_types(offset.dtype, torch.float32)),
            mask=None,
        )
        matrices, sums = _Matrices.of(given), _Matrices.of(made)
        incoming = _by_group(grad, given.key.size(2))
        for number, part in enumerate(work.parts):
            kept = saved[2 * number : 2 * number + 2]
            _part_backward(sums, incoming, matrices, *kept, part=part, work=work)
        if offset is not None and made.offset is not None:
            made = made._replace(offset=made.offset.to(offset.dtype))
        return None, *made


def _part_forward(
    context: torch.Tensor, given: _Matrices, part: Part, work: Work
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Write ``context``; the probabilities and what dropout kept, if they are saved."""
    probabilities = _probabilities(given, _rows(given.query, part), part, work)
    weights, kept = _of_keys(probabilities, part.piece), None
    if work.rate:
        weights, kept = torch.native_dropout(weights, work.rate, True)
    _multiply_into(context, part, weights, _keys(given.value, part), scale=1.0)
    return probabilities if work.keep else None, kept


def _part_backward(
    made: _Matrices,
    grad: torch.Tensor,
    given: _Matrices,
    probabilities: torch.Tensor | None,
    kept: torch.Tensor | None,
    *,
    part: Part,
    work: Work,
) -> None:
    """Add one part's share to the gradients ``made``; the piece that comes first writes them."""
    piece, plain = part.piece, given.all.is_plain
    first, scale = piece == work.parts[0].piece, work.scale * work.scores.coefficient
    queries, incoming = _rows(given.query, part), _rows(grad, part)
    if probabilities is None:
        probabilities = _probabilities(given, queries, part, work)
    of_scores = torch.empty_like(probabilities)
    of_weights, weights = (_of_keys(x, piece) for x in (of_scores, probabilities))
    if of_weights is not of_scores:
        of_scores[..., piece.keys :] = 0
    _product(of_weights, incoming, _keys(given.value, part).transpose(1, 2))
    if kept is not None:
        weights = _dropped(weights, kept, work.rate)
        of_weights.copy_(_dropped(of_weights, kept, work.rate))
    _accumulate(made.value, part, weights, incoming, first=first)
    by_head = [given.by_head(x, part) for x in (of_scores, probabilities)]
    masked_softmax.softmax_backward_(by_head[0], by_head[1], piece, work.scores, plain=plain)
    if (of_offset := made.offset_of(part)) is not None:
        whole = given.by_head(of_scores, part)
        of_offset.add_(whole[..., piece.keys].sum(dim=(0, 2), dtype=of_offset.dtype))
    if (mask := given.mask_of(part)) is not None:
        given.by_head(of_scores, part)[..., : piece.keys].masked_fill_(mask, 0)
    _accumulate(made.key, part, of_weights, queries, first=first, scale=scale)
    _multiply_into(made.query, part, of_weights, _keys(given.key, part), scale=scale)


def _probabilities(given: _Matrices, queries: torch.Tensor, part: Part, work: Work) -> torch.Tensor:
    """Of one part, ``[matrices, H/K * length, columns]``; ``queries`` are its rows."""
    piece, offset = part.piece, given.offset_of(part)
    scores = queries.new_empty(*queries.shape[:2], masked_softmax.columns(piece.keys, offset))
    keys = _keys(given.key, part).transpose(1, 2)
    _product(_of_keys(scores, piece), queries, keys, scale=work.scale)
    masked_softmax.softmax_(
        given.by_head(scores, part), piece, work.scores, given.mask_of(part), offset
    )
    return scores


def _dropped(x: torch.Tensor, kept: torch.Tensor, rate: float) -> torch.Tensor:
    """What dropout makes of ``x`` that it made of the probabilities."""
    return torch.ops.aten.native_dropout_backward(x, kept, 1 / (1 - rate))


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``[s, b, H, d] -> [b * K, H/K, s, d]``; a view of what is contiguous."""
    return x.unflatten(2, (groups, -1)).flatten(1, 2).permute(1, 2, 0, 3)


def _rows(x: torch.Tensor, part: Part) -> torch.Tensor:
    """Queries of a part, ``[b * K, H/K, s, d] -> [matrices, H/K * length, d]``; a copy where H > K.

    The heads of a group lie below each other: one product with its keys serves them all.
    """
    return x[part.matrices, :, part.piece.rows].flatten(1, 2)


def _keys(x: torch.Tensor, part: Part) -> torch.Tensor:
    """Keys or values that a part sees, ``[b * K, s, d] -> [matrices, keys, d]``, a view."""
    return x[part.matrices, part.piece.start : part.piece.end]


def _of_keys(scores: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The columns that have a key."""
    return scores if scores.size(2) == piece.keys else scores[..., : piece.keys]


def _product(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, scale: float = 1.0, beta: float = 0.0
) -> None:
    """``out = beta * out + scale * a b``."""
    torch.baddbmm(out, a, b, beta=beta, alpha=scale, out=out)


def _multiply_into(
    out: torch.Tensor, part: Part, a: torch.Tensor, b: torch.Tensor, *, scale: float
) -> None:
    """The product ``[matrices, H/K * length, d]`` into a part's rows of ``[b * K, H/K, s, d]``."""
    rows = out[part.matrices, :, part.piece.rows]
    if rows.size(1) == 1:
        _product(rows.squeeze(1), a, b, scale=scale)
        return
    made = a.new_empty(a.size(0), a.size(1), rows.size(3))
    _product(made, a, b, scale=scale)
    rows.copy_(made.view(rows.shape))


def _accumulate(
    total: torch.Tensor,
    part: Part,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    first: bool,
    scale: float = 1.0,
) -> None:
    """Add ``a^T b`` to the gradient of a part's keys; the first one writes, zeros elsewhere."""
    piece = part.piece
    if first and piece.start:
        total[part.matrices, : piece.start] = 0
    if first and piece.end < total.size(1):
        total[part.matrices, piece.end :] = 0
    sums = _keys(total, part)
    _product(sums, a.transpose(1, 2), b, scale=scale, beta=0.0 if first else 1.0)
