"""Core attention for queries far behind the first key: their past and their own square, merged.

Under a sequence split a late run of queries costs a fused kernel the whole rectangle of its keys,
causal or not: a quarter more than context parallelism takes at m = 2. Split in two it costs what a
causal square does (:mod:`megatron_helix.kernels.merged_attention`).

On a GPU, one H200, it ran on whole causal squares alone, not in a training step.
"""

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.kernels import merged_attention
from megatron_helix.kernels.plain_attention import PlainAttention


class SplitAttention(PlainAttention):
    """On torch's fused kernels: causal with queries at the end of their keys or in runs, and full.

    Grouped queries; bf16 and fp16 on a GPU, on a CPU fp32 and fp64 as well.
    """

    core = "split"
    takes_runs = True

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
            attention_mask: as for :meth:`is_causal`, and the next three.
            attn_mask_type: likewise.
            attention_bias: likewise.
            packed_seq_params: likewise.
            runs: (position, length) of neighbouring queries, in order.
        """
        causal = self.is_causal(attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        scale = self.whole_scale
        last = key.size(0) - query.size(0)
        if causal and (runs or query.size(0) > 1):
            places = runs or [(last, query.size(0))]
            context = merged_attention.causal(query, key, value, places, scale=scale)
        else:
            context = merged_attention.full(query, key, value, scale=scale)
        return context.flatten(2)
