"""Core attention by ffpa-attn's CuTe kernels: head dimensions of 320 to 512 on Hopper.

ffpa-attn (https://github.com/xlite-dev/ffpa-attn, 0.2.4) is imported when the class is first used,
from the pip extra ``ffpa``. Its kernels are compiled at the first step. Forward and backward keep
the scores on the chip, at any length.

It was not run on a GPU yet: on a CPU there is nothing to run.
"""

from functools import cache
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.basics.errors import UserError

CHANNELS = range(320, 513)  # head dimensions with a kernel for sm_90; also refused by the flags

_CAUSAL = (AttnMaskType.causal, AttnMaskType.causal_bottom_right)


class FFPAAttention(DotProductAttention):
    """Megatron's ``DotProductAttention``, contract and parameters, on ffpa-attn's kernels.

    Causal with queries at the end of their keys, and full; grouped queries; bf16 and fp16.

    Raises:
        UserError: for dropout, windows, softmax offsets and other head dimensions, which its
            kernels lack. Asked for such, the library would take a slower path of its own.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        lacking = {
            "--attention-dropout": self.attention_dropout.p,
            "--window-size": self.scale_mask_softmax.window_size,
            "--softmax-type": None if self.softmax_offset is None else self.config.softmax_type,
            "--kv-channels": None
            if self.hidden_size_per_attention_head in CHANNELS
            else self.hidden_size_per_attention_head,
        }
        for flag, value in lacking.items():
            if value:
                raise UserError(
                    f"{flag}: ffpa's kernels have no dropout, window or softmax offset and take"
                    f" {CHANNELS.start} to {CHANNELS.stop - 1} channels, got {value}; use another"
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
    ) -> torch.Tensor:
        """Query ``[sq, b, H, d]``, key and value ``[sk, b, K, d]`` -> ``[sq, b, H * d]``.

        A mask is not looked at where the type is causal: as with TransformerEngine, it is the
        causal one that Megatron's data loader makes.

        Raises:
            UserError: for other masks, packed sequences and attention biases.
        """
        causal = (attn_mask_type or self.attn_mask_type) in _CAUSAL
        masked = attention_mask is not None and not causal
        if masked or attention_bias is not None or packed_seq_params is not None:
            raise UserError(
                "--helix-core-attention: ffpa takes neither a mask that is not causal, nor packed"
                " sequences, nor an attention bias; leave the flag away"
            )
        context = _kernel()(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
            is_causal=causal and query.size(0) > 1,
            # Megatron divides by the layer's number before the softmax and multiplies inside it.
            scale=self.softmax_scale * (self.scale_mask_softmax.scale or 1.0),
            enable_gqa=query.size(2) != key.size(2),
            backend="cutedsl",  # its others are slower and are not asked
        )
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


@cache
def _kernel() -> Any:
    try:
        from ffpa_attn import ffpa_attn_func  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"--helix-core-attention: ffpa needs the package ffpa-attn, which cannot be imported"
            f" ({error}); pip install 'megatron-helix[ffpa]'"
        ) from None
    return ffpa_attn_func
