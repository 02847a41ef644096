"""Commands whose ``--help`` says what there is to say, and no more."""

import re
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_MEGATRONS = "Megatron's: python -m megatron_helix.pretrain_gpt --help"


def _without_type(params: list[Any]) -> list[Any]:
    """Options that are switches show no type, for they take no value."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class Helped(TyperCommand):
    """A command whose help breaks lines where the terminal does, not where the source did."""

    def __init__(self, *args: Any, help: str | None = None, **kwargs: Any) -> None:
        joined = re.sub(r"(?<!\n)\n(?!\n)", " ", help.strip()) if help else help
        super().__init__(*args, help=joined, **kwargs)

    def get_params(self, ctx: Any) -> list[Any]:
        """Its options and arguments."""
        return _without_type(super().get_params(ctx))


class PassingOn(Helped):
    """Hands flags on to Megatron's training loop: its ``--help`` shows the helix flags, too."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """What typer shows, then the helix flags, and where Megatron's are."""
        from megatron_helix.options.flags import add_helix_arguments, shown

        super().format_help(ctx, formatter)
        typer.echo(f"Flags after --:\n\n{shown(add_helix_arguments)}\n\n{_MEGATRONS}")


class Commands(TyperGroup):
    """``helix`` itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its options."""
        return _without_type(super().get_params(ctx))
