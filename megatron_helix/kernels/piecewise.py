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
"""

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

    parts: list[Part]
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

    def of(self, part: Part) -> "Given":
        """Views of what one part has of it."""
        whole = (slice(None), part.sequences, part.groups)
        heads = _heads(part, self.query.size(2) // self.key.size(2))
        masks = self.mask is not None and self.mask.size(0) > 1
        return Given(
            self.query[:, part.sequences, heads],
            self.key[whole],
            self.value[whole],
            None if self.offset is None else self.offset[heads],
            self.mask[part.sequences] if self.mask is not None and masks else self.mask,
        )


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
        saved: list[torch.Tensor | None] = []
        for part in work.parts:
            saved += _part_forward(_of_queries(context, part, given), given.of(part), part, work)
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
        for number, part in enumerate(work.parts):
            incoming = _of_queries(grad, part, given)
            kept = saved[2 * number : 2 * number + 2]
            _part_backward(made.of(part), incoming, given.of(part), *kept, part=part, work=work)
        if offset is not None and made.offset is not None:
            made = made._replace(offset=made.offset.to(offset.dtype))
        return None, *made


def _part_forward(
    context: torch.Tensor, given: Given, part: Part, work: Work
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Write ``context``; the probabilities and what dropout kept, if they are saved."""
    piece, groups = part.piece, given.key.size(2)
    probabilities = _probabilities(given, piece, work)
    weights, kept = probabilities[..., : piece.keys], None
    if work.rate:
        weights, kept = torch.native_dropout(weights, work.rate, True)
    weights = _grouped(weights, groups)
    _multiply_into(context[piece.rows], weights, _keys(given.value, piece), scale=1.0)
    return probabilities if work.keep else None, kept


def _part_backward(
    made: Given,
    grad: torch.Tensor,
    given: Given,
    probabilities: torch.Tensor | None,
    kept: torch.Tensor | None,
    *,
    part: Part,
    work: Work,
) -> None:
    """Add one part's share to the gradients ``made``; the piece that comes first writes them."""
    piece, groups = part.piece, given.key.size(2)
    first, scale = piece == work.parts[0].piece, work.scale * work.scores.coefficient
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
    masked_softmax.softmax_backward_(of_scores, probabilities, piece, work.scores, plain=plain)
    if made.offset is not None:
        made.offset.add_(of_scores[..., piece.keys].sum(dim=(0, 2), dtype=made.offset.dtype))
    if given.mask is not None:
        of_weights.masked_fill_(_mask(given.mask, piece), 0)
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
    mask = None if given.mask is None else _mask(given.mask, piece)
    masked_softmax.softmax_(scores, piece, work.scores, mask, given.offset)
    return scores


def _dropped(x: torch.Tensor, kept: torch.Tensor, rate: float) -> torch.Tensor:
    """What dropout makes of ``x`` that it made of the probabilities."""
    return torch.ops.aten.native_dropout_backward(x, kept, 1 / (1 - rate))


def _heads(part: Part, shared: int) -> slice:
    """Of a part, where ``shared`` of them share a key."""
    return slice(part.groups.start * shared, part.groups.stop * shared)


def _of_queries(x: torch.Tensor, part: Part, given: Given) -> torch.Tensor:
    """What a part has of ``[sq, b, H, d]``, a view."""
    return x[:, part.sequences, _heads(part, given.query.size(2) // given.key.size(2))]


def _mask(mask: torch.Tensor, piece: Piece) -> torch.Tensor:
    """One piece's of ``[b or 1, 1, sq, sk]``."""
    return mask[..., piece.rows, piece.start : piece.end]


def _rows(x: torch.Tensor, piece: Piece, groups: int) -> torch.Tensor:
    """Queries of a piece, ``[s, b, H, d] -> [b * K, H/K * length, d]``; a copy where H > K.

    The heads of a group lie below each other: one product with its keys serves them all.
    """
    rows = x[piece.rows]
    length, b, heads, channels = rows.shape
    grouped = rows.view(length, b, groups, heads // groups, channels).permute(1, 2, 3, 0, 4)
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
        _product(out.view(length, -1, channels).transpose(0, 1), a, b, scale=scale)
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
    sums = total[piece.start : piece.end]
    sums = sums.view(piece.keys, -1, sums.size(3)).transpose(0, 1)
    _product(sums, a.transpose(1, 2), b, scale=scale, beta=0.0 if first else 1.0)
