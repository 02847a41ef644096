"""Forked ranks, for a command."""

from collections.abc import Callable
from typing import Any

import typer

from megatron_helix.launching import fork_ranks

_SHOWN_LINES = 20  # of a rank that failed


def run(ranks: fork_ranks.Ranks, *, poll: Callable[[], Any] | None = None) -> None:
    """Run the ranks; when one fails, show the end of its output.

    Raises:
        UserError: as :func:`fork_ranks.run`; so for the other errors.
    """
    try:
        fork_ranks.run(ranks, poll=poll)
    except fork_ranks.RankFailed as failure:
        log = ranks.log(failure.rank)
        if log and log.exists():
            said = log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
            typer.echo("\n".join(said), err=True)
        raise
