"""Self-attention over the m x n partition: Megatron's own, on whole heads of 1/m of the tokens."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_helix.exchange.activations import batch_share
from megatron_helix.layout import HelixLayout
from megatron_helix.linear import helix_proj, helix_qkv
from megatron_helix.process_groups import on_head_axis, register


class HelixSelfAttention(SelfAttention):
    """Megatron's ``SelfAttention`` with the tensor-parallel group cut into head groups x segments.

    The linears span all m * n ranks and store one tile each; the exchange between them and the rest
    hands attention a tensor-parallel group of n ranks and 1/m of the sequences. Rotary embeddings, QK
    norms, output gate, softmax and core attention are stock, on stock shapes.

    Args:
        layout: the partition.
        (others): those of ``SelfAttention``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *,
        layout: HelixLayout,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ):
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp"])
        groups = register(layout, pg_collection.tp)
        tiles = {"layout": layout, "groups": groups}
        super().__init__(
            config,
            replace(
                submodules,
                linear_qkv=partial(helix_qkv(submodules.linear_qkv), **tiles),
                linear_proj=partial(helix_proj(submodules.linear_proj), **tiles),
                core_attention=partial(_on_head_axis, submodules.core_attention, layout.n),
            ),
            layer_number,
            pg_collection=on_head_axis(pg_collection, groups),
            **kwargs,
        )
        self.helix_layout, self.helix_groups = layout, groups
        # Checkpoints read it to tell replicas apart: norms are replicated over all m * n ranks.
        self.tp_group = groups.tp

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``SelfAttention.forward``; the mask ``[b, 1, s, s]`` is split like the batch."""
        mask = batch_share(attention_mask, self.helix_layout.m, self.helix_groups.segment)
        return super().forward(hidden_states, mask, *args, **kwargs)


def _on_head_axis(builder: Any, n: int, *, config: TransformerConfig, **kwargs: Any) -> Any:
    """Core attention built for a tensor-parallel size of n: TransformerEngine reads it off config."""
    config = copy.copy(config)
    config.tensor_model_parallel_size = n
    return builder(config=config, **kwargs)
