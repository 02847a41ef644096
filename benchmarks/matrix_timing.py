"""Training and prefill side by side, for ``gpu_matrix.py``: layouts take turns, several times.

A row is the median step over a layout's turns. With a hardware file, what the planner predicts
stands beside it; with a GPU's peak, its utilisation (MFU).
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matrix_turns import Bench, Turn, one_by_one
from rich.console import Console
from rich.table import Table

from megatron_helix.basics import files
from megatron_helix.experiment import execution, metrics, runs
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.planner.flops import FORMULA
from megatron_helix.report import prediction
from megatron_helix.run_config.layout import LayoutConfig

MFU = f"FLOPs of a step / (step time x GPUs x peak of one); {FORMULA}"


def timing(
    bench: Bench, experiment: ExperimentConfig, rounds: int, console: Console
) -> list[dict[str, Any]]:
    """A row for each layout that ran; one that fails is left out of the rounds that follow."""
    (model,), (phase,) = experiment.models, experiment.phases
    found: dict[str, list[metrics.RunMetrics]] = defaultdict(list)
    failed: set[str] = set()
    turns = [
        Turn(
            experiment=experiment,
            run=_run(experiment, layout),
            folder=_folder(bench, experiment, number) / layout.name,
            more=("--helix-profile",) if bench.profile and number == rounds - 1 else (),
        )
        for number in range(rounds)
        for layout in experiment.layouts
    ]
    for turn, outcome in one_by_one(
        bench, turns, wanted=lambda turn: turn.run.layout.name not in failed
    ):
        name = turn.run.layout.name
        if isinstance(outcome, str):
            failed.add(name)
            console.print(f"{phase} {model.name} {name}: {outcome}")
            continue
        found[name].append(outcome)
        console.print(
            f"{phase} {model.name} {turn.folder.parent.name} {name}: {outcome.step_ms:.1f} ms a"
            f" step, TPOT {outcome.tpot_ms:.3f} ms"
        )
    rows = [
        _row(bench, experiment, layout, found[layout.name])
        for layout in experiment.layouts
        if found[layout.name]
    ]
    console.print(_table(f"{phase}, {model.name}, {bench.gpus} GPUs, measured", rows))
    return rows


def _folder(bench: Bench, experiment: ExperimentConfig, number: int) -> Path:
    (model,), (phase,) = experiment.models, experiment.phases
    return bench.out / f"{phase}-{model.name}" / f"turn{number}"


def _run(experiment: ExperimentConfig, layout: LayoutConfig) -> runs.Run:
    (model,), (phase,) = experiment.models, experiment.phases
    return runs.Run(model=model, layout=layout, phase=phase, precision=experiment.precision)


def _row(
    bench: Bench,
    experiment: ExperimentConfig,
    layout: LayoutConfig,
    turns: list[metrics.RunMetrics],
) -> dict[str, Any]:
    step_ms = statistics.median(turn.step_ms for turn in turns)
    used = execution.utilisation(experiment, _run(experiment, layout), step_ms)
    profiles = [rank["profile"] for rank in turns[-1].per_rank if rank["profile"]]
    row = {
        "layout": layout.name,
        "micro_batch": layout.micro_batch,
        "turns": len(turns),
        "step_ms": step_ms,
        "step_ms_spread": [
            min(turn.step_ms_spread[0] for turn in turns),
            max(turn.step_ms_spread[1] for turn in turns),
        ],
        "tokens_per_s": experiment.batch.tokens / step_ms * 1e3,
        "tpot_ms": statistics.median(turn.tpot_ms for turn in turns),
        "breakdown_ms": turns[-1].breakdown_ms,
        "exposed_ms": _exposed_ms(_folder(bench, experiment, 0) / layout.name),
        "sent_mb": sum(turns[0].sent_bytes.values()) / 1e6,
        "tflops_per_gpu": used["tflops_per_device"],
        "mfu": used["mfu"],
        "memory_gb": max(rank["peak_memory_bytes"] or 0 for rank in turns[0].per_rank) / 1e9,
        "profiled": {  # milliseconds of the same step; mean of ranks
            f"{key}_ms": statistics.mean(profile[f"{key}_s"] for profile in profiles) * 1e3
            for key in ("ledger", "profiler", "exposed", "hidden")
            if profiles
        },
        "last_loss": turns[0].losses[-1],
    }
    if predicted := prediction.of_run(experiment, _run(experiment, layout)):
        row["predicted"] = predicted
        row["tps_error"] = prediction.error(row, "tokens_per_s")
    return row


def _exposed_ms(folder: Path) -> dict[str, float]:
    """Milliseconds a step that a rank was held up, by axis and kind; last step, mean of ranks."""
    ranks = [
        json.loads(file.read_text().splitlines()[-1]) for file in files.of_ranks(folder, ".jsonl")
    ]
    sums: dict[str, float] = defaultdict(float)
    for rank in ranks:
        for entry in rank["traffic"]:
            sums[f"{entry['axis']}/{entry['kind']}"] += entry["time_s"] / len(ranks) * 1e3
    return {key: value for key, value in sums.items() if value}


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    made = Table(title=title)
    made.caption = "TPOT: exposed communication and waiting of a rank per `batch` tokens; memory GB"
    with_mfu = any(row["mfu"] is not None for row in rows)
    if with_mfu:
        made.caption += f". MFU: {MFU}"
    predicted = any("predicted" in row for row in rows)
    headings = ["layout", "step ms", "tokens/s", "TPOT ms", "MB sent", "TFLOP/s", "memory"]
    headings += ["MFU"] * with_mfu
    for heading in [*headings, *(["predicted tokens/s", "error"] if predicted else [])]:
        made.add_column(heading, justify="left" if heading == "layout" else "right", no_wrap=True)
    for row in rows:
        cells = [
            row["layout"],
            f"{row['step_ms']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tpot_ms']:.3f}",
            f"{row['sent_mb']:.1f}",
            f"{row['tflops_per_gpu']:.0f}",
            f"{row['memory_gb']:.1f}",
            *([f"{row['mfu']:.1%}"] if with_mfu else []),
        ]
        if "predicted" in row:
            cells += [f"{row['predicted']['tokens_per_s']:,.0f}", f"{row['tps_error']:+.1%}"]
        made.add_row(*cells)
    return made
