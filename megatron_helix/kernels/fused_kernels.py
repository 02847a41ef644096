"""Torch's fused attention kernels with their log-sum-exp, and their backward passes, one by one.

``torch.nn.functional.scaled_dot_product_attention`` keeps what merging needs to itself. Behind it
are the operators here: one for CPUs, and for GPUs cuDNN's up to 128 channels a head, which is the
faster one on Hopper, and FlashAttention 2 up to 256. Torch's own ring attention
(``torch.distributed.tensor.experimental``) calls the latter two in the same way.

Those of a GPU ran on one H200, alone (``benchmarks/core_attention.py``), not in a training step.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

_CUDNN_CHANNELS = 128
_aten = torch.ops.aten


class Attended(NamedTuple):
    """What a kernel made.

    Attributes:
        output: ``[b, H, sq, d]``.
        lse: ``[b, H, sq]``, in fp32 for half precision.
        state: that its backward pass asks for beside these.
    """

    output: torch.Tensor
    lse: torch.Tensor
    state: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Attention of ``[b, H, sq, d]`` to keys and values ``[b, K, sk, d]``.

    Attributes:
        causal: of as many queries as keys.
        scale: of the product of queries and keys.
    """

    causal: bool
    scale: float

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Attended:
        """Output and log-sum-exp."""
        raise NotImplementedError

    def backward(
        self, grad: torch.Tensor, qkv: tuple[torch.Tensor, ...], attended: Attended
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of query, key and value.

        Output and log-sum-exp may be those of more keys than these: the probabilities are then the
        share that these keys have of the whole.
        """
        raise NotImplementedError


class OnCPU(Kernel):
    """Torch's flash attention for CPUs."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Attended:
        """As the base says."""
        made = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, self.causal, scale=self.scale
        )
        return Attended(*made, state=())

    def backward(
        self, grad: torch.Tensor, qkv: tuple[torch.Tensor, ...], attended: Attended
    ) -> tuple[torch.Tensor, ...]:
        """As the base says."""
        # It reads the log-sum-exp in the order in which the forward pass wrote it: [b, sq, H].
        lse = attended.lse.transpose(1, 2).contiguous().transpose(1, 2)
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(grad, *qkv, attended.output, lse, 0.0, self.causal), scale=self.scale
        )


class ByCuDNN(Kernel):
    """cuDNN's, of half precision."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Attended:
        """As the base says."""
        output, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
            _aten._scaled_dot_product_cudnn_attention(
                *(q, k, v, None, True, 0.0, self.causal), scale=self.scale
            )
        )
        state = (seed, offset, None, cum_q, cum_k, max_q, max_k)
        return Attended(output, lse.view(lse.shape[:3]), state)

    def backward(
        self, grad: torch.Tensor, qkv: tuple[torch.Tensor, ...], attended: Attended
    ) -> tuple[torch.Tensor, ...]:
        """As the base says."""
        lse = attended.lse.contiguous()[..., None]
        return _aten._scaled_dot_product_cudnn_attention_backward(
            *(grad, *qkv, attended.output, lse, *attended.state, 0.0, self.causal),
            scale=self.scale,
        )


class ByFlash(Kernel):
    """FlashAttention 2, of half precision."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Attended:
        """As the base says."""
        output, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
            _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, self.causal, scale=self.scale)
        )
        return Attended(output, lse, (cum_q, cum_k, max_q, max_k, seed, offset))

    def backward(
        self, grad: torch.Tensor, qkv: tuple[torch.Tensor, ...], attended: Attended
    ) -> tuple[torch.Tensor, ...]:
        """As the base says."""
        cum_q, cum_k, max_q, max_k, seed, offset = attended.state
        given = (grad, *qkv, attended.output, attended.lse.contiguous())
        return _aten._scaled_dot_product_flash_attention_backward(
            *given,
            *(cum_q, cum_k, max_q, max_k, 0.0, self.causal, seed, offset),
            scale=self.scale,
        )


def kernel(query: torch.Tensor, *, causal: bool, scale: float) -> Kernel:
    """The one for such queries, ``[..., d]``."""
    kind = OnCPU
    if query.device.type == "cuda":
        kind = ByCuDNN if query.size(-1) <= _CUDNN_CHANNELS else ByFlash
    return kind(causal=causal, scale=scale)
