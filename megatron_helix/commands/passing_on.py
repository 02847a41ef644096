"""Commands that hand flags on to Megatron's training loop."""

from typing import Any

import typer
from typer.core import TyperCommand

_MEGATRONS = "Megatron's: python -m megatron_helix.pretrain_gpt --help"


class PassingOn(TyperCommand):
    """Its ``--help`` shows the helix flags too, behind its own options."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """What typer shows, then the helix flags, and where Megatron's are."""
        from megatron_helix.options.flags import add_helix_arguments, shown

        super().format_help(ctx, formatter)
        typer.echo(f"Flags after --:\n\n{shown(add_helix_arguments)}\n\n{_MEGATRONS}")
