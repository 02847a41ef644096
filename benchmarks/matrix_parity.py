"""Exactness, for ``gpu_matrix.py``: every layout against the first, from the same weights.

A small dense and a small MoE model, with torch's layers in fp32 and with TransformerEngine's in
fp16 where it is installed. Runs share the GPUs, for nothing is timed.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matrix_turns import LAUNCHER, LOCAL, Bench, Turn, initial_weights, layouts, rivals
from rich.console import Console

from megatron_helix.experiment import metrics, results, runs
from megatron_helix.experiment.config import ExperimentConfig, Precision
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig

RUNS_AT_ONCE = {"cuda": 16, "cpu": 1}
# Relative, of losses and gradient norms over the steps of a run.
BANDS = {"fp32": (1e-5, 1e-4), "fp16": (2e-3, 2e-2)}


def parity(
    bench: Bench, models: Sequence[ModelConfig], console: Console
) -> Iterator[dict[str, Any]]:
    """A row for each layout, model and precision, once known: how far it leaves the first one."""
    engine = find_spec("transformer_engine") is not None
    arms: list[tuple[Precision, tuple[str, ...]]] = [("fp32", LOCAL)]
    if bench.device == "cuda":
        arms.append(("fp16", () if engine else LOCAL))
    tables = [
        ExperimentConfig(
            name="parity",
            models=[model],
            layouts=_layouts(bench, model, precision),
            world_size=bench.gpus,
            batch=BatchConfig(sequences=8, sequence_length=128),
            steps=5,
            device=bench.device,
            launcher=LAUNCHER,
            precision=precision,
        )
        for model in models
        for precision, _ in arms
    ]
    implementations = dict(arms)
    with ThreadPoolExecutor(RUNS_AT_ONCE[bench.device]) as pool:
        starts = [
            pool.submit(_start, bench, experiment, implementations[experiment.precision])
            for experiment in tables
        ]
        runs_of = [
            [
                pool.submit(
                    _outcome,
                    bench,
                    experiment,
                    layout,
                    (
                        *implementations[experiment.precision],
                        *runs.start_flags(layout, start.result()),
                    ),
                )
                for layout in experiment.layouts
            ]
            for experiment, start in zip(tables, starts, strict=True)
        ]
        for experiment, found in zip(tables, runs_of, strict=True):
            for layout, run in zip(experiment.layouts, found, strict=True):
                band = BANDS[experiment.precision]
                row = {
                    "model": experiment.models[0].name,
                    "precision": experiment.precision,
                    "layout": layout.name,
                    **_compared(run.result(), found[0].result(), band),
                }
                console.print(*row.values())
                yield row


def _folder(bench: Bench, experiment: ExperimentConfig) -> Path:
    return bench.out / "parity" / experiment.precision


def _start(bench: Bench, experiment: ExperimentConfig, more: tuple[str, ...]) -> Path:
    """The weights that all layouts start from are made; the folder of them."""
    target = runs.initial_folder(_folder(bench, experiment), experiment.models[0])
    return initial_weights(bench, experiment, target, more=more)


def _outcome(
    bench: Bench, experiment: ExperimentConfig, layout: LayoutConfig, more: tuple[str, ...]
) -> metrics.RunMetrics | str:
    if bench.is_over():
        return "out of time"
    (model,) = experiment.models
    run = runs.Run(model=model, layout=layout, phase="train", precision=experiment.precision)
    where = _folder(bench, experiment) / model.name / layout.name
    return Turn(experiment=experiment, run=run, folder=where, more=more).outcome(bench)


def _layouts(bench: Bench, model: ModelConfig, precision: Precision) -> list[LayoutConfig]:
    gpus = bench.gpus
    sharding = rivals(gpus, model, [4], bench.device)
    made = layouts(gpus, model, [4])
    # Torch's layers, which fp32 runs in, have no context parallelism, and GTP is TransformerEngine.
    made += [one for one in sharding if one.fsdp and one.trains_in(precision)]
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
