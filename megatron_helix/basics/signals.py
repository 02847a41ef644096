"""Which processes end with which, and on what signal."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Between asking ranks to end and killing them, where a user asks: --exit-signal-handler saves a
# checkpoint then.
SAVE_GRACE_S = 300.0
SILENCE_S = 2.0  # before the user is told what is waited for

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # found before a fork: there is little that a fork may do


def end_with_parent(how: signal.Signals) -> None:
    """Let the kernel send this process a signal when the one that started it is gone."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, how)


def end_with_torchrun() -> None:
    """Kill this process when the torchrun that started it, if one has, is gone.

    torchrun gives each rank a session of its own, so that nothing else reaches them then.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGKILL)


def kill_marked(name: str, value: str) -> None:
    """Kill every process that has ``name=value`` in its environment.

    Those are a process that was started with it and all that came of it, in whatever session and
    whether their parents are there or not.
    """
    entry, killed = f"{name}={value}".encode(), set[int]()
    while found := _with_environment(entry) - killed:  # one may have started another meanwhile
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= found


def _with_environment(entry: bytes) -> set[int]:
    found = set()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # gone by now, or another user's
            if entry in file.read_bytes().split(b"\0"):
                found.add(int(file.parent.name))
    return found


def tell_waiting() -> None:
    """Say why nothing ends."""
    print(
        "waiting for the ranks to end, which may be saving a checkpoint:"
        f" {SAVE_GRACE_S:.0f} s at most; Ctrl-C once more kills them",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the parent like Ctrl-C does, so that it still ends its ranks.

    Also where SIGINT is ignored, as in a script's background. Only the main thread gets signals;
    from another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
