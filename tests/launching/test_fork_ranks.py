"""The launcher: a run ends when its ranks do, and leaves no process behind."""

import contextlib
import io
import multiprocessing
import os
import pty
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from rich.console import Console

from megatron_helix.basics import errors
from megatron_helix.experiment import progress
from megatron_helix.fuzz import report
from megatron_helix.launching import failures, fork_ranks
from tests.launch_case import ENDS_WITHIN_S, children, is_alive, pids, ranks, wait_for


def in_a_collective_without_rank_1(how_it_ends: Callable[[], None]) -> Callable[[], None]:
    """Rank 1 meets its end while the others are in a collective that waits for it."""

    def run() -> None:
        dist.init_process_group("gloo")
        dist.barrier()
        if dist.get_rank() == 1:
            how_it_ends()
        dist.barrier()

    return run


def test_finished_ranks_leave_their_output_and_their_environment_is_torchruns(
    tmp_path: Path,
) -> None:
    before = children()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")

    def run() -> None:
        print("out", *(os.environ[name] for name in names))
        print("err", file=sys.stderr)
        dist.init_process_group("gloo")
        assert dist.get_world_size() == 3
        dist.barrier()  # one that left would be missed by one that still connects

    described = ranks(run, tmp_path)
    fork_ranks.run(described, timeout_s=ENDS_WITHIN_S)
    for rank in range(3):
        lines = (tmp_path / "logs" / f"rank{rank:02d}.log").read_text().splitlines()
        assert f"out {rank} {rank} 3 3" in lines
        assert "err" in lines
        assert described.log(rank) == tmp_path / "logs" / f"rank{rank:02d}.log"
    assert children() == before
    assert "RANK" not in os.environ


def test_ranks_of_a_wrapped_stream_write_to_their_logs_alone(tmp_path: Path) -> None:
    """A parent's bars, or a test, may stand between ``print`` and the terminal."""

    def run() -> None:
        print("out")
        print("err", file=sys.stderr)

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        fork_ranks.run(ranks(run, tmp_path, 1), timeout_s=ENDS_WITHIN_S)
    assert (tmp_path / "logs" / "rank00.log").read_text().split() == ["out", "err"]
    assert said.getvalue() == ""


@contextlib.contextmanager
def bars_of_a_run(console: Console) -> Iterator[None]:
    with progress.shown(console, {"execution_monitoring/a": 3}) as (notify, _):
        notify("execution_monitoring/a", "started")
        yield


@contextlib.contextmanager
def bars_of_the_fuzzer(console: Console) -> Iterator[None]:
    with report.shown(console, 3):
        yield


@pytest.mark.parametrize("bars", [bars_of_a_run, bars_of_the_fuzzer])
def test_bars_of_a_terminal_are_in_no_log(
    bars: Callable[[Console], contextlib.AbstractContextManager[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = "word " * 60  # longer than a terminal is wide

    def run() -> None:
        print(line)
        print(line, file=sys.stderr)

    above, below = pty.openpty()
    with open(above, "rb", buffering=0) as screen, open(below, "w") as terminal:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, terminal)
        threads = len(list(Path("/proc/self/task").iterdir()))
        with bars(Console(force_terminal=True, width=80)):
            assert (sys.stdout, sys.stderr) == (terminal, terminal)
            assert len(list(Path("/proc/self/task").iterdir())) == threads  # forks need none
            fork_ranks.run(ranks(run, tmp_path, 1), timeout_s=ENDS_WITHIN_S)
        terminal.flush()
        assert b"word" not in screen.read(100_000)
    assert (tmp_path / "logs" / "rank00.log").read_text().splitlines() == [line, line]


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    before = children()
    suicide = in_a_collective_without_rank_1(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(failures.RankFailed, match=r"rank 1 of 3 was killed by SIGKILL") as failure:
        fork_ranks.run(ranks(suicide, tmp_path), timeout_s=ENDS_WITHIN_S)
    assert (failure.value.rank, failure.value.exitcode) == (1, -signal.SIGKILL)
    assert "rank01.log" in str(failure.value)
    assert len(pids(tmp_path)) == 3
    assert not any(is_alive(pid) for pid in pids(tmp_path))
    assert children() == before


def test_the_killed_rank_is_named_though_a_lower_one_has_failed_too(tmp_path: Path) -> None:
    def end() -> None:
        if os.environ["RANK"] == "0":
            sys.exit(1)
        os.kill(os.getpid(), signal.SIGKILL)

    def have_ended() -> bool:
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in pids(tmp_path)]
        return [stat.rpartition(")")[2].split()[0] for stat in stats] == ["Z", "Z"]

    with pytest.raises(failures.RankFailed, match=r"rank 1 of 2 was killed by SIGKILL"):
        fork_ranks.run(ranks(end, tmp_path, 2), poll=lambda: wait_for(have_ended))


def test_a_rank_that_is_seen_to_be_killed_late_is_still_the_cause(tmp_path: Path) -> None:
    """As on a busy machine, where a killed process keeps its exit code back for a second."""

    def end() -> None:
        if os.environ["RANK"] == "0":
            sys.exit(1)
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(failures.RankFailed, match=r"rank 1 of 2 was killed by SIGKILL"):
        fork_ranks.run(ranks(end, tmp_path, 2), timeout_s=ENDS_WITHIN_S)


def test_ranks_that_ignore_sigterm_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_ranks, "GRACE_S", 0.2)

    def run() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / f"deaf{os.environ['RANK']}").touch()
        if os.environ["RANK"] == "0":
            wait_for(lambda: len(list(tmp_path.glob("deaf*"))) == 3)
            raise SystemExit(3)
        time.sleep(10 * ENDS_WITHIN_S)

    with pytest.raises(failures.RankFailed, match=r"rank 0 of 3 failed \(exit code 3\)"):
        fork_ranks.run(ranks(run, tmp_path), timeout_s=ENDS_WITHIN_S)
    assert len(pids(tmp_path)) == 3
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_a_rank_that_fails_while_it_is_looked_at_is_not_lost(tmp_path: Path) -> None:
    """Its exit code is there at the second look of a round."""

    class Process:
        looks = 0

        def __init__(self) -> None:
            self.sentinel, there = os.pipe()
            os.close(there)  # ready to be waited for

        @property
        def exitcode(self) -> int | None:
            self.looks += 1
            return None if self.looks == 1 else 3

    watched = ranks(lambda: None, tmp_path, 1)
    store = SimpleNamespace(exitcode=None, sentinel=os.pipe()[0])
    with pytest.raises(failures.RankFailed, match=r"rank 0 of 1 failed \(exit code 3\)"):
        fork_ranks._watch(watched, [Process()], store, None, None)


def test_an_exception_in_a_rank_is_in_its_log_and_in_the_line_that_ends_the_run(
    tmp_path: Path,
) -> None:
    """Of the rank that failed first: the others have only lost a peer."""

    def mistake() -> None:
        raise ZeroDivisionError("the mistake of rank 1")

    run = in_a_collective_without_rank_1(mistake)
    said = r"^rank 1 of 3 failed \(exit code 1\): ZeroDivisionError: the mistake of rank 1; the "
    with pytest.raises(failures.RankFailed, match=said):
        fork_ranks.run(ranks(run, tmp_path), timeout_s=ENDS_WITHIN_S)
    log = (tmp_path / "logs" / "rank01.log").read_text()
    assert "Traceback" in log
    assert "ZeroDivisionError: the mistake of rank 1" in log
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_a_mistake_that_a_rank_tells_is_in_the_line_too(tmp_path: Path) -> None:
    def mistaken() -> None:
        with errors.told():
            raise errors.UserError("--flag: must be so,\n  got not so")

    said = r"^rank 0 of 1 failed \(exit code 2\): UserError: --flag: must be so, got not so; the "
    with pytest.raises(failures.RankFailed, match=said):
        fork_ranks.run(ranks(mistaken, tmp_path, 1), timeout_s=ENDS_WITHIN_S)


def test_ranks_that_outlast_the_timeout_are_ended(tmp_path: Path) -> None:
    def run() -> None:
        if os.environ["RANK"] != "0":
            time.sleep(10 * ENDS_WITHIN_S)

    with pytest.raises(TimeoutError, match=r"^ranks \[1, 2\] of 3 did not end in time$"):
        fork_ranks.run(ranks(run, tmp_path), timeout_s=5.0)
    assert len(pids(tmp_path)) == 3
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_progress_is_polled_while_ranks_run(tmp_path: Path) -> None:
    go = tmp_path / "go"
    polls: list[int] = []

    def poll() -> None:
        polls.append(1)
        if len(polls) == 3:
            go.touch()  # the ranks wait for it: without polls they would not end

    fork_ranks.run(ranks(lambda: wait_for(go.exists), tmp_path), timeout_s=ENDS_WITHIN_S, poll=poll)
    assert len(polls) >= 3


@pytest.mark.parametrize("timeout_s", [0.0, 1.0])
def test_a_store_that_does_not_come_up_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout_s: float
) -> None:
    before = children()
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **kwargs: time.sleep(1000))
    with pytest.raises(TimeoutError, match=r"^the store at which ranks meet did not come up in"):
        fork_ranks.run(ranks(lambda: None, tmp_path), timeout_s=timeout_s)
    assert not pids(tmp_path)
    assert children() == before


def test_a_store_that_does_not_come_up_is_not_waited_for_without_a_limit_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_ranks, "STORE_S", 0.5)
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **kwargs: time.sleep(1000))
    with pytest.raises(
        failures.RunFailed, match=r"^the store at which ranks meet did not come up in"
    ):
        fork_ranks.run(ranks(lambda: None, tmp_path))


def test_a_store_that_dies_at_once_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = children()
    nowhere = fork_ranks.Ranks(target=lambda: None, world_size=2, address="192.0.2.1")
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(
        failures.RunFailed,
        match=r"^the store at which ranks meet, at 192.0.2.1, ended \(exit code 1\); .* address",
    ):
        fork_ranks.run(nowhere)
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert children() == before


def test_a_store_that_dies_while_ranks_run_ends_them(tmp_path: Path) -> None:
    before = children()

    def kill_store() -> None:
        if len(pids(tmp_path)) == 3:
            (store,) = children() - before - set(pids(tmp_path))
            os.kill(store, signal.SIGKILL)

    with pytest.raises(
        failures.RunFailed, match=r"ranks meet, at 127.0.0.1, ended \(exit code -9\)"
    ):
        fork_ranks.run(ranks(lambda: time.sleep(1000), tmp_path), poll=kill_store)
    assert children() == before


def test_a_log_is_no_program(tmp_path: Path) -> None:
    fork_ranks.run(ranks(lambda: print("said"), tmp_path), timeout_s=ENDS_WITHIN_S)
    for log in (tmp_path / "logs").glob("rank*.log"):
        assert log.read_text() == "said\n"
        assert not log.stat().st_mode & 0o111


def test_a_folder_of_logs_takes_one_run_at_a_time(tmp_path: Path) -> None:
    go, context = tmp_path / "go", multiprocessing.get_context("fork")
    waits = ranks(lambda: wait_for(go.exists), tmp_path)
    first = context.Process(target=fork_ranks.run, args=(waits,))
    first.start()
    wait_for(lambda: len(pids(tmp_path)) == 3)
    with pytest.raises(
        ValueError, match=f"^--logs: .*logs must be used by one run .* process {first.pid} is at"
    ):
        fork_ranks.run(ranks(lambda: None, tmp_path))
    go.touch()
    first.join()
    assert first.exitcode == 0
    fork_ranks.run(ranks(lambda: None, tmp_path), timeout_s=ENDS_WITHIN_S)


def test_logs_that_cannot_be_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    taken = fork_ranks.Ranks(target=lambda: None, world_size=1, logs=tmp_path / "file")
    with pytest.raises(
        ValueError, match=r"^--logs: .*file must be a folder that can be made: File"
    ):
        fork_ranks.run(taken)


def test_the_process_that_forks_has_no_threads_but_those_it_had(tmp_path: Path) -> None:
    """A lock that another thread holds during a fork stays locked in the fork: ranks would hang."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before, parent, counted = threads(), os.getpid(), []
    os.register_at_fork(before=lambda: counted.append(threads()) if os.getpid() == parent else None)
    fork_ranks.run(
        ranks(lambda: dist.init_process_group("gloo"), tmp_path), timeout_s=ENDS_WITHIN_S
    )
    assert len(counted) >= 3
    assert max(counted) == before
