"""TransformerEngine's fused attention, with its log-sum-exp: what merging parts of it needs.

Its ``DotProductAttention`` keeps that to itself. The functions behind it are those that its own
context parallelism calls in the same way. Written against 2.20.2; held against stock on one H200,
unpacked and on packed rows (docs/exactness.md), and timed on two. The tests have a stand-in.
"""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from megatron_helix.kernels.gap_attention import Block

CHANNELS = 256  # of a head, the most that its kernels train on Hopper


def kernel_of(core_attention: Any) -> "EngineKernel | None":
    """What computes the parts of a core attention, where it is TransformerEngine's and fused.

    None for what its kernels do not do in parts, or where they are not asked for: dropout, windows,
    softmax offsets, caps, largest logits, FP8, bitwise determinism, other dtypes, long heads.
    """
    config = core_attention.config
    if getattr(core_attention, "fused_attention", None) is None or not _knows_parts():
        return None
    windowed = (core_attention.window_size or (-1,))[0] >= 0
    other = (
        config.attention_dropout
        or windowed
        or core_attention.softmax_type != "vanilla"
        or getattr(core_attention, "softcap", 0.0)
        or core_attention.return_max_logit
        or core_attention.deterministic
        or config.apply_query_key_layer_scaling
        or config.fp8_dot_product_attention
        or config.fp8_multi_head_attention
    )
    halves = config.params_dtype in (torch.bfloat16, torch.float16)
    short = config.kv_channels <= CHANNELS and config.kv_channels % 8 == 0
    asked = os.environ.get("NVTE_FUSED_ATTN", "1") != "0"  # what --attention-backend sets
    if other or not (halves and short and asked):
        return None
    return EngineKernel(scale=core_attention.softmax_scale)


@cache
def _knows_parts() -> bool:
    """Whether it is 2.19 or later, whose functions are called as here, on a GPU that they are for.

    cuDNN gives the log-sum-exp of packed rows token by token from 9.6 on.
    """
    known = find_spec("transformer_engine") is not None
    if not known or find_spec("transformer_engine.pytorch.distributed_weight") is None:
        return False
    from transformer_engine.pytorch.utils import (  # type: ignore[import-not-found]
        get_cudnn_version,  # the one it runs; torch refuses to tell where it has another
    )

    newer = get_cudnn_version() >= (9, 6, 0)
    return newer and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


@dataclass(frozen=True)
class EngineKernel:
    """A :class:`~megatron_helix.kernels.gap_attention.Kernel`.

    Attributes:
        scale: of the product of queries and keys.
    """

    scale: float

    def forward(
        self, block: Block, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the protocol says."""
        fused = _functions()
        output, (stats, state, *_) = fused.fused_attn_fwd(
            is_training=True, q=query, k=key, v=value, **self._given(block, query, key)
        )
        lse = stats.squeeze(-1)
        return output, lse if block.packed else lse.permute(2, 0, 1).contiguous(), state

    def backward(
        self,
        block: Block,
        grad: torch.Tensor,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        lse: torch.Tensor,
        state: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the protocol says."""
        fused, (query, key, value) = _functions(), qkv
        stats = lse if block.packed else lse.permute(1, 2, 0)
        given = self._given(block, query, key)
        query_grad, key_grad, value_grad, *_ = fused.fused_attn_bwd(
            q=query,
            k=key,
            v=value,
            o=output,
            d_o=grad,
            aux_ctx_tensors=[stats.unsqueeze(-1).contiguous(), state],
            do_format=given["o_format"],
            dqkv_layout=given["qkv_layout"],
            **given,
        )
        return query_grad, key_grad, value_grad

    def _given(self, block: Block, query: torch.Tensor, key: torch.Tensor) -> dict[str, Any]:
        """What either pass asks for."""
        rows = "thd" if block.packed else "sbhd"
        given = {
            "fake_dtype": query.dtype,
            "fused_attention_backend": _functions().FusedAttnBackend["F16_arbitrary_seqlen"],
            "attn_scale": self.scale,
            "dropout": 0.0,
            "qkv_layout": f"{rows}_{rows}_{rows}",
            "o_format": rows,
        }
        if block.packed is None:
            sequences, device = query.size(1), query.device
            return given | {
                "attn_mask_type": "causal" if block.causal else "no_mask",
                "max_seqlen_q": len(query),
                "max_seqlen_kv": len(key),
                "cu_seqlens_q": _ends(sequences, len(query), device),
                "cu_seqlens_kv": _ends(sequences, len(key), device),
            }
        return given | {
            "attn_mask_type": "padding_causal" if block.causal else "padding",
            "max_seqlen_q": block.packed.most_queries,
            "max_seqlen_kv": block.packed.most_keys,
            "cu_seqlens_q": block.packed.queries,
            "cu_seqlens_kv": block.packed.keys,
            "cu_seqlens_q_padded": block.packed.first_query,
            "cu_seqlens_kv_padded": block.packed.first_key,
        }


@cache
def _ends(sequences: int, length: int, device: torch.device) -> torch.Tensor:
    """Where sequences of one length end: made on the device, for which the host need not wait."""
    numbers = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    return numbers * length


@cache
def _functions() -> Any:
    """TransformerEngine's module of them."""
    from transformer_engine.pytorch.cpp_extensions import (  # type: ignore[import-not-found]
        fused_attn,
    )

    return fused_attn
