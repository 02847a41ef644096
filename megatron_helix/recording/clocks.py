"""How long a collective holds a rank up.

It is held up inside the call and in waiting for its result, for the transfer and for slower ranks
alike. On the CPU the wall clock says so. On a GPU calls return at once, so events on the stream
that computes stand around the call and around the wait: what passes between them is the *exposed*
time, and communication that computation hides counts nothing. Calls that NCCL starts as one (a
pipeline's sends and receives) have one wait, which they share equally.

What shards weights (Megatron FSDP, torch FSDP2, GTP) starts its collectives from streams of its
own, which wait for them while another one computes; there the time is what the computing stream
waits for an event behind them. Sends and receives from another stream count as if it computed:
context parallelism's ring computes on two streams in turns.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_helix.recording.kinds import POINT_TO_POINT


@dataclass(slots=True, eq=False)
class Call:
    """One collective, as this rank saw it; each is itself alone.

    Attributes:
        axis: the process group's description.
        kind: of the collective.
        channel: who talks: the group's name, and for a send or receive both ends of it.
        number: how many calls the channel had before; the same on every rank.
        elements: that this rank sent.
        sent_bytes: their bytes.
        kept_bytes: of an all-to-all, what this rank had for itself.
        time_s: how long it was held up.
    """

    axis: str
    kind: str
    channel: str
    number: int
    elements: int = 0
    sent_bytes: int = 0
    kept_bytes: int = 0
    time_s: float = 0.0


class HostClock:
    """Time as the process feels it; right where a call returns when its result is there."""

    def start(self) -> float:
        """A moment."""
        return time.perf_counter()

    def stop(self, start: float, calls: Collection[Call]) -> None:
        """Add the time since ``start`` to the calls, in equal shares."""
        _share_out(time.perf_counter() - start, calls)

    def settle(self) -> None:
        """Every time is known already."""

    def watch(self) -> Callable[[], None]:
        """Nothing more to see."""
        return lambda: None


@dataclass
class StreamClock:
    """Time that the computing stream of a GPU is held up: exposed communication.

    Torch looks into the process's environment when asked for the current stream of no named device,
    so it is told which, and asked once for each moment: a process that starts small kernels would
    take half as long again.

    Attributes:
        cuda: torch's module, or what stands in for a GPU.
        computing: the stream, the current one as a step begins; none before the first, for a rank
            that is made has no GPU of its own yet.
        pending: events around what held it up, and the calls that did.
    """

    cuda: Any = torch.cuda
    computing: Any = None
    pending: list[tuple[Any, Any, Collection[Call]]] = field(default_factory=list)
    _record: Callable[..., None] | None = None  # an event, unseen by the watch
    _beside: dict[Any, set[Call]] = field(default_factory=lambda: defaultdict(set))  # by stream
    _under_way: set[Call] = field(default_factory=set)  # not yet waited for by the computing one

    def start(self) -> Any:
        """A moment in the stream's order of work."""
        return self._moment(self._current())

    def _current(self) -> Any:
        return self.cuda.current_stream(self.computing and self.computing.device_index)

    def _moment(self, stream: Any) -> Any:
        event = self.cuda.Event(enable_timing=True)
        (self._record or self.cuda.Event.record)(event, stream)
        return event

    def stop(self, start: Any, calls: Collection[Call]) -> None:
        """Remember what lies between ``start`` and now; known once the GPU has come here.

        From another stream than the computing one, remember only that ``calls`` were started.
        """
        stream = self._current()
        computes = self.computing is None or stream == self.computing
        if computes or all(call.kind in POINT_TO_POINT for call in calls):
            self._held_up(start, stream, calls)
            return
        self._beside[stream].update(calls)
        self._under_way.update(calls)

    def _held_up(self, start: Any, stream: Any, calls: Collection[Call]) -> None:
        self.pending.append((start, self._moment(stream), calls))
        self._under_way.difference_update(calls)

    def settle(self) -> None:
        """Wait for the GPU and add up; the stream that is current now computes from here on."""
        self.cuda.synchronize()
        self.computing = self.cuda.current_stream()
        for start, end, calls in self.pending:
            _share_out(start.elapsed_time(end) / 1e3, calls)
        self.pending.clear()
        self._beside.clear()
        self._under_way.clear()

    def watch(self) -> Callable[[], None]:
        """See which stream waits for which, from now on.

        Returns:
            A function that ends it.
        """
        event_type = self.cuda.Event
        record, wait = event_type.record, event_type.wait
        self._record = record

        def recorded(event: Any, stream: Any = None) -> None:
            stream = stream or self._current()
            record(event, stream)
            event.helix_behind = self._beside[stream].copy()

        def waited(event: Any, stream: Any = None) -> None:
            stream = stream or self._current()
            calls = getattr(event, "helix_behind", set()) & self._under_way
            if calls and stream == self.computing:
                start = self._moment(stream)
                wait(event, stream)
                self._held_up(start, stream, calls)
                return
            self._beside[stream] |= calls  # what waits for that one, waits for them
            wait(event, stream)

        event_type.record, event_type.wait = recorded, waited

        def unwatch() -> None:
            event_type.record, event_type.wait, self._record = record, wait, None

        return unwatch


def _share_out(seconds: float, calls: Collection[Call]) -> None:
    for call in calls:
        call.time_s += seconds / len(calls)
