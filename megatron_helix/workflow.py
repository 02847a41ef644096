"""An experiment as a graph of nodes, from its input to its report.

The six components of the source experiment are groups of nodes; the deployment verification and the
report follow them. A second call with the same experiment does only what is missing or changed.
"""

import json
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_helix import __version__
from megatron_helix.basics import files
from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import dag, decode, execution, progress, runs, source, vocabulary
from megatron_helix.experiment.config import ExperimentConfig
from megatron_helix.experiment.dag import Made, Node, seen
from megatron_helix.experiment.runs import Run
from megatron_helix.launching import launchers
from megatron_helix.report import outlook, prediction
from megatron_helix.run_config.model import ModelConfig
from megatron_helix.verification import expectation

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


def run(
    experiment: ExperimentConfig, out: Path, console: Console, file: str | None = None
) -> dict[str, Any]:
    """Do what is missing of ``experiment`` in ``out``.

    Args:
        experiment: what runs.
        out: folder for all of it.
        console: for what is said meanwhile.
        file: name of the file that the experiment was read from, for its results.

    Returns:
        The value of every node by name.

    Raises:
        UserError: when a layout cannot run, or another process works in ``out``; before any rank
            is started.
        RunFailed: when a rank of a run fails. What is finished stays.
    """
    check(experiment)
    totals = {
        f"execution_monitoring/{one.name}": runs.steps(experiment, one)
        for one in [*runs.compared(experiment), *runs.checks(experiment)]
    }
    with files.locked(out, "--out"), progress.shown(console, totals) as (notify, advance):
        return dag.run(nodes(experiment, out, console, advance, file), out, notify)


def check(experiment: ExperimentConfig) -> None:
    """Refuse what cannot run here.

    Raises:
        UserError: naming what is missing, or the run and what is wrong with it.
    """
    from megatron_helix.options import arguments

    names = [one.name for one in [*runs.compared(experiment), *runs.checks(experiment)]]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"models, layouts: {name} would be the folder of two runs; rename the model or the"
                " layout of one of them"
            )
    launchers.require(experiment.launcher, experiment.device, experiment.world_size)
    require_layouts(experiment)
    for one in [*runs.compared(experiment), *runs.checks(experiment)]:
        with runs.named(one):
            arguments.complete(runs.layout_flags(experiment, one), experiment.world_size)
    outlook.rows(experiment)


def require_layouts(experiment: ExperimentConfig) -> None:
    """Refuse layouts that cannot run anywhere.

    Raises:
        UserError: naming the run and what is wrong with it.
    """
    for one in [*runs.compared(experiment), *runs.checks(experiment)]:
        with runs.named(one):
            expectation.deployment(experiment, one).check()


def nodes(
    experiment: ExperimentConfig,
    out: Path,
    console: Console | None = None,
    advance: progress.Advance | None = None,
    file: str | None = None,
) -> list[Node]:
    """The graph of ``experiment``, in the order of its components."""
    console = console or Console(quiet=True)
    software = {name: version(name) for name in ("torch", "megatron-core")}
    ran = {**software, "megatron-helix": __version__, "source": source.of_runs()}
    compared, checks = runs.compared(experiment), runs.checks(experiment)
    made = [
        Node(
            name="input_preparation",
            inputs=[experiment.batch.model_dump(), _data(experiment)],
            action=partial(_input, experiment, out, console),
        )
    ]
    for model in experiment.models:
        made.append(
            Node(
                name=f"model_loading/{model.name}",
                inputs=[runs.model_flags(experiment, model), list(experiment.flags), ran],
                action=partial(_model, experiment, model, out, advance),
                needs=("input_preparation",),
            )
        )
    for one in [*compared, *checks]:
        made += _run_nodes(experiment, one, out, ran, advance)
    results = tuple(f"execution_monitoring/{one.name}" for one in compared)
    mapped = tuple(f"device_mapping/{one.name}" for one in compared)
    partitions = tuple(f"partitioning_setup/{one.name}" for one in compared)
    checked = tuple(f"execution_monitoring/{one.name}" for one in checks)
    document = experiment.model_dump(mode="json")
    return [
        *made,
        Node(
            name="result_collection",
            inputs=[document, file, source.whole()],
            action=partial(_collect, experiment, compared, out, file),
            needs=results,
        ),
        Node(
            name="deployment_verification",
            inputs=[document["verification"], source.whole()],
            action=partial(_verify, experiment, compared, checks, out),
            needs=(*partitions, *mapped, *results, *checked),
        ),
        Node(
            name="report",
            inputs=source.whole(),
            action=partial(_report, out),
            needs=("result_collection", "deployment_verification"),
        ),
    ]


def _data(experiment: ExperimentConfig) -> list[list[Any]]:
    """What the dataset's files hold, wherever they lie."""
    if experiment.data is None:
        return [["conversations"]] if experiment.sft else []
    return [seen(file) for file in runs.dataset_files(experiment, experiment.data)]


def _run_nodes(
    experiment: ExperimentConfig,
    one: Run,
    out: Path,
    ran: dict[str, str],
    advance: progress.Advance | None,
) -> list[Node]:
    """Partition, devices and execution of one run."""
    cut, devices, executed = (f"{component}/{one.name}" for component in COMPONENTS[2:5])
    asked = runs.source_of(one)
    # What a run of another phase does not depend on.
    request = [decode.asked(experiment).model_dump()] if one.phase == "decode" else []
    return [
        Node(
            name=cut,
            inputs=[
                asked,
                experiment.world_size,
                vocabulary.rows(experiment),
                experiment.batch.model_dump(),
                *request,
                source.whole(),
            ],
            action=lambda _: Made(value=expectation.describe(experiment, one)),
            needs=(f"model_loading/{one.model.name}",),
        ),
        Node(
            name=devices,
            inputs=[experiment.world_size, experiment.launcher.model_dump(), experiment.device],
            action=lambda values: Made(value=expectation.devices(experiment, values[cut])),
            needs=(cut,),
        ),
        Node(
            name=executed,
            inputs=[runs.layout_flags(experiment, one), *request, ran],
            action=partial(_execute, experiment, one, out, advance and partial(advance, executed)),
            needs=("input_preparation", f"model_loading/{one.model.name}", devices),
        ),
    ]


def _input(
    experiment: ExperimentConfig, out: Path, console: Console, values: dict[str, Any]
) -> Made:
    prefix = runs.dataset(experiment, out, console)
    return Made(
        value={
            "prefix": str(prefix.relative_to(out)),
            "sequences": experiment.batch.sequences,
            "sequence_length": experiment.batch.sequence_length,
        },
        files=runs.dataset_files(experiment, prefix),
    )


def _model(
    experiment: ExperimentConfig,
    model: ModelConfig,
    out: Path,
    advance: progress.Advance | None,
    values: dict[str, Any],
) -> Made:
    folder = runs.initial_folder(out, model)
    shutil.rmtree(folder, ignore_errors=True)
    name = f"model_loading/{model.name}"
    alive = advance and progress.Steps(folder, partial(advance, name))  # it has none to count
    made = runs.initial_weights(experiment, model, _prefix(out, values), out, alive)
    saved = sorted(path for path in made.rglob("*") if path.is_file())
    return Made(value={"checkpoint": str(made.relative_to(out))}, files=saved)


def _prefix(out: Path, values: dict[str, Any]) -> Path:
    return out / values["input_preparation"]["prefix"]


def _execute(
    experiment: ExperimentConfig,
    one: Run,
    out: Path,
    poll: execution.Poll | None,
    values: dict[str, Any],
) -> Made:
    result, written = execution.execute(experiment, one, out, _prefix(out, values), poll)
    return Made(value=result, files=written)


def _collect(
    experiment: ExperimentConfig,
    compared: list[Run],
    out: Path,
    file: str | None,
    values: dict[str, Any],
) -> Made:
    """``results.json``: the runs, the baseline first within a model; and what was asked for."""
    results = []
    for one in compared:
        result = dict(values[f"execution_monitoring/{one.name}"])
        result.pop("per_rank", None)
        if one.phase != "decode":
            result |= execution.utilisation(experiment, one, result["step_ms"])
        results.append({**result, "predicted": prediction.of_run(experiment, one)})
    path = out / "results.json"
    document = {"file": file, "runs": results, "outlook": outlook.rows(experiment)}
    files.write(path, json.dumps(document, indent=2) + "\n")
    asked = out / "experiment.json"
    files.write(asked, experiment.model_dump_json(indent=1) + "\n")
    return Made(value=results, files=[path, asked])


def _verify(
    experiment: ExperimentConfig,
    compared: list[Run],
    checks: list[Run],
    out: Path,
    values: dict[str, Any],
) -> Made:
    from megatron_helix.verification import verify

    found = verify.verify(experiment, compared, checks, out, values)
    path = out / "verification.json"
    files.write(path, json.dumps({"checks": found}, indent=2) + "\n")
    return Made(value=found, files=[path])


def _report(out: Path, values: dict[str, Any]) -> Made:
    from megatron_helix.report import report

    return Made(value=None, files=report.write(out))
