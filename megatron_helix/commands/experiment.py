"""``helix run``, ``helix report``, ``helix compare`` and ``helix dag``."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_helix.basics.errors import UserError

Format = Literal["mermaid", "dot", "svg"]
Folder = Annotated[Path, typer.Argument(help="Folder of a finished experiment.")]


def run(
    experiment: Annotated[Path, typer.Argument(help="An experiment file (YAML).")],
    out: Annotated[Path, typer.Option(help="Folder for results and logs.")],
    hardware: Annotated[
        Path | None,
        typer.Option(help="A hardware file (YAML) to predict for; instead of the experiment's."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print results and checks as JSON; all else on stderr.")
    ] = False,
) -> None:
    """Run layouts side by side, verify and report; a second call does what is missing or changed.

    Exit code 3 when a layout leaves the baseline or the deployment is not as planned; 2 when
    something asked for cannot be, 1 when a rank failed, 130 when interrupted.
    """
    from rich.console import Console

    from megatron_helix import workflow
    from megatron_helix.experiment import config, results
    from megatron_helix.report import outlook, terminal

    console = Console(stderr=as_json)
    chosen = config.load(experiment, hardware)
    values = workflow.run(chosen, out, console, experiment.name)
    found, checks = values["result_collection"], values["deployment_verification"]
    wrong = [f"not exact: {line}" for line in results.departures(chosen, found)]
    wrong += [f"not verified: {line}" for line in results.failures(checks)]
    if as_json:
        said = {"runs": found, "outlook": outlook.rows(chosen), "checks": checks, "wrong": wrong}
        typer.echo(json.dumps(said, indent=2))
    else:
        for table in terminal.tables(chosen, found):
            console.print(table)
    for line in wrong or [f"verified: {results.verdict(chosen, found, checks)}"]:
        console.print(line, highlight=False)
    console.print(f"results: {out / 'results.json'}, report: {out / 'report.html'}")
    if wrong:
        raise typer.Exit(3)


def report(folder: Folder) -> None:
    """Write report.md, report.html and the plots once more."""
    from megatron_helix.report import report

    for path in report.write(folder):
        typer.echo(path)


def compare(
    first: Folder,
    second: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two experiments of equal models, data and batch."""
    from rich.console import Console

    from megatron_helix.report import comparison

    if as_json:
        typer.echo(json.dumps(comparison.as_json(comparison.pairs(first, second)), indent=2))
    else:
        Console().print(comparison.table(first, second))


def dag(
    experiment: Annotated[Path, typer.Argument(help="An experiment file (YAML).")],
    format: Annotated[Format, typer.Option(help="Of the graph.")] = "mermaid",
    deployment: Annotated[
        bool, typer.Option("--deployment", help="Draw operators on devices instead.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Its name; the first by default.")] = None,
    layout: Annotated[str | None, typer.Option(help="Its name; the first helix one.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers to draw, from the first.")] = 1,
) -> None:
    """Print the graph of an experiment, or of one micro-batch's forward pass on its devices."""
    from megatron_helix import workflow
    from megatron_helix.experiment import config
    from megatron_helix.report import deployment_graph, drawing

    if not deployment and (model or layout):
        raise UserError(
            "--model, --layout: say what --deployment draws, which was not given; add it, or leave"
            " them away"
        )
    chosen = config.load(experiment)
    workflow.require_layouts(chosen)
    if deployment:
        made = deployment_graph.build(chosen, model=model, layout=layout, layers=layers)
    else:
        made = drawing.experiment_graph(workflow.nodes(chosen, Path()))
    typer.echo(drawing.draw(made, format))
