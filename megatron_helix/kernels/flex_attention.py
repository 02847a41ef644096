"""Core attention on torch's FlexAttention: a fused kernel where TransformerEngine has none.

TransformerEngine's fused attention ends at a head dimension of 256 on Hopper, and its unfused path
writes the scores, ``[b, H, s, s]``, to memory. FlexAttention compiles one kernel from a mask
function (Dong et al., 2024, arXiv 2412.05496) and keeps the scores on the chip.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from megatron_helix.basics.errors import UserError

Visible = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_CAUSAL = (AttnMaskType.causal, AttnMaskType.causal_bottom_right)


class FlexAttention(DotProductAttention):
    """Megatron's ``DotProductAttention``, contract and parameters, without scores in memory.

    Causal, bottom-right causal, full and given masks, sliding windows, grouped queries and softmax
    offsets. Torch has a backward pass for CUDA only; on the CPU it runs forward, for tests.

    Raises:
        UserError: for attention dropout, which the kernel cannot do.
    """

    aligns_at_end = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.attention_dropout.p:
            raise UserError(
                "--attention-dropout: must be 0 with --helix-core-attention flex, got"
                f" {self.attention_dropout.p}; set it to 0"
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

        ``attention_mask`` is ``[b or 1, 1, sq, sk]``, true where hidden; a row that hides all gives
        zeros, where stock gives the mean of the values.

        Raises:
            UserError: for packed sequences and attention biases.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise UserError(
                "--helix-core-attention: flex takes neither packed sequences nor an attention bias;"
                " leave the flag away"
            )
        block_mask = self._block_mask(query, key, attention_mask, attn_mask_type)
        context, aux = _kernel(query.device.type)(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
            block_mask=block_mask,
            # Megatron divides by the layer's number before the softmax and multiplies inside it.
            scale=self.softmax_scale * (self.scale_mask_softmax.scale or 1.0),
            enable_gqa=query.size(2) != key.size(2),
            return_aux=AuxRequest(lse=True),
            kernel_options=_kernel_options(query.size(3)),
        )
        if self.softmax_offset is not None:
            # One more term in the denominator: Z / (Z + exp(offset)), with lse = log Z. [b, H, sq]
            offset = self.softmax_offset.float()[None, :, None]
            context = context * torch.sigmoid(aux.lse - offset)[..., None]
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1).to(value.dtype)

    def _block_mask(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        mask_type: AttnMaskType | None,
    ) -> BlockMask | None:
        """Which scores count, as ``DotProductAttention`` decides; None for all."""
        window = self.scale_mask_softmax.window_size
        queries, keys, device = query.size(0), key.size(0), query.device
        if window is not None:
            return _position_mask(queries, keys, tuple(window), device)
        if mask is not None:
            return create_block_mask(
                _given(mask), mask.size(0), None, queries, keys, device=device.type
            )
        if (mask_type or self.attn_mask_type) in _CAUSAL and queries > 1:
            return _position_mask(queries, keys, (-1, 0), device)
        return None


@cache
def _kernel(device: str) -> Callable[..., Any]:
    """Compiled for a GPU. Uncompiled it is the plain formula, which is what a CPU runs.

    Once for every length: torch 2.11 fails to lower a mask function whose bounds are symbols.
    """
    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention


def _kernel_options(head_dim: int) -> Any:
    """Smaller blocks where torch's own choice does not fit the 227 KiB of an SM of Hopper."""
    if head_dim <= 256:
        return None
    blocks = dict.fromkeys(("BLOCK_M", "BLOCK_N"), 32)
    blocks |= dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32)
    return {**blocks, "num_stages": 1, "num_warps": 8}


@lru_cache(maxsize=64)  # with a window, every step of a generation has another
def _position_mask(
    queries: int, keys: int, window: tuple[int, int], device: torch.device
) -> BlockMask:
    """A causal or sliding-window mask; the last query is at the last key's position.

    Args:
        queries: number of them.
        keys: number of them.
        window: how far a query sees to the left, -1 for all the way, and to the right.
        device: where it lies.
    """
    left, right = window
    left = keys + queries if left < 0 else left

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        distance = k - q - (keys - queries)
        return (distance <= right) & (distance >= -left)

    return create_block_mask(visible, None, None, queries, keys, device=device.type)


def _given(mask: torch.Tensor) -> Visible:
    """A mask of Megatron's, one for each sequence or one for all."""
    one = mask.size(0) == 1

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ~mask[b * 0 if one else b, 0, q, k]

    return visible
