"""The ledger counts what the closed forms of its docstring say, and changes nothing else."""

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

from megatron_helix.recording import profile
from megatron_helix.recording.clocks import Call, HostClock
from megatron_helix.recording.comm_ledger import CommLedger, Traffic, install
from tests.distributed import run_distributed

P = 4  # ranks
N = 24  # elements a rank puts in; divisible by P
AXIS = "the-axis"


def tensors(count: int = P, size: int = N) -> list[torch.Tensor]:
    """``count`` tensors of ``size`` elements."""
    return [torch.ones(size) for _ in range(count)]


def send_or_receive(group: dist.ProcessGroup) -> None:
    """Rank 0 sends to rank 1."""
    if group.rank() == 0:
        dist.send(torch.ones(N), 1, group=group)
    if group.rank() == 1:
        dist.recv(torch.ones(N), 0, group=group)


def isend_irecv(group: dist.ProcessGroup) -> None:
    """A ring: every rank sends to the next one."""
    to, of = (group.rank() + 1) % P, (group.rank() - 1) % P
    works = [dist.isend(torch.ones(N), to, group), dist.irecv(torch.ones(N), of, group)]
    for work in works:
        work.wait()


def batched_isend_irecv(group: dist.ProcessGroup) -> None:
    """The same ring, as Megatron's pipeline sends."""
    to, of = (group.rank() + 1) % P, (group.rank() - 1) % P
    received = torch.zeros(N)
    sends = dist.P2POp(dist.isend, torch.full((N,), float(group.rank())), to, group)
    receives = dist.P2POp(dist.irecv, received, of, group)
    for work in dist.batch_isend_irecv([sends, receives]):
        work.wait()
    assert torch.equal(received, torch.full((N,), float(of)))


def unequal(rank: int) -> list[int]:
    """Rows for each rank, and from each: every pair exchanges another number."""
    return [rank + other for other in range(P)]


def all_to_all_of_rows(group: dist.ProcessGroup) -> None:
    """Rows of six elements."""
    rows = unequal(group.rank())
    dist.all_to_all_single(
        torch.ones(sum(rows), 6), torch.ones(sum(rows), 6), rows, rows, group=group
    )


# What is called, its kind, and the elements that rank r must send by the ledger's table.
Collective = Callable[[dist.ProcessGroup], object]
CASES: dict[str, tuple[Collective, str, Callable[[int], float]]] = {
    "all_reduce": (
        lambda g: dist.all_reduce(torch.ones(N), group=g),
        *("all_reduce", lambda r: 2 * (P - 1) / P * N),
    ),
    "all_gather": (
        lambda g: dist.all_gather(tensors(), torch.ones(N), group=g),
        *("all_gather", lambda r: (P - 1) * N),
    ),
    "all_gather_into_tensor": (
        lambda g: dist.all_gather_into_tensor(torch.ones(P * N), torch.ones(N), group=g),
        *("all_gather", lambda r: (P - 1) * N),
    ),
    "reduce_scatter": (
        lambda g: dist.reduce_scatter(torch.ones(N), tensors(), group=g),
        *("reduce_scatter", lambda r: (P - 1) * N),
    ),
    "reduce_scatter_tensor": (
        lambda g: dist.reduce_scatter_tensor(torch.ones(N), torch.ones(P * N), group=g),
        *("reduce_scatter", lambda r: (P - 1) * N),
    ),
    "all_to_all_single": (
        lambda g: dist.all_to_all_single(torch.ones(N), torch.ones(N), group=g),
        *("all_to_all", lambda r: (P - 1) / P * N),
    ),
    "all_to_all": (
        lambda g: dist.all_to_all(tensors(), tensors(), group=g),
        *("all_to_all", lambda r: (P - 1) * N),  # V is all P tensors
    ),
    "all_to_all_single, unequal": (
        *(all_to_all_of_rows, "all_to_all"),
        lambda r: 6 * (sum(unequal(r)) - 2 * r),
    ),
    "broadcast": (
        lambda g: dist.broadcast(torch.ones(N), src=2, group=g),
        *("broadcast", lambda r: N * (r == 2)),
    ),
    "reduce": (
        lambda g: dist.reduce(torch.ones(N), dst=2, group=g),
        *("reduce", lambda r: N * (r != 2)),
    ),
    "gather": (
        lambda g: dist.gather(torch.ones(N), tensors() if g.rank() == 2 else None, 2, group=g),
        *("gather", lambda r: N * (r != 2)),
    ),
    "scatter": (
        lambda g: dist.scatter(torch.ones(N), tensors() if g.rank() == 2 else None, 2, group=g),
        *("scatter", lambda r: (P - 1) * N * (r == 2)),
    ),
    "send": (send_or_receive, "send", lambda r: N * (r == 0)),
    "isend": (isend_irecv, "send", lambda r: N),
    "batch_isend_irecv": (batched_isend_irecv, "send", lambda r: N),
    "barrier": (lambda g: dist.barrier(group=g), "barrier", lambda r: 0),
}


def measure(collective: Collective) -> dict[tuple[str, str], Traffic]:
    """What one call puts into the ledger of this rank."""
    group = dist.new_group(group_desc=AXIS)
    ledger = CommLedger()
    uninstall = install(ledger)
    collective(group)
    uninstall()
    return ledger.take()


@pytest.mark.parametrize("name", CASES)
def test_a_collective_counts_what_a_rank_must_send(name: str) -> None:
    collective, kind, elements = CASES[name]
    for rank, entries in enumerate(run_distributed(measure, P, collective)):
        assert {axis for axis, _ in entries} <= {AXIS}
        sent = entries.get((AXIS, kind), Traffic())
        assert sent.elements == elements(rank)
        assert sent.sent_bytes == 4 * elements(rank)
        others = [entry for (_, other), entry in entries.items() if other != kind]
        assert all(entry.sent_bytes == 0 for entry in others)  # a receive, at most


def test_what_a_rank_has_for_itself_is_counted_apart() -> None:
    for rank, entries in enumerate(run_distributed(measure, P, all_to_all_of_rows)):
        assert entries[AXIS, "all_to_all"].kept_bytes == 4 * 6 * 2 * rank
    equal, *_ = CASES["all_to_all_single"]
    for entries in run_distributed(measure, P, equal):
        assert entries[AXIS, "all_to_all"].kept_bytes == 4 * N // P
    summed, *_ = CASES["all_reduce"]
    for entries in run_distributed(measure, P, summed):
        assert entries[AXIS, "all_reduce"].kept_bytes == 0


ROWS = [4, 0, 3, 2]  # of rank 2, for each


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("alltoall_base", (torch.ones(9), torch.ones(9), [], ROWS)),
        ("all_to_all_single", (torch.ones(9), torch.ones(9), [], ROWS)),
        ("alltoall", ([], [torch.ones(rows) for rows in ROWS])),  # gloo takes equal ones only
    ],
)
def test_unequal_parts_are_known_by_every_name_of_an_all_to_all(
    name: str, given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that this torch does not have as well: counted is what the method is given."""
    monkeypatch.setattr(dist.ProcessGroup, name, lambda group, *args: None, raising=False)
    ledger = CommLedger()
    uninstall = install(ledger)
    group = SimpleNamespace(size=lambda: P, rank=lambda: 2, group_desc=AXIS, group_name=AXIS)
    getattr(dist.ProcessGroup, name)(group, *given)
    uninstall()
    (call,) = ledger.take_calls()
    counted = call.kind, call.elements, call.sent_bytes, call.kept_bytes
    assert counted == ("all_to_all", 6, 4 * 6, 4 * 3)


def test_bytes_follow_the_element_size_and_sums_run_on() -> None:
    def twice() -> Traffic:
        group = dist.new_group(group_desc=AXIS)
        ledger = CommLedger()
        install(ledger)
        for dtype in (torch.float64, torch.bfloat16):
            dist.all_to_all_single(
                torch.ones(N, dtype=dtype), torch.ones(N, dtype=dtype), group=group
            )
        return ledger.take()[AXIS, "all_to_all"]

    for traffic in run_distributed(twice, P):
        assert traffic.calls == 2
        assert traffic.elements == 2 * (P - 1) / P * N
        assert traffic.sent_bytes == (8 + 2) * (P - 1) / P * N


def test_axes_are_told_apart_and_a_rank_alone_sends_nothing() -> None:
    def on_groups() -> dict[tuple[str, str], Traffic]:
        pairs = [dist.new_group([a, a + 1], group_desc="pair") for a in (0, 2)]
        alone = [dist.new_group([a], group_desc="alone") for a in range(P)]
        ledger = CommLedger()
        install(ledger)
        for group in (pairs[dist.get_rank() // 2], alone[dist.get_rank()]):
            dist.all_reduce(torch.ones(N), group=group)
        return ledger.take()

    for entries in run_distributed(on_groups, P):
        assert entries["pair", "all_reduce"].elements == N
        assert entries["alone", "all_reduce"].elements == 0


def test_waiting_for_an_asynchronous_result_counts_as_time() -> None:
    late_s = 0.3

    def one_is_late() -> tuple[bool, float, float]:
        group = dist.new_group(group_desc=AXIS)
        ledger = CommLedger()
        install(ledger)
        if dist.get_rank() == 0:
            time.sleep(late_s)
        x = torch.ones(N)
        work = dist.all_reduce(x, group=group, async_op=True)
        (call,) = ledger.take_calls()
        in_call = call.time_s
        work.wait()
        assert work.is_completed()
        assert work.is_success()  # what the ledger does not know is the work's own
        return bool((x == P).all()), in_call, call.time_s

    results = run_distributed(one_is_late, P)
    assert all(right for right, _, _ in results)
    # The others entered together, after the group was made, and could not be done before rank 0.
    assert all(total > in_call for _, in_call, total in results)
    assert max(total for _, _, total in results[1:]) > late_s / 2


def test_calls_that_start_as_one_share_their_wait() -> None:
    """As NCCL starts a pipeline's sends and receives; torch's fake backend can, gloo cannot."""

    class Told(HostClock):
        """What is said to have passed."""

        seconds = 0.0

        def stop(self, start: float, calls: Sequence[Call]) -> None:
            super().stop(time.perf_counter() - self.seconds, calls)

    def coalesced() -> list[Call]:
        group = dist.new_group(backend="fake", group_desc=AXIS)
        to, of = (dist.get_rank() + 1) % P, (dist.get_rank() - 1) % P
        clock = Told()
        ledger = CommLedger(clock)
        uninstall = install(ledger)
        with _coalescing_manager(group, torch.device("cpu"), async_ops=True) as together:
            dist.isend(torch.ones(N), to, group)
            dist.irecv(torch.ones(N), of, group)
        clock.seconds = 1.0
        together.wait()
        clock.seconds = 0.0
        dist.send(torch.ones(N), to, group)
        uninstall()
        return ledger.take_calls()

    for calls in run_distributed(coalesced, P):
        assert [call.kind for call in calls] == ["send", "recv", "send"]
        assert [call.time_s for call in calls] == pytest.approx([0.5, 0.5, 0.0], abs=0.01)


def test_take_starts_again_and_uninstall_restores() -> None:
    before = dict(vars(dist.ProcessGroup))
    ledger = CommLedger()
    uninstall = install(ledger)
    assert vars(dist.ProcessGroup)["allreduce"] is not before["allreduce"]
    uninstall()
    assert dict(vars(dist.ProcessGroup)) == before
    ledger.open("a", "b", "c")
    assert ledger.take()["a", "b"].calls == 1
    assert ledger.take() == {}


class Event:
    """What the profiler saw, from ``start`` to ``end`` in nanoseconds."""

    def __init__(
        self, name: str, start: int, end: int, device: str = "CUDA", is_label: bool = False
    ):
        self._name, self._start, self._end = name, start, end
        self._device, self._is_label = device, is_label

    def name(self) -> str:
        return self._name

    def start_ns(self) -> int:
        return self._start

    def duration_ns(self) -> int:
        return self._end - self._start

    def is_user_annotation(self) -> bool:
        return self._is_label

    def device_type(self) -> SimpleNamespace:
        return SimpleNamespace(name=self._device)


def test_collectives_of_a_gpu_are_exposed_where_nothing_else_runs() -> None:
    events = [
        Event("aten::mm", 0, 900, device="CPU"),
        Event("gemm", 0, 100),
        Event("ncclDevKernel_AllGather_RING_LL", 50, 150),  # half of it beside the GEMM
        Event("ncclDevKernel_SendRecv", 200, 300),  # an all-to-all
        Event("nccl:all_to_all", 200, 300, is_label=True),
        Event("ncclDevKernel_ReduceScatter", 290, 310),  # two collectives at once are one time
    ]
    calls = [Call("tp", "all_to_all", "c", 0, time_s=1.0), Call("pp", "recv", "c", 1, time_s=0.5)]
    assert profile.times(events, calls) == pytest.approx(
        {
            "profiler_s": 220e-9,
            "exposed_s": 160e-9,
            "hidden_s": 50e-9,
            "ledger_s": 1.5,
            "computed_s": 100e-9,
        }
    )


def test_sends_of_a_cpu_count_in_neither_time() -> None:
    events = [
        Event("gloo:all_gather", 0, 100, device="CPU"),
        Event("gloo:send", 0, 900, device="CPU"),
        Event("aten::mm", 0, 900, device="CPU"),
    ]
    calls = [Call("tp", "all_gather", "c", 0, time_s=1.0), Call("pp", "send", "c", 1, time_s=0.5)]
    assert profile.times(events, calls) == pytest.approx(
        {"profiler_s": 100e-9, "exposed_s": 100e-9, "hidden_s": 0.0, "ledger_s": 1.0}
    )
