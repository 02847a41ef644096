"""scripts/planted_faults.yaml follows the code and the suite: its lines and its tests are there."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from _pytest.mark import KeywordMatcher
from _pytest.mark.expression import Expression

from tests.covering import THOROUGH
from tests.script_module import script_module

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script() -> ModuleType:
    """The script, which is no package."""
    return script_module("scripts/planted_faults.py")


def test_every_line_that_is_to_be_spoilt_is_there(script: ModuleType) -> None:
    faults = script.load([])
    assert len(faults) > 100
    for fault in faults:
        assert fault.planted(ROOT) != (ROOT / fault.file).read_text(encoding="utf-8")


def fast_tests(node: pytest.Collector) -> Iterator[pytest.Item]:
    """Of a file or class, without those that wait for ``--all``."""
    for child in node.collect():
        if isinstance(child, pytest.Collector):
            yield from fast_tests(child)
        elif isinstance(child, pytest.Item) and not child.get_closest_marker(THOROUGH.name):
            yield child


def test_every_fault_names_tests_of_the_fast_suite(
    script: ModuleType, request: pytest.FixtureRequest
) -> None:
    @cache
    def collected(file: str) -> list[pytest.Item]:
        return list(fast_tests(pytest.Module.from_parent(request.session, path=ROOT / file)))

    without = []
    for fault in script.load([]):
        place, *rest = fault.tests
        assert rest[:1] in ([], ["-k"]), fault.name
        words = Expression.compile(rest[1]) if rest else None
        seen_by = [
            item
            for item in collected(place.partition("::")[0])
            if ("::" not in place or place in (item.nodeid, item.nodeid.partition("[")[0]))
            and (words is None or words.evaluate(KeywordMatcher.from_item(item)))
        ]
        without += [] if seen_by else [fault.name]
    assert not without
