"""Layouts side by side on the GPUs of one machine: exactness, then TPS and exposed communication.

    python benchmarks/gpu_matrix.py --gpus 2 --out runs/gpu
    python benchmarks/gpu_matrix.py --gpus 4 --device cpu --shape tiny --steps 3 --out runs/tried

*Parity*: a small dense and a small MoE model, each layout from the same weights on the same data,
with torch's layers in fp32 and with TransformerEngine's in fp16 where it is installed. Runs share
the GPUs. *Timing*: the layer shape of the source experiment, stock layouts and helix taking turns,
each at several micro-batches; a turn is one training or prefill run of Megatron's loop, a row the
median step over its turns.

A turn's files stay in OUT: a second call goes on where the first one ended. ``--limit`` ends a call
in time for its results to be written. Each timed layout draws weights of its own.
"""

import json
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from megatron_helix.experiment import execution, launchers, metrics, results, runs
from megatron_helix.experiment.config import ExperimentConfig, LauncherConfig, Precision
from megatron_helix.launch import RunFailed
from megatron_helix.run_config import BatchConfig, LayoutConfig, ModelConfig

TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "kv_channels": 32,
}
SEED: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 8192,
    "num_attention_heads": 16,
    "kv_channels": 512,
}
SHAPES = {
    "tiny": [
        ModelConfig(name="dense", ffn_hidden_size=1024, **TINY),
        ModelConfig(name="moe", ffn_hidden_size=256, num_experts=8, **TINY),
    ],
    "seed": [
        ModelConfig(name="dense", ffn_hidden_size=32768, **SEED),
        ModelConfig(name="moe", ffn_hidden_size=32768, num_experts=8, **SEED),
    ],
    # Adam's states of the 17 billion parameters of the source's MoE model need eight GPUs.
    "small-experts": [
        ModelConfig(name="dense", ffn_hidden_size=32768, **SEED),
        ModelConfig(name="moe_8192", ffn_hidden_size=8192, num_experts=8, **SEED),
    ],
}
PARITY_RUNS_AT_ONCE = 8
LOCAL = ("--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion")
LOCAL += ("--no-rope-fusion",)
# Relative, of losses and gradient norms over the steps of a parity run.
BANDS = {"fp32": (1e-5, 1e-4), "fp16": (2e-3, 2e-2)}


Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Bench:
    """What the options ask for, and where turns go."""

    out: Path
    gpus: int
    device: Device
    launcher: LauncherConfig
    data: Path
    flags: tuple[str, ...]

    def turn(
        self, experiment: ExperimentConfig, run: runs.Run, more: Sequence[str], folder: Path
    ) -> metrics.RunMetrics:
        """One run, or what an earlier call measured of it."""
        if not (folder / "done").exists():
            flags = [
                *runs.layout_flags(experiment, run),
                *("--data-path", str(self.data), "--split", "100,0,0"),
                *("--helix-metrics", str(folder), "--helix-phase", run.phase),
                *self.flags,
                *more,
            ]
            launchers.launch(self.launcher, flags, self.gpus, folder / "logs")
            (folder / "done").touch()
        return metrics.read(folder)


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


def main(
    out: Annotated[Path, typer.Option(help="Folder of the turns and of results.json.")],
    gpus: Annotated[int, typer.Option(min=1, max=8)],
    device: Annotated[Device, typer.Option(help="cpu rehearses.")] = "cuda",
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "seed",
    parts: Annotated[str, typer.Option(help="Of parity, train, prefill.")] = "parity,train,prefill",
    models: Annotated[str, typer.Option(help="Names of models; all of the shape.")] = "",
    only: Annotated[str, typer.Option(help="Layouts whose name has one of these words.")] = "",
    sequences: Annotated[int, typer.Option(help="Of a global batch.")] = 16,
    sequence_length: int = 2048,
    micro_batches: Annotated[str, typer.Option(help="Each layout tries these.")] = "1,2,4,8,16",
    rounds: int = 2,
    steps: Annotated[int, typer.Option(min=2, help="Of a turn; the first warms up.")] = 11,
    precision: Precision = "fp16",
    limit: Annotated[float, typer.Option(help="Seconds after which no turn begins.")] = 1e9,
    flags: Annotated[str, typer.Option(help="More flags for every run.")] = "",
) -> None:
    """Run what is asked for; exit code 1 when a layout leaves the first one's losses."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    ends = time.monotonic() + limit
    console = Console(width=150)
    bench = Bench(
        out=out,
        gpus=gpus,
        device=device,
        launcher=LauncherConfig(kind="torchrun" if device == "cuda" else "fork"),
        data=runs.corpus_dataset(out, console),
        flags=tuple(flags.split()),
    )
    found: dict[str, Any] = {
        "gpus": gpus,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "source": "measured",
    }
    exact = True
    for part in parts.split(","):
        if part == "parity":
            found[part] = _parity(bench, ends, console)
            exact = all(row.get("exact", True) for row in found[part])
            continue
        for model in SHAPES[shape]:
            if models and model.name not in models.split(","):
                continue
            sizes = [int(size) for size in micro_batches.split(",") if int(size) <= sequences]
            chosen = [
                item
                for item in layouts(gpus, model, sizes)
                if not only or any(word in item.name for word in only.split(","))
            ]
            experiment = ExperimentConfig(
                name=part,
                models=[model],
                layouts=chosen,
                world_size=gpus,
                batch=BatchConfig(sequences=sequences, sequence_length=sequence_length),
                phases=["train" if part == "train" else "prefill"],
                steps=steps,
                learning_rate=1e-4,
                device=device,
                launcher=bench.launcher,
                precision=precision,
            )
            found[f"{part}-{model.name}"] = _timing(bench, experiment, rounds, ends, console)
            (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    raise typer.Exit(int(not exact))


def _parity(bench: Bench, ends: float, console: Console) -> list[dict[str, Any]]:
    """Every layout against the first, with the same initial weights."""
    engine = find_spec("transformer_engine") is not None
    arms: list[tuple[Precision, tuple[str, ...]]] = [("fp32", LOCAL)]
    if bench.device == "cuda":
        arms.append(("fp16", () if engine else LOCAL))
    tables = [(model, *arm) for model in SHAPES["tiny"] for arm in arms]
    at_once = PARITY_RUNS_AT_ONCE if bench.device == "cuda" else 1  # a thread must not fork
    rows: list[dict[str, Any]] = []
    for model, precision, implementation in tables:
        experiment = ExperimentConfig(
            name="parity",
            models=[model],
            layouts=_parity_layouts(bench.gpus, model, precision),
            world_size=bench.gpus,
            batch=BatchConfig(sequences=8, sequence_length=128),
            steps=5,
            device=bench.device,
            launcher=bench.launcher,
            precision=precision,
        )
        initial = bench.out / "parity" / precision
        _initial_weights(bench, experiment, model, implementation, initial)
        more = [*implementation, *_from(runs.initial_folder(initial, model))]

        def one(
            layout: LayoutConfig,
            experiment: ExperimentConfig = experiment,
            folder: Path = initial / model.name,
            more: Sequence[str] = more,
        ) -> metrics.RunMetrics | str:
            if time.monotonic() > ends:
                return "out of time"
            run = runs.Run(
                model=experiment.models[0],
                layout=layout,
                phase="train",
                precision=experiment.precision,
            )
            try:
                return bench.turn(experiment, run, more, folder / layout.name)
            except (RunFailed, ValueError) as failure:
                return str(failure)

        if at_once > 1:
            with ThreadPoolExecutor(at_once) as pool:
                turns = list(pool.map(one, experiment.layouts))
        else:
            turns = [one(layout) for layout in experiment.layouts]
        for layout, turn in zip(experiment.layouts, turns, strict=True):
            row = {"model": model.name, "precision": precision, "layout": layout.name}
            rows.append({**row, **_compared(turn, turns[0], BANDS[precision])})
            console.print(*rows[-1].values())
    return rows


def _parity_layouts(gpus: int, model: ModelConfig, precision: Precision) -> list[LayoutConfig]:
    made = layouts(gpus, model, [4])
    if gpus > 1:
        cut: dict[str, Any] = {"m": gpus, "n": 1, "ep": gpus if model.num_experts else 1}
        sequence = {**cut, "exchange": "weights", "split": "sequence", "micro_batch": 1}
        made.append(LayoutConfig(name="helix_sequence", **sequence))
        if precision == "fp32":  # its softmax in fp32 is not TransformerEngine's
            scores = {**cut, "exchange": "scores", "micro_batch": 4}
            made.append(LayoutConfig(name="helix_scores", **scores))
    return made


def _compared(
    turn: metrics.RunMetrics | str, first: metrics.RunMetrics | str, bands: tuple[float, float]
) -> dict[str, Any]:
    if isinstance(turn, str) or isinstance(first, str):
        return {"failed": str(turn), "exact": False}
    loss = results.largest_difference(turn.losses, first.losses)
    norm = results.largest_difference(_known(turn), _known(first))
    return {"loss": loss, "grad_norm": norm, "exact": loss <= bands[0] and norm <= bands[1]}


def _known(turn: metrics.RunMetrics) -> list[float]:
    return [norm for norm in turn.grad_norms if norm is not None]


def _from(folder: Path) -> list[str]:
    return ["--load", str(folder), "--finetune", "--no-load-optim", "--no-load-rng"]


def _initial_weights(
    bench: Bench, experiment: ExperimentConfig, model: ModelConfig, more: Sequence[str], out: Path
) -> None:
    """One stock step, saved: what every layout of a parity run starts from."""
    target = runs.initial_folder(out, model)
    if (target / "latest_checkpointed_iteration.txt").exists():
        return
    flags = [
        *runs.model_flags(experiment, model),
        *("--data-path", str(bench.data), "--split", "100,0,0", "--train-iters", "1"),
        *("--micro-batch-size", "1", "--global-batch-size", "1"),
        *("--save", str(target), "--save-interval", "1", "--no-save-optim", "--no-save-rng"),
        *(["--fp16", "--initial-loss-scale", "65536"] if experiment.precision == "fp16" else []),
        *bench.flags,
        *more,
    ]
    launchers.launch(bench.launcher, flags, 1, target.parent / "logs" / model.name)


def _timing(
    bench: Bench, experiment: ExperimentConfig, rounds: int, ends: float, console: Console
) -> list[dict[str, Any]]:
    """Layouts take turns; one that fails (memory) is left out of the next rounds."""
    (model,), (phase,) = experiment.models, experiment.phases
    turns: dict[str, list[metrics.RunMetrics]] = {item.name: [] for item in experiment.layouts}
    failed: dict[str, str] = {}
    for turn in range(rounds):
        for layout in experiment.layouts:
            if layout.name in failed or time.monotonic() > ends:
                continue
            run = runs.Run(model=model, layout=layout, phase=phase, precision=experiment.precision)
            folder = bench.out / f"{phase}-{model.name}" / f"turn{turn}" / layout.name
            profile = ["--helix-profile"] if turn == rounds - 1 else []
            try:
                turns[layout.name].append(bench.turn(experiment, run, profile, folder))
            except RunFailed as failure:
                failed[layout.name] = str(failure)
                console.print(f"{phase} {model.name} {layout.name}: {failure}")
                continue
            step = turns[layout.name][-1]
            console.print(
                f"{phase} {model.name} turn {turn} {layout.name}: {step.step_ms:.1f} ms a step,"
                f" TPOT {step.tpot_ms:.3f} ms"
            )
    rows = [
        _row(experiment, layout, turns[layout.name])
        for layout in experiment.layouts
        if turns[layout.name]
    ]
    console.print(_table(f"{phase}, {model.name}, {bench.gpus} GPUs, measured", rows))
    return rows


def _row(
    experiment: ExperimentConfig, layout: LayoutConfig, turns: list[metrics.RunMetrics]
) -> dict[str, Any]:
    step_ms = statistics.median(turn.step_ms for turn in turns)
    run = runs.Run(
        model=experiment.models[0],
        layout=layout,
        phase=experiment.phases[0],
        precision=experiment.precision,
    )
    flops = execution.step_flops(experiment, run) / experiment.world_size
    profiles = [rank["profile"] for rank in turns[-1].per_rank if rank["profile"]]
    seconds = sum(profile["profiler_s"] for profile in profiles)
    return {
        "layout": layout.name,
        "turns": len(turns),
        "step_ms": step_ms,
        "step_ms_spread": [
            min(turn.step_ms_spread[0] for turn in turns),
            max(turn.step_ms_spread[1] for turn in turns),
        ],
        "tokens_per_s": experiment.batch.tokens / step_ms * 1e3,
        "tpot_ms": statistics.median(turn.tpot_ms for turn in turns),
        "breakdown_ms": turns[-1].breakdown_ms,
        "sent_mb": sum(turns[0].sent_bytes.values()) / 1e6,
        "tflops_per_gpu": flops / step_ms / 1e9,
        "memory_gb": max(rank["peak_memory_bytes"] or 0 for rank in turns[0].per_rank) / 1e9,
        "exposed_of_profiled": (
            sum(profile["ledger_s"] for profile in profiles) / seconds if seconds else None
        ),
        "last_loss": turns[0].losses[-1],
    }


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    made = Table(title=title)
    made.caption = "TPOT: exposed communication and waiting of a rank per `batch` tokens; memory GB"
    for heading in ("layout", "step ms", "tokens/s", "TPOT ms", "MB sent", "TFLOP/s", "memory"):
        made.add_column(heading, justify="left" if heading == "layout" else "right", no_wrap=True)
    for row in rows:
        made.add_row(
            row["layout"],
            f"{row['step_ms']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tpot_ms']:.3f}",
            f"{row['sent_mb']:.1f}",
            f"{row['tflops_per_gpu']:.0f}",
            f"{row['memory_gb']:.1f}",
        )
    return made


if __name__ == "__main__":
    typer.run(main)
