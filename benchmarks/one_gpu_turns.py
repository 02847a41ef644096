"""The trainings of ``one_gpu_parity.py``: pairs of ranks that share one GPU, and their curves.

Ranks of several trainings import at once; the GPU is shared by few, for two processes have it in
turns and a collective waits for both. On the CPU they are forked, one training after the other.
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import one_gpu_rank
from matrix_turns import LAUNCHER, Device, program

from megatron_helix.launching import launchers
from megatron_helix.launching.fork_ranks import RunFailed
from megatron_helix.launching.launcher_config import LauncherConfig

AHEAD = 6  # trainings whose ranks are alive
SHARING = 3  # of them past their gates
LAUNCHERS = {"cpu": LauncherConfig(kind="fork"), "cuda": LAUNCHER}
# Of ranks that NCCL takes for those of two hosts: sockets, and nothing else.
SOCKETS = {
    **dict.fromkeys(("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"), "1"),
    **dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), "lo"),
    **dict.fromkeys(("NCCL_NVLS_ENABLE", "NCCL_MNNVL_ENABLE", "NCCL_RAS_ENABLE"), "0"),
    **{"NCCL_NET": "Socket", "NCCL_NET_PLUGIN": "none", "NCCL_GRAPH_REGISTER": "0"},
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes a process longer than its steps
}


@dataclass(frozen=True)
class Curve:
    """What the steps of a training said; all figures of a step are rank 0's.

    Attributes:
        losses: of every step.
        norms: of every step's gradient; none of skipped ones.
        skipped: steps without an update.
        by_gaps: whether every step attended gap by gap.
        failed: why it is not whole; empty.
    """

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    skipped: int = 0
    by_gaps: bool = False
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of Megatron's loop.

    Attributes:
        name: of the run.
        folder: of its lines and logs.
        flags: Megatron's.
        ranks: how many.
        steps: that it takes.
        is_first: whether the others start from what it saves.
    """

    name: str
    folder: Path
    flags: tuple[str, ...]
    ranks: int
    steps: int
    is_first: bool = False

    @property
    def gate(self) -> Path:
        """The file that its ranks wait for."""
        return self.folder / "go"

    @property
    def lines(self) -> Path:
        """The file of what its steps say."""
        return self.folder / "steps.jsonl"

    @property
    def is_ready(self) -> bool:
        """Whether all ranks wait at the gate."""
        return all(one_gpu_rank.ready(self.gate, rank).exists() for rank in range(self.ranks))

    def curve(self, device: Device, poll: Callable[[], None]) -> Curve:
        """Train, and read what the steps said; a failure is said in the curve.

        Args:
            device: of the ranks.
            poll: called now and then; opens the gate, and raises RunFailed to end the run.
        """
        from megatron_helix import pretrain_gpt

        def forked() -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return one_gpu_rank.train, (pretrain_gpt.prepare(self.flags, self.ranks), self.lines)

        self.folder.mkdir(parents=True, exist_ok=True)
        marks = [one_gpu_rank.ready(self.gate, rank) for rank in range(self.ranks)]
        for old in (self.gate, self.lines, *marks):
            old.unlink(missing_ok=True)
        words = ["one_gpu_rank", str(self.gate), str(self.lines), *self.flags]
        what = replace(program(words), forked=forked)
        failed = ""
        try:
            launchers.start(LAUNCHERS[device], what, self.ranks, self.folder / "logs", poll)
        except RunFailed as failure:
            failed = str(failure)
        return read(self.lines, self.steps, failed)


def read(lines: Path, steps: int, failed: str = "") -> Curve:
    """The curve of a training of so many steps that wrote these lines."""
    text = lines.read_text().rpartition("\n")[0] if lines.exists() else ""
    said = [json.loads(line) for line in text.splitlines()]
    losses = tuple(step["loss"] for step in said)
    if len(said) != steps:
        failed = failed or f"{len(said)} steps of {steps}"
    elif not all(map(math.isfinite, losses)):
        failed = failed or "a loss is no number"
    return Curve(
        losses=losses,
        norms=tuple(step["norm"] for step in said if step["norm"] is not None),
        skipped=sum(step["skipped"] for step in said),
        by_gaps=bool(said) and all(step["by_gaps"] for step in said),
        failed=failed,
    )


def curves(
    trainings: Sequence[Training], device: Device, limit_s: float
) -> Iterator[tuple[Training, Curve]]:
    """Each training and its curve, in order.

    Args:
        trainings: what is run; one of them is first.
        device: of the ranks.
        limit_s: seconds after which all that runs is ended.
    """
    ends = time.monotonic() + limit_s
    over, saved = threading.Event(), threading.Event()
    turns = threading.Semaphore(SHARING)

    def in_time() -> None:
        if over.is_set() or time.monotonic() > ends:
            raise RunFailed(f"not done in {limit_s:.0f} s")

    def run(training: Training) -> Curve:
        opened = False

        def poll() -> None:
            nonlocal opened
            in_time()
            may_begin = training.is_first or saved.is_set()
            if not opened and may_begin and training.is_ready and turns.acquire(blocking=False):
                opened = True
                training.gate.touch()

        try:
            return training.curve(device, poll)
        finally:
            if opened:
                turns.release()
            if training.is_first:
                saved.set()

    if device == "cpu":
        yield from ((training, training.curve(device, in_time)) for training in trainings)
        return
    os.environ.update(SOCKETS)
    with ThreadPoolExecutor(AHEAD) as pool:
        try:
            started = [pool.submit(run, training) for training in trainings]
            for training, future in zip(trainings, started, strict=True):
                yield training, future.result()
        finally:
            over.set()
