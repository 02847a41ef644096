"""Run the ranks of one machine as forks of a process that has already imported Megatron.

Importing Megatron costs seconds of CPU for every process; sixteen ranks on two cores would spend a
minute on it before the first step. A parent that has paid once forks its ranks for nothing. On GPUs
use torchrun: a process that has touched CUDA must not fork.
"""

import contextlib
import multiprocessing as mp
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_helix.basics import files, signals
from megatron_helix.launching.failures import RankFailed, RunFailed, RunTimeoutError
from megatron_helix.launching.last_words import LastWords

GRACE_S = 5.0  # between asking ranks that have lost a peer, or their time, to end and killing them
SETTLE_S = 5.0  # at most, between the first failure that is seen and naming its cause
STORE_S = 60.0  # for the store to come up
_STDOUT, _STDERR = 1, 2  # where native code writes, whatever Python's streams are


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """What to run on every rank.

    Attributes:
        target: called in each rank, after its environment names rank and world size.
        args: its arguments.
        world_size: number of ranks.
        logs: folder that takes each rank's output, ``rank00.log`` and so on; None leaves it on the
            terminal.
        address: where the ranks reach this process.
        enter: called first in each rank, with its number: puts the rank where it belongs (a network
            namespace, say) and returns environment variables for it.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    world_size: int
    logs: Path | None = None
    address: str = "127.0.0.1"
    enter: Callable[[int], dict[str, str]] | None = None

    def log(self, rank: int) -> Path | None:
        """The file that takes a rank's output."""
        return self.logs / f"rank{rank:02d}.log" if self.logs else None


def run(
    ranks: Ranks, *, timeout_s: float | None = None, poll: Callable[[], Any] | None = None
) -> None:
    """Fork the ranks and wait until all have ended well.

    Args:
        ranks: what to run.
        timeout_s: seconds after which the ranks are ended.
        poll: called about ten times a second meanwhile, for progress.

    Raises:
        UserError: when another run is writing to the same logs.
        RankFailed: as soon as a rank ends with an error or by a signal; the others are ended first.
        RunFailed: when the store at which they meet is not there.
        RunTimeoutError: when the ranks outlast ``timeout_s``.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with contextlib.closing(LastWords()) as words:
        telling = replace(ranks, target=words.of(ranks.target))
        with forked(telling, deadline) as (started, store):
            _watch(ranks, started, store, deadline, poll, words.heard)


@contextlib.contextmanager
def forked(ranks: Ranks, deadline: float | None = None) -> Iterator[tuple[list[Any], Any]]:
    """Fork the ranks, and end those that are left when the block is over.

    Args:
        ranks: what to run.
        deadline: on the monotonic clock, for the store at which they meet to come up.

    Yields:
        Their processes, in the order of their ranks, and that of the store.

    Raises:
        UserError: when another run is writing to the same logs.
        RunFailed: when the store is not there.
    """
    with (
        files.locked(ranks.logs, "--logs") if ranks.logs else contextlib.nullcontext(),
        signals.terminate_as_interrupt(),
    ):
        context = mp.get_context("fork")
        parent = os.getpid()
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            if stream:  # what is not written yet, every rank would write once more
                stream.flush()
        here, there = context.Pipe(duplex=False)
        store = context.Process(target=_serve_rendezvous, args=(ranks.address, there, parent))
        started: list[Any] = []
        grace_s = GRACE_S
        try:
            store.start()
            there.close()  # so that the end of the store is an end of file
            port = _port(store, here, ranks.address, deadline)
            for rank in range(ranks.world_size):
                args = (ranks, rank, port, parent)
                started.append(context.Process(target=_run_rank, args=args, name=f"rank {rank}"))
                started[-1].start()
            yield started, store
        except KeyboardInterrupt:
            grace_s = 0.0  # they have had their time when this is over
            _let_save(started)
            raise
        finally:
            _end(started, grace_s)
            _end([store], GRACE_S)  # last: ranks that save meet there, too
            here.close()


def _port(store: Any, here: Connection, address: str, deadline: float | None) -> int:
    """The port at which the store listens, once it does."""
    limit = time.monotonic() + STORE_S
    limit = limit if deadline is None else min(limit, deadline)
    ready = wait([here, store.sentinel], timeout=max(0.0, limit - time.monotonic()))
    if here in ready:
        with contextlib.suppress(EOFError):
            return here.recv()
    if ready:  # it is ending, and its exit code comes a moment later
        store.join(GRACE_S)
    _require_store(store, address)
    raise RunTimeoutError("the store at which ranks meet did not come up in time; try again")


def _require_store(store: Any, address: str) -> None:
    if store.exitcode is not None:
        raise RunFailed(
            f"the store at which ranks meet, at {address}, ended (exit code {store.exitcode});"
            " read what it said last: it needs an address of this machine, and memory"
        )


def _watch(
    ranks: Ranks,
    processes: list[Any],
    store: Any,
    deadline: float | None,
    poll: Any,
    heard: Callable[[], dict[int, str]] = dict,
) -> None:
    left = dict(enumerate(processes))
    while left:
        # Only who polls wakes up: the ranks have the cores to themselves.
        limit = None if deadline is None else max(0.0, deadline - time.monotonic())
        ends = [process.sentinel for process in (store, *left.values())]
        wait(ends, timeout=0.1 if poll else limit)
        if poll:
            poll()
        _require_store(store, ranks.address)
        failed = _failed(left)
        if failed:
            failed = _settled(left)
            said = heard()
            told = list(said)
            # A signal is a cause, and so is what failed before others had lost a peer.
            rank = min(
                failed,
                key=lambda rank: (failed[rank] > 0, told.index(rank) if rank in told else -1, rank),
            )
            of_rank = said.get(rank, "")
            raise RankFailed(rank, ranks.world_size, failed[rank], ranks.log(rank), of_rank)
        # Only what ended well: a rank may have failed since, and is to be seen next time.
        left = {rank: process for rank, process in left.items() if process.exitcode != 0}
        if left and deadline is not None and time.monotonic() >= deadline:
            raise RunTimeoutError(f"ranks {sorted(left)} of {ranks.world_size} did not end in time")


def _settled(processes: dict[int, Any]) -> dict[int, int]:
    """Exit codes of the ranks that have failed, with the cause of the failures among them.

    A rank that loses a peer fails at once, and the kernel closes the connections of a killed
    process before its exit code can be read: on a busy machine seconds before.
    """
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        running = any(process.exitcode is None for process in processes.values())
        if not running or min(_failed(processes).values()) < 0:
            break
        time.sleep(0.05)
    return _failed(processes)


def _failed(processes: dict[int, Any]) -> dict[int, int]:
    """Exit codes of the ranks that have failed."""
    codes = {rank: process.exitcode for rank, process in processes.items()}
    return {rank: code for rank, code in codes.items() if code}


def _let_save(processes: list[Any]) -> None:
    """Ask the ranks to end, and wait as long as a checkpoint may take to be saved."""
    running = _ask(processes)
    if not _ended(running, signals.SILENCE_S):
        signals.tell_waiting()
        _ended(running, signals.SAVE_GRACE_S)


def _end(processes: list[Any], grace_s: float) -> None:
    """End what is left: ask, wait a little, then kill. Every process is reaped."""
    running = _ask(processes)
    try:
        _ended(running, grace_s)
    finally:
        for process in running:
            process.kill()
            process.join()


def _ask(processes: list[Any]) -> list[Any]:
    """Send SIGTERM to those that run, which are returned."""
    running = [process for process in processes if process.pid and process.exitcode is None]
    for process in running:
        process.terminate()
    return running


def _ended(processes: list[Any], timeout_s: float) -> bool:
    """Whether all have ended, within the time."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return all(process.exitcode is not None for process in processes)


def _die_with(parent: int) -> None:
    """Tie this process to its parent's life, and leave Ctrl-C to the parent."""
    signals.end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _serve_rendezvous(address: str, port: Any, parent: int) -> None:
    """The store at which the ranks meet, as torchrun's agent serves it.

    In a process of its own: its threads must not run in one that forks, and a port that is chosen
    in the parent to be bound by rank 0 may be taken in between.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    _die_with(parent)
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    signal.pause()


def _run_rank(ranks: Ranks, rank: int, port: int, parent: int) -> None:
    """One rank, in its own environment and with its own output."""
    import torch

    _die_with(parent)
    if ranks.enter:
        os.environ.update(ranks.enter(rank))
    torch.set_num_threads(1)  # as torchrun does: the ranks share the cores already
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_WORLD_SIZE=str(ranks.world_size),
        MASTER_ADDR=ranks.address,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    log = ranks.log(rank)
    if log:
        with log.open("wb") as file:
            os.dup2(file.fileno(), _STDOUT)
            os.dup2(file.fileno(), _STDERR)
        # The parent's may be wrapped: by bars of a terminal, by a test.
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    ranks.target(*ranks.args)  # an exception or sys.exit becomes the exit code
