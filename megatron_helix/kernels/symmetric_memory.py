"""Memory of the GPUs of one host that each of them reads: torch's symmetric memory.

Copies from it are made by copy engines, over NVLink where there is one. Written against torch 2.11
and 2.13, whose caching allocator counts this memory as any other.

Not run on two GPUs yet: on one H200 two processes trained from each other's memory, over NCCL's
socket transport and with TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1, as over NCCL to the last bit
(docs/exactness.md).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

BOOT = Path("/proc/sys/kernel/random/boot_id")  # of this host, since it was started
OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class SymmetricMemory:
    """The memory that the ranks of a group have in each other's reach.

    Args:
        group: ranks on GPUs for which :func:`within_reach` holds.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._handles: list[Any] = []

    def place(
        self, elements: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """New memory, ``[elements]``, and that of every rank; a collective.

        Raises:
            RuntimeError: where torch does not map it into all ranks.
        """
        from torch.distributed import _symmetric_memory as symmetric

        with torch.cuda.use_mem_pool(symmetric.get_mem_pool(device)):
            own = torch.empty(elements, dtype=dtype, device=device)
        handle = symmetric.rendezvous(own, self.group)
        self._handles.append(handle)
        # A tensor need not begin where its memory does, which `get_buffer` would read from.
        everyones = range(self.group.size())
        return own, [handle.get_remote_tensor(rank, own.shape, dtype) for rank in everyones]

    def barrier(self) -> None:
        """The current stream waits for those of all ranks."""
        self._handles[0].barrier()


def within_reach(group: dist.ProcessGroup) -> bool:
    """Whether all ranks of ``group`` are on GPUs of one host that reach each other; a collective.

    Every rank comes to the same answer.
    """
    if group.size() == 1 or dist.get_backend(group) != "nccl":
        return False
    device, devices = torch.cuda.current_device(), torch.cuda.device_count()
    host = BOOT.read_text().strip() if BOOT.exists() else os.uname().nodename
    reached = [torch.cuda.can_device_access_peer(device, n) for n in range(devices) if n != device]
    reached.insert(device, os.environ.get(OVERLAP) == "1")
    everyones: list[Any] = [None] * group.size()
    dist.all_gather_object(everyones, (host, device, reached), group=group)
    hosts = {host for host, _, _ in everyones}
    pairs = [
        others[device] if device < len(others) else False
        for at, (_, _, others) in enumerate(everyones)
        for place, (_, device, _) in enumerate(everyones)
        if place != at
    ]
    return len(hosts) == 1 and all(pairs)
