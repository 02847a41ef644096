"""Core attention by library GEMMs, for pieces of queries on their own prefixes.

At a head dimension of 512 no fused kernel on Hopper is as fast as GEMMs up to some thousand tokens,
but of what Megatron's and TransformerEngine's unfused paths compute half is above the diagonal and
thrown away. Pieces leave most of that out (:mod:`megatron_helix.kernels.query_pieces`). For piece p
of a head, with the keys ``0..E_p`` that it sees::

    S_p[l, E_p] = Q_p[l, d] K[:E_p, d]^T        P_p = softmax(S_p)        O_p[l, d] = P_p V[:E_p, d]
    dV[:E_p] += P_p^T dO_p      dP_p = dO_p V[:E_p]^T      dS_p = P_p (dP_p - rowsum(P_p dP_p))
    dK[:E_p] += dS_p^T Q_p      dQ_p = dS_p K[:E_p]

The sums over pieces are accumulated in place by the GEMMs, in the gradient's own dtype: a key that
c pieces see has its gradient rounded c times, 8 at most.

It was run on the CPU only, not on a GPU yet.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.autograd.function import once_differentiable

from megatron_helix.basics.errors import UserError
from megatron_helix.kernels import masked_softmax, query_pieces
from megatron_helix.kernels.masked_softmax import Scores
from megatron_helix.kernels.query_pieces import Piece, Sight

_CAUSAL = (AttnMaskType.causal, AttnMaskType.causal_bottom_right)


@dataclass(frozen=True, kw_only=True)
class _Work:
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


class _Attention(torch.autograd.Function):
    """Forward: ``[sq, b, H, d], [sk, b, K, d], [sk, b, K, d] -> [sq, b, H, d]``, as above.

    Backward: gradients of query, key, value and offset. Saves these and the given mask; of every
    piece what dropout kept (one byte a score) and, with ``keep``, the probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        offset: torch.Tensor | None,
        mask: torch.Tensor | None,
        work: _Work,
    ) -> torch.Tensor:
        groups = key.size(2)
        context = query.new_empty(*query.shape[:3], value.size(3))
        saved: list[torch.Tensor | None] = []
        for piece in work.pieces:
            probabilities = _probabilities(query, key, offset, mask, piece, work)
            weights, kept = probabilities[..., : piece.keys], None
            if work.rate:
                weights, kept = torch.native_dropout(weights, work.rate, True)
            _multiply_into(
                context[piece.rows], _grouped(weights, groups), _keys(value, piece), scale=1.0
            )
            saved += [probabilities if work.keep else None, kept]
        ctx.work = work
        ctx.save_for_backward(query, key, value, offset, mask, *saved)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        work: _Work = ctx.work
        query, key, value, offset, mask, *saved = ctx.saved_tensors
        groups, scale = key.size(2), work.scale * work.scores.coefficient
        of_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        of_key, of_value = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value)
        )
        of_offset = None
        if offset is not None:
            of_offset = torch.zeros_like(
                offset, dtype=torch.promote_types(offset.dtype, torch.float32)
            )
        for number in reversed(range(len(work.pieces))):
            piece, (probabilities, kept) = work.pieces[number], saved[2 * number : 2 * number + 2]
            if probabilities is None:
                probabilities = _probabilities(query, key, offset, mask, piece, work)
            incoming = _rows(grad, piece, groups)
            of_scores = torch.empty_like(probabilities)
            of_weights = of_scores[..., : piece.keys]
            of_scores[..., piece.keys :] = 0
            _product(_grouped(of_weights, groups), incoming, _keys(value, piece).transpose(1, 2))
            weights = probabilities[..., : piece.keys]
            if kept is not None:
                kept_scale = kept / (1 - work.rate)
                weights = weights * kept_scale
                of_weights *= kept_scale
            first = number + 1 == len(work.pieces)
            _accumulate(of_value, piece, _grouped(weights, groups), incoming, first=first)
            del weights
            of_scores = masked_softmax.softmax_backward(
                of_scores, probabilities, piece, work.scores, plain=mask is None and offset is None
            )
            del probabilities
            if of_offset is not None:
                of_offset += of_scores[..., piece.keys].sum(dim=(0, 2), dtype=of_offset.dtype)
            of_weights = of_scores[..., : piece.keys]
            if mask is not None:
                of_weights.masked_fill_(_part(mask, piece), 0)
            of_weights = _grouped(of_weights, groups)
            queries = _rows(query, piece, groups)
            _accumulate(of_key, piece, of_weights, queries, first=first, scale=scale)
            _multiply_into(of_query[piece.rows], of_weights, _keys(key, piece), scale=scale)
        if of_offset is not None:
            of_offset = of_offset.to(offset.dtype)
        return of_query, of_key, of_value, of_offset, None, None


def _probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    offset: torch.Tensor | None,
    mask: torch.Tensor | None,
    piece: Piece,
    work: _Work,
) -> torch.Tensor:
    """Of one piece, ``[b, H, length, columns]``."""
    columns = masked_softmax.columns(piece.keys, offset)
    scores = query.new_empty(query.size(1), query.size(2), piece.length, columns)
    _product(
        _grouped(scores, key.size(2))[..., : piece.keys],
        _rows(query, piece, key.size(2)),
        _keys(key, piece).transpose(1, 2),
        scale=work.scale,
    )
    part = None if mask is None else _part(mask, piece)
    return masked_softmax.softmax(scores, piece, work.scores, part, offset)


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


class PrefixAttention(DotProductAttention):
    """Megatron's ``DotProductAttention``, contract and parameters, on pieces of the queries.

    Causal, bottom-right causal, full and given masks, sliding windows, grouped queries (keys and
    values are not repeated), softmax offsets and dropout; bf16, fp16, fp32 and fp64.

    Scores are in memory for one piece at a time. The probabilities are kept for the backward pass
    where they take no more memory than queries, keys and values do: up to some 1.6 times 3 d tokens
    of causal attention with as many query groups as heads. Beyond, they are computed again, which
    is a product of seven instead of six.

    Attributes:
        least, most: how queries are cut (:func:`megatron_helix.kernels.query_pieces.cut`).
    """

    least = query_pieces.LEAST
    most = query_pieces.MOST

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        runs: list[tuple[int, int]] | None = None,
    ) -> torch.Tensor:
        """Query ``[sq, b, H, d]``, key and value ``[sk, b, K, d]`` -> ``[sq, b, H * d]``.

        Args:
            query: aligned to the end of the keys, unless ``runs`` says where they are.
            key: of the whole sequence.
            value: like ``key``.
            attention_mask: ``[b or 1, 1, sq, sk]``, true where hidden; beside the causal mask where
                the type is causal, and not looked at in a layer with a window, as in stock.
            attn_mask_type: the layer's own by default.
            attention_bias: refused.
            packed_seq_params: refused.
            runs: (position, length) of neighbouring queries, in order.

        Raises:
            UserError: for packed sequences and attention biases.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise UserError(
                "--helix-core-attention: prefix takes neither packed sequences nor an attention"
                " bias; leave the flag away"
            )
        keys = key.size(0)
        sight = self._sight(attn_mask_type or self.attn_mask_type)
        if self.scale_mask_softmax.window_size is not None:
            attention_mask = None
        pieces = query_pieces.cut(
            runs or [(keys - query.size(0), query.size(0))],
            keys,
            sight,
            least=self.least,
            most=self.most,
        )
        scores = query.size(1) * query.size(2) * query_pieces.computed(pieces)
        work = _Work(
            pieces=pieces,
            # Megatron divides by the layer's number in the product and multiplies after it.
            scores=Scores(sight=sight, coefficient=float(self.scale_mask_softmax.scale or 1)),
            scale=self.softmax_scale,
            rate=self.attention_dropout.p if self.training else 0.0,
            keep=torch.is_grad_enabled() and scores <= query.numel() + key.numel() + value.numel(),
        )
        given = (query, key, value, self.softmax_offset, attention_mask, work)
        if work.rate and not self.config.sequence_parallel:
            with get_cuda_rng_tracker().fork():
                context = _Attention.apply(*given)
        else:
            context = _Attention.apply(*given)
        return context.flatten(2)

    def _sight(self, mask_type: AttnMaskType) -> Sight:
        """How far a query sees, as ``DotProductAttention`` decides."""
        window = self.scale_mask_softmax.window_size
        if window is not None:
            left, right = window
            return Sight(left=None if left < 0 else left, right=None if right < 0 else right)
        return masked_softmax.CAUSAL if mask_type in _CAUSAL else Sight(left=None, right=None)
