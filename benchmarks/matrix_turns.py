"""The turns of ``gpu_matrix.py``: which layouts, and runs of Megatron's loop one after the other.

A turn's files stay in its folder, so that a second call goes on where the first one ended.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_helix.experiment import metrics, runs
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.launching import launchers
from megatron_helix.launching.fork_ranks import RunFailed
from megatron_helix.launching.launcher_config import LauncherConfig
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig

Device = Literal["cpu", "cuda"]

FUSED_CHANNELS = 256  # head dimension up to which TransformerEngine attends over several ranks
WAITING = 3  # turns whose ranks import while one runs; a core a rank
LAUNCHER = LauncherConfig(kind="torchrun")
LOCAL = ("--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion")
LOCAL += ("--no-rope-fusion",)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the options ask for, and where turns go.

    Attributes:
        out: folder of everything.
        gpus: ranks of every run.
        device: that they run on; on ``cpu`` they rehearse.
        data: prefix of the dataset.
        flags: more of Megatron's, for every run.
        profile: whether the last step of each layout's last turn is watched by torch's profiler.
        ends: the moment (``time.monotonic``) after which no turn begins.
    """

    out: Path
    gpus: int
    device: Device
    data: Path
    flags: tuple[str, ...]
    profile: bool
    ends: float

    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.ends


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One run of Megatron's loop; ``module`` is what a rank runs, called as ``gated.py`` is."""

    experiment: ExperimentConfig
    run: runs.Run
    folder: Path
    more: tuple[str, ...] = ()
    module: str = "gated"

    @property
    def is_done(self) -> bool:
        """Whether an earlier call measured it."""
        return (self.folder / "done").exists()

    @property
    def gate(self) -> Path:
        """The file that its ranks wait for."""
        return self.folder / "go"

    def start(self, bench: Bench) -> metrics.RunMetrics:
        """Run it, once the gate is open; or only read what an earlier call measured."""
        if not self.is_done:
            flags = [
                *runs.layout_flags(self.experiment, self.run),
                *("--data-path", str(bench.data), "--split", "100,0,0"),
                *("--helix-metrics", str(self.folder), "--helix-phase", self.run.phase),
                *bench.flags,
                *self.more,
            ]
            ranks = program([self.module, str(self.gate), *flags])
            launchers.start(LAUNCHER, ranks, bench.gpus, self.folder / "logs")
            (self.folder / "done").touch()
        return metrics.read(self.folder)

    def open_gate(self) -> None:
        """Let the ranks go on."""
        self.gate.parent.mkdir(parents=True, exist_ok=True)
        self.gate.touch()

    def outcome(self, bench: Bench) -> metrics.RunMetrics | str:
        """What it measured, or why it could not."""
        self.open_gate()
        try:
            return self.start(bench)
        except (RunFailed, ValueError) as failure:
            return str(failure)


def program(words: Sequence[str]) -> launchers.Program:
    """Ranks that are processes of their own, and find the modules beside this one."""
    here = str(Path(__file__).parent)
    known = os.environ.get("PYTHONPATH", "")
    if here not in known.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, known)))
    return launchers.Program(words=words)


def one_by_one(
    bench: Bench, turns: Iterable[Turn], wanted: Callable[[Turn], bool]
) -> Iterator[tuple[Turn, metrics.RunMetrics | str]]:
    """Each turn and its outcome; the ranks of the next ones import while one has the GPUs.

    Args:
        bench: says when to end.
        turns: in order.
        wanted: asked before a turn's ranks are started.
    """
    coming: deque[tuple[Turn, Future[metrics.RunMetrics]]] = deque()
    rest = iter(turns)
    with ThreadPoolExecutor(WAITING + 1) as pool:

        def begin() -> None:
            turn = next((turn for turn in rest if wanted(turn)), None)
            if turn is not None and not bench.is_over():
                turn.gate.unlink(missing_ok=True)
                coming.append((turn, pool.submit(turn.start, bench)))

        for _ in range(WAITING):
            begin()
        while coming:
            turn, future = coming.popleft()
            begin()
            turn.open_gate()
            try:
                yield turn, future.result()
            except (RunFailed, ValueError) as failure:
                yield turn, str(failure)


def layouts(gpus: int, model: ModelConfig, micro_batches: Sequence[int]) -> list[LayoutConfig]:
    """Stock first: the analogue of TP=8, PP=2; then TP, TP x DP, and helix by each exchange."""
    made: list[LayoutConfig] = []

    def add(name: str, **values: Any) -> None:
        ranks = values.get("tp") or values["m"] * values["n"]
        data_parallel = gpus // ranks // values.get("pp", 1)
        if model.num_experts:
            values["ep"] = gpus // values.get("pp", 1)
        for each in micro_batches:
            if data_parallel == 1 or each <= max(micro_batches) // data_parallel:
                made.append(LayoutConfig(name=f"{name}_mb{each}", micro_batch=each, **values))

    if gpus == 1:
        add("tp1", tp=1)
        return made
    add(f"tp{gpus // 2}_pp2", tp=gpus // 2, pp=2)
    add(f"tp{gpus}", tp=gpus)
    for tp in (gpus // 2, gpus // 4):
        if tp:
            add(f"tp{tp}_dp{gpus // tp}", tp=tp, distributed_optimizer=True)
    for n in (gpus // 2, gpus // 4):
        if n:
            m = gpus // n
            add(f"helix_{m}x{n}_activations", m=m, n=n, exchange="activations")
            add(f"helix_{m}x{n}_weights", m=m, n=n, exchange="weights")
            add(f"helix_{m}x{n}_step", m=m, n=n, exchange="weights", gather="step")
    return made


def rivals(
    gpus: int, model: ModelConfig, micro_batches: Sequence[int], device: Device
) -> list[LayoutConfig]:
    """What an expert would pick beside: sharded weights, and context parallelism by its kinds."""
    if gpus == 1:
        return []
    shared = {"tp": 1, "distributed_optimizer": True}
    experts = {"ep": gpus} if model.num_experts else {}
    kinds: dict[str, dict[str, Any]] = {
        "torch_fsdp2": {"tp": 1, "fsdp": "torch_fsdp2"},
        "megatron_fsdp": {"tp": 1, "fsdp": "megatron_fsdp", **experts},
    }
    if device == "cuda" and not model.num_experts:
        kinds["gtp"] = {**shared, "gtp": gpus}
        for kind in ("p2p", "a2a", "all_gather") if model.kv_channels <= FUSED_CHANNELS else ():
            ring = {"cp": gpus, "cp_comm_type": kind, "overlap_dp": True}
            kinds[f"cp_{kind}"] = {**shared, **ring}
    return [
        LayoutConfig(name=f"{name}_mb{each}", micro_batch=each, **values)
        for name, values in kinds.items()
        for each in micro_batches
        if "cp" in values or each <= max(1, max(micro_batches) // gpus)
    ]


def initial_weights(
    bench: Bench,
    experiment: ExperimentConfig,
    target: Path,
    layout: LayoutConfig | None = None,
    more: Sequence[str] = (),
) -> Path:
    """One step of training, saved in ``target``: what every layout of the experiment starts from.

    By one stock rank, or all ranks of ``layout`` for a model that is too large for one.
    """
    if (target / "latest_checkpointed_iteration.txt").exists():
        return target
    (model,) = experiment.models
    layout = layout or LayoutConfig(name="alone", tp=1, micro_batch=1)
    run = runs.Run(model=model, layout=layout, phase="train", precision=experiment.precision)
    flags = [
        *runs.layout_flags(experiment, run),
        *("--data-path", str(bench.data), "--split", "100,0,0", "--train-iters", "1"),
        *("--micro-batch-size", "1", "--global-batch-size", "1"),
        *("--save", str(target), "--save-interval", "1", "--no-save-optim", "--no-save-rng"),
        *bench.flags,
        *more,
    ]
    ranks = layout.tensor_parallel_size * layout.pp
    launchers.launch(LAUNCHER, flags, ranks, target.parent / "logs" / model.name)
    return target
