"""What docs/performance.md has of one GPU is stored, and never passes for more than it is."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.script_module import script_module

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text()
NAME = "one rank alone, links modelled"
HELIX = "helix 2x1 weights"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """What writes them."""
    return script_module("docs/one_gpu.py")


def test_the_tables_are_current(script: ModuleType) -> None:
    assert script.page(PAGE) == PAGE, "call python docs/one_gpu.py"
    marks = re.findall(r"<!-- one GPU: (\w+) -->", PAGE)
    assert sorted(marks) == sorted(script.PARTS)


def test_a_figure_changed_by_hand_is_found(script: ModuleType) -> None:
    forged = PAGE.replace("| 2204 |", "| 2104 |")
    assert forged != PAGE
    assert script.page(forged) == PAGE


def test_one_rank_alone_has_a_name_of_its_own(script: ModuleType) -> None:
    """Neither measured nor predicted; and its steps stand in no other table."""
    results = script.stored("one_rank_h200")
    assert results["source"] == NAME
    begin = PAGE.index(f"### {NAME.capitalize()}")
    outside = PAGE[:begin] + PAGE[PAGE.index("\n### ", begin + 1) :]
    cells = {cell.strip(" *") for line in outside.splitlines() for cell in line.split("|")[1:]}
    of_two = [row for cell in script.stored("two_h200_rivals")["cells"] for row in cell["rows"]]
    same = {row["step_ms"] for row in of_two}  # of DP=2 once, by chance
    steps = {step for row in results["rows"] for step in row["step_ms"]} - same
    assert len(steps) > len(results["rows"])
    assert not cells & {f"{step:g}" for step in steps}


def test_what_two_gpus_gave_was_logged(script: ModuleType) -> None:
    log = (ROOT / "docs" / "log.md").read_text()
    beside = [
        row["two_gpus"] for row in script.stored("one_rank_h200")["rows"] if "two_gpus" in row
    ]
    assert len(beside) == 5
    for there in beside:
        for step in there["step_ms"]:
            assert f"{step:.1f}" in log or f"{step:,.0f}" in log


def test_ratios_in_words_are_those_of_the_steps(script: ModuleType) -> None:
    rows = {(row["model"], row["arm"]): row for row in script.stored("one_rank_h200")["rows"]}
    steps = {name: row["step_ms"][-1] for name, row in rows.items()}
    cp = steps["long", "CP=2, p2p"]
    gaps, calls = (f"{HELIX}, {how}" for how in ("gap by gap", "several calls a piece"))
    packed = steps["packed", gaps] / steps["packed", f"{HELIX}, several calls a run"]
    size = rows["long", gaps]["memory_mib"] / rows["long", "CP=2, p2p"]["memory_mib"]
    said = [
        f"{steps['long', gaps] / cp:.3f} times as long",
        f"at {size:.3f} times its memory",
        f"{steps['long', calls] / cp:.2f} times",
        f"a step is {100 * (1 - packed):.1f} % shorter",
    ]
    words = " ".join(PAGE.split())
    assert [one for one in said if one not in words] == []


def test_errors_of_prefix_are_as_said(script: ModuleType) -> None:
    rows = script.stored("one_h200_core")["rows"]
    by_arm = {(row["arm"], script._shape(row)): row["errors"] for row in rows}
    ratios = [
        ours / theirs
        for (arm, shape), errors in by_arm.items()
        if arm == "prefix"
        for ours, theirs in zip(errors, by_arm["spec", shape], strict=True)
    ]
    assert len(ratios) >= 36
    assert max(ratios) <= 1.16
    assert "at most 1.16 times" in " ".join(PAGE.split())
