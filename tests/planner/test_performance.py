"""docs/performance.md: every figure is what the planner says now."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.script_module import script_module

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text()


@pytest.fixture(scope="module")
def performance() -> ModuleType:
    """The script that writes the figures."""
    return script_module("docs/performance.py")


def test_the_figures_are_current(performance: ModuleType) -> None:
    assert performance.page(PAGE) == PAGE, "call python docs/performance.py"
    assert re.findall(r"<!-- figures: (\w+) -->", PAGE) == list(performance.PARTS)


def test_a_figure_changed_by_hand_is_found(performance: ModuleType) -> None:
    row = re.search(r"^\| dense \| h100_nvl16 \| .*$", PAGE, re.M)
    assert row
    forged = PAGE.replace(row[0], row[0].replace("dense", "sparse"))
    assert forged != PAGE
    assert performance.page(forged) == PAGE


def test_every_measured_run_stands_beside_its_prediction(performance: ModuleType) -> None:
    table = PAGE[PAGE.index("## Measured") :]
    for (model, phase), measured in performance.MEASURED_MS.items():
        for (gpus, layout), milliseconds in measured.items():
            row = rf"^\| {model} \| {phase} \| {gpus} \| {layout} \| {milliseconds:.1f} \|"
            assert re.search(row, table, re.M)


def test_a_measured_layout_that_cannot_be_is_named(
    performance: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {("dense", "train"): {(2, "tp2_mb4"): 600.0, (2, "tp2_mb3"): 600.0}}
    monkeypatch.setattr(performance, "MEASURED_MS", bad)
    with pytest.raises(ValueError, match="MEASURED_MS: dense cannot train by tp2_mb3 on 2 GPUs"):
        performance.few_gpus()


def test_the_table_has_what_the_benchmark_wrote(performance: ModuleType) -> None:
    """Its names leave out what the planner's say: expert parallelism, and that weights move."""
    written = json.loads((ROOT / "benchmarks/results/four_h200.json").read_text())
    for (model, phase), measured in performance.MEASURED_MS.items():
        rows = written.get(f"{phase}-{model}", [])
        found = {re.sub("_dp[24]", "", row["layout"]): f"{row['step_ms']:.1f}" for row in rows}
        for (gpus, name), milliseconds in measured.items():
            if gpus == 4:
                said = re.sub("_ep[24]", "", name).replace("_weights_step", "_step")
                assert found[said] == f"{milliseconds:.1f}"
