"""The ``helix`` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_helix.experiment import launch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Two-level attention partitioning for Megatron-LM.",
)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def pretrain(
    context: typer.Context,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Ranks to start.")],
    logs: Annotated[Path | None, typer.Option(help="Folder for the ranks' output.")] = None,
) -> None:
    """Train on this machine's CPU ranks: import Megatron once, then fork the ranks.

    Flags after -- are Megatron's and helix's, as for `torchrun -m megatron_helix.pretrain_gpt`.
    """
    from megatron_helix import pretrain_gpt

    flags = pretrain_gpt.prepare(["--helix-device", "cpu", *context.args], nproc_per_node)
    launch.run(
        launch.Ranks(target=pretrain_gpt.train, args=(flags,), world_size=nproc_per_node, logs=logs)
    )


@app.command()
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


@app.command()
def data(
    sources: Annotated[list[Path], typer.Argument(help="Text files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Prefix of the dataset: OUT.bin and OUT.idx.")],
    pattern: Annotated[str, typer.Option(help="Which files of a folder.")] = "*",
) -> None:
    """Make a Megatron dataset of UTF-8 bytes: one document a file, byte 0 ends a document."""
    from megatron_helix import corpus

    summary = corpus.build(sources, out, pattern=pattern)
    typer.echo(f"{out}.bin, {out}.idx: {summary.documents:,} documents, {summary.tokens:,} tokens")


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 2, a failed run 1."""
    try:
        app()
    except ValueError as error:
        sys.exit(_say(error, 2))
    except (launch.RankFailed, TimeoutError) as error:
        sys.exit(_say(error, 1))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))


def _say(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
