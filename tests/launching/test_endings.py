"""How a run is ended: those that save are waited for, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_helix.basics import signals
from megatron_helix.launching import failures, fork_ranks, launchers
from megatron_helix.launching.launcher_config import LauncherConfig
from tests.covering import THOROUGH, fast
from tests.launch_case import ENDS_WITHIN_S, ctrl_c, is_alive, pids, ranks, wait_for

ROOT = Path(__file__).parents[2]
# A rank that leaves its process id, and waits, or fails if it is the one that is named.
SLEEPER = """
import os, pathlib, sys, time
rank = os.environ["RANK"]
pathlib.Path(sys.argv[1], "pid" + rank).write_text(str(os.getpid()))
if rank in sys.argv[2:]:
    1 / 0
time.sleep(1000)
"""
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


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_ranks(tmp_path: Path, how: signal.Signals) -> None:
    def interrupt() -> None:
        if len(pids(tmp_path)) == 3:
            os.kill(os.getpid(), how)

    with ctrl_c(), pytest.raises(KeyboardInterrupt):
        fork_ranks.run(ranks(lambda: time.sleep(10 * ENDS_WITHIN_S), tmp_path), poll=interrupt)
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
            fork_ranks.run(ranks(lambda: time.sleep(10 * ENDS_WITHIN_S), tmp_path), poll=terminate)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fork_ranks, "GRACE_S", 0.1)
    monkeypatch.setattr(signals, "SILENCE_S", 0.1)

    def interrupt() -> None:
        if len(list(tmp_path.glob("ready*"))) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with ctrl_c(), pytest.raises(KeyboardInterrupt):
        fork_ranks.run(ranks(saves(tmp_path, 1.0), tmp_path), poll=interrupt)
    assert len(list(tmp_path.glob("saved*"))) == 3
    (told,) = capfd.readouterr().err.splitlines()
    assert told == (
        "waiting for the ranks to end, which may be saving a checkpoint: 300 s at most; Ctrl-C once"
        " more kills them"
    )
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_a_second_ctrl_c_waits_no_longer(tmp_path: Path) -> None:
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

    with ctrl_c(), pytest.raises(KeyboardInterrupt):
        fork_ranks.run(ranks(run, tmp_path), poll=interrupt)
    assert len(pids(tmp_path)) == 3
    assert not (folder / "outlived").exists()
    assert not any(is_alive(pid) for pid in pids(tmp_path))


@pytest.mark.parametrize("how", fast([signal.SIGKILL], [signal.SIGTERM, signal.SIGKILL]))
def test_ranks_do_not_outlive_a_launcher_that_is_ended(tmp_path: Path, how: signal.Signals) -> None:
    script = f"""
import os, pathlib, time
from megatron_helix.basics import files, signals
from megatron_helix.launching import fork_ranks
def run():
    pathlib.Path({str(tmp_path)!r}, "pid" + os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(1000)
fork_ranks.run(fork_ranks.Ranks(target=run, world_size=2))
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


@pytest.mark.parametrize("how", fast([signal.SIGTERM], [signal.SIGTERM, signal.SIGKILL]))
def test_ranks_of_torchrun_do_not_outlive_what_started_it(
    tmp_path: Path, how: signal.Signals
) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    script = f"""
import pathlib
from megatron_helix.launching import launchers
from megatron_helix.launching.launcher_config import LauncherConfig
logs, kind = pathlib.Path({str(tmp_path)!r}, "logs"), LauncherConfig(kind="torchrun")
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
    saver: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fork_ranks, "GRACE_S", 0.1)
    monkeypatch.setattr(signals, "SILENCE_S", 0.1)

    def interrupt() -> None:
        if have_begun(tmp_path):
            os.kill(os.getpid(), signal.SIGINT)

    with ctrl_c(), pytest.raises(KeyboardInterrupt):
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

    with pytest.raises(failures.RunFailed, match=r"a rank failed \(exit code -9\)"):
        saver(1000.0, kill)
    wait_for(lambda: not any(is_alive(pid) for pid in pids(tmp_path)))


@THOROUGH
def test_ranks_do_not_outlive_a_torchrun_of_the_users_own(tmp_path: Path) -> None:
    """That is killed, and whose ranks do not end on SIGTERM."""
    (tmp_path / "deaf.py").write_text(f"""
import os, pathlib, signal, time
from megatron_helix import pretrain_gpt
def train(flags):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path({str(tmp_path)!r}, "pid" + os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(1000)
pretrain_gpt.train, pretrain_gpt.prepare = train, lambda flags, ranks, **options: flags
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


@THOROUGH
def test_a_second_ctrl_c_kills_what_torchrun_has_started(
    tmp_path: Path, saver: Callable[..., None], monkeypatch: pytest.MonkeyPatch
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

    with ctrl_c(), pytest.raises(KeyboardInterrupt):
        saver(2 * ENDS_WITHIN_S, interrupt)
    wait_for(lambda: not any(is_alive(pid) for pid in pids(tmp_path)))
    assert not list(tmp_path.glob("saved*"))


@THOROUGH
def test_a_rank_of_torchrun_that_fails_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["sleeper", str(tmp_path), "1"]
    program = launchers.Program(words=words, forked=lambda: pytest.fail("torchrun does not fork"))
    with pytest.raises(
        failures.RunFailed, match=r"a rank failed \(exit code 1\); its output is in"
    ):
        launchers.start(LauncherConfig(kind="torchrun"), program, 2, tmp_path / "logs")
    assert "ZeroDivisionError" in "".join(
        file.read_text() for file in tmp_path.glob("logs/**/stderr.log")
    )
    assert not any(is_alive(pid) for pid in pids(tmp_path))
