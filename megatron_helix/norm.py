"""Norms where Megatron's do not fit: under sequence parallelism, and without a fused linear."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.errors import UserError

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


def sequence_parallel_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object
) -> torch.nn.Module:
    """``torch.nn.LayerNorm`` or ``RMSNorm`` whose weights are marked ``sequence_parallel``.

    Megatron's wrapper around torch's norms refuses sequence parallelism, because it would leave
    their weights without the mark by which ``finalize_model_grads`` sums their gradients over the
    tensor-parallel ranks. This one sets the mark; it is Megatron's own rule, not a new one.

    Raises:
        UserError: for a normalization torch has no module of, and weights around zero.
    """
    if config.normalization not in _NORMS:
        raise UserError(
            f"--normalization: the local transformer implementation has {sorted(_NORMS)}, got"
            f" {config.normalization}; use --transformer-impl transformer_engine"
        )
    if config.layernorm_zero_centered_gamma:
        raise UserError(
            "--apply-layernorm-1p: torch's norms, of the local transformer implementation, have no"
            " weights around zero, got it; leave it away, or use --transformer-impl"
            " transformer_engine"
        )
    norm = _NORMS[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def input_norm(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """The norm that TransformerEngine fuses in front of a linear, on its own; none, then ``x``.

    The gathered linear multiplies with a weight the fused module does not hold, so the fused kernel
    cannot be used; the parameters are the module's.
    """
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return x
    if linear.zero_centered_gamma:
        weight = weight + 1
    if linear.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(x, weight.shape, weight, linear.eps)
    return torch.nn.functional.layer_norm(
        x, weight.shape, weight, linear.layer_norm_bias, linear.eps
    )
