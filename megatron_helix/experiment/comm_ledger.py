"""Count what every collective moves and how long a rank is held up by it.

torch.distributed hands every collective, whatever function asked for it, to a method of
``ProcessGroup``; :func:`install` puts the ledger between. Bytes are what a rank must *send* at
least, whatever the algorithm (p ranks, tensor of V bytes a rank holds before an all-gather or after
a reduce-scatter, else in all):

=================  =========================
all_reduce         ``2 (p-1)/p V``
all_gather         ``(p-1) V``
reduce_scatter     ``(p-1) V``
all_to_all         ``(p-1)/p V``
broadcast          ``V`` (on the source)
send               ``V``
=================  =========================

Source of the formulas: Chan, Heimlich, Purkayastha, van de Geijn, "Collective communication:
theory, practice, and experience" (2007), the lower bounds of table I.

Time is the time this rank spent inside the call and in waiting for its result: communication and
waiting for slower ranks, as the rank feels it. It is measured with the wall clock, which is right
on the CPU; on a GPU, where calls return at once, it counts only what blocks the host.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Traffic:
    """Running sums for one axis and kind of collective."""

    calls: int = 0
    elements: int = 0
    sent_bytes: int = 0
    time_s: float = 0.0


class CommLedger:
    """Traffic of this rank by (axis, kind). An axis is a process group's description."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Traffic] = {}

    def entry(self, axis: str, kind: str) -> Traffic:
        """The sums of one axis and kind, made on first use."""
        return self.entries.setdefault((axis, kind), Traffic())

    def take(self) -> dict[tuple[str, str], Traffic]:
        """The entries so far; the ledger starts again from nothing."""
        taken, self.entries = self.entries, {}
        return taken


def _numel(tensors: Any) -> tuple[int, int]:
    """(elements, bytes) of a tensor or of nested lists of tensors."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel(), tensors.numel() * tensors.element_size()
    sizes = [_numel(tensor) for tensor in tensors]
    return sum(size[0] for size in sizes), sum(size[1] for size in sizes)


_Share = Callable[[int], float]
_GATHER: tuple[str, int, _Share] = ("all_gather", 1, lambda p: p - 1)
_SCATTER: tuple[str, int, _Share] = ("reduce_scatter", 0, lambda p: p - 1)
_SWAP: tuple[str, int, _Share] = ("all_to_all", 1, lambda p: (p - 1) / p)
_SUM: tuple[str, int, _Share] = ("all_reduce", 0, lambda p: 2 * (p - 1) / p)

# Method of ProcessGroup: its kind, which argument is the tensor V, and what a rank sends of V.
# torch 2.13 renamed some; both names are here, and :func:`install` takes those that exist.
_METHODS: dict[str, tuple[str, int, _Share]] = {
    "allreduce": _SUM,
    "allreduce_coalesced": _SUM,
    "allgather": _GATHER,
    "allgather_coalesced": _GATHER,
    "_allgather_base": _GATHER,
    "all_gather_single": _GATHER,
    "allgather_into_tensor_coalesced": _GATHER,
    "all_gather_single_coalesced": _GATHER,
    "reduce_scatter": _SCATTER,
    "_reduce_scatter_base": _SCATTER,
    "reduce_scatter_single": _SCATTER,
    "reduce_scatter_tensor_coalesced": _SCATTER,
    "reduce_scatter_single_coalesced": _SCATTER,
    "alltoall": _SWAP,
    "alltoall_base": _SWAP,
    "all_to_all_single": _SWAP,
    "broadcast": ("broadcast", 0, lambda p: 1),
    "reduce": ("reduce", 0, lambda p: 1),
    "gather": ("gather", 1, lambda p: 1),
    "scatter": ("scatter", 0, lambda p: p - 1),
    "send": ("send", 0, lambda p: 1),
    "recv": ("recv", 0, lambda p: 0),
    "barrier": ("barrier", -1, lambda p: 0),
}


class _TimedWork:
    """A ``Work`` whose waiting counts. Everything else is the work's own."""

    def __init__(self, work: Any, traffic: Traffic):
        self._work, self._traffic = work, traffic

    def wait(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._work.wait(*args)
        finally:
            self._traffic.time_s += time.perf_counter() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def install(ledger: CommLedger) -> Callable[[], None]:
    """Let every collective of this process pass through ``ledger``.

    Returns:
        A function that takes the ledger out again.
    """
    present = vars(dist.ProcessGroup)
    # From the class's own dict: what getattr gives would not bind to an object when put back.
    originals = {name: present[name] for name in _METHODS if name in present}
    for name in originals:
        counted = _counted(getattr(dist.ProcessGroup, name), *_METHODS[name], ledger)
        setattr(dist.ProcessGroup, name, counted)

    def uninstall() -> None:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)

    return uninstall


def _counted(original: Any, kind: str, which: int, share: _Share, ledger: CommLedger) -> Any:
    def collective(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        traffic = ledger.entry(group.group_desc or "WORLD", kind)
        size = group.size()
        if which >= 0 and size > 1:
            elements, nbytes = _numel(args[which])
            sends = kind not in _ROOT_SENDS or _ROOT_SENDS[kind] == _is_root(group, args)
            traffic.elements += round(elements * share(size)) if sends else 0
            traffic.sent_bytes += round(nbytes * share(size)) if sends else 0
        traffic.calls += 1
        start = time.perf_counter()
        work = original(group, *args, **kwargs)
        traffic.time_s += time.perf_counter() - start
        return None if work is None else _TimedWork(work, traffic)

    return collective


# Rooted collectives: whether it is the root that sends, or all the others.
_ROOT_SENDS = {"broadcast": True, "scatter": True, "reduce": False, "gather": False}


def _is_root(group: dist.ProcessGroup, args: Iterable[Any]) -> bool:
    root = next((arg.rootRank for arg in args if hasattr(arg, "rootRank")), 0)
    return group.rank() == root
