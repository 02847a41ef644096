"""Helix tiles as pieces of the canonical weight, so that a checkpoint is Megatron's own.

A checkpoint holds every weight once, with its rows (or columns) in Megatron's order, whatever
layout saved it. A tile is many runs of consecutive canonical rows; each run becomes one
``ShardedTensor`` at its canonical place, and loading puts the runs together again. Padding, behind
the runs of smaller segments, is in no checkpoint: loaded, it is zero. The runs of a weight are then
not all of one length, which Megatron's format knows as an irregular grid, and whose pieces fit any
other layout's as well.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory

from megatron_helix.partition.features import padded, shares
from megatron_helix.partition.layout import PADDING, HelixLayout


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
    length, run = layout.stored_run, layout.runs[layout.coordinates(rank)[1]]
    starts = order.chunk(layout.size)[rank][::length].tolist()
    total = int((order != PADDING).sum())
    regular = min(layout.runs) == length
    prepended = len(sharded_offsets)

    def build(
        key: str, tensor: torch.Tensor, replica_id: ReplicaId, flattened_range: slice | None
    ) -> list[ShardedTensor]:
        assert flattened_range is None, "tiles are saved whole, not as flat ranges"
        pieces = [piece.narrow(axis, 0, run) for piece in tensor.split(length, dim=axis)]
        known = {"replica_id": replica_id, "prepend_axis_num": prepended}
        if regular:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    piece,
                    *sharded_offsets,
                    (prepended + axis, start // run, total // run),
                    **known,
                )
                for piece, start in zip(pieces, starts, strict=True)
            ]
        return [
            _irregular(
                ShardedTensor.from_rank_offsets(key, piece, *sharded_offsets, **known),
                piece,
                axis=prepended + axis,
                start=start,
                total=total,
            )
            for piece, start in zip(pieces, starts, strict=True)
        ]

    def merge(runs: Any) -> torch.Tensor:
        if regular:
            return torch.cat(runs, dim=axis)
        pieces = [piece.flatten(0, prepended) for piece in runs]
        behind = (0, 0) * (pieces[0].dim() - 1 - axis) + (0, length - run)
        return torch.cat([torch.nn.functional.pad(piece, behind) for piece in pieces], dim=axis)

    return ShardedTensorFactory(shard.key, shard.data, build, merge, shard.replica_id)


def _irregular(
    piece: ShardedTensor, real: torch.Tensor, *, axis: int, start: int, total: int
) -> ShardedTensor:
    """The ``real`` data of a piece, as the part from ``start`` on of ``total`` indices of ``axis``.

    Megatron counts prepended axes, each of one index here, among those of such a part.
    """
    shape, offset = list(piece.global_shape), list(piece.global_offset)
    shape[axis], offset[axis] = total, start
    data = real[(None,) * piece.prepend_axis_num]
    return replace(
        piece,
        data=data,
        local_shape=tuple(data.shape),
        global_shape=tuple(shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,
        prepend_axis_num=0,
    )


def without_padding(
    shard: ShardedTensor | ShardedTensorFactory, *, axis: int, features: int, parts: int
) -> ShardedTensorFactory:
    """A shard of an MLP's padded weight (or of a state shaped like it) as its real features alone.

    Args:
        shard: as Megatron describes it, a rank's share of each projection a piece.
        axis: the dimension of the weight that holds features.
        features: real ones of the whole MLP.
        parts: ranks that share them.
    """
    whole = padded(features, parts)
    share = whole // parts

    def trimmed(piece: ShardedTensor) -> ShardedTensor:
        at = piece.prepend_axis_num + axis
        projection, place = divmod(piece.global_offset[at], whole)
        mine = shares(features, parts)[place // share]
        return _irregular(
            piece,
            piece.data.narrow(axis, 0, len(mine)),
            axis=at,
            start=projection * features + mine.start,
            total=piece.global_shape[at] // whole * features,
        )

    def build(
        key: str, tensor: torch.Tensor, replica_id: ReplicaId, flattened_range: slice | None
    ) -> list[ShardedTensor]:
        if isinstance(shard, ShardedTensorFactory):
            pieces: Any = shard.build_fn(key, tensor, replica_id, flattened_range)
        else:
            kind = {"dtype": tensor.dtype, "replica_id": replica_id}
            pieces = [replace(shard, key=key, data=tensor, **kind)]
        return [trimmed(piece) for piece in pieces]

    def merge(pieces: Any) -> torch.Tensor:
        shards = [filled(piece) for piece in pieces]
        return shard.merge_fn(shards) if isinstance(shard, ShardedTensorFactory) else shards[0]

    def filled(piece: torch.Tensor) -> torch.Tensor:
        piece = piece.view(piece.shape[-dims:])
        zeros = list(piece.shape)
        zeros[axis] = share - zeros[axis]
        return torch.cat([piece, piece.new_zeros(zeros)], dim=axis)

    assert shard.data is not None
    dims = shard.data.dim()
    return ShardedTensorFactory(shard.key, shard.data, build, merge, shard.replica_id)
