"""What counts as exposed on a GPU; one stands in here whose streams have a time each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megatron_helix.recording.clocks import Call, StreamClock


class Stream:
    """Work in order; so far, in milliseconds."""

    device_index = 3

    def __init__(self) -> None:
        self.at = 0.0


class Event:
    """As ``torch.cuda.Event``."""

    cuda: "Gpu"

    def __init__(self, **_how: Any) -> None:
        self.at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.at = (stream or self.cuda.current).at

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or self.cuda.current
        stream.at = max(stream.at, self.at)

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


class Gpu:
    """As ``torch.cuda``."""

    def __init__(self) -> None:
        self.current = Stream()
        self.asked: list[int | None] = []
        self.Event = type("Event", (Event,), {"cuda": self})

    def current_stream(self, device: int | None = None) -> Stream:
        self.asked.append(device)
        return self.current

    def synchronize(self) -> None:
        """Nothing is under way."""

    @contextmanager
    def stream(self, one: Stream) -> Iterator[None]:
        before, self.current = self.current, one
        yield
        self.current = before

    def compute(self, ms: float) -> None:
        self.current.at += ms

    def event(self, stream: Stream) -> Any:
        made = self.Event()
        made.record(stream)
        return made


class Rank:
    """A GPU with a watched clock; what it computes and what it starts."""

    def __init__(self) -> None:
        self.gpu = Gpu()
        self.clock = StreamClock(cuda=self.gpu)
        self.unwatch = self.clock.watch()
        self.gpu.current = Stream()  # of the rank's own GPU: it takes it now
        self.collective(0)  # as it meets the others
        self.clock.settle()  # a step begins

    def collective(self, ms: float, kind: str = "reduce_scatter") -> Call:
        """Started from the current stream, which waits for it."""
        call = Call("dp", kind, "dp", 0)
        self.clock.stop(self.clock.start(), [call])
        start = self.clock.start()
        self.gpu.compute(ms)
        self.clock.stop(start, [call])
        return call

    def wait_for(self, stream: Stream) -> None:
        """The current stream does, as by ``wait_stream``."""
        self.gpu.event(stream).wait()

    def exposed_ms(self, call: Call) -> float:
        self.clock.settle()
        return call.time_s * 1e3


@pytest.fixture
def rank() -> Iterator[Rank]:
    made = Rank()
    yield made
    made.unwatch()
    assert (made.gpu.Event.record, made.gpu.Event.wait) == (Event.record, Event.wait)


def test_the_computing_stream_is_held_up(rank: Rank) -> None:
    call = rank.collective(5)
    assert rank.exposed_ms(call) == pytest.approx(5)


def test_a_call_asks_for_the_stream_of_its_gpu_as_it_starts_and_as_it_ends(rank: Rank) -> None:
    """More often, or of no named GPU, and the ledger would slow what it measures."""
    rank.gpu.asked.clear()
    rank.clock.stop(rank.clock.start(), [Call("dp", "all_gather", "dp", 0)])
    assert rank.gpu.asked == [Stream.device_index] * 2


def test_no_gpu_is_asked_for_before_the_rank_has_its_own() -> None:
    """Else every rank's clock would follow the first GPU, and take memory there."""
    StreamClock(cuda=None)


@pytest.mark.parametrize(("computed", "exposed"), [(3, 2), (8, 0)])
def test_from_a_stream_of_its_own_what_is_waited_for_counts(
    rank: Rank, computed: float, exposed: float
) -> None:
    """As Megatron FSDP's reduce-scatters."""
    side = Stream()
    with rank.gpu.stream(side):
        call = rank.collective(5)
    done = rank.gpu.event(side)
    rank.gpu.compute(computed)
    done.wait()
    assert rank.exposed_ms(call) == pytest.approx(exposed)


def test_what_nobody_waits_for_is_hidden(rank: Rank) -> None:
    with rank.gpu.stream(Stream()):
        call = rank.collective(5)
    rank.gpu.compute(3)
    assert rank.exposed_ms(call) == 0


def test_only_what_is_behind_the_event_counts(rank: Rank) -> None:
    side = Stream()
    with rank.gpu.stream(side):
        first = rank.collective(5)
    done = rank.gpu.event(side)
    with rank.gpu.stream(side):
        second = rank.collective(7)
    done.wait()
    rank.wait_for(side)
    assert rank.exposed_ms(first) == pytest.approx(5)
    assert second.time_s * 1e3 == pytest.approx(7)


def test_a_stream_that_waits_for_one_passes_it_on(rank: Rank) -> None:
    """As torch FSDP2's gathers are copied out of by another stream."""
    side, after = Stream(), Stream()
    with rank.gpu.stream(side):
        call = rank.collective(5)
    with rank.gpu.stream(after):
        rank.wait_for(side)
    rank.gpu.compute(1)
    rank.wait_for(after)
    assert rank.exposed_ms(call) == pytest.approx(4)


def test_streams_that_wait_for_each_other_pass_a_call_on_once(rank: Rank) -> None:
    """Else what they know of would double with every turn."""
    sides = Stream(), Stream()
    with rank.gpu.stream(sides[0]):
        call = rank.collective(5)
    for turn in range(64):
        with rank.gpu.stream(sides[1 - turn % 2]):
            rank.wait_for(sides[turn % 2])
    assert len(rank.gpu.event(sides[0]).helix_behind) == 1
    rank.wait_for(sides[0])
    assert rank.exposed_ms(call) == pytest.approx(5)


def test_a_call_is_waited_for_once(rank: Rank) -> None:
    """Of the call itself, and again of an event behind what follows it."""
    side = Stream()
    with rank.gpu.stream(side):
        call = rank.collective(5)
    start = rank.clock.start()
    rank.gpu.current.at = max(rank.gpu.current.at, side.at)
    rank.clock.stop(start, [call])
    with rank.gpu.stream(side):
        rank.gpu.compute(9)  # no collective
    rank.wait_for(side)
    assert rank.exposed_ms(call) == pytest.approx(5)


def test_a_ring_computes_on_both_streams(rank: Rank) -> None:
    with rank.gpu.stream(Stream()):
        call = rank.collective(5, kind="send")
    assert rank.exposed_ms(call) == pytest.approx(5)


def test_a_step_begins_with_nothing_under_way(rank: Rank) -> None:
    side = Stream()
    with rank.gpu.stream(side):
        before = rank.collective(5)
    done = rank.gpu.event(side)
    rank.clock.settle()
    done.wait()
    assert rank.exposed_ms(before) == 0
