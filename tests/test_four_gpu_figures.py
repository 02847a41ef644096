"""What the performance page has of four GPUs is stored, and its words say the same."""

import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.script_module import script_module

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text()
WORDS = " ".join(PAGE.split())
HELIX = "helix 4x1 weights"
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """What writes them."""
    return script_module("docs/four_gpus.py")


def rows(script: ModuleType, *of: str) -> Rows:
    return {row["arm"]: row for row in script.cell(*of)}


def more(one: dict[str, Any], other: dict[str, Any], key: str = "step_ms") -> float:
    """Per cent."""
    return 100 * (one[key] / other[key] - 1)


def test_the_tables_are_current(script: ModuleType) -> None:
    assert script.page(PAGE) == PAGE, "call python docs/four_gpus.py"
    marks = re.findall(r"<!-- four GPUs: (\w+) -->", PAGE)
    assert sorted(marks) == sorted(script.PARTS)


def test_a_figure_changed_by_hand_is_found(script: ModuleType) -> None:
    forged = PAGE.replace("| 1505.4 |", "| 1405.4 |")
    assert forged != PAGE
    assert script.page(forged) == PAGE


def test_what_ran_are_the_experiments_that_are_shipped(script: ModuleType) -> None:
    for call in script.stored(script.FILE)["cells"]:
        file = ROOT / "configs" / "experiments" / f"{call['experiment']}.yaml"
        given = yaml.safe_load(file.read_text())
        assert (call["model"], call["batch"]) == (given["models"][0], given["batch"])
        layouts = [{k: v for k, v in one.items() if k != "name"} for one in given["layouts"]]
        assert all(row["layout"] in layouts for row in call["rows"])


def test_rivals_are_as_far_ahead_as_said(script: ModuleType) -> None:
    dense, moe, qwen, long = (rows(script, name) for name in ("dense", "moe", "qwen", "long"))
    fsdp, auto = dense["M-FSDP"], dense["M-FSDP, core attention auto"]
    said = f"Megatron-FSDP, by {more(dense[HELIX], fsdp):.1f} % as it comes and by"
    assert f"{said} {100 * (1 - auto['step_ms'] / dense[HELIX]['step_ms']):.1f} %" in WORDS
    assert auto["memory_gb"] == pytest.approx(dense[HELIX]["memory_gb"], rel=0.01)
    fsdp = moe["M-FSDP"]
    less = -more(fsdp, moe[HELIX], "memory_gb")
    said = f"MoE Megatron-FSDP by {more(moe[HELIX], fsdp):.1f} % with {less:.0f} % less memory"
    assert said in WORDS
    once, step = qwen[f"{HELIX}, gathered once"], long[f"{HELIX}, a step"]
    assert f"DP=4 by {more(once, qwen['DP=4']):.1f} % with a quarter more memory" in WORDS
    assert more(qwen["DP=4"], once, "memory_gb") == pytest.approx(25, abs=1)
    assert f"takes {-more(once, qwen['M-FSDP']):.1f} % less time than Megatron-FSDP" in WORDS
    assert f"with {more(once, qwen['M-FSDP'], 'memory_gb'):.0f} % more memory (`once`)" in WORDS
    ring = long["CP=4, a2a"]
    said = f"a2a by {more(step, ring):.1f} % with {-more(ring, step, 'memory_gb'):.0f} % less"
    assert said in WORDS
    whole = f"which holds a sequence whole, by {-more(long['M-FSDP'], step):.0f} %"
    assert f"{whole} with twice the memory" in WORDS


def test_helix_is_as_far_ahead_of_tensor_parallelism_as_said(script: ModuleType) -> None:
    best = {"dense": HELIX, "moe": HELIX, "qwen": f"{HELIX}, gathered once"}
    ahead: dict[str, list[float]] = {"TP=4": [], "TP=2, PP=2": []}
    for name, arm in best.items():
        call = rows(script, name)
        for rival, found in ahead.items():
            if rival in call:
                found.append(-more(call[arm], call[rival]))
    said = "ahead of TP=4 by {:.0f} to {:.0f} % and of TP=2, PP=2 by {:.0f} to {:.0f} %"
    assert said.format(*(end(found) for found in ahead.values() for end in (min, max))) in WORDS
    cuts = [
        more(rows(script, name)["helix 2x2 weights"], rows(script, name)[HELIX])
        for name in ("dense", "qwen", "long")
    ]
    assert f"takes {min(cuts):.0f} to {max(cuts):.1f} % longer" in WORDS


def test_few_query_groups_are_as_fast_as_said(script: ModuleType) -> None:
    call = rows(script, "qwen, two query groups", "referee")
    helix, tp = call[f"{HELIX}, a step"], call["TP=4"]
    ratio = helix["step_ms"] / tp["step_ms"]
    said = f"TP=4 takes {tp['step_ms']} ms, helix 4 x 1 with `step` {helix['step_ms']}"
    assert f"{said}, {ratio:.2f} times that, with twice the memory" in WORDS
    assert helix["memory_mib"] / tp["memory_mib"] == pytest.approx(2, rel=0.02)


def test_predictions_are_as_near_as_said(script: ModuleType) -> None:
    benchmark = script_module("benchmarks/predictions.py")
    models = ("dense", "moe", "qwen", "long")
    found = [row for row in benchmark.four_gpus() if row.cell.split(",")[0] in models]
    assert len(found) == sum(len(one["rows"]) for one in script.stored(script.FILE)["cells"])

    def most(key: str, *of: str) -> int:
        errors = [row.errors()[key] for row in found if row.cell.split(",")[0] in of]
        return math.ceil(100 * max(map(abs, errors)))

    memory = [most("memory_gb", *of) for of in (("dense", "qwen"), ("moe",), ("long",))]
    said = "TPS within {} %, memory within {} %, of the MoE {} and of one long sequence {} %"
    assert said.format(most("tokens_per_s", *models), *memory) in WORDS
    apart = [
        abs(row.predicted["tpot_ms"] - row.measured["tpot_ms"])
        for row in found
        if "tpot_ms" in row.measured
    ]
    assert "and TPOT within 0.02 ms" in WORDS
    assert 0.015 < max(apart) < 0.02
