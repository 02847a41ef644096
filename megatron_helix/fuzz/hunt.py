"""A run of the fuzzer: draws, tries, shrinks, tells."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from megatron_helix.fuzz import report
from megatron_helix.fuzz.case import Case
from megatron_helix.fuzz.draw import draw
from megatron_helix.fuzz.shrink import shrink
from megatron_helix.fuzz.trial import Laboratory, Outcome
from megatron_helix.options.features.rows import Works

MOST_DRAWS = 10  # for one case that counts


@contextmanager
def laboratory(ranks: int, timeout_s: float) -> Iterator[Laboratory]:
    """A laboratory in a folder that is gone afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="helix-fuzz-") as folder,
        Laboratory(Path(folder) / "laboratory", ranks, timeout_s) as found,
    ):
        yield found


def hunt(
    console: Console,
    *,
    draws: int,
    seed: int,
    worlds: Sequence[int],
    only: Works | None,
    timeout_s: float,
    tries: int,
) -> tuple[list[Outcome], list[Outcome]]:
    """Try cases until so many were not drawn again.

    Returns:
        All outcomes, and the faults: failures made small, each once.
    """
    outcomes: list[Outcome] = []
    faults: dict[Case, Outcome] = {}
    with (
        laboratory(max(worlds), timeout_s) as here,
        report.shown(console, draws) as update,
    ):
        for number in range(draws * MOST_DRAWS):
            if report.counted(outcomes) >= draws:
                break
            outcome = here.attempt(draw(seed, number, worlds=worlds, only=only))
            outcomes.append(outcome)
            update(outcomes)
            if outcome.failed:
                console.print(report.describe(outcome), markup=False, soft_wrap=True)
                fault = smaller(here, outcome, tries)
                if fault.case not in faults:
                    faults[fault.case] = fault
                    text = f"smaller, {report.describe(fault)}"
                    console.print(text, markup=False, soft_wrap=True)
    return outcomes, list(faults.values())


def smaller(here: Laboratory, failure: Outcome, tries: int) -> Outcome:
    """The smallest case found that fails as this one does."""
    found = {failure.case: failure}

    def fails(case: Case) -> bool:
        found[case] = here.attempt(case)
        return found[case].fails_as(failure)

    case = shrink(failure.case, fails, tries=tries)
    return replace(found[case], seconds=sum(outcome.seconds for outcome in found.values()))
