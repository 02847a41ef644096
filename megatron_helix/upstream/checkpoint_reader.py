"""Reads a stored tensor once, however many pieces of it a rank asks for.

A helix tile is many runs of canonical rows, and torch's file reader loads the whole stored tensor
for each of them. Here the pieces of one tensor are asked for together, as the box around them, and
taken out of what comes back. Nothing that is loaded changes.
"""

from collections import defaultdict
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem


class _Boxes:
    """What the reader is given as its planner: boxes in, pieces out to the planner itself.

    Args:
        planner: of the load.
        pieces: by the stored tensor that they are of.
    """

    def __init__(self, planner: Any, pieces: dict[MetadataIndex, list[ReadItem]]):
        self.planner, self.pieces = planner, pieces

    def items(self) -> list[ReadItem]:
        """One request for each stored tensor."""
        return [_box(pieces) for pieces in self.pieces.values()]

    def resolve_tensor(self, box: ReadItem) -> torch.Tensor:
        """Where the reader puts the box."""
        stored = self.planner.metadata.state_dict_metadata[box.storage_index.fqn]
        return torch.empty(box.lengths, dtype=stored.properties.dtype)

    def commit_tensor(self, box: ReadItem, tensor: torch.Tensor) -> None:
        """The box is there."""
        for piece in self.pieces[box.storage_index]:
            part = tensor
            for dim, (at, start) in enumerate(
                zip(piece.storage_offsets, box.storage_offsets, strict=True)
            ):
                part = part.narrow(dim, at - start, piece.lengths[dim])
            target = self.planner.resolve_tensor(piece).detach()
            target.copy_(part)
            self.planner.commit_tensor(piece, target)


def _box(pieces: list[ReadItem]) -> ReadItem:
    """The smallest request that covers all pieces; a single one as it is."""
    starts = [piece.storage_offsets for piece in pieces]
    ends = [[*map(sum, zip(p.storage_offsets, p.lengths, strict=True))] for p in pieces]
    first = torch.Size(map(min, zip(*starts, strict=True)))
    last = map(max, zip(*ends, strict=True))
    lengths = torch.Size(b - a for a, b in zip(first, last, strict=True))
    return replace(pieces[0], storage_offsets=first, lengths=lengths)


def read_tensors_once() -> None:
    """Let torch's file reader, which Megatron loads ``torch_dist`` checkpoints with, do so."""
    original = FileSystemReader.read_data
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def read_data(self: FileSystemReader, plan: Any, planner: Any) -> Any:
        pieces: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            if item.type == LoadItemType.TENSOR:
                pieces[item.storage_index].append(item)
        several = {index: items for index, items in pieces.items() if len(items) > 1}
        boxes = _Boxes(planner, several)
        original(self, replace(plan, items=boxes.items()), boxes).wait()  # type: ignore[arg-type]
        rest = [item for item in plan.items if item.storage_index not in several]
        return original(self, replace(plan, items=rest), planner)

    FileSystemReader.read_data = read_data
