"""Norms where Megatron's do not fit: under sequence parallelism, and without a fused linear."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.basics.errors import UserError

Norm = Callable[[torch.Tensor], torch.Tensor]

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
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def input_norm(linear: Any) -> Norm:
    """The norm that TransformerEngine fuses in front of a linear, on its own; none, then ``x``.

    For the torch path, and a TransformerEngine before 2.19, whose modules multiply nothing but what
    they hold; the parameters are the module's. Weights around zero have the one added in fp32,
    as in TransformerEngine's kernels, of which a half would keep little: on a GPU by its own norm,
    which has not been run there yet.
    """
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return lambda x: x
    if not linear.zero_centered_gamma:
        return lambda x: _normalized(linear, x, linear.layer_norm_weight, linear.layer_norm_bias)
    if weight.device.type == "cuda":
        return _engine_norm(linear)
    return partial(_around_zero, linear)


def _around_zero(linear: Any, x: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = linear.layer_norm_bias
    one_more = linear.layer_norm_weight.to(wide) + 1
    return _normalized(linear, x.to(wide), one_more, bias if bias is None else bias.to(wide)).to(x)


def _normalized(
    linear: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if linear.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(x, weight.shape, weight, linear.eps)
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, linear.eps)


def _engine_norm(linear: Any) -> Norm:
    """Megatron's choice of TransformerEngine's norms, on the linear's own parameters."""
    from megatron.core.extensions.transformer_engine import TENorm

    norm: Any = TENorm(linear.config, linear.layer_norm_weight.numel(), linear.eps)
    norm.weight = linear.layer_norm_weight
    if linear.normalization == "LayerNorm":
        norm.bias = linear.layer_norm_bias
    return norm
