"""The refusals, checked on parsed arguments and configs, and what needs stock's token order."""

from collections.abc import Iterable
from typing import Any

from megatron_helix.basics.errors import UserError
from megatron_helix.options.features.refused import REFUSED
from megatron_helix.options.features.rows import Refused, asked
from megatron_helix.options.features.works import IN_ORDER


def require_compatible(
    *sources: Any,
    rows: Iterable[Refused] = REFUSED,
    where: str = "under --helix-m > 1",
    otherwise: str = "run stock tensor parallelism (--helix-m 1)",
) -> None:
    """Refuse what cannot run under helix.

    Args:
        sources: what describes the run: a Namespace that Megatron's parser made, before or after
            its validation, and config objects, whose fields a layer spec, a YAML file or a
            checkpoint can set without a flag.
        rows: of the table.
        where: they hold.
        otherwise: what can be done but leaving it away.

    Raises:
        UserError: naming the flag or field, the reason and the remedy.
    """
    for refused in rows:
        for source in sources:
            value = refused.asked_of(source)
            if value is None:
                continue
            said = refused.asks if value is True else f"{refused.asks} {_word(value)}"
            raise UserError(
                f"{said}: is refused {where}: {refused.reason}; leave it away, or {otherwise}"
            )


def needs_order(args: Any) -> str | None:
    """The flag with its value that needs stock's token order in every layer; None if none does."""
    for row in IN_ORDER:
        value = asked(args, row.field, row.values)
        if value is not None:
            return row.asks if value is True else f"{row.asks} {_word(value)}"
    return None


def _word(value: Any) -> str:
    """A value as the command line has it."""
    return str(getattr(value, "name", value))
