"""What a user sees while an experiment runs: bars on a terminal, lines in a log.

The ranks have the cores to themselves: what they write is read once, no more than twice a second,
and by no thread of this process, which forks ranks.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_helix.basics import files

EVERY_S = 0.5
TOLD_S = 0.5  # of a node that is no run: one that takes less is counted only

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


class _Tally:
    """Which runs are over, and how many other nodes there was nothing to see of.

    Args:
        totals: steps of the nodes that are runs.
    """

    def __init__(self, totals: Mapping[str, int]):
        self.totals = totals
        self.begun = 0
        self.folded: Counter[str] = Counter()
        self._since: dict[str, float] = {}

    def start(self, name: str) -> str:
        """A node begins; what it is called to the user: a run with its number."""
        self._since[name] = time.monotonic()
        if name not in self.totals:
            return name
        self.begun += 1
        return f"{self.begun} of {len(self.totals)}, {name.partition('/')[2]}"

    def keep(self, name: str) -> None:
        """A node is as it was."""
        self.begun += name in self.totals
        self.folded["kept"] += 1

    def end(self, name: str) -> float | None:
        """A node is done; the seconds that it took, None where those are nothing to tell."""
        seconds = time.monotonic() - self._since[name]
        if name in self.totals or seconds >= TOLD_S:
            return seconds
        self.folded["done at once"] += 1
        return None

    def left(self) -> str:
        """What has not begun."""
        left = len(self.totals) - self.begun
        return f", {left} left" if left else ""

    def __str__(self) -> str:
        return ", ".join(f"{count} nodes {state}" for state, count in self.folded.items())


@contextmanager
def shown(console: Console, totals: Mapping[str, int]) -> Iterator[tuple[Notify, Advance | None]]:
    """Show what is done: a line, or a bar, for every node that takes its time.

    The others are counted, and told of together when all is over.

    Args:
        console: where; bars need a terminal.
        totals: steps of the nodes that are runs; numbered, so that one sees how many are left.

    Yields:
        What to call with a node's name and state (as :func:`dag.run` does), and with its name and
        the number of steps that are done; None where nobody looks at those.
    """
    tally = _Tally(totals)
    if console.is_terminal:
        with _bars(console, tally) as calls:
            yield calls
    else:
        yield _lines(console, tally), None
    if tally.folded:
        console.print(str(tally), highlight=False, soft_wrap=True)


@contextmanager
def _bars(console: Console, tally: _Tally) -> Iterator[tuple[Notify, Advance]]:
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
        total = tally.totals.get(name, 1)
        if state == "kept":
            tally.keep(name)
        elif state == "started":
            tasks[name] = progress.add_task(tally.start(name), total=total)
            progress.refresh()
        elif tally.end(name) is None:
            progress.remove_task(tasks[name])
        else:
            progress.update(tasks[name], completed=total, refresh=True)

    def advance(name: str, steps: int) -> None:
        progress.update(tasks[name], completed=steps, refresh=True)

    with progress:
        yield notify, advance


def _lines(console: Console, tally: _Tally) -> Notify:
    called: dict[str, str] = {}

    def notify(name: str, state: str) -> None:
        if state == "kept":
            tally.keep(name)
        elif state == "started":
            called[name] = tally.start(name)
        elif (seconds := tally.end(name)) is not None:
            steps = tally.totals.get(name)
            what = f"{steps} steps, {seconds:.0f} s{tally.left()}" if steps else f"{seconds:.0f} s"
            console.print(f"{called[name]}: {what}", highlight=False, soft_wrap=True)

    return notify
