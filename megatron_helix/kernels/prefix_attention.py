"""Core attention on pieces of queries, each with the keys that it sees.

At a head dimension of 512 no fused kernel on Hopper is as fast as GEMMs up to some thousand tokens,
but of what Megatron's and TransformerEngine's unfused paths compute half is above the diagonal and
thrown away. Pieces leave most of that out (:mod:`megatron_helix.kernels.query_pieces`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.basics.errors import UserError
from megatron_helix.kernels import masked_softmax, parts, piecewise, query_pieces
from megatron_helix.kernels.masked_softmax import Scores
from megatron_helix.kernels.query_pieces import Sight

_CAUSAL = (AttnMaskType.causal, AttnMaskType.causal_bottom_right)


class PrefixAttention(DotProductAttention):
    """Megatron's ``DotProductAttention``, contract and parameters, on pieces of the queries.

    Causal, bottom-right causal, full and given masks, sliding windows, grouped queries (keys and
    values are not repeated), softmax offsets and dropout; bf16, fp16, fp32 and fp64.

    Scores are in memory for some heads of one piece at a time. The probabilities are kept for the
    backward pass where they take at most 1.5 times the memory of queries, keys and values: up to
    8 d tokens of causal attention with as many query groups as heads. Beyond, they are computed
    again, which is a product of seven instead of six.

    Attributes:
        least, most: how queries are cut (:func:`megatron_helix.kernels.query_pieces.cut`).
        scores, filling: how heads are (:func:`megatron_helix.kernels.parts.divide`).
        kept: times queries, keys and values: what kept probabilities may take.
    """

    takes_runs = True
    least = query_pieces.LEAST
    most = query_pieces.MOST
    scores = parts.SCORES
    filling = parts.FILLING
    kept = parts.KEPT

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
        cut, scores = _divided(
            tuple(runs or [(keys - query.size(0), query.size(0))]),
            keys,
            sight,
            parts.Heads(query.size(1), query.size(2), key.size(2), query.size(3)),
            (self.least, self.most, self.scores, self.filling),
        )
        elements = query.numel() + key.numel() + value.numel()
        work = piecewise.Work(
            parts=cut,
            # Megatron divides by the layer's number in the product and multiplies after it.
            scores=Scores(sight=sight, coefficient=float(self.scale_mask_softmax.scale or 1)),
            scale=self.softmax_scale,
            rate=self.attention_dropout.p if self.training else 0.0,
            keep=torch.is_grad_enabled() and scores <= self.kept * elements,
        )
        value = _apart(value, query, key)
        given = piecewise.Given(query, key, value, self.softmax_offset, attention_mask)
        if work.rate and not self.config.sequence_parallel:
            with get_cuda_rng_tracker().fork():
                context = piecewise.attend(work, given)
        else:
            context = piecewise.attend(work, given)
        return context.flatten(2)

    def _sight(self, mask_type: AttnMaskType) -> Sight:
        """How far a query sees, as ``DotProductAttention`` decides."""
        window = self.scale_mask_softmax.window_size
        if window is not None:
            left, right = window
            return Sight(left=None if left < 0 else left, right=None if right < 0 else right)
        return masked_softmax.CAUSAL if mask_type in _CAUSAL else Sight(left=None, right=None)


@functools.lru_cache(maxsize=64)  # a GPU waits for the first product meanwhile
def _divided(
    runs: tuple[tuple[int, int], ...],
    keys: int,
    sight: Sight,
    heads: parts.Heads,
    how: tuple[int, int, int, int],
) -> tuple[Sequence[parts.Part], int]:
    """The parts, and how many scores they have together; ``how`` are the attributes."""
    least, most, scores, filling = how
    pieces = query_pieces.cut(runs, keys, sight, least=least, most=most)
    computed = heads.sequences * heads.heads * query_pieces.computed(pieces)
    return parts.divide(pieces, heads, scores=scores, filling=filling), computed


def _apart(value: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """A copy, where ``value`` alone would keep packed QKV in memory for the backward pass.

    Of packed QKV it is a view; queries and keys are none once they are rotated.
    """
    storage = value.untyped_storage()
    mine = all(x.untyped_storage().data_ptr() != storage.data_ptr() for x in others)
    packed = mine and storage.nbytes() >= 2 * value.nbytes
    return value.clone() if packed and torch.is_grad_enabled() else value
