"""How long a collective holds a rank up.

It is held up inside the call and in waiting for its result, for the transfer and for slower ranks
alike. On the CPU the wall clock says so. On a GPU calls return at once, so events on the stream
that computes stand around the call and around the wait: what passes between them is the *exposed*
time, and communication that computation hides counts nothing. Calls that NCCL starts as one (a
pipeline's sends and receives) have one wait, which they share equally.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Call:
    """One collective, as this rank saw it.

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

    def stop(self, start: float, calls: Sequence[Call]) -> None:
        """Add the time since ``start`` to the calls, in equal shares."""
        _share_out(time.perf_counter() - start, calls)

    def settle(self) -> None:
        """Every time is known already."""


@dataclass
class StreamClock:
    """Time that the current stream of the GPU is held up: exposed communication."""

    pending: list[tuple[Any, Any, Sequence[Call]]] = field(default_factory=list)

    def start(self) -> Any:
        """A moment in the stream's order of work."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, start: Any, calls: Sequence[Call]) -> None:
        """Remember what lies between ``start`` and now; known once the GPU has come here."""
        self.pending.append((start, self.start(), calls))

    def settle(self) -> None:
        """Wait for the GPU and add up."""
        torch.cuda.synchronize()
        for start, end, calls in self.pending:
            _share_out(start.elapsed_time(end) / 1e3, calls)
        self.pending.clear()


def _share_out(seconds: float, calls: Sequence[Call]) -> None:
    for call in calls:
        call.time_s += seconds / len(calls)
