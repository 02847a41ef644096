"""MLPs whose features the tensor-parallel degree does not divide, padded with zeros.

Megatron's own classes are built with the next size that the degree divides, and do all the rest:
dense MLPs, experts one by one or in groups, shared experts. Of a padded feature the rows of
``linear_fc1`` (of a gated MLP in both projections), their biases and the column of ``linear_fc2``
are zero, and stay so. With ``x`` the input, ``a`` an activation function with ``a(0) = 0``, ``y``
the output and ``dy`` its gradient, the padded feature is in every token::

    h = W_1 x + b_1 = 0                    (gated: g = 0 and u = 0)
    z = a(h) = 0                           (gated: z = a(g) (u + offset) = 0)
    dW_2 = dy z = 0,  dz = W_2^T dy = 0
    dh = a'(0) dz = 0                      (gated: dg = a'(0) (u + offset) dz, du = a(g) dz)
    dW_1 = dh x = 0,  db_1 = dh = 0

These are products with a factor that is zero and sums of them: exactly zero in every precision,
whatever scales the loss or weights a token. So is every average over data-parallel ranks, and what
gradient clipping makes of it; and a step of Adam, SGD or Lion, whose moments are zero, changes a
weight of zero by zero, decayed or not. Zeros count in no norm. (A gradient that is not finite
spoils padding as it spoils everything; a scaled loss leaves such a step out.)

A checkpoint has none of it (:func:`megatron_helix.partition.checkpoint.without_padding`), and
weights that are drawn on the CPU are those of stock for the same seed.

Grouped experts and TransformerEngine's linears, which need a GPU, have not been run padded.
"""

import copy
import dataclasses
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.partition.checkpoint import without_padding
from megatron_helix.partition.features import padded, places, shares

Init = Callable[[torch.Tensor], Any]

# A parameter's axis of features, by its name: of one expert, or the n-th of a group.
_AXES = {0: re.compile(r"linear_fc1\.(weight|bias)\d*$"), 1: re.compile(r"linear_fc2\.weight\d*$")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Whose features: the field of Megatron's config that counts them, and the group over which.

    Attributes:
        field: of ``TransformerConfig``.
        group: of ``ProcessGroupCollection``.
    """

    field: str
    group: str


DENSE = Features(field="ffn_hidden_size", group="tp")
EXPERTS = Features(field="moe_ffn_hidden_size", group="expt_tp")
SHARED_EXPERTS = Features(field="moe_shared_expert_intermediate_size", group="tp")


def padding(builder: Any, features: Features) -> partial:
    """``builder`` of an MLP or of experts, whose features are padded if they have to be."""
    return partial(_build, builder=builder, features=features)


def padding_experts(submodules: MoESubmodules) -> MoESubmodules:
    """The same for both kinds of experts of an MoE layer."""
    shared = submodules.shared_experts
    return dataclasses.replace(
        submodules,
        experts=padding(submodules.experts, EXPERTS),
        shared_experts=shared and padding(shared, SHARED_EXPERTS),
    )


def _build(*args: Any, builder: Any, features: Features, **kwargs: Any) -> Any:
    """What ``builder`` makes, called as Megatron calls it: with a config by place or by name."""
    given = [*args, *kwargs.values()]
    config = next(one for one in given if isinstance(one, TransformerConfig))
    count = getattr(config, features.field)
    parts = getattr(kwargs["pg_collection"], features.group).size()
    if count is None or count % parts == 0:
        return builder(*args, **kwargs)
    larger = _padded_config(config, features.field, parts)
    args = tuple(larger if one is config else one for one in args)
    kwargs = {name: larger if one is config else one for name, one in kwargs.items()}
    mlp = builder(*args, **kwargs)
    mlp.helix_features, mlp.helix_parts = count, parts
    mlp.__class__ = _extended(type(mlp))
    _zero_padding(mlp, getattr(kwargs["pg_collection"], features.group).rank())
    return mlp


def _padded_config(config: TransformerConfig, field: str, parts: int) -> TransformerConfig:
    """A copy with as many features as are stored, whose weights are drawn without the padding."""
    features = getattr(config, field)
    larger = copy.copy(config)
    setattr(larger, field, padded(features, parts))
    projections = 2 if config.gated_linear_unit else 1
    of_rows = torch.tensor(places(features, parts, projections))
    rows = projections * padded(features, parts)
    larger.init_method = _without_padding(config.init_method, of_rows, rows, dim=0)
    columns = padded(features, parts)
    of_columns = torch.tensor(places(features, parts))
    larger.output_layer_init_method = _without_padding(
        config.output_layer_init_method, of_columns, columns, dim=1
    )
    return larger


def _without_padding(init_method: Init | None, real: torch.Tensor, size: int, dim: int) -> Init:
    """``init_method`` on the real entries along ``dim`` of a weight of ``size``, and zeros between.

    With ``--use-cpu-initialization`` every rank draws the whole weight and keeps its shard: drawing
    the canonical weight makes the numbers those of stock. A shard drawn on its own (GPU
    initialisation) is left as drawn.
    """
    assert init_method is not None  # Megatron's config has made one

    def init(weight: torch.Tensor) -> None:
        if weight.dim() != 2 or weight.size(dim) != size:
            init_method(weight)
            return
        shape = list(weight.shape)
        shape[dim] = real.numel()
        canonical = weight.new_empty(shape)
        init_method(canonical)
        with torch.no_grad():
            weight.zero_().index_copy_(dim, real.to(weight.device), canonical)

    return init


@torch.no_grad()
def _zero_padding(mlp: Any, rank: int) -> None:
    """Make what a rank has of the padding zero, however its weights were drawn."""
    real = len(shares(mlp.helix_features, mlp.helix_parts)[rank])
    share = padded(mlp.helix_features, mlp.helix_parts) // mlp.helix_parts
    for name, weight in mlp.named_parameters():
        for axis in _axes(name):
            projections = weight.detach().unflatten(axis, (-1, share))
            projections.narrow(axis + 1, real, share - real).zero_()


def _axes(name: str) -> list[int]:
    """The axis of features of what has a name, if it has one."""
    return [axis for axis, pattern in _AXES.items() if pattern.search(name)]


class _Padded(torch.nn.Module):
    """Mixin before a class of MLPs that has been built with padding, in place.

    Megatron's checkpoint has no seam in an MLP's spec: what a gated one writes of its two
    projections is its own, whatever its linears say.
    """

    helix_features: int
    helix_parts: int

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's, of the real features alone."""
        state = super().sharded_state_dict(*args, **kwargs)  # type: ignore[misc]
        for name, entry in state.items():
            for axis in _axes(name):
                state[name] = without_padding(
                    entry, axis=axis, features=self.helix_features, parts=self.helix_parts
                )
        return state


@cache
def _extended(mlp: type) -> type:
    return type(f"Padded{mlp.__name__}", (_Padded, mlp), {})
