"""Which code a result depends on, as a hash of its source files.

A version says nothing in a checkout that is being worked on.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import megatron_helix

_BESIDE_RUNS = ("commands", "planner", "report", "verification", "workflow.py")
_PACKAGE = Path(megatron_helix.__file__).parent
# Beside what ranks execute: their flags, and how their lines are put together.
_OF_RUNS = ("decode", "execution", "metrics", "runs", "vocabulary")


@cache
def whole() -> str:
    """Of the whole package."""
    return _digest(lambda parts: True)


@cache
def of_runs() -> str:
    """Of what the outcome of a run depends on: neither commands nor planner, verdicts nor report.

    A hint in a report is no reason to train again.
    """

    def matters(parts: tuple[str, ...]) -> bool:
        if parts[0] == "experiment":
            return Path(parts[-1]).stem in _OF_RUNS
        return parts[0] not in _BESIDE_RUNS

    return _digest(matters)


def _digest(matters: Callable[[tuple[str, ...]], bool]) -> str:
    found = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        inside = path.relative_to(_PACKAGE)
        if path.suffix in (".py", ".j2") and matters(inside.parts):
            found.update(f"{inside}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]
