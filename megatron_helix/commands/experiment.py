"""``helix run``."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    experiment: Annotated[Path, typer.Argument(help="An experiment file (YAML).")],
    out: Annotated[Path, typer.Option(help="Folder for results and logs.")],
) -> None:
    """Run layouts side by side and compare them; exit code 3 when one leaves the baseline."""
    from rich.console import Console

    from megatron_helix.experiment import config, report, workflow

    console = Console()
    chosen = config.load(experiment)
    results = workflow.run(chosen, out, console)
    report.write(results, out / "results.json")
    console.print(report.table(results))
    console.print(f"results: {out / 'results.json'}")
    departures = report.departures(chosen, results)
    for departure in departures:
        console.print(f"not exact: {departure}")
    if departures:
        raise typer.Exit(3)
