"""Decode side by side, for ``gpu_matrix.py``: layouts serve one request from one checkpoint."""

import statistics
from pathlib import Path
from typing import Any

from matrix_turns import LAUNCHER, Bench, initial_weights, program
from rich.console import Console
from rich.table import Table

from megatron_helix.experiment import decode, runs
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.results import if_known
from megatron_helix.launching import launchers
from megatron_helix.launching.fork_ranks import RunFailed

Found = dict[str, Any]


def decoding(
    bench: Bench, experiment: ExperimentConfig, rounds: int, console: Console
) -> list[Found]:
    """A row for each layout; its figures are the medians of its turns.

    Args:
        bench: where it runs.
        experiment: one model, with the phase ``decode``.
        rounds: turns of each layout.
        console: for a line a turn, and the table.
    """
    (model,) = experiment.models
    out = bench.out / "decode"
    first = experiment.layouts[0]
    initial_weights(bench, experiment, runs.initial_folder(out, model), layout=first)
    found: dict[str, list[Found]] = {layout.name: [] for layout in experiment.layouts}
    for number in range(rounds):
        for layout in experiment.layouts:
            if bench.is_over() or len(found[layout.name]) < number:
                continue
            run = runs.Run(
                model=model, layout=layout, phase="decode", precision=experiment.precision
            )
            place = out / f"turn{number}"
            try:
                found[layout.name].append(_turn(bench, experiment, run, place))
            except (RunFailed, ValueError) as failure:
                console.print(f"decode {model.name} {layout.name}: {failure}")
                continue
            step = found[layout.name][-1]
            console.print(
                f"decode {model.name} {place.name} {layout.name}: {step['itl_p50_ms']:.2f} ms a"
                f" token, TPOT {step['tpot_ms']:.3f} ms"
            )
    rows = [_row(name, turns) for name, turns in found.items() if turns]
    console.print(_table(f"decode, {model.name}, {bench.gpus} GPUs, measured", rows))
    return rows


def _turn(bench: Bench, experiment: ExperimentConfig, run: runs.Run, place: Path) -> Found:
    """One request; what an earlier call measured stays."""
    folder = runs.folder(place, run)
    if not (folder / "done").exists():
        prompts = folder / "prompts.txt"
        decode.write_prompts(experiment, run, bench.data, prompts)
        initial = runs.initial_folder(bench.out / "decode", run.model)
        here = runs.initial_folder(place, run.model)
        if not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            here.symlink_to(initial.resolve())
        words = decode.program(experiment, run, prompts, place).words
        launchers.start(LAUNCHER, program([*words, *bench.flags]), bench.gpus, folder / "logs")
        (folder / "done").touch()
    return decode.read(experiment, run, folder / "metrics")


def _row(name: str, turns: list[Found]) -> Found:
    row: Found = {"layout": name, "turns": len(turns)}
    for key in ("ttft_ms", "itl_p50_ms", "itl_p99_ms", "tpot_ms", "tokens_per_s"):
        known = [turn[key] for turn in turns if turn[key] is not None]
        row[key] = statistics.median(known) if known else None
    row["kv_mb"] = max(turns[0]["kv_bytes"]) / 1e6
    row["sent_mb"] = sum(turns[0]["sent_bytes"].values()) / 1e6
    return row


def _table(title: str, rows: list[Found]) -> Table:
    made = Table(title=title)
    made.caption = "times in ms; KV cache of a rank, and what it sends in a decode step, in MB"
    figures = ("ttft_ms", "itl_p50_ms", "itl_p99_ms", "tpot_ms", "tokens_per_s", "kv_mb", "sent_mb")
    for heading in ("layout", "TTFT", "ITL p50", "p99", "TPOT", "tokens/s", "KV", "sent"):
        made.add_column(heading, justify="left" if heading == "layout" else "right", no_wrap=True)
    for row in rows:
        made.add_row(row["layout"], *(if_known(row[figure], 2) for figure in figures))
    return made
