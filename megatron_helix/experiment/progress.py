"""What a user sees while an experiment runs: bars on a terminal, lines in a log.

The ranks have the cores to themselves: what they write is read once, no more than twice a second,
and by no thread of this process, which forks ranks.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_helix.basics import files

EVERY_S = 0.5

Notify = Callable[[str, str], None]
Advance = Callable[[str, int], None]


class Steps:
    """Counts the steps that every rank of a run has written a line of.

    Args:
        folder: of the ranks' ``rankNN.jsonl``.
        tell: called with the number, when it has been looked up.
    """

    def __init__(self, folder: Path, tell: Callable[[int], None]):
        self.folder, self.tell = folder, tell
        self._seen: dict[Path, tuple[int, int]] = {}  # bytes that were read, and lines in them
        self._next = 0.0

    def __call__(self) -> None:
        """Look once more, if it is time."""
        if time.monotonic() < self._next:
            return
        for path in files.of_ranks(self.folder, ".jsonl"):
            read, lines = self._seen.get(path, (0, 0))
            with path.open("rb") as file:
                file.seek(read)
                new = file.read()
            self._seen[path] = read + len(new), lines + new.count(b"\n")
        self.tell(min((lines for _, lines in self._seen.values()), default=0))
        self._next = time.monotonic() + EVERY_S


@contextmanager
def shown(console: Console, totals: Mapping[str, int]) -> Iterator[tuple[Notify, Advance | None]]:
    """Show what is done.

    Args:
        console: where; bars need a terminal.
        totals: steps of the nodes that have several.

    Yields:
        What to call with a node's name and state (as :func:`dag.run` does), and with its name and
        the number of steps that are done; None where nobody looks at those.
    """
    if not console.is_terminal:
        yield _lines(console, totals), None
        return
    progress = Progress(
        TextColumn("{task.description:44}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        redirect_stdout=False,  # forked ranks would inherit what writes around the bars
        redirect_stderr=False,
    )
    tasks: dict[str, Any] = {}

    def notify(name: str, state: str) -> None:
        total = totals.get(name, 1)
        if name not in tasks:
            tasks[name] = progress.add_task(name.removeprefix("execution_"), total=total)
        progress.update(tasks[name], completed=None if state == "started" else total, refresh=True)

    def advance(name: str, steps: int) -> None:
        progress.update(tasks[name], completed=steps, refresh=True)

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
