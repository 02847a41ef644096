"""Helix tiles as pieces of the canonical weight, so that a checkpoint is Megatron's own.

A checkpoint holds every weight once, with its rows (or columns) in Megatron's order, whatever
layout saved it. A tile is many runs of consecutive canonical rows, all of one length; each run
becomes one ``ShardedTensor`` at its canonical place, and loading puts the runs together again.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory

from megatron_helix.partition.layout import HelixLayout


def tile_in_canonical_order(
    shard: ShardedTensor,
    order: torch.Tensor,
    *,
    layout: HelixLayout,
    rank: int,
    axis: int,
    sharded_offsets: tuple[tuple[int, int, int], ...],
) -> ShardedTensorFactory:
    """A tile of a weight (or of an optimizer state shaped like it) as canonical runs.

    Args:
        shard: the tile as Megatron's linear describes it: a contiguous shard.
        order: canonical index of every stored index along ``axis``, all ranks in turn.
        layout: the partition.
        rank: this rank within the tensor-parallel group.
        axis: the dimension of the weight that is cut.
        sharded_offsets: offsets that outer modules prepend (layers), as given to
            ``sharded_state_dict``.
    """
    run = layout.segment_size // layout.segment_blocks
    mine = order.chunk(layout.size)[rank]
    places = (mine[::run] // run).tolist()
    num_runs = order.numel() // run
    prepended = len(sharded_offsets)

    def build(
        key: str, tensor: torch.Tensor, replica_id: ReplicaId, flattened_range: slice | None
    ) -> list[ShardedTensor]:
        assert flattened_range is None, "tiles are saved whole, not as flat ranges"
        return [
            ShardedTensor.from_rank_offsets(
                key,
                piece,
                *sharded_offsets,
                (prepended + axis, place, num_runs),
                replica_id=replica_id,
                prepend_axis_num=prepended,
            )
            for piece, place in zip(tensor.split(run, dim=axis), places, strict=True)
        ]

    def merge(runs: Any) -> torch.Tensor:
        return torch.cat(runs, dim=axis)

    return ShardedTensorFactory(shard.key, shard.data, build, merge, shard.replica_id)
