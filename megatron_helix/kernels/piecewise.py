"""Attention by library GEMMs, piece of queries by piece, in one autograd function.

For piece p of a head, with the keys ``0..E_p`` that it sees::

    S_p[l, E_p] = Q_p[l, d] K[:E_p, d]^T        P_p = softmax(S_p)        O_p[l, d] = P_p V[:E_p, d]
    dV[:E_p] += P_p^T dO_p      dP_p = dO_p V[:E_p]^T      dS_p = P_p (dP_p - rowsum(P_p dP_p))
    dK[:E_p] += dS_p^T Q_p      dQ_p = dS_p K[:E_p]

The sums over pieces are accumulated in place by the GEMMs, in the gradient's own dtype: a key that
c pieces see has its gradient rounded c times, 8 at most.

It was run on the CPU only, not on a GPU yet.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megatron_helix.kernels import masked_softmax
from megatron_helix.kernels.masked_softmax import Scores
from megatron_helix.kernels.query_pieces import Piece


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one call computes.

    Attributes:
        pieces: of the queries, in order.
        scores: how their softmax is made.
        scale: of the product of queries and keys, in it.
        rate: of dropout.
        keep: probabilities for the backward pass; else they are computed again.
    """

    pieces: list[Piece]
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


def attend(work: Work, given: Given) -> torch.Tensor:
    """``[sq, b, H, d]``, with gradients of all but the mask."""
    return _Attention.apply(work, *given)


class _Attention(torch.autograd.Function):
    """Forward: the tensors of :class:`Given` ``-> [sq, b, H, d]``, as above.

    Backward: gradients of query, key, value and offset. Saves what goes in; of every piece what
    dropout kept (one byte a score) and, with ``keep``, the probabilities.
    """

    @staticmethod
    def forward(ctx: Any, work: Work, *tensors: torch.Tensor | None) -> torch.Tensor:
        given = Given(*tensors)  # type: ignore[arg-type]  # the first three are there
        query, value, groups = given.query, given.value, given.key.size(2)
        context = query.new_empty(*query.shape[:3], value.size(3))
        saved: list[torch.Tensor | None] = []
        for piece in work.pieces:
            probabilities = _probabilities(given, piece, work)
            weights, kept = probabilities[..., : piece.keys], None
            if work.rate:
                weights, kept = torch.native_dropout(weights, work.rate, True)
            weights = _grouped(weights, groups)
            _multiply_into(context[piece.rows], weights, _keys(value, piece), scale=1.0)
            saved += [probabilities if work.keep else None, kept]
        ctx.work = work
        ctx.save_for_backward(*given, *saved)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        work: Work = ctx.work
        given, saved = Given(*ctx.saved_tensors[:5]), ctx.saved_tensors[5:]
        offset = given.offset
        made = Given(
            *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[:3]),
            offset=None
            if offset is None
            else torch.zeros_like(offset, dtype=torch.promote_types(offset.dtype, torch.float32)),
            mask=None,
        )
        for number in reversed(range(len(work.pieces))):
            _piece_backward(
                made, grad, given, *saved[2 * number : 2 * number + 2], number=number, work=work
            )
        if offset is not None and made.offset is not None:
            made = made._replace(offset=made.offset.to(offset.dtype))
        return None, *made


def _piece_backward(
    made: Given,
    grad: torch.Tensor,
    given: Given,
    probabilities: torch.Tensor | None,
    kept: torch.Tensor | None,
    *,
    number: int,
    work: Work,
) -> None:
    """Add one piece's part to the gradients ``made``; the last piece, which comes first, writes.

    Two tensors of the size of its scores are there at a time: probabilities, and their gradient in
    whose place that of the scores comes to be.
    """
    piece, groups = work.pieces[number], given.key.size(2)
    first, scale = number + 1 == len(work.pieces), work.scale * work.scores.coefficient
    if probabilities is None:
        probabilities = _probabilities(given, piece, work)
    incoming = _rows(grad, piece, groups)
    of_scores = torch.empty_like(probabilities)
    of_scores[..., piece.keys :] = 0
    of_weights, weights = (x[..., : piece.keys] for x in (of_scores, probabilities))
    _product(_grouped(of_weights, groups), incoming, _keys(given.value, piece).transpose(1, 2))
    if kept is not None:
        weights = _dropped(weights, kept, work.rate)
        of_weights.copy_(_dropped(of_weights, kept, work.rate))
    _accumulate(made.value, piece, _grouped(weights, groups), incoming, first=first)
    plain = given.mask is None and given.offset is None
    of_scores = masked_softmax.softmax_backward(
        of_scores, probabilities, piece, work.scores, plain=plain
    )
    if made.offset is not None:
        made.offset.add_(of_scores[..., piece.keys].sum(dim=(0, 2), dtype=made.offset.dtype))
    of_weights = of_scores[..., : piece.keys]
    if given.mask is not None:
        of_weights.masked_fill_(_part(given.mask, piece), 0)
    of_weights = _grouped(of_weights, groups)
    queries = _rows(given.query, piece, groups)
    _accumulate(made.key, piece, of_weights, queries, first=first, scale=scale)
    _multiply_into(made.query[piece.rows], of_weights, _keys(given.key, piece), scale=scale)


def _probabilities(given: Given, piece: Piece, work: Work) -> torch.Tensor:
    """Of one piece, ``[b, H, length, columns]``."""
    query, groups = given.query, given.key.size(2)
    columns = masked_softmax.columns(piece.keys, given.offset)
    scores = query.new_empty(query.size(1), query.size(2), piece.length, columns)
    _product(
        _grouped(scores, groups)[..., : piece.keys],
        _rows(query, piece, groups),
        _keys(given.key, piece).transpose(1, 2),
        scale=work.scale,
    )
    part = None if given.mask is None else _part(given.mask, piece)
    return masked_softmax.softmax(scores, piece, work.scores, part, given.offset)


def _dropped(x: torch.Tensor, kept: torch.Tensor, rate: float) -> torch.Tensor:
    """What dropout makes of ``x`` that it made of the probabilities."""
    return torch.ops.aten.native_dropout_backward(x, kept, 1 / (1 - rate))


def _part(mask: torch.Tensor, piece: Piece) -> torch.Tensor:
    """One piece's of ``[b or 1, 1, sq, sk]``."""
    return mask[..., piece.rows, piece.start : piece.end]


def _rows(x: torch.Tensor, piece: Piece, groups: int) -> torch.Tensor:
    """Queries of a piece, ``[s, b, H, d] -> [b * K, H/K * length, d]``; a copy where H > K.

    The heads of a group lie below each other: one product with its keys serves them all.
    """
    part = x[piece.rows]
    length, b, heads, channels = part.shape
    grouped = part.view(length, b, groups, heads // groups, channels).permute(1, 2, 3, 0, 4)
    return grouped.reshape(b * groups, -1, channels)


def _keys(x: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Keys or values that a piece sees, ``[s, b, K, d] -> [b * K, keys, d]``."""
    return x[piece.start : piece.end].flatten(1, 2).transpose(0, 1)


def _grouped(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """``[b, H, length, columns] -> [b * K, H/K * length, columns]``, a view."""
    return scores.view(scores.size(0) * groups, -1, scores.size(3))


def _product(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, scale: float = 1.0, beta: float = 0.0
) -> None:
    """``out = beta * out + scale * a b``."""
    torch.baddbmm(out, a, b, beta=beta, alpha=scale, out=out)


def _multiply_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, scale: float) -> None:
    """The product ``[b * K, H/K * length, d]`` into rows ``[length, b, H, d]``."""
    length, batch, heads, channels = out.shape
    groups = a.size(0) // batch
    if groups == heads:
        _product(out.flatten(1, 2).transpose(0, 1), a, b, scale=scale)
        return
    made = a.new_empty(a.size(0), a.size(1), channels)
    _product(made, a, b, scale=scale)
    by_head = made.view(batch, groups, heads // groups, length, channels).permute(3, 0, 1, 2, 4)
    out.view(length, batch, groups, heads // groups, channels).copy_(by_head)


def _accumulate(
    total: torch.Tensor,
    piece: Piece,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    first: bool,
    scale: float = 1.0,
) -> None:
    """Add ``a^T b`` to the gradient of a piece's keys; the first one writes, zeros elsewhere."""
    if first:
        total[: piece.start] = 0
        total[piece.end :] = 0
    _product(_keys(total, piece), a.transpose(1, 2), b, scale=scale, beta=0.0 if first else 1.0)
