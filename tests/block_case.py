"""The layers of a decoder block, cut, tensor-parallel or whole, for what a training run hides."""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.exchange.strategy import Choice
from megatron_helix.layers.layer_spec import (
    helixify,
    with_document_attention,
    with_sequence_parallel_norms,
)
from megatron_helix.partition.layout import HelixLayout
from tests.cpu_config import cpu_config


@dataclass(frozen=True, kw_only=True)
class Block:
    """A decoder block; its MLP is dense."""

    layers: int = 2
    hidden: int = 32
    ffn: int = 64
    heads: int = 4
    groups: int = 4
    kv_channels: int = 8
    rope: bool = True
    bias: bool = False
    gated: bool = False
    dtype: torch.dtype = torch.float32
    more: dict[str, Any] = field(default_factory=dict)  # of TransformerConfig

    def layout(self, m: int, n: int) -> HelixLayout:
        """Its partition."""
        return HelixLayout(
            m=m,
            n=n,
            num_attention_heads=self.heads,
            num_query_groups=self.groups,
            kv_channels=self.kv_channels,
            rotary_dim=self.kv_channels if self.rope else 0,
            output_gate=bool(self.more.get("attention_output_gate")),
        )


def build(
    block: Block,
    groups: ProcessGroupCollection,
    layout: HelixLayout | None = None,
    choice: Choice = Choice(),
    *,
    sequence_parallel: bool = True,
) -> torch.nn.ModuleList:
    """Its layers on ``groups.tp``: stock, or cut by a layout. For one rank they are the whole."""
    config, spec = describe(block, groups, layout, choice, sequence_parallel=sequence_parallel)
    layer = spec.layer_specs[0] if isinstance(spec, TransformerBlockSubmodules) else spec
    layers = [
        build_module(layer, config=config, layer_number=1 + i, pg_collection=groups)
        for i in range(block.layers)
    ]
    return torch.nn.ModuleList(layers).to(block.dtype)  # norms take no dtype from the config


def describe(
    block: Block,
    groups: ProcessGroupCollection,
    layout: HelixLayout | None = None,
    choice: Choice = Choice(),
    *,
    sequence_parallel: bool = True,
) -> tuple[TransformerConfig, Any]:
    """Megatron's config of it, and the spec of its layers."""
    config = cpu_config(
        num_layers=block.layers,
        hidden_size=block.hidden,
        ffn_hidden_size=block.ffn,
        num_attention_heads=block.heads,
        num_query_groups=block.groups,
        kv_channels=block.kv_channels,
        tensor_model_parallel_size=groups.tp.size(),
        sequence_parallel=sequence_parallel and groups.tp.size() > 1,
        add_bias_linear=block.bias,
        gated_linear_unit=block.gated,
        params_dtype=block.dtype,
        **block.more,
    )
    spec: Any = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm)
    spec = with_document_attention(spec)
    if layout is not None:
        spec = helixify(spec, layout, choice)
    return config, with_sequence_parallel_norms(spec, config)


def run(
    layers: torch.nn.ModuleList, block: Block, x: torch.Tensor, sequence: int, **more: Any
) -> torch.Tensor:
    """The stream ``[s or s/T, b, hidden]`` through all layers; ``more`` is for each of them."""
    rotary = None
    if block.rope:
        rotary = RotaryEmbedding(block.kv_channels, 1.0, use_cpu_initialization=True)(sequence)
    for layer in layers:
        x, _ = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=rotary, **more)
    return x
