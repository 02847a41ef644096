"""Core attention for queries far behind the first key: their past and their own square, merged.

Under a sequence split a late run of queries costs a fused kernel the whole rectangle of its keys,
causal or not: a quarter more than context parallelism takes at m = 2. Split in two it costs what a
causal square does (:mod:`megatron_helix.kernels.merged_attention`).

It was run on the CPU only, not on a GPU yet.
"""

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.basics.errors import UserError
from megatron_helix.kernels import merged_attention
from megatron_helix.kernels.fused_kernels import MOST_CHANNELS

_CAUSAL = (AttnMaskType.causal, AttnMaskType.causal_bottom_right)


class SplitAttention(DotProductAttention):
    """Megatron's ``DotProductAttention``, contract and parameters, on torch's fused kernels.

    Causal with queries at the end of their keys or in runs, and full; grouped queries; bf16 and
    fp16 on a GPU, on a CPU fp32 and fp64 as well.

    Raises:
        UserError: for dropout, windows, softmax offsets and wider heads, which the kernels lack.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        channels = self.hidden_size_per_attention_head
        lacking = {
            "--attention-dropout": self.attention_dropout.p,
            "--window-size": self.scale_mask_softmax.window_size,
            "--softmax-type": None if self.softmax_offset is None else self.config.softmax_type,
            "--kv-channels": channels if channels > MOST_CHANNELS else None,
        }
        for flag, value in lacking.items():
            if value:
                raise UserError(
                    f"{flag}: split's kernels have no dropout, window or softmax offset and take at"
                    f" most {MOST_CHANNELS} channels, got {value}; use another"
                    " --helix-core-attention"
                )

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

        A mask is not looked at where the type is causal: as with TransformerEngine, it is the
        causal one that Megatron's data loader makes.

        Args:
            query: aligned to the end of the keys, unless ``runs`` says where they are.
            key: of the whole sequence.
            value: like ``key``.
            attention_mask: None, or the causal one.
            attn_mask_type: the layer's own by default.
            attention_bias: refused.
            packed_seq_params: refused.
            runs: (position, length) of neighbouring queries, in order.

        Raises:
            UserError: for other masks, packed sequences and attention biases.
        """
        causal = (attn_mask_type or self.attn_mask_type) in _CAUSAL
        masked = attention_mask is not None and not causal
        if masked or attention_bias is not None or packed_seq_params is not None:
            raise UserError(
                "--helix-core-attention: split takes neither a mask that is not causal, nor packed"
                " sequences, nor an attention bias; leave the flag away"
            )
        # Megatron divides by the layer's number in the product and multiplies after it.
        scale = self.softmax_scale * float(self.scale_mask_softmax.scale or 1)
        last = key.size(0) - query.size(0)
        if causal and (runs or query.size(0) > 1):
            places = runs or [(last, query.size(0))]
            context = merged_attention.causal(query, key, value, places, scale=scale)
        else:
            context = merged_attention.full(query, key, value, scale=scale)
        return context.flatten(2)
