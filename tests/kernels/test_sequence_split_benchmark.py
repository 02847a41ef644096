"""``benchmarks/sequence_split.py`` on a CPU, with the plain kernel: errors are roundoff."""

from typing import Any

import pytest

from megatron_helix.planner.core_timing import Shape
from tests.distributed import run_distributed
from tests.gap_case import by_gaps
from tests.script_module import script_module


def run(lengths: list[int], packs: bool, m: int) -> list[dict[str, Any]]:
    """What it measures. Runs in a rank, which has a process group."""
    benchmark = script_module("benchmarks/sequence_split.py")
    with by_gaps() as calls:
        size = Shape(1, 4, 2, 64, 8)
        rows = benchmark.measured(size, lengths, 48, m, "cpu", packs=packs, repeats=1)
    assert any(not block.causal for block in calls)
    return rows


def run_without_the_kernel() -> list[dict[str, Any]]:
    """On a CPU as it is. Runs in a rank."""
    benchmark = script_module("benchmarks/sequence_split.py")
    return benchmark.measured(Shape(1, 4, 2, 64, 8), [64], 48, 2, "cpu", packs=False, repeats=1)


def test_without_a_kernel_that_does_parts_an_arm_is_left_out() -> None:
    (rows,) = run_distributed(run_without_the_kernel, 1)
    (left_out,) = [row for row in rows if "failed" in row]
    assert left_out["arm"] == "gaps"
    assert left_out["failed"].startswith("left out: no kernel here gives its log-sum-exp away")
    assert [row["arm"] for row in rows if "errors" in row] == ["errors, whole"]
    assert len([row for row in rows if "training_ms" in row]) == 1 + 2


@pytest.mark.parametrize(
    ("m", "lengths", "packs"), [(2, [64], False), (2, [20, 1, 43], True), (4, [20, 1, 43], True)]
)
def test_ranks_together_are_the_whole(m: int, lengths: list[int], packs: bool) -> None:
    (rows,) = run_distributed(run, 1, lengths, packs, m)
    assert [row for row in rows if "failed" in row] == []
    assert len([row for row in rows if "training_ms" in row]) == 1 + 2 * m
    whole, gaps = (row["errors"] for row in rows if "errors" in row)
    for ours, theirs in zip(gaps, whole, strict=True):
        assert ours <= 4 * theirs
