"""What a user sees while an experiment runs: bars on a terminal, lines in a log."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Notify = Callable[[str, str], None]
Advance = Callable[[str, int], None]


@contextmanager
def shown(console: Console, totals: Mapping[str, int]) -> Iterator[tuple[Notify, Advance]]:
    """Show what is done.

    Args:
        console: where; bars need a terminal.
        totals: steps of the nodes that have several.

    Yields:
        What to call with a node's name and state (as :func:`dag.run` does), and with its name and
        the number of steps that are done.
    """
    if not console.is_terminal:
        yield _lines(console, totals), lambda name, steps: None
        return
    progress = Progress(
        TextColumn("{task.description:44}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    tasks: dict[str, Any] = {}

    def notify(name: str, state: str) -> None:
        total = totals.get(name, 1)
        if name not in tasks:
            tasks[name] = progress.add_task(name.removeprefix("execution_"), total=total)
        if state != "started":
            progress.update(tasks[name], completed=total)

    def advance(name: str, steps: int) -> None:
        progress.update(tasks[name], completed=steps)

    with progress:
        yield notify, advance


def _lines(console: Console, totals: Mapping[str, int]) -> Notify:
    since: dict[str, float] = {}

    def notify(name: str, state: str) -> None:
        steps = totals.get(name, 1)
        if state == "started":
            since[name] = time.monotonic()
            if steps == 1:
                return
            state = f"{steps} steps"
        elif state == "done":
            state = f"done in {time.monotonic() - since[name]:.0f} s"
        console.print(f"{name}: {state}", highlight=False, soft_wrap=True)

    return notify
