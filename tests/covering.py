"""Which cases the fast suite runs; ``scripts/test.sh --all`` runs the others, marked thorough."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

THOROUGH = pytest.mark.thorough


def covering(
    cases: Iterable[tuple], *, together: int = 1, of: Sequence[int] | None = None
) -> list[Any]:
    """Parameters of a test: as few unmarked as show every value, or every so many together.

    Args:
        cases: values of a test's parameters.
        together: 1 for every value of each parameter, 2 for every pair of values of two.
        of: numbers of the parameters whose values are to be shown; all, by default.
    """
    cases = list(cases)
    of = range(len(cases[0])) if of is None else of
    shows = [set(combinations(((i, repr(case[i])) for i in of), together)) for case in cases]
    missing, kept = set().union(*shows), set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(shows[i] & missing))
        kept.add(best)
        missing -= shows[best]
    return [
        pytest.param(*case, marks=() if i in kept else THOROUGH) for i, case in enumerate(cases)
    ]


def fast(kept: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test, of which the fast suite runs the ones named."""
    kept = list(kept)
    return [pytest.param(case, marks=() if case in kept else THOROUGH) for case in cases]


def one_of_each(models: Sequence[str], cases: Iterable[tuple]) -> list[Any]:
    """Parameters of a test, of which the fast suite runs the first of each of these models.

    All of them with every exchange, cut and feature: tests/fuzz/test_slice.py.
    """
    cases = list(cases)
    first = [next(case for case in cases if case[0] == model) for model in models]
    return [pytest.param(*case, marks=() if case in first else THOROUGH) for case in cases]
