"""What the ranks do not divide and zeros pad: what that needs, and what it wastes.

How features of MLPs are padded is in :mod:`megatron_helix.layers.padded_features`, how segments of
heads are in :mod:`megatron_helix.exchange.padding`.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from megatron_helix.basics.errors import UserError
from megatron_helix.options.checks import require_loadable
from megatron_helix.options.features.check import require_compatible
from megatron_helix.options.features.refused_runs import RUNS
from megatron_helix.partition.features import padded, require_features, waste
from megatron_helix.partition.layout import HelixLayout

# What counts the zeros of padding, or divides them by nothing.
_ZEROS = (
    ("log_num_zeros_in_grad", bool, "gradients of padding are zeros that it would count"),
    ("adam_eps", lambda value: value == 0, "Adam divides the zeros of padding by it"),
)

# What keeps the features of a rank in another order or shape.
_BESIDE = (
    ("moe_mlp_glu_interleave_size", "it has gates and features of a rank in turn"),
    ("moe_shared_expert_glu_interleave_size", "it has gates and features of a rank in turn"),
    ("moe_single_grouped_weight", "it keeps the weights of all experts in one"),
    ("moe_single_grouped_bias", "it keeps the biases of all experts in one"),
)


@dataclass(frozen=True, kw_only=True)
class Uneven:
    """Features that ``parts`` ranks share and do not divide; the flag that sets them."""

    flag: str
    features: int
    parts: int

    def __str__(self) -> str:
        stored = padded(self.features, self.parts)
        return (
            f"helix: {self.flag} {self.features} is stored as {stored} by {self.parts} ranks:"
            f" {waste(self.features, self.parts):.2%} more, of zeros"
        )


def uneven(config: Any) -> list[Uneven]:
    """What of a ``TransformerConfig`` is padded, dense MLPs first.

    Raises:
        UserError: where ranks have no feature at all.
    """
    tp, etp = config.tensor_model_parallel_size, config.expert_tensor_parallel_size or 1
    shared = config.moe_shared_expert_intermediate_size
    found = [("--ffn-hidden-size", config.ffn_hidden_size, tp)] * has_dense_layers(config)
    if config.num_moe_experts:
        found.append(("--moe-ffn-hidden-size", config.moe_ffn_hidden_size, etp))
        found += [("--moe-shared-expert-intermediate-size", shared, tp)] * bool(shared)
    for flag, features, parts in found:
        require_features(flag, features, parts)
    return [
        Uneven(flag=flag, features=features, parts=parts)
        for flag, features, parts in found
        if features % parts
    ]


def has_dense_layers(config: Any) -> bool:
    """Whether some layers of a ``TransformerConfig`` have a dense MLP."""
    frequency = config.moe_layer_freq
    if not config.num_moe_experts:
        return True
    return frequency > 1 if isinstance(frequency, int) else 0 in frequency


def require_paddable_heads(args: argparse.Namespace, cut: HelixLayout) -> None:
    """Check that nothing of a run is at odds with the padding of its attention weights.

    Args:
        args: as Megatron has parsed them.
        cut: the partition.

    Raises:
        UserError: naming the flag, the reason and the remedy.
    """
    if cut.waste:
        padding = f"where --helix-m {cut.m} pads segments of --kv-channels {cut.kv_channels}"
        _require_zeros(args, padding, "use a --helix-m that divides")


def _require_zeros(args: argparse.Namespace, padding: str, otherwise: str) -> None:
    for name, is_asked, reason in _ZEROS:
        value = getattr(args, name, None)
        if value is not None and is_asked(value):
            raise UserError(
                f"--{name.replace('_', '-')}: is refused {padding}: {reason}, got {value}; leave it"
                f" away, or {otherwise}"
            )


def require_paddable(args: argparse.Namespace, config: Any) -> None:
    """Check that nothing of a run with uneven features is at odds with padding.

    Raises:
        UserError: naming the flag or field, the reason and the remedy.
    """
    found = uneven(config)
    if not found:
        return
    padding = f"where {found[0].flag} {found[0].features} is padded for {found[0].parts} ranks"
    divisible = (
        f"use {found[0].flag} {padded(found[0].features, found[0].parts)}, which they divide"
    )
    _require_zeros(args, padding, divisible)
    for name, reason in _BESIDE:
        value = getattr(args, name, None) or getattr(config, name, None)
        if value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag}: is refused {padding}: {reason}; leave it away, or {divisible}"
            )
    activation = config.activation_func
    if _at_zero(activation) != 0:
        name = getattr(activation, "__name__", repr(activation))
        raise UserError(
            f"activation_func: {name} is not zero at zero, as it must be {padding};"
            f" use another, or {divisible}"
        )
    require_compatible(args, config, rows=RUNS, where=padding, otherwise=divisible)
    require_loadable(args, where=padding)


def _at_zero(activation: Any) -> float:
    import torch

    with torch.compiler.set_stance("force_eager"):  # a number is not worth a compilation
        return float(activation(torch.zeros(1)))
