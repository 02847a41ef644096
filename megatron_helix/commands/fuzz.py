"""``helix fuzz``."""

from pathlib import Path
from typing import Annotated

import typer


def fuzz(
    draws: Annotated[int, typer.Option(min=1, help="Cases to try.")] = 50,
    seed: Annotated[int, typer.Option(help="Another seed, other cases.")] = 0,
    world: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Ranks of a case; repeatable. By default 2 to 8."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="A feature that every case has: part of its name in the table."),
    ] = None,
    case: Annotated[
        str | None, typer.Option(help="Try this one, a line that a failure printed.")
    ] = None,
    tries: Annotated[
        int, typer.Option(min=0, help="Smaller cases to try for a failure, at most.")
    ] = 40,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a run may take.")] = 120.0,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all outcomes.")
    ] = None,
) -> None:
    """Draw models, layouts and features at random; compare helix with stock Megatron on CPU ranks.

    Ends with exit code 1 when a case failed, each shown with the command that tries it again.
    """
    from rich.console import Console

    from megatron_helix.basics import files
    from megatron_helix.upstream import patches

    patches.quieten()  # before Megatron is imported
    from megatron_helix.fuzz import case as cases
    from megatron_helix.fuzz import draw, hunt, report

    if as_json:
        files.require_place(as_json, "--json")
    console = Console()
    if case is not None:
        one = cases.parse(case)
        with hunt.laboratory(one.ranks(one.tp), timeout) as here:
            outcomes = [here.attempt(one)]
        console.print(report.describe(outcomes[0]), markup=False, soft_wrap=True)
        faults = [outcome for outcome in outcomes if outcome.failed]
    else:
        outcomes, faults = hunt.hunt(
            console,
            draws=draws,
            seed=seed,
            worlds=tuple(world or draw.WORLDS),
            only=draw.find(only) if only else None,
            timeout_s=timeout,
            tries=tries,
        )
        console.print(report.summary(outcomes))
        for line in report.said_apart(outcomes):
            console.print(line, markup=False, soft_wrap=True)
    if as_json:
        report.write(as_json, outcomes, faults, seed)
    if faults:
        raise typer.Exit(1)
