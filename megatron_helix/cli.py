"""The ``helix`` command: its subcommands are the modules of :mod:`megatron_helix.commands`."""

from typing import Annotated

import typer

from megatron_helix import __version__
from megatron_helix.basics import errors, signals
from megatron_helix.commands import calibrate, data, experiment, fuzz, generate, plan, pretrain
from megatron_helix.commands import launch as launch_command
from megatron_helix.commands.helped import Commands, Helped, PassingOn
from megatron_helix.launching.failures import RunFailed

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Two-level attention partitioning for Megatron-LM.",
)
_ANY_FLAG = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(cls=PassingOn, context_settings=_ANY_FLAG)(pretrain.pretrain)
app.command(cls=Helped, context_settings=_ANY_FLAG)(generate.generate)
app.command(cls=Helped)(experiment.run)
app.command(cls=Helped)(experiment.report)
app.command(cls=Helped)(experiment.compare)
app.command(cls=Helped)(experiment.dag)
app.command(cls=Helped)(data.data)
app.command(cls=Helped)(plan.plan)
app.command(cls=Helped)(calibrate.calibrate)
app.command(cls=Helped)(fuzz.fuzz)
app.command(cls=PassingOn, context_settings=_ANY_FLAG)(launch_command.launch)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"megatron-helix {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command: a user's mistake is one line on stderr and exit code 2, a failed run 1.

    What else goes wrong is a fault of the program and keeps its trace. typer ends an interrupted
    command with 130.
    """
    signals.end_with_torchrun()
    try:
        with errors.told():
            app()
    except RunFailed as error:
        errors.leave(error, 1)


if __name__ == "__main__":
    main()
