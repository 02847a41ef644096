"""What a user of the fuzzer sees: progress, every failure as it is found, a table, a JSON file."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_helix.basics import files
from megatron_helix.fuzz.case import Case
from megatron_helix.fuzz.compare import TOLERANCES
from megatron_helix.fuzz.trial import (
    CRASHED,
    DIFFERS,
    DISCARDED,
    DRAWN_AGAIN,
    EQUAL,
    HUNG,
    REFUSED,
    STOCK_FAILED,
    Outcome,
)
from megatron_helix.options.features.works import WORKS

MEANING = {
    EQUAL: "helix gave stock's numbers",
    REFUSED: "helix said in one line why not",
    DISCARDED: "Megatron does not take the flags; drawn again",
    STOCK_FAILED: "stock Megatron failed: nothing to compare with; drawn again",
    DIFFERS: "other numbers than stock's",
    CRASHED: "helix failed where stock runs",
    HUNG: "helix did not end",
}


def command(case: Case) -> str:
    """The line that tries a case again."""
    return f"helix fuzz --case {shlex.quote(str(case))}"


def describe(outcome: Outcome) -> str:
    """A failure: what, where, both runs' numbers, and the command that shows it again."""
    lines = [f"{outcome.status}: {outcome.text}", *_numbers(outcome)]
    lines += outcome.trace.strip().splitlines()[-6:] if not outcome.helix else []
    return "\n".join([*lines, f"  {command(outcome.case)}"])


def _numbers(outcome: Outcome) -> Iterator[str]:
    """Of the last rank of each run, which has a loss."""
    for name, run in (("stock", outcome.stock), ("helix", outcome.helix)):
        for number, step in enumerate(run[-1] if run else (), start=1):
            values = ", ".join(
                f"{what} {value:.8g}"
                for what in TOLERANCES
                if (value := getattr(step, what)) is not None
            )
            yield f"  {name}, step {number}: {values}"


@contextmanager
def shown(console: Console, draws: int) -> Iterator[Callable[[list[Outcome]], None]]:
    """Progress while cases are tried: a bar on a terminal, now and then a line in a log.

    Yields:
        What to call with the outcomes so far.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        auto_refresh=False,  # no thread beside what forks ranks, whose output is their own
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = progress.add_task("cases", total=draws)

    def update(outcomes: list[Outcome]) -> None:
        done, counts = counted(outcomes), Counter(outcome.status for outcome in outcomes)
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        progress.update(task, completed=done, description=said, refresh=True)
        if not console.is_terminal and outcomes[-1].status not in DRAWN_AGAIN and done % 10 == 0:
            console.print(f"{done} of {draws} cases: {said}", soft_wrap=True)

    with progress:
        yield update


def counted(outcomes: list[Outcome]) -> int:
    """Cases that were not drawn again."""
    return sum(outcome.status not in DRAWN_AGAIN for outcome in outcomes)


def summary(outcomes: list[Outcome]) -> Table:
    """How many cases came out how, and how long they took."""
    table = Table("Outcome", "Cases", "Seconds", "Meaning", title="helix fuzz")
    for status, meaning in MEANING.items():
        of_it = [outcome for outcome in outcomes if outcome.status == status]
        if of_it or status == EQUAL:
            seconds = sum(outcome.seconds for outcome in of_it)
            table.add_row(status, str(len(of_it)), f"{seconds:.0f}", meaning)
    return table


def said_apart(outcomes: list[Outcome]) -> Iterator[str]:
    """Why cases were refused or stock failed, and the features that no equal case had."""
    for status in (REFUSED, STOCK_FAILED):
        texts = Counter(
            outcome.text.splitlines()[0].split(", got")[0][:120]
            for outcome in outcomes
            if outcome.status == status
        )
        for text, count in texts.most_common():
            yield f"{status}, {count} times: {text}"
    missing = [name for name, count in coverage(outcomes).items() if not count]
    if missing:
        yield f"in no equal case: {'; '.join(missing)}"  # names have commas


def coverage(outcomes: list[Outcome]) -> dict[str, int]:
    """For every feature that has examples, in how many equal cases it was."""
    seen = Counter(
        feature
        for outcome in outcomes
        if outcome.status == EQUAL
        for feature in outcome.case.features
    )
    return {
        row.feature: sum(seen[example] for example in row.examples) for row in WORKS if row.examples
    }


def write(file: Path, outcomes: list[Outcome], faults: list[Outcome], seed: int) -> None:
    """Everything, as JSON."""
    content = {
        "seed": seed,
        "counts": dict(Counter(outcome.status for outcome in outcomes)),
        "features in equal cases": coverage(outcomes),
        "faults": [_json(outcome) for outcome in faults],
        "cases": [_json(outcome) for outcome in outcomes],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, json.dumps(content, indent=1, default=str) + "\n")


def _json(outcome: Outcome) -> dict[str, Any]:
    runs = {name: getattr(outcome, name)[-1:] for name in ("stock", "helix")}
    return {**asdict(outcome), "case": str(outcome.case), "command": command(outcome.case)} | {
        name: [asdict(step) for steps in run for step in steps] for name, run in runs.items()
    }
