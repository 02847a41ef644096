"""``helixify``: any stock layer spec with its self-attention cut m x n."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.transformer.attention import (
    CrossAttention,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_helix.basics.errors import UserError
from megatron_helix.exchange.strategy import Choice
from megatron_helix.kernels.document_attention import DocumentAttention
from megatron_helix.kernels.ffpa_attention import FFPAAttention
from megatron_helix.kernels.flex_attention import FlexAttention
from megatron_helix.kernels.prefix_attention import PrefixAttention
from megatron_helix.layers.attention import HelixSelfAttention
from megatron_helix.layers.linear import helix_linear
from megatron_helix.layers.norm import sequence_parallel_norm
from megatron_helix.layers.padded_features import DENSE, padding, padding_experts
from megatron_helix.layers.transformer_layer import helix_layer
from megatron_helix.partition.layout import HelixLayout

CORE_ATTENTIONS = {
    "prefix": PrefixAttention,
    "flex": FlexAttention,
    "ffpa": FFPAAttention,
}


def helixify(spec: Any, layout: HelixLayout, choice: Choice = Choice()) -> Any:
    """``spec`` with attention cut m x n, and what goes with it in its layers and MLPs.

    Args:
        spec: a layer, block or multi-token-prediction spec: local or TransformerEngine, dense or
        MoE.
        layout: the partition. With m = 1 plain tensor parallelism does it: ``spec`` comes back as
        is.
        choice: exchange and split the user asked for.

    Raises:
        UserError: for an attention that has no m x n partition (cross attention, MLA, and any
        class that is not megatron-core's own).
    """
    if layout.m == 1:
        return spec

    def swap(node: Any) -> Any:
        if isinstance(node, partial):
            return _with_helix_linears(node, layout) if _is_dense_mlp(node) else node
        if not isinstance(node, ModuleSpec) or not isinstance(node.module, type):
            return node
        if issubclass(node.module, (CrossAttention, MultiLatentAttention)):
            raise UserError(
                f"--helix-m: {node.module.__name__} has no head-dimension partition, got"
                f" {layout.m}; use --helix-m 1, which is plain tensor parallelism"
            )
        params = {**node.params, "layout": layout, "choice": choice}
        if node.module is SelfAttention:
            return dataclasses.replace(node, module=HelixSelfAttention, params=params)
        if issubclass(node.module, TransformerLayer):
            _require_cut(node.submodules, layout)
            return dataclasses.replace(node, module=helix_layer(node.module), params=params)
        return node

    return with_padded_features(_map_spec(spec, swap))


def with_padded_features(spec: Any) -> Any:
    """``spec`` with MLPs and experts whose features the tensor-parallel degree need not divide.

    Where it does they are built as ever.
    """

    def swap(node: Any) -> Any:
        if isinstance(node, partial):
            return padding(node, DENSE) if _is_dense_mlp(node) else node
        return padding_experts(node) if isinstance(node, MoESubmodules) else node

    return _map_spec(spec, swap)


def _require_cut(submodules: Any, layout: HelixLayout) -> None:
    """Check that a layer's self-attention is one that has been cut.

    A class derived from ``SelfAttention`` is not: nobody knows what its own methods count on.
    """
    attention: Any = getattr(submodules, "self_attention", None)
    module = attention.module if isinstance(attention, ModuleSpec) else attention
    if module is not HelixSelfAttention:
        name = f"{module.__module__}.{module.__qualname__}" if isinstance(module, type) else module
        raise UserError(
            f"--spec: under --helix-m {layout.m} the self-attention of a layer must be"
            f" megatron-core's SelfAttention, which is cut, got {name}; use SelfAttention with"
            " submodules of your own, or --helix-m 1, which is plain tensor parallelism"
        )


def with_core_attention(spec: Any, core: str) -> Any:
    """``spec``, before or after :func:`helixify`, with one of our own core attentions, by name.

    ``"spec"`` leaves it as it is.
    """

    def swap(node: Any) -> Any:
        if isinstance(node, SelfAttentionSubmodules) and core != "spec":
            return dataclasses.replace(node, core_attention=CORE_ATTENTIONS[core])
        return node

    return _map_spec(spec, swap)


def with_document_attention(spec: Any) -> Any:
    """``spec`` with Megatron's local core attention able to keep packed documents apart."""

    def swap(node: Any) -> Any:
        local = (
            isinstance(node, SelfAttentionSubmodules) and node.core_attention is DotProductAttention
        )
        return dataclasses.replace(node, core_attention=DocumentAttention) if local else node

    return _map_spec(spec, swap)


def _is_dense_mlp(builder: partial) -> bool:
    return builder.func == MLP.as_mlp_submodule


def _with_helix_linears(mlp: partial, layout: HelixLayout) -> partial:
    """The builder of a dense MLP, its two linears able to gather their shards."""
    submodules = mlp.keywords["submodules"]
    linears = {
        name: partial(helix_linear(name, getattr(submodules, name)), layout=layout)
        for name in ("linear_fc1", "linear_fc2")
    }
    submodules = dataclasses.replace(submodules, **linears)
    return partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": submodules})


def with_sequence_parallel_norms(
    spec: Any, config: TransformerConfig, vp_stage: int | None = None
) -> Any:
    """A local ``spec`` whose torch norms also work under sequence parallelism.

    Returned as a block spec, since a layer spec leaves the choice of the final norm to the block.
    Unchanged where Megatron has a norm of its own for the case.
    """
    spec = swap_norms(spec, config)
    if not _needs_norms(config) or isinstance(spec, TransformerBlockSubmodules):
        return spec
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules([spec] * num_layers, layer_norm=sequence_parallel_norm)


def swap_norms(spec: Any, config: TransformerConfig) -> Any:
    """Any local ``spec`` with torch norms that work under sequence parallelism."""
    if not _needs_norms(config):
        return spec
    return _map_spec(
        spec, lambda node: sequence_parallel_norm if node is WrappedTorchNorm else node
    )


def _needs_norms(config: TransformerConfig) -> bool:
    return config.sequence_parallel and config.transformer_impl == "local"


def _map_spec(node: Any, change: Callable[[Any], Any]) -> Any:
    """``node`` with ``change`` applied to it and to everything a spec can hold, innermost first."""
    if isinstance(node, (list, tuple)):
        return type(node)(_map_spec(item, change) for item in node)
    if isinstance(node, partial):
        keywords = {key: _map_spec(value, change) for key, value in node.keywords.items()}
        return change(partial(node.func, *node.args, **keywords))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        parts = {
            field.name: _map_spec(getattr(node, field.name), change)
            for field in dataclasses.fields(node)
            if field.init
        }
        return change(dataclasses.replace(node, **parts))
    return change(node)
