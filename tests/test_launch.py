"""The launcher: a run ends when its ranks do, however they end, and leaves no process behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_helix import files, launch, signals
from megatron_helix.experiment import launchers
from megatron_helix.experiment.config import LauncherConfig

ENDS_WITHIN_S = 60.0  # far more than GRACE_S, far less than the collectives' own timeout of minutes

ROOT = Path(__file__).parents[1]
# A rank that leaves its process id, and waits, or fails if it is the one that is named.
SLEEPER = """
import os, pathlib, sys, time
rank = os.environ["RANK"]
pathlib.Path(sys.argv[1], "pid" + rank).write_text(str(os.getpid()))
if rank in sys.argv[2:]:
    1 / 0
time.sleep(1000)
"""


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, though the shell had it ignored for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def write_pid(folder: Path) -> None:
    """Leave this rank's process id for the parent to look up."""
    files.write(folder / f"pid{os.environ['RANK']}", str(os.getpid()))


def pids(folder: Path) -> list[int]:
    """Process ids of all ranks that came to run."""
    return [int(file.read_text()) for file in sorted(folder.glob("pid*"))]


def is_alive(pid: int) -> bool:
    """Whether a process exists, a zombie included."""
    return Path(f"/proc/{pid}").exists()


def children() -> set[int]:
    """Every child of this process, running or not yet reaped."""
    own = str(os.getpid())
    stats = [file.read_text() for file in Path("/proc").glob("[0-9]*/stat") if file.exists()]
    return {int(stat.split()[0]) for stat in stats if stat.rpartition(")")[2].split()[1] == own}


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; fail if it never does."""
    deadline = time.monotonic() + ENDS_WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


def ranks(target: Callable[[], None], folder: Path, world_size: int = 3) -> launch.Ranks:
    """Ranks that leave their process ids and output in ``folder``, then run ``target``."""

    def run() -> None:
        write_pid(folder)
        target()

    return launch.Ranks(target=run, world_size=world_size, logs=folder / "logs")


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

    described = ranks(run, tmp_path)
    launch.run(described, timeout_s=ENDS_WITHIN_S)
    for rank in range(3):
        lines = (tmp_path / "logs" / f"rank{rank:02d}.log").read_text().splitlines()
        assert f"out {rank} {rank} 3 3" in lines
        assert "err" in lines
        assert described.log(rank) == tmp_path / "logs" / f"rank{rank:02d}.log"
    assert children() == before
    assert "RANK" not in os.environ


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    before = children()
    suicide = in_a_collective_without_rank_1(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(launch.RankFailed, match=r"rank 1 of 3 was killed by SIGKILL") as failure:
        launch.run(ranks(suicide, tmp_path), timeout_s=ENDS_WITHIN_S)
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

    with pytest.raises(launch.RankFailed, match=r"rank 1 of 2 was killed by SIGKILL"):
        launch.run(ranks(end, tmp_path, 2), poll=lambda: wait_for(have_ended))


def test_a_rank_that_is_seen_to_be_killed_late_is_still_the_cause(tmp_path: Path) -> None:
    """As on a busy machine, where a killed process keeps its exit code back for a second."""

    def end() -> None:
        if os.environ["RANK"] == "0":
            sys.exit(1)
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(launch.RankFailed, match=r"rank 1 of 2 was killed by SIGKILL"):
        launch.run(ranks(end, tmp_path, 2), timeout_s=ENDS_WITHIN_S)


def test_ranks_that_ignore_sigterm_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.2)

    def run() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / f"deaf{os.environ['RANK']}").touch()
        if os.environ["RANK"] == "0":
            wait_for(lambda: len(list(tmp_path.glob("deaf*"))) == 3)
            raise SystemExit(3)
        time.sleep(10 * ENDS_WITHIN_S)

    with pytest.raises(launch.RankFailed, match=r"rank 0 of 3 failed \(exit code 3\)"):
        launch.run(ranks(run, tmp_path), timeout_s=ENDS_WITHIN_S)
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
    with pytest.raises(launch.RankFailed, match=r"rank 0 of 1 failed \(exit code 3\)"):
        launch._watch(watched, [Process()], store, None, None)


def test_an_exception_in_a_rank_is_in_its_log(tmp_path: Path) -> None:
    def mistake() -> None:
        raise ZeroDivisionError("the mistake of rank 1")

    run = in_a_collective_without_rank_1(mistake)
    with pytest.raises(launch.RankFailed, match=r"rank \d of 3 failed \(exit code 1\)"):
        launch.run(ranks(run, tmp_path), timeout_s=ENDS_WITHIN_S)
    log = (tmp_path / "logs" / "rank01.log").read_text()
    assert "Traceback" in log
    assert "ZeroDivisionError: the mistake of rank 1" in log
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_ranks_that_outlast_the_timeout_are_ended(tmp_path: Path) -> None:
    def run() -> None:
        if os.environ["RANK"] != "0":
            time.sleep(10 * ENDS_WITHIN_S)

    with pytest.raises(TimeoutError, match=r"^ranks \[1, 2\] of 3 did not end in time$"):
        launch.run(ranks(run, tmp_path), timeout_s=1.0)
    assert len(pids(tmp_path)) == 3
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_progress_is_polled_while_ranks_run(tmp_path: Path) -> None:
    go = tmp_path / "go"
    polls: list[int] = []

    def poll() -> None:
        polls.append(1)
        if len(polls) == 3:
            go.touch()  # the ranks wait for it: without polls they would not end

    launch.run(ranks(lambda: wait_for(go.exists), tmp_path), timeout_s=ENDS_WITHIN_S, poll=poll)
    assert len(polls) >= 3


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_ranks(tmp_path: Path, ctrl_c: None, how: signal.Signals) -> None:
    def interrupt() -> None:
        if len(pids(tmp_path)) == 3:
            os.kill(os.getpid(), how)

    with pytest.raises(KeyboardInterrupt):
        launch.run(ranks(lambda: time.sleep(10 * ENDS_WITHIN_S), tmp_path), poll=interrupt)
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_a_launcher_in_the_background_of_a_script_ends_its_ranks(tmp_path: Path) -> None:
    """There the shell has SIGINT ignored, so that Ctrl-C says nothing: SIGTERM must."""

    def terminate() -> None:
        if len(pids(tmp_path)) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            launch.run(ranks(lambda: time.sleep(10 * ENDS_WITHIN_S), tmp_path), poll=terminate)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def saves(folder: Path, seconds: float) -> Callable[[], None]:
    """A rank that answers SIGTERM with a checkpoint, which takes its time."""

    def run() -> None:
        asked: list[int] = []
        signal.signal(signal.SIGTERM, lambda signum, frame: asked.append(signum))
        (folder / f"ready{os.environ['RANK']}").touch()
        wait_for(lambda: bool(asked))
        time.sleep(seconds)
        (folder / f"saved{os.environ['RANK']}").touch()

    return run


def test_ranks_that_save_when_they_are_asked_to_end_are_waited_for(
    tmp_path: Path, ctrl_c: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.1)
    monkeypatch.setattr(signals, "SILENCE_S", 0.1)

    def interrupt() -> None:
        if len(list(tmp_path.glob("ready*"))) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        launch.run(ranks(saves(tmp_path, 1.0), tmp_path), poll=interrupt)
    assert len(list(tmp_path.glob("saved*"))) == 3
    (told,) = capfd.readouterr().err.splitlines()
    assert told == (
        "waiting for the ranks to end, which may be saving a checkpoint: 300 s at most; Ctrl-C once"
        " more kills them"
    )
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_a_second_ctrl_c_waits_no_longer(tmp_path: Path, ctrl_c: None) -> None:
    folder, launcher = tmp_path, os.getpid()

    def run() -> None:
        def again(signum: int, frame: object) -> None:
            if os.environ["RANK"] == "0":
                time.sleep(0.5)  # by now it waits
                os.kill(launcher, signal.SIGINT)

        signal.signal(signal.SIGTERM, again)
        (folder / f"ready{os.environ['RANK']}").touch()
        deadline = time.monotonic() + 2 * ENDS_WITHIN_S
        while time.monotonic() < deadline:  # a signal does not end a sleep
            time.sleep(0.1)
        (folder / "outlived").touch()

    def interrupt() -> None:
        if len(list(tmp_path.glob("ready*"))) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        launch.run(ranks(run, tmp_path), poll=interrupt)
    assert len(pids(tmp_path)) == 3
    assert not (folder / "outlived").exists()
    assert not any(is_alive(pid) for pid in pids(tmp_path))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_do_not_outlive_a_launcher_that_is_ended(tmp_path: Path, how: signal.Signals) -> None:
    script = f"""
import os, pathlib, time
from megatron_helix import files, launch, signals
from megatron_helix.experiment import launchers
from megatron_helix.experiment.config import LauncherConfig
def run():
    pathlib.Path({str(tmp_path)!r}, "pid" + os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(1000)
launch.run(launch.Ranks(target=run, world_size=2))
"""
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) as launcher:
        try:
            # A file appears before its text does.
            wait_for(lambda: sum(bool(f.read_text()) for f in tmp_path.glob("pid*")) == 2)
            launcher.send_signal(how)
            launcher.communicate(timeout=ENDS_WITHIN_S)
        finally:
            launcher.kill()
    assert launcher.returncode != 0
    # SIGKILL leaves the launcher no time: its ranks end by themselves, and init reaps them.
    wait_for(lambda: not any(is_alive(pid) for pid in pids(tmp_path)))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_of_torchrun_do_not_outlive_what_started_it(
    tmp_path: Path, how: signal.Signals
) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    script = f"""
import pathlib
from megatron_helix.experiment import config, launchers
logs, kind = pathlib.Path({str(tmp_path)!r}, "logs"), config.LauncherConfig(kind="torchrun")
program = launchers.Program(words=["sleeper", {str(tmp_path)!r}], forked=lambda: None)
launchers.start(kind, program, 2, logs)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE) as launcher:
        try:
            wait_for(lambda: sum(bool(f.read_text()) for f in tmp_path.glob("pid*")) == 2)
            launcher.send_signal(how)
            _, said = launcher.communicate(timeout=ENDS_WITHIN_S)
        finally:
            launcher.kill()
    assert launcher.returncode != 0
    assert (b"KeyboardInterrupt" in said) is (how == signal.SIGTERM)
    wait_for(lambda: not any(is_alive(pid) for pid in pids(tmp_path)))


# A rank that answers SIGTERM with a checkpoint, which takes its time; or that does not answer.
SAVER = """
import os, pathlib, signal, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
asked = []
signal.signal(signal.SIGTERM, lambda signum, frame: asked.append(signum))
(folder / ("pid" + os.environ["RANK"])).write_text(str(os.getpid()))
while not asked:
    time.sleep(0.1)
deadline = time.monotonic() + seconds
while time.monotonic() < deadline:
    time.sleep(0.1)
(folder / ("saved" + os.environ["RANK"])).touch()
"""


@pytest.fixture
def saver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs :data:`SAVER` on two ranks of torchrun's; called with its seconds and a poll."""
    (tmp_path / "saver.py").write_text(SAVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(seconds: float, poll: Callable[[], None]) -> None:
        program = launchers.Program(words=["saver", str(tmp_path), str(seconds)])
        launchers.start(LauncherConfig(kind="torchrun"), program, 2, tmp_path / "logs", poll)

    return run


def have_begun(folder: Path) -> bool:
    """Whether both ranks have left their process ids; a file appears before its text does."""
    return sum(bool(file.read_text()) for file in folder.glob("pid*")) == 2


def torchrun_of(rank: int) -> int:
    """The process that started a rank."""
    return int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])


def test_ranks_of_torchrun_that_save_when_they_are_asked_to_end_are_waited_for(
    tmp_path: Path,
    ctrl_c: None,
    saver: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.1)
    monkeypatch.setattr(signals, "SILENCE_S", 0.1)

    def interrupt() -> None:
        if have_begun(tmp_path):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        saver(2.0, interrupt)
    assert len(list(tmp_path.glob("saved*"))) == 2
    assert "waiting for the ranks to end, which may be saving a" in capfd.readouterr().err
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_torchrun_leaves_its_ranks_as_long_as_the_launcher_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asks.py").write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1]).write_text(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = launchers.Program(words=["asks", str(tmp_path / "limit")])
    launchers.start(LauncherConfig(kind="torchrun"), program, 1, tmp_path / "logs")
    assert float((tmp_path / "limit").read_text()) == signals.SAVE_GRACE_S


def test_a_torchrun_that_is_killed_leaves_no_rank_behind(
    tmp_path: Path, saver: Callable[..., None]
) -> None:
    """Its ranks have sessions of their own, and do not end on SIGTERM."""

    def kill() -> None:
        if have_begun(tmp_path):
            os.kill(torchrun_of(pids(tmp_path)[0]), signal.SIGKILL)

    with pytest.raises(launch.RunFailed, match=r"a rank failed \(exit code -9\)"):
        saver(1000.0, kill)
    wait_for(lambda: not any(is_alive(pid) for pid in pids(tmp_path)))


def test_ranks_do_not_outlive_a_torchrun_of_the_users_own(tmp_path: Path) -> None:
    """That is killed, and whose ranks do not end on SIGTERM."""
    (tmp_path / "deaf.py").write_text(f"""
import os, pathlib, signal, time
from megatron_helix import pretrain_gpt
def train(flags):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path({str(tmp_path)!r}, "pid" + os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(1000)
pretrain_gpt.train, pretrain_gpt.prepare = train, lambda flags, ranks: flags
pretrain_gpt.main([])
""")
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "deaf.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-m", *words], env=environment) as torchrun:
        try:
            while not have_begun(tmp_path):  # however long their imports take
                assert torchrun.poll() is None
                time.sleep(0.1)
        finally:
            torchrun.kill()
    wait_for(lambda: not any(is_alive(pid) for pid in pids(tmp_path)))


def test_a_second_ctrl_c_kills_what_torchrun_has_started(
    tmp_path: Path, ctrl_c: None, saver: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "SILENCE_S", 0.1)
    told = signals.tell_waiting

    def again() -> None:
        told()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(signals, "tell_waiting", again)

    def interrupt() -> None:
        if have_begun(tmp_path):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        saver(2 * ENDS_WITHIN_S, interrupt)
    wait_for(lambda: not any(is_alive(pid) for pid in pids(tmp_path)))
    assert not list(tmp_path.glob("saved*"))


def test_a_rank_of_torchrun_that_fails_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["sleeper", str(tmp_path), "1"]
    program = launchers.Program(words=words, forked=lambda: pytest.fail("torchrun does not fork"))
    with pytest.raises(launch.RunFailed, match=r"a rank failed \(exit code 1\); its output is in"):
        launchers.start(LauncherConfig(kind="torchrun"), program, 2, tmp_path / "logs")
    assert "ZeroDivisionError" in "".join(
        file.read_text() for file in tmp_path.glob("logs/**/stderr.log")
    )
    assert not any(is_alive(pid) for pid in pids(tmp_path))


@pytest.mark.parametrize("timeout_s", [0.0, 1.0])
def test_a_store_that_does_not_come_up_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout_s: float
) -> None:
    before = children()
    monkeypatch.setattr(launch, "TCPStore", lambda *args, **kwargs: time.sleep(1000))
    with pytest.raises(TimeoutError, match=r"^the store at which ranks meet did not come up in"):
        launch.run(ranks(lambda: None, tmp_path), timeout_s=timeout_s)
    assert not pids(tmp_path)
    assert children() == before


def test_a_store_that_does_not_come_up_is_not_waited_for_without_a_limit_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "STORE_S", 0.5)
    monkeypatch.setattr(launch, "TCPStore", lambda *args, **kwargs: time.sleep(1000))
    with pytest.raises(
        launch.RunFailed, match=r"^the store at which ranks meet did not come up in"
    ):
        launch.run(ranks(lambda: None, tmp_path))


def test_a_store_that_dies_at_once_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = children()
    nowhere = launch.Ranks(target=lambda: None, world_size=2, address="192.0.2.1")
    monkeypatch.setattr(launch, "TCPStore", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(
        launch.RunFailed,
        match=r"^the store at which ranks meet, at 192.0.2.1, ended \(exit code 1\); .* address",
    ):
        launch.run(nowhere)
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert children() == before


def test_a_store_that_dies_while_ranks_run_ends_them(tmp_path: Path) -> None:
    before = children()

    def kill_store() -> None:
        if len(pids(tmp_path)) == 3:
            (store,) = children() - before - set(pids(tmp_path))
            os.kill(store, signal.SIGKILL)

    with pytest.raises(launch.RunFailed, match=r"ranks meet, at 127.0.0.1, ended \(exit code -9\)"):
        launch.run(ranks(lambda: time.sleep(1000), tmp_path), poll=kill_store)
    assert children() == before


def test_a_log_is_no_program(tmp_path: Path) -> None:
    launch.run(ranks(lambda: print("said"), tmp_path), timeout_s=ENDS_WITHIN_S)
    for log in (tmp_path / "logs").glob("rank*.log"):
        assert log.read_text() == "said\n"
        assert not log.stat().st_mode & 0o111


def test_a_folder_of_logs_takes_one_run_at_a_time(tmp_path: Path) -> None:
    go, context = tmp_path / "go", multiprocessing.get_context("fork")
    waits = ranks(lambda: wait_for(go.exists), tmp_path)
    first = context.Process(target=launch.run, args=(waits,))
    first.start()
    wait_for(lambda: len(pids(tmp_path)) == 3)
    with pytest.raises(
        ValueError, match=f"^--logs: .*logs must be used by one run .* process {first.pid} is at"
    ):
        launch.run(ranks(lambda: None, tmp_path))
    go.touch()
    first.join()
    assert first.exitcode == 0
    launch.run(ranks(lambda: None, tmp_path), timeout_s=ENDS_WITHIN_S)


def test_logs_that_cannot_be_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    taken = launch.Ranks(target=lambda: None, world_size=1, logs=tmp_path / "file")
    with pytest.raises(
        ValueError, match=r"^--logs: .*file must be a folder that can be made: File"
    ):
        launch.run(taken)


def test_the_process_that_forks_has_no_threads_but_those_it_had(tmp_path: Path) -> None:
    """A lock that another thread holds during a fork stays locked in the fork: ranks would hang."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before, parent, counted = threads(), os.getpid(), []
    os.register_at_fork(before=lambda: counted.append(threads()) if os.getpid() == parent else None)
    launch.run(ranks(lambda: dist.init_process_group("gloo"), tmp_path), timeout_s=ENDS_WITHIN_S)
    assert len(counted) >= 3
    assert max(counted) == before
