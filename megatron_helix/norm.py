"""A torch norm for the local transformer implementation under sequence parallelism.

Megatron's wrapper around torch's norms refuses sequence parallelism, because it would leave their
weights without the mark by which ``finalize_model_grads`` sums their gradients over the
tensor-parallel ranks. This one sets the mark; it is Megatron's own rule, not a new one.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


def sequence_parallel_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object
) -> torch.nn.Module:
    """``torch.nn.LayerNorm`` or ``RMSNorm`` whose weights are marked ``sequence_parallel``.

    Raises:
        ValueError: for a normalization torch has no module of.
    """
    if config.normalization not in _NORMS:
        raise ValueError(
            f"--normalization: the local transformer implementation has {sorted(_NORMS)}, got"
            f" {config.normalization}; use --transformer-impl transformer_engine"
        )
    norm = _NORMS[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
