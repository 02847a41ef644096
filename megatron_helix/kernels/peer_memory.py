"""Tensors that the ranks of a group read from one another: a gather without a collective.

A collective of NCCL's is a kernel. It holds SMs, which the GEMM beside it then lacks, and starts
when the last rank comes to it. Ranks that reach each other's memory copy what they need themselves,
by the engines that do nothing else, when they need it.

What a collective sees to by itself is seen to here, for a group as a whole:

* nobody reads before all have written: the first gather after a change waits for all ranks;
* nobody writes while another reads: :meth:`PeerMemory.settle` waits for all ranks. Whoever changes
  lent tensors calls it first, and gathers none between that and the change.

All ranks of a group do the same in the same order: what waits, waits for all of them.

Which memory that is, and how ranks wait, is of a :class:`Reach`:
:mod:`megatron_helix.kernels.symmetric_memory` on GPUs of one host.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_helix.kernels.collectives import UnderWay


class Reach(Protocol):
    """Memory that all ranks of a group read."""

    def place(
        self, elements: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """New memory, ``[elements]``, and that of every rank; a collective.

        Raises:
            RuntimeError: where ranks do not come to read each other's memory.
        """
        ...

    def barrier(self) -> None:
        """Wait for all ranks: on a GPU the current stream does, and its writes are seen."""
        ...


ALIGNED = 256  # elements: every parameter begins at a multiple of that


@dataclass
class _Lent:
    """A parameter that peers read: where it lay when it was lent, and how often it had changed."""

    parameter: torch.nn.Parameter
    place: int
    version: int
    everyones: Sequence[torch.Tensor]  # of each rank, flat


class PeerMemory:
    """The lent parameters of a group's ranks.

    Args:
        group: the ranks.
        reach: their memory.
    """

    def __init__(self, group: dist.ProcessGroup, reach: Reach) -> None:
        self.group, self._reach = group, reach
        self._lent: dict[int, _Lent] = {}
        self._changed, self._read = True, False
        self._stream: Any = None

    def lend(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Move parameters to where peers read them; all ranks lend alike ones in the same order.

        Those of one type lie in one piece of memory: a piece each would be rounded up to 20 MB.

        Args:
            parameters: contiguous.

        Raises:
            RuntimeError: as :meth:`Reach.place` does; those of that type have not been moved then.
        """
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            those = [parameter for parameter in parameters if parameter.dtype == dtype]
            ends = [*accumulate(-(-one.numel() // ALIGNED) * ALIGNED for one in those)]
            own, everyones = self._reach.place(ends[-1], dtype, those[0].device)
            for parameter, begin in zip(those, [0, *ends], strict=False):
                parts = [flat.narrow(0, begin, parameter.numel()) for flat in everyones]
                self._move(parameter, own.narrow(0, begin, parameter.numel()), parts)
        self._changed = True

    def _move(
        self, parameter: torch.nn.Parameter, own: torch.Tensor, everyones: Sequence[torch.Tensor]
    ) -> None:
        own = own.view(parameter.shape)
        own.copy_(parameter.data)
        parameter.data = own
        version = parameter._version
        self._lent[id(parameter)] = _Lent(parameter, parameter.data_ptr(), version, everyones)

    def has(self, parameter: torch.Tensor) -> bool:
        """Whether peers read the parameter: it was lent, and lies where it lay then."""
        lent = self._lent.get(id(parameter))
        return lent is not None and lent.place == parameter.data_ptr()

    def start_gathers(
        self,
        parameter: torch.nn.Parameter,
        runs: Sequence[torch.Tensor],
        into: Sequence[torch.Tensor],
    ) -> Sequence[UnderWay]:
        """All ranks' parts of a lent parameter, begun; on a GPU on a stream of its own.

        Args:
            parameter: lent.
            runs: parts of it, ``[a, ...]`` each, contiguous.
            into: ``[p * a, ...]`` for each, contiguous.
        """
        lent = self._lent[id(parameter)]
        if self._changed or lent.version != parameter._version:
            self._await_changes()
        self._read = True
        ranks, mine, begin = self.group.size(), self.group.rank(), parameter.storage_offset()
        with self._beside(parameter) as done:
            for run, place in zip(runs, into, strict=True):
                places = place.view(ranks, *run.shape)
                for peer in (*range(mine + 1, ranks), *range(mine + 1)):
                    flat = lent.everyones[peer]
                    theirs = flat.narrow(0, run.storage_offset() - begin, run.numel())
                    source = run if peer == mine else theirs.view(run.shape)
                    places[peer].copy_(source, non_blocking=True)
        return [UnderWay(place, done) for place in into]

    def settle(self) -> None:
        """Wait until all ranks have read what they were to read: lent tensors are to change."""
        if self._read:
            if self._stream is not None:
                torch.cuda.current_stream().wait_stream(self._stream)
            self._reach.barrier()
        self._changed, self._read = True, False

    def _await_changes(self) -> None:
        self._reach.barrier()
        self._changed = False
        for lent in self._lent.values():
            lent.version = lent.parameter._version

    @contextmanager
    def _beside(self, tensor: torch.Tensor) -> Iterator["_Done | None"]:
        """A stream beside the current one, and what waits for it; on a CPU neither."""
        if tensor.device.type != "cuda":
            yield None
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        done = _Done(torch.cuda.Event())
        with torch.cuda.stream(self._stream):
            yield done
            done.event.record()


@dataclass(frozen=True)
class _Done:
    """Copies on another stream."""

    event: Any

    def wait(self) -> None:
        """The current stream waits, not the process."""
        torch.cuda.current_stream().wait_event(self.event)
