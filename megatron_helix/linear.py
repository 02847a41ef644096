"""Megatron's parallel linears with helix tiles for shards and an exchange at their head-side end.

The linear classes of a layer spec (local or TransformerEngine) are subclassed, not wrapped: parameter
names, fused layer norms, sequence parallelism and delayed weight gradients stay Megatron's. A tile is
a contiguous shard of a row permutation of the canonical weight, so the tensor-parallel linear runs on
it as it stands; only the initialisation and the order of heads at its activations know of tiles.
"""

from functools import cache
from typing import Any, Callable

import torch

from megatron_helix.checkpoint import tile_in_canonical_order
from megatron_helix.exchange.activations import context_to_segments, qkv_to_whole_heads
from megatron_helix.layout import HelixLayout
from megatron_helix.process_groups import HelixGroups

Init = Callable[[torch.Tensor], Any]


def in_tile_order(init_method: Init, order: torch.Tensor, dim: int) -> Init:
    """``init_method`` followed by a reordering of the whole weight into tile order.

    With ``--use-cpu-initialization`` every rank draws the whole weight and keeps its shard: drawing
    the canonical weight first makes the global weights equal stock's. A shard drawn on its own (GPU
    initialisation) is as random in any order and is left as drawn.
    """

    def init(weight: torch.Tensor) -> None:
        init_method(weight)
        if weight.size(dim) == order.numel():
            with torch.no_grad():
                weight.copy_(weight.index_select(dim, order.to(weight.device)))

    return init


class _HelixLinear:
    """What the two ends of attention share: tiles for shards, in memory and in checkpoints."""

    tile_axis: int  # the dimension of the weight that is cut
    tiled: tuple[str, ...]  # the parameters that are cut along it

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        layout: HelixLayout,
        groups: HelixGroups,
        init_method: Init,
        tp_group: Any = None,  # attention passes its head group; the tiles span the whole group
        **kwargs: Any,
    ):
        self.tile_order = self.canonical_order(layout)
        super().__init__(
            input_size,
            output_size,
            init_method=in_tile_order(init_method, self.tile_order, self.tile_axis),
            tp_group=groups.tp,
            **kwargs,
        )
        self.helix_layout, self.helix_groups = layout, groups

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's, with every tile described by its canonical rows."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in self.tiled:
            if f"{prefix}{name}" in state:
                state[f"{prefix}{name}"] = tile_in_canonical_order(
                    state[f"{prefix}{name}"],
                    self.tile_order,
                    layout=self.helix_layout,
                    rank=self.helix_groups.tp.rank(),
                    axis=self.tile_axis,
                    sharded_offsets=sharded_offsets,
                )
        return state


class _HelixQKV(_HelixLinear):
    """Column-parallel QKV projection whose output is whole heads for 1/m of the tokens.

    ``[s, b, hidden] -> [s, b/m, K/n * slots * d]``: what stock attention expects of ``linear_qkv`` on
    a tensor-parallel group of n ranks.
    """

    tile_axis = 0
    tiled = ("weight", "bias")
    canonical_order = staticmethod(HelixLayout.qkv_rows)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        qkv, bias = super().forward(*args, **kwargs)
        return qkv_to_whole_heads(qkv, self.helix_layout, self.helix_groups.dim), bias


class _HelixProj(_HelixLinear):
    """Row-parallel output projection that takes whole heads for 1/m of the tokens.

    ``[s, b/m, H/n * d] -> [s, b, hidden]`` (``[s/T, b, hidden]`` under sequence parallelism).
    """

    tile_axis = 1
    tiled = ("weight",)
    canonical_order = staticmethod(HelixLayout.proj_columns)

    def forward(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        segments = context_to_segments(context, self.helix_layout, self.helix_groups.dim)
        return super().forward(segments, *args, **kwargs)


@cache
def helix_qkv(linear: type) -> type:
    """The spec's ``linear_qkv`` class with tiles for shards and the exchange behind it."""
    return type(f"Helix{linear.__name__}", (_HelixQKV, linear), {})


@cache
def helix_proj(linear: type) -> type:
    """The spec's ``linear_proj`` class with tiles for shards and the exchange before it."""
    return type(f"Helix{linear.__name__}", (_HelixProj, linear), {})
