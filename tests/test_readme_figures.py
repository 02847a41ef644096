"""Figures of README.md, and those that docs/performance.md has by hand, are the stored ones."""

import ast
import copy
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.script_module import script_module

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TYPED = re.compile(r"\d (%|times|ms|GB)")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """What writes them."""
    return script_module("docs/readme.py")


def test_the_tables_are_what_the_results_say(script: ModuleType) -> None:
    assert script.page(README) == README, "call python docs/readme.py"


def test_a_figure_changed_by_hand_is_found(script: ModuleType) -> None:
    assert TYPED.search(README)
    forged = re.sub(r"\d( % faster than CP)", r"0\1", README)
    assert forged != README
    assert script.page(forged) == README


def test_another_result_is_another_figure(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = script.memory
    monkeypatch.setattr(script, "memory", lambda one, other: shown(other, one))
    assert script.page(README) != README


def test_an_earlier_call_is_not_compared_with_a_later_one(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast its rows are."""
    stored, said = script.stored, script.rivals()
    found = copy.deepcopy(stored(script.FOUR))  # it is read once for all
    earlier = [row for one in found["cells"] for row in one["rows"] if "call" in row]
    assert earlier
    for row in earlier:
        row["step_ms"] = 1.0
    monkeypatch.setattr(
        script, "stored", lambda file: found if file == script.FOUR else stored(file)
    )
    assert script.rivals() == said
    for row in earlier:
        del row["call"]
    assert script.rivals() != said


def test_no_figure_is_typed_into_the_script() -> None:
    """A number in front of a unit comes out of braces, of the results."""
    tree = ast.parse((ROOT / "docs" / "readme.py").read_text())
    documented = [
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    ]
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documented
    ]
    assert any(" times fewer bytes" in text for text in texts)
    assert not [text for text in texts if TYPED.search(text)]


def test_a_table_that_is_not_there_is_named(script: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"no table '\| what decides .*; put its heading back"):
        script.page("# Nothing\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (1.124, "12 % slower"),
        (0.9962, "0.4 % faster"),
        (1.0096, "1 % slower"),
        (0.9, "10 % faster"),
    ],
)
def test_what_a_time_is_to_another(script: ModuleType, change: float, said: str) -> None:
    assert script.than(change * 600, 600) == said


# Where performance.md's tables by hand have their figures from; memory in thousands of MiB.
BY_HAND = {
    "## Rivals": ("two_h200_rivals", "two_h200_fp8"),
    "### Packed rows": ("two_h200_packed",),
    "### A turn of reinforcement learning": ("two_h200_turns",),
}
# Of code that is gone, left out of the results: docs/performance.md says why.
GONE = {3073.0}


@pytest.mark.parametrize(("heading", "files"), BY_HAND.items(), ids=str)
def test_a_table_by_hand_has_stored_figures(
    script: ModuleType, heading: str, files: tuple[str, ...]
) -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    part = re.split(r"^##", text.partition(heading)[2], flags=re.M)[0]
    part = re.sub(r"<!-- (figures|two GPUs): .*?<!-- \1 end -->", "", part, flags=re.S)
    cells = [
        (place, cell.strip(" *"))
        for line in part.splitlines()
        if line.startswith("| ")
        for place, cell in enumerate(line.strip("|").split("|"))
    ]
    shown = {float(cell) for place, cell in cells if place and re.fullmatch(r"[\d.]+", cell)}
    known = set()
    for file in files:
        found = script.stored(file)
        for row in found.get("rows") or [row for one in found["cells"] for row in one["rows"]]:
            numbers = [value for value in row.values() if isinstance(value, int | float)]
            for value in (*numbers, row.get("memory_mib", 0) / 1000):
                known |= {round(value, digits) for digits in range(4)}
    assert len(shown) >= 8
    assert shown - known <= GONE
