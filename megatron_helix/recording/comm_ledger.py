"""Count what every collective moves and how long a rank is held up by it.

torch.distributed hands every collective, whatever function asked for it, to a method of
``ProcessGroup``; :func:`install` puts the ledger between. Bytes are what a rank must *send* at
least, whatever the algorithm (p ranks, tensor of V bytes a rank holds before an all-gather or after
a reduce-scatter, else in all):

=================  =========================
all_reduce         ``2 (p-1)/p V``
all_gather         ``(p-1) V``
reduce_scatter     ``(p-1) V``
all_to_all         ``(1 - own/V) V``
broadcast          ``V`` (on the source)
send               ``V``
=================  =========================

An all-to-all's own part is what its rank sends to itself: as the split sizes say, or the tensors of
a list, or ``1/p`` of V. What is kept so is counted beside what is sent: of rows that a router deals
out only the sum of both is known beforehand.

Source of the formulas: Chan, Heimlich, Purkayastha, van de Geijn, "Collective communication:
theory, practice, and experience" (2007), the lower bounds of table I.

Time is how long a rank is held up: :mod:`megatron_helix.recording.clocks`.

Every call keeps a number that is the same on all ranks of its group. The rank that comes last does
not wait, so the shortest time of a call over its ranks is the transfer, and what a rank has above
it is waiting (see :mod:`megatron_helix.experiment.metrics`). No clocks are compared.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_helix.recording.clocks import Call, HostClock, StreamClock

Entries = dict[tuple[str, str], "Traffic"]


@dataclass
class Traffic:
    """Running sums for one axis and kind of collective."""

    calls: int = 0
    elements: int = 0
    sent_bytes: int = 0
    kept_bytes: int = 0
    time_s: float = 0.0


class CommLedger:
    """The calls of this rank, in order.

    Args:
        clock: what their time is taken with; the wall clock by default.
    """

    def __init__(self, clock: HostClock | StreamClock | None = None) -> None:
        self.clock = clock or HostClock()
        self.calls: list[Call] = []
        self._numbers: Counter[str] = Counter()

    def open(self, axis: str, kind: str, channel: str) -> Call:
        """A new call, with the next number of its channel."""
        call = Call(axis, kind, channel, self._numbers[channel])
        self._numbers[channel] += 1
        self.calls.append(call)
        return call

    def take_calls(self) -> list[Call]:
        """The calls so far, with their times; the ledger starts again from nothing."""
        self.clock.settle()
        taken, self.calls = self.calls, []
        return taken

    def take(self) -> Entries:
        """The calls so far as sums by (axis, kind); the ledger starts again from nothing."""
        return totals(self.take_calls())


def totals(calls: Iterable[Call]) -> Entries:
    """Sums by (axis, kind)."""
    entries: Entries = {}
    for call in calls:
        entry = entries.setdefault((call.axis, call.kind), Traffic())
        entry.calls += 1
        entry.elements += call.elements
        entry.sent_bytes += call.sent_bytes
        entry.kept_bytes += call.kept_bytes
        entry.time_s += call.time_s
    return entries


def _numel(tensors: Any) -> tuple[int, int]:
    """(elements, bytes) of a tensor or of nested lists of tensors."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel(), tensors.numel() * tensors.element_size()
    sizes = [_numel(tensor) for tensor in tensors]
    return sum(size[0] for size in sizes), sum(size[1] for size in sizes)


_Share = Callable[[int, int], float]  # of p ranks and V; V is multiplied first, to stay exact
_GATHER: tuple[str, int, _Share] = ("all_gather", 1, lambda p, v: (p - 1) * v)
_SCATTER: tuple[str, int, _Share] = ("reduce_scatter", 0, lambda p, v: (p - 1) * v)
_SWAP: tuple[str, int, _Share] = ("all_to_all", 1, lambda p, v: (p - 1) * v / p)
_SUM: tuple[str, int, _Share] = ("all_reduce", 0, lambda p, v: 2 * (p - 1) * v / p)

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
    "broadcast": ("broadcast", 0, lambda p, v: v),
    "reduce": ("reduce", 0, lambda p, v: v),
    "gather": ("gather", 1, lambda p, v: v),
    "scatter": ("scatter", 0, lambda p, v: (p - 1) * v),
    "send": ("send", 0, lambda p, v: v),
    "recv": ("recv", 0, lambda p, v: 0),
    "barrier": ("barrier", -1, lambda p, v: 0),
}


class _TimedWork:
    """A ``Work`` whose waiting counts. Everything else is the work's own."""

    __slots__ = ("_calls", "_clock", "_work")

    def __init__(self, work: Any, calls: Sequence[Call], clock: HostClock | StreamClock):
        self._work, self._calls, self._clock = work, calls, clock

    def wait(self, *args: Any) -> Any:
        start = self._clock.start()
        try:
            return self._work.wait(*args)
        finally:
            self._clock.stop(start, self._calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def install(ledger: CommLedger) -> Callable[[], None]:
    """Let every collective of this process pass through ``ledger``.

    Returns:
        A function that takes the ledger out again.
    """
    present = vars(dist.ProcessGroup)
    # From the class's own dict: what getattr gives would not bind to an object when put back.
    originals = {name: present[name] for name in (*_METHODS, *_COALESCING) if name in present}
    begun: dict[str, int] = {}
    for name in originals:
        method = getattr(dist.ProcessGroup, name)
        if name in _COALESCING:
            wrapped = _COALESCING[name](method, ledger, begun)
        else:
            wrapped = _counted(method, *_METHODS[name], ledger)
        setattr(dist.ProcessGroup, name, wrapped)
    unwatch = ledger.clock.watch()

    def uninstall() -> None:
        unwatch()
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)

    return uninstall


def _counted(original: Any, kind: str, which: int, share: _Share, ledger: CommLedger) -> Any:
    def collective(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        call = ledger.open(group.group_desc or "WORLD", kind, _channel(group, kind, args))
        size = group.size()
        if which >= 0 and size > 1:
            elements, nbytes = _numel(args[which])
            sends = kind not in _ROOT_SENDS or _ROOT_SENDS[kind] == _is_root(group, args)
            call.elements = round(share(size, elements)) if sends else 0
            call.sent_bytes = round(share(size, nbytes)) if sends else 0
            if kind == "all_to_all":
                if parts := _parts(args):
                    call.elements = _without(group.rank(), parts, elements)
                    call.sent_bytes = _without(group.rank(), parts, nbytes)
                call.kept_bytes = nbytes - call.sent_bytes
        start = ledger.clock.start()
        work = original(group, *args, **kwargs)
        ledger.clock.stop(start, [call])
        return None if work is None else _TimedWork(work, [call], ledger.clock)

    return collective


def _parts(args: Sequence[Any]) -> list[int]:
    """Sizes of what an all-to-all has for each rank, in any unit; none given where all are equal.

    Of a list of tensors they are the tensors' own; of one tensor, split sizes of the input, which
    Megatron's token dispatcher has as an array.
    """
    if isinstance(args[1], torch.Tensor):
        return [int(size) for size in args[3]]
    return [tensor.numel() for tensor in args[1]]


def _without(rank: int, parts: list[int], whole: int) -> int:
    """What is left of ``whole`` without the part that is for ``rank``; exact."""
    return whole - whole * parts[rank] // (sum(parts) or 1)


def _timed_together(original: Any, ledger: CommLedger, begun: dict[str, int]) -> Any:
    """``_end_coalescing``: its work is that of all calls since ``_start_coalescing``.

    NCCL starts the sends and receives of a pipeline stage as one kernel that way; the works that
    the calls themselves gave are nobody's.
    """

    def end(group: dist.ProcessGroup, *args: Any) -> Any:
        calls = ledger.calls[begun.pop(group.group_name, len(ledger.calls)) :]
        start = ledger.clock.start()
        work = original(group, *args)
        ledger.clock.stop(start, calls)
        return None if work is None else _TimedWork(work, calls, ledger.clock)

    return end


def _marked(original: Any, ledger: CommLedger, begun: dict[str, int]) -> Any:
    """``_start_coalescing``, which remembers how many calls there were before."""

    def start(group: dist.ProcessGroup, *args: Any) -> Any:
        begun[group.group_name] = len(ledger.calls)
        return original(group, *args)

    return start


def _channel(group: dist.ProcessGroup, kind: str, args: tuple[Any, ...]) -> str:
    """Calls of one channel come in the same order on all ranks that take part."""
    if kind == "send":
        return f"{group.group_name}:{group.rank()}>{args[1]}"
    if kind == "recv":
        return f"{group.group_name}:{args[1]}>{group.rank()}"
    return group.group_name


_COALESCING = {"_start_coalescing": _marked, "_end_coalescing": _timed_together}

# Rooted collectives: whether it is the root that sends, or all the others.
_ROOT_SENDS = {"broadcast": True, "scatter": True, "reduce": False, "gather": False}


def _is_root(group: dist.ProcessGroup, args: Iterable[Any]) -> bool:
    root = next((arg.rootRank for arg in args if hasattr(arg, "rootRank")), 0)
    return group.rank() == root
