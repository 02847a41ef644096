"""Ranks that live for many calls, where a launch for each would cost more than the call.

:class:`Session` forks gloo ranks once and calls functions on them, one after the other, each on as
many of the ranks as it wants. Every call finds the process as it was forked: what Megatron, helix
and a run of theirs left in modules and classes is put back (:mod:`megatron_helix.fuzz.state`), and
process groups are new ones.
"""

import contextlib
import faulthandler
import gc
import os
import pickle
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_helix.fuzz.state import Snapshot, forget_models
from megatron_helix.launching import fork_ranks
from megatron_helix.launching.failures import RunFailed

SETTLE_S = 3.0  # at most, between the first rank that failed and taking what the others say
SAID_LINES = 15  # of a rank's output
YOUNG = 50_000  # objects: looking for garbage is for after a call, which seldom makes more
NO_ANSWER, ENDED = "no answer", "exit code"


@dataclass(frozen=True)
class Failure:
    """How a function ended on a rank.

    Attributes:
        kind: name of the exception; :data:`ENDED` and a number where the rank itself did;
            :data:`NO_ANSWER` where time was up.
        text: what the exception says.
        trace: where it was raised; the end of the rank's output, or where the rank was.
        functions: names of the functions that the exception passed through, outermost first.
    """

    kind: str
    text: str
    trace: str = ""
    functions: tuple[str, ...] = ()


class CallFailed(RunFailed):
    """A function did not return on every rank.

    Attributes:
        failure: of the rank that ended, or failed first.
    """

    def __init__(self, failure: Failure):
        self.failure = failure
        super().__init__(f"{failure.kind}: {failure.text}\n{failure.trace}")


class Session:
    """Forked ranks, for the length of a ``with`` block.

    Everything a function needs should be imported before: what a rank imports itself is not put
    back to how it was, and every rank pays for it again.

    Args:
        size: most ranks that a call can want.
        folder: takes the ranks' output, of the last call only.
    """

    def __init__(self, size: int, folder: Path):
        self.size, self.folder = size, folder
        self._life = contextlib.ExitStack()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._calls = 0

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def call(
        self, function: Callable[..., Any], *args: Any, ranks: int, timeout_s: float = 120.0
    ) -> list[Any]:
        """``function(*args)`` on the first ``ranks`` ranks of a gloo world; what they returned.

        Ranks are forked where none live. Those of a failed call end with it, unless all of them
        failed alike: then none waits for another.

        Args:
            function: of a module's own, since its name is what travels.
            args: anything that pickles.
            ranks: how many take part; the others rest.
            timeout_s: seconds after which they are ended.

        Raises:
            CallFailed: when the function raised or a rank was lost, or time was up.
        """
        if not self._processes:
            self._fork()
        self._calls += 1
        job = pickle.dumps((self._calls, ranks, function, args))
        for pipe in self._pipes[:ranks]:
            pipe.send_bytes(job)
        answers: dict[int, Any] = {}
        try:
            self._collect(answers, ranks, time.monotonic() + timeout_s)
        except BaseException:
            self.end()
            raise
        failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
        if not failures and len(answers) == ranks:
            return [answers[rank] for rank in range(ranks)]
        if len(failures) < ranks or len({(one.kind, one.text) for one in failures}) > 1:
            self.end()
        if failures:  # a rank that ended is why others failed
            raise CallFailed(min(failures, key=lambda one: ENDED not in one.kind))
        silent = sorted(set(range(ranks)) - answers.keys())
        text = f"ranks {silent} of {ranks} did not answer in {timeout_s:g} s"
        raise CallFailed(Failure(NO_ANSWER, text, self._stack(silent[0])))

    def end(self) -> None:
        """End the ranks; the next call forks new ones."""
        self._life.close()
        self._pipes, self._processes = [], []

    def _fork(self) -> None:
        ends = [get_context("fork").Pipe() for _ in range(self.size)]
        self._pipes = [ours for ours, _ in ends]
        ranks = fork_ranks.Ranks(
            target=_serve,
            args=([theirs for _, theirs in ends],),
            world_size=self.size,
            logs=self.folder,
        )
        gc.collect()
        gc.freeze()  # what is there now the ranks need not look through again and again
        try:
            self._processes, _ = self._life.enter_context(fork_ranks.forked(ranks))
        finally:
            gc.unfreeze()

    def _collect(self, answers: dict[int, Any], ranks: int, deadline: float) -> None:
        """Take answers until all are there, or a while after the first failure."""
        while len(answers) < ranks:
            left = {rank: self._pipes[rank] for rank in range(ranks) if rank not in answers}
            ended = [self._processes[rank].sentinel for rank in left]
            if not wait([*left.values(), *ended], deadline - time.monotonic()):
                return
            for rank, pipe in left.items():
                if pipe.poll():
                    answers[rank] = self._told(rank, pickle.loads(pipe.recv_bytes()))
                elif self._processes[rank].exitcode is not None:
                    code = self._processes[rank].exitcode
                    text = f"rank {rank} ended"
                    answers[rank] = Failure(f"{ENDED} {code}", text, self._tail(rank))
                if isinstance(answers.get(rank), Failure):
                    deadline = min(deadline, time.monotonic() + SETTLE_S)

    def _told(self, rank: int, answer: Any) -> Any:
        """The answer; of an exit also what was printed before it, argparse's error for one."""
        if isinstance(answer, Failure) and answer.kind == "SystemExit":
            return replace(answer, text=f"{answer.text}, {self._tail(rank, 1)}")
        return answer

    def _tail(self, rank: int, lines: int = SAID_LINES) -> str:
        return "\n".join(self._output(rank).splitlines()[-lines:])

    def _stack(self, rank: int) -> str:
        """Where a rank was when it was ended, innermost first."""
        stack = self._output(rank).rpartition("(most recent call first):\n")[2]
        return "\n".join(stack.splitlines()[:SAID_LINES])

    def _output(self, rank: int) -> str:
        return (self.folder / f"rank{rank:02d}.log").read_text(errors="replace")


def _serve(ends: list[Connection]) -> None:
    """One rank: call what comes, until the session ends it."""
    faulthandler.register(signal.SIGTERM, chain=True)  # a rank that hangs says where
    rank = int(os.environ["RANK"])
    _keep_to_a_core(rank)
    pipe = ends[rank]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)  # pyright: ignore
    _write_checkpoints_in_process()
    gc.set_threshold(YOUNG)
    state = Snapshot(
        "megatron", "megatron_helix", "torch.distributed.checkpoint", classes=(dist.ProcessGroup,)
    )
    while True:
        job = pipe.recv_bytes()
        # Not after the call before: its answer said that no rank waits for this one any more.
        groups = list(distributed_c10d._world.pg_map)
        if dist.is_initialized():
            dist.destroy_process_group()
        state.restore()
        forget_models()
        _let_go(groups)
        sys.stdout.flush()
        sys.stderr.flush()
        os.ftruncate(sys.stdout.fileno(), os.lseek(sys.stdout.fileno(), 0, os.SEEK_SET))
        number, ranks, function, args = pickle.loads(job)
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
        try:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(str(number), store),  # pyright: ignore
                rank=rank,
                world_size=ranks,
                timeout=timedelta(minutes=10),
            )
            answer = function(*args)
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code:  # a run that was told to exit
                pipe.send_bytes(pickle.dumps(None))
                continue
            frames = traceback.extract_tb(error.__traceback__)
            trace = traceback.format_exc()
            functions = tuple(frame.name for frame in frames)
            answer = Failure(type(error).__name__, str(error), trace, functions)
        pipe.send_bytes(pickle.dumps(answer))


def _let_go(groups: list[dist.ProcessGroup]) -> None:
    """Of all at once: each waits for gloo's thread to look up, a hundredth of a second a socket."""
    with ThreadPoolExecutor(max(1, len(groups))) as pool:
        for _ in range(len(groups)):
            pool.submit(groups.pop)


def _keep_to_a_core(rank: int) -> None:
    """With its threads: ranks that share cores and wander between them take an eighth longer."""
    cores = sorted(os.sched_getaffinity(0))
    first = os.getppid()  # other sessions begin elsewhere
    os.sched_setaffinity(0, {cores[(first + rank) % len(cores)]})


def _write_checkpoints_in_process() -> None:
    """Hand the results of a save on without the process that Megatron starts for it.

    It serves asynchronous saves alone, and would outlive a rank that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()
