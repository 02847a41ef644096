"""An experiment as a graph of nodes, from its input to its report.

The six components of the source experiment are groups of nodes; the deployment verification and the
report follow them. A second call with the same experiment does only what is missing or changed.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import megatron_helix
from megatron_helix.experiment import dag, launchers, metrics, partition, runs
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.dag import Made, Node
from megatron_helix.experiment.runs import Run
from megatron_helix.planner.flops import of_model

COMPONENTS = (
    "input_preparation",
    "model_loading",
    "partitioning_setup",
    "device_mapping",
    "execution_monitoring",
    "result_collection",
    "deployment_verification",
    "report",
)

Poll = Callable[[int], None]


def run(experiment: ExperimentConfig, out: Path, console: Console) -> dict[str, Any]:
    """Do what is missing of ``experiment`` in ``out``.

    Returns:
        The value of every node by name.

    Raises:
        ValueError: when a layout cannot run, or another process works in ``out``; before any rank
            is started.
        RunFailed: when a rank of a run fails. What is finished stays.
    """
    check(experiment)
    with dag.locked(out):
        progress = Progress(
            TextColumn("{task.description:44}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        tasks: dict[str, Any] = {}
        totals = {
            f"execution_monitoring/{one.name}": runs.steps(experiment, one)
            for one in [*runs.compared(experiment), *runs.checks(experiment)]
        }

        def notify(name: str, state: str) -> None:
            total = totals.get(name, 1)
            if name not in tasks:
                tasks[name] = progress.add_task(name.removeprefix("execution_"), total=total)
            if state != "started":
                progress.update(tasks[name], completed=total)

        def advance(name: str, steps: int) -> None:
            progress.update(tasks[name], completed=steps)

        with progress:
            return dag.run(nodes(experiment, out, console, advance), out, notify)


def check(experiment: ExperimentConfig) -> None:
    """Refuse what cannot run.

    Raises:
        ValueError: naming the run and what is wrong with it.
    """
    from megatron_helix import arguments

    for one in [*runs.compared(experiment), *runs.checks(experiment)]:
        try:
            partition.deployment(experiment, one).check()
            arguments.complete(runs.layout_flags(experiment, one), experiment.world_size)
        except ValueError as error:
            raise ValueError(f"{one.model.name}, layout {one.layout.name}: {error}") from None


def nodes(
    experiment: ExperimentConfig,
    out: Path,
    console: Console | None = None,
    advance: Callable[[str, int], None] = lambda name, steps: None,
) -> list[Node]:
    """The graph of ``experiment``, in the order of its components."""
    console = console or Console(quiet=True)
    software = {name: version(name) for name in ("torch", "megatron-core", "megatron-helix")}
    compared, checks = runs.compared(experiment), runs.checks(experiment)
    made = [
        Node(
            name="input_preparation",
            inputs=experiment.batch.model_dump(),
            action=partial(_input, experiment, out, console),
        )
    ]
    for model in experiment.models:
        made.append(
            Node(
                name=f"model_loading/{model.name}",
                inputs=[runs.model_flags(experiment, model), software],
                action=partial(_model, experiment, model, out),
                needs=("input_preparation",),
            )
        )
    for one in [*compared, *checks]:
        made += _run_nodes(experiment, one, out, software, advance)
    results = tuple(f"execution_monitoring/{one.name}" for one in compared)
    mapped = tuple(f"device_mapping/{one.name}" for one in compared)
    partitions = tuple(f"partitioning_setup/{one.name}" for one in compared)
    checked = tuple(f"execution_monitoring/{one.name}" for one in checks)
    document = experiment.model_dump(mode="json")
    return [
        *made,
        Node(
            name="result_collection",
            inputs=document,
            action=partial(_collect, experiment, compared, out),
            needs=results,
        ),
        Node(
            name="deployment_verification",
            inputs=[document["verification"], document["tolerance"]],
            action=partial(_verify, experiment, compared, checks, out),
            needs=(*partitions, *mapped, *results, *checked),
        ),
        Node(
            name="report",
            inputs=megatron_helix.__version__,
            action=partial(_report, out),
            needs=("result_collection", "deployment_verification"),
        ),
    ]


def _run_nodes(
    experiment: ExperimentConfig,
    one: Run,
    out: Path,
    software: dict[str, str],
    advance: Callable[[str, int], None],
) -> list[Node]:
    """Partition, devices and execution of one run."""
    cut, devices, executed = (f"{component}/{one.name}" for component in COMPONENTS[2:5])
    source = runs.source_of(one)
    return [
        Node(
            name=cut,
            inputs=[source, experiment.world_size, experiment.batch.model_dump(), software],
            action=lambda _: Made(value=partition.describe(experiment, one)),
            needs=(f"model_loading/{one.model.name}",),
        ),
        Node(
            name=devices,
            inputs=[experiment.world_size, experiment.launcher.model_dump(), experiment.device],
            action=lambda values: Made(value=partition.devices(experiment, values[cut])),
            needs=(cut,),
        ),
        Node(
            name=executed,
            inputs=[runs.layout_flags(experiment, one), software],
            action=partial(_execute, experiment, one, out, partial(advance, executed)),
            needs=("input_preparation", devices),
        ),
    ]


def _input(
    experiment: ExperimentConfig, out: Path, console: Console, values: dict[str, Any]
) -> Made:
    prefix = runs.corpus_dataset(out, console)
    files = [prefix.with_suffix(suffix) for suffix in (".bin", ".idx")]
    return Made(
        value={
            "prefix": str(prefix.relative_to(out)),
            "sequences": experiment.batch.sequences,
            "sequence_length": experiment.batch.sequence_length,
        },
        files=files,
    )


def _model(experiment: ExperimentConfig, model: Any, out: Path, values: dict[str, Any]) -> Made:
    shutil.rmtree(runs.initial_folder(out, model), ignore_errors=True)
    made = runs.initial_weights(experiment, model, _prefix(out, values), out)
    files = sorted(path for path in made.rglob("*") if path.is_file())
    return Made(value={"checkpoint": str(made.relative_to(out))}, files=files)


def _prefix(out: Path, values: dict[str, Any]) -> Path:
    return out / values["input_preparation"]["prefix"]


def _execute(
    experiment: ExperimentConfig, one: Run, out: Path, poll: Poll, values: dict[str, Any]
) -> Made:
    """The result of one run, measured now."""
    folder = runs.folder(out, one)
    shutil.rmtree(folder, ignore_errors=True)
    flags = runs.run_flags(experiment, one, _prefix(out, values), out)
    if not one.is_check:
        flags.append("--helix-profile")
    launchers.launch(
        experiment.launcher,
        flags,
        experiment.world_size,
        folder / "logs",
        lambda: poll(metrics.steps_done(folder / "metrics")),
    )
    measured = asdict(metrics.read(folder / "metrics"))
    # Written by the same code in a prefill, too, where there is no gradient to speak of.
    measured["grad_norms"] = [norm for norm in measured["grad_norms"] if norm is not None]
    flops = step_flops(experiment, one)
    per_gpu = flops / experiment.world_size / measured["step_ms"] / 1e9
    result = {
        "name": one.name,
        "model": one.model.name,
        "layout": one.layout.name,
        "phase": one.phase,
        "precision": one.precision,
        "world_size": experiment.world_size,
        **measured,
        "tflops_per_device": per_gpu,
        "mfu": per_gpu / experiment.peak_tflops if experiment.peak_tflops else None,
        "device": experiment.device,
        "source": "measured",
        "commit": commit(),
    }
    kept = folder / "result.json"
    kept.write_text(json.dumps(result, indent=2))
    return Made(value=result, files=[kept, *sorted((folder / "metrics").iterdir())])


def step_flops(experiment: ExperimentConfig, one: Run) -> float:
    """Operations of a step of a run; attention in full, as is usual for FLOPs utilisation."""
    tokens, keys = experiment.batch.tokens, experiment.batch.sequence_length
    flops = of_model(one.model, tokens=tokens, words=tokens, keys=keys, vocabulary=runs.VOCABULARY)
    return flops * (3 if one.phase == "train" else 1)


def _collect(
    experiment: ExperimentConfig, compared: list[Run], out: Path, values: dict[str, Any]
) -> Made:
    """``results.json``: the runs, the baseline first within a model; and what was asked for."""
    results = [dict(values[f"execution_monitoring/{one.name}"]) for one in compared]
    for result in results:
        del result["per_rank"]
    path = out / "results.json"
    path.write_text(json.dumps({"runs": results}, indent=2) + "\n")
    asked = out / "experiment.json"
    asked.write_text(experiment.model_dump_json(indent=1) + "\n")
    return Made(value=results, files=[path, asked])


def _verify(
    experiment: ExperimentConfig,
    compared: list[Run],
    checks: list[Run],
    out: Path,
    values: dict[str, Any],
) -> Made:
    from megatron_helix.experiment import verify

    found = verify.verify(experiment, compared, checks, out, values)
    path = out / "verification.json"
    path.write_text(json.dumps({"checks": found}, indent=2) + "\n")
    return Made(value=found, files=[path])


def _report(out: Path, values: dict[str, Any]) -> Made:
    from megatron_helix.experiment import report

    return Made(value=None, files=report.write(out))


def commit() -> str:
    """The commit of this source tree, or the version where it is none."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return megatron_helix.__version__
