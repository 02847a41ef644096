"""Core attention by ffpa-attn's CuTe kernels: head dimensions of 320 to 512 on Hopper.

ffpa-attn (https://github.com/xlite-dev/ffpa-attn, 0.2.4) is imported when the class is first used,
from the pip extra ``ffpa``. Its kernels are compiled at the first step. Forward and backward keep
the scores on the chip, at any length.

Its kernels ran on one H200, alone; this module was not run: on a CPU there is nothing to run.
"""

from functools import cache
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_helix.basics.errors import UserError
from megatron_helix.kernels.plain_attention import PlainAttention


class FFPAAttention(PlainAttention):
    """On ffpa-attn's kernels: causal with queries at the end of their keys, and full.

    Grouped queries; bf16 and fp16. What its kernels lack is refused: asked for it, the library
    would take a slower path of its own.
    """

    core = "ffpa"
    aligns_at_end = True

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

        The mask and what follows it: as for :meth:`is_causal`.
        """
        causal = self.is_causal(attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        context = _kernel()(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
            is_causal=causal and query.size(0) > 1,
            scale=self.whole_scale,
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
