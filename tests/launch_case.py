"""What the tests of the launcher share: ranks that leave their process ids, and who is alive."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_helix.basics import files
from megatron_helix.launching import fork_ranks

ENDS_WITHIN_S = 60.0  # far more than GRACE_S, far less than the collectives' own timeout of minutes


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


def ranks(target: Callable[[], None], folder: Path, world_size: int = 3) -> fork_ranks.Ranks:
    """Ranks that leave their process ids and output in ``folder``, then run ``target``."""

    def run() -> None:
        write_pid(folder)
        target()

    return fork_ranks.Ranks(target=run, world_size=world_size, logs=folder / "logs")


@contextlib.contextmanager
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, though the shell had it ignored for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
