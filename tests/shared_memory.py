"""Memory that gloo ranks read of each other, as GPUs of one host do."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist


class SharedMemory:
    """A :class:`megatron_helix.kernels.peer_memory.Reach` over files that all ranks map.

    Args:
        group: the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def place(
        self, elements: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """New memory, ``[elements]``, and that of every rank; a collective."""
        folder = tempfile.mkdtemp(prefix="helix-test-memory-")
        everyones = [""] * self.group.size()
        dist.all_gather_object(everyones, str(Path(folder, "memory")), group=self.group)
        memory = [
            torch.from_file(file, shared=True, size=elements, dtype=dtype, device=device)
            for file in everyones
        ]
        dist.barrier(self.group)
        shutil.rmtree(folder)  # what is mapped stays
        return memory[self.group.rank()], memory

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(self.group)
