"""What the performance page has of four GPUs is stored, and its words say the same."""

import math
import re
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.performance_page import PAGE, ROOT, WORDS, Rows
from tests.script_module import script_module

HELIX = "helix 4x1 weights"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """What writes them."""
    return script_module("docs/four_gpus.py")


def rows(script: ModuleType, *of: str) -> Rows:
    """Of one call, by arm: sentences compare no others."""
    return {row["arm"]: row for row in script.of_one_call(script.cell(*of))}


def more(one: dict[str, Any], other: dict[str, Any], key: str = "step_ms") -> float:
    """Per cent."""
    return 100 * (one[key] / other[key] - 1)


def test_the_tables_are_current(script: ModuleType) -> None:
    assert script.page(PAGE) == PAGE, "call python docs/four_gpus.py"
    marks = re.findall(r"<!-- four GPUs: (\w+) -->", PAGE)
    assert sorted(marks) == sorted(script.PARTS)


def test_a_figure_changed_by_hand_is_found(script: ModuleType) -> None:
    forged = PAGE.replace("| 1350.6 |", "| 1250.6 |")
    assert forged != PAGE
    assert script.page(forged) == PAGE


def test_what_ran_are_the_experiments_that_are_shipped(script: ModuleType) -> None:
    for call in script.stored(script.FILE)["cells"]:
        file = ROOT / "configs" / "experiments" / f"{call['experiment']}.yaml"
        given = yaml.safe_load(file.read_text())
        assert (call["model"], call["batch"]) == (given["models"][0], given["batch"])
        layouts = [{k: v for k, v in one.items() if k != "name"} for one in given["layouts"]]
        assert all(row["layout"] in layouts for row in call["rows"])


def of_its(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Memory, as a multiple."""
    return f"{one['memory_gb'] / other['memory_gb']:.2f} times"


def test_helix_is_as_far_ahead_of_megatron_fsdp_as_said(script: ModuleType) -> None:
    dense, moe = rows(script, "dense"), rows(script, "moe")
    auto = ", core attention auto"
    helix, fsdp = dense[HELIX], dense["M-FSDP"]
    said = f"helix takes {-more(helix, fsdp):.1f} % less time than Megatron-FSDP of the dense model"
    said += f" at {of_its(helix, fsdp)} its memory, and {-more(moe[HELIX], moe['M-FSDP']):.1f} %"
    assert f"{said} less of the MoE at {of_its(moe[HELIX], moe['M-FSDP'])}" in WORDS
    helix, once = dense[HELIX + auto], dense[f"{HELIX}, gathered once{auto}"]
    fsdp = dense[f"M-FSDP{auto}"]
    said = f"With `auto` on both it is {more(helix, fsdp):.1f} % more of the dense model, or"
    said += f" {-more(once, fsdp):.1f} % less at {of_its(once, fsdp)} the memory (`once`), and"
    assert f"{said} {-more(moe[HELIX + auto], moe[f'M-FSDP{auto}']):.1f} % less of the MoE" in WORDS


def test_rivals_are_as_far_ahead_as_said(script: ModuleType) -> None:
    forward, qwen, alone, long = (
        rows(script, name) for name in ("forward", "qwen", "qwen_forward", "long")
    )
    dp, fsdp = forward["DP=4"], forward["M-FSDP"]
    assert dp["memory_gb"] / forward[HELIX]["memory_gb"] == pytest.approx(2, abs=0.02)
    said = f"DP=4, by {more(forward[HELIX], dp):.1f} % with twice the memory, where helix takes"
    assert f"{said} {-more(forward[HELIX], fsdp):.1f} % less time than Megatron-FSDP" in WORDS
    once, step = qwen[f"{HELIX}, gathered once"], long[f"{HELIX}, a step"]
    assert f"DP=4 by {more(once, qwen['DP=4']):.1f} % with a quarter more memory" in WORDS
    assert more(qwen["DP=4"], once, "memory_gb") == pytest.approx(25, abs=1)
    said = f"takes {-more(once, qwen['M-FSDP']):.1f} % less time than Megatron-FSDP with"
    said += f" {more(once, qwen['M-FSDP'], 'memory_gb'):.0f} % more memory (`once`) and as much"
    assert f"{said} at its memory" in WORDS
    for key in ("step_ms", "memory_gb"):
        assert more(qwen[HELIX], qwen["M-FSDP"], key) == pytest.approx(0, abs=0.1)
    dp, fsdp, helix = alone["DP=4"], alone["M-FSDP"], alone[HELIX]
    assert dp["memory_gb"] / helix["memory_gb"] == pytest.approx(2, abs=0.02)
    said = f"forward pass DP=4 by {more(helix, dp):.1f} % with twice the memory, Megatron-FSDP by"
    size = f"{more(fsdp, helix, 'memory_gb'):.0f} % more"
    assert f"{said} {more(helix, fsdp):.1f} % with {size}" in WORDS
    ring = long["CP=4, a2a"]
    said = f"a2a by {more(step, ring):.1f} % with {-more(ring, step, 'memory_gb'):.0f} % less"
    assert said in WORDS
    fsdp = long["M-FSDP"]
    whole = f"which holds a sequence whole, by {more(step, fsdp):.0f} %"
    assert f"{whole} with {fsdp['memory_gb'] / step['memory_gb']:.1f} times the memory" in WORDS


def test_rivals_are_compared_at_one_core_attention(script: ModuleType) -> None:
    """Where the page says whose is whose."""
    for name in script.CELLS:
        for row in script.cell(name):
            arm = row["arm"]
            _, _, core = arm.partition(", core attention ")
            assert row["layout"].get("core_attention", "") == core, arm
    for row in rows(script, "dense", "referee").values():
        assert row["layout"]["core_attention"] == "auto"


def test_helix_is_as_far_ahead_of_tensor_parallelism_as_said(script: ModuleType) -> None:
    dense, forward, alone, long = (
        rows(script, name) for name in ("dense", "forward", "qwen_forward", "long")
    )
    step = long[f"{HELIX}, a step"]
    pairs = [(dense[HELIX], dense), (forward[HELIX], forward), (alone[HELIX], alone), (step, long)]
    tp = [-more(helix, rivals["TP=4"]) for helix, rivals in pairs]
    said = "ahead of TP=4 by {:.0f} % of the dense model, by {:.0f} and {:.0f} % of forward passes"
    assert f"{said} and by {{:.0f}} % of one long sequence".format(*tp) in WORDS
    pp = -more(forward[HELIX], forward["TP=2, PP=2"])
    assert f"ahead of TP=2, PP=2 by {pp:.0f} % of the dense model's forward pass" in WORDS
    cuts = [more(call["helix 2x2 weights"], call[HELIX]) for call in (forward, long)]
    assert f"takes {min(cuts):.0f} to {max(cuts):.1f} % longer" in WORDS


def test_calls_are_not_compared_with_each_other(script: ModuleType) -> None:
    """No row of an earlier call stands beside this one's rival, or in a sentence that is tested."""
    for name in script.CELLS:
        for row, line in zip(script.cell(name), script.beside(name)[2:-1], strict=True):
            arm, _, _, of_rivals, _, _, of_its, *_ = line.strip("| ").split(" | ")
            assert (arm.endswith(", earlier call"), not of_rivals.strip(), not of_its.strip()) == (
                ("call" in row,) * 3
            )


def test_megatrons_own_log_is_told_as_stored(script: ModuleType) -> None:
    dense, qwen = rows(script, "dense", "referee"), rows(script, "qwen", "referee")
    fsdp, once = dense["M-FSDP, core attention auto"], dense[f"{HELIX}, gathered once"]

    def size(one: dict[str, Any], other: dict[str, Any]) -> str:
        return f"{one['memory_mib'] / other['memory_mib']:.2f} times"

    said = f"helix is {-more(dense[HELIX], fsdp):.1f} % ahead of Megatron-FSDP at"
    said += f" {size(dense[HELIX], fsdp)} its memory, and {-more(once, fsdp):.1f} % at"
    assert f"{said} {size(once, fsdp)} (`once`)" in WORDS
    step, dp = qwen[f"{HELIX}, a step"], qwen["DP=4"]
    said = f"it is {-more(qwen[HELIX], qwen['M-FSDP']):.1f} % ahead of Megatron-FSDP at its memory;"
    said += f" `step` is {more(step, dp):.1f} % behind DP=4 at {size(step, dp)} its memory, in FP8"
    assert qwen[HELIX]["memory_mib"] == pytest.approx(qwen["M-FSDP"]["memory_mib"], rel=0.002)
    step, dp, fsdp = (qwen[f"{arm}, FP8"] for arm in (f"{HELIX}, a step", "DP=4", "M-FSDP"))
    said += f" {more(step, dp):.1f} % at {size(step, dp)} and {-more(step, fsdp):.1f} % ahead of"
    assert f"{said} Megatron-FSDP with {more(step, fsdp, 'memory_mib'):.0f} % more" in WORDS
    gains = [-more(model[HELIX], model[f"{HELIX}, one by one"]) for model in (dense, qwen)]
    assert "{:.1f} % of the dense step, {:.1f} % of Qwen's".format(*gains) in WORDS
    long = rows(script, "long", "referee")
    step, ring, fsdp = long[f"{HELIX}, a step"], long["CP=4, a2a"], long["M-FSDP"]
    assert ring["memory_mib"] == pytest.approx(step["memory_mib"], rel=0.005)
    said = f"`step` is {more(step, ring):.1f} % behind context parallelism's a2a at its memory, and"
    said += f" {more(step, fsdp):.1f} % behind Megatron-FSDP at {size(step, fsdp)} its memory"
    assert said in WORDS
    kernels = dense[HELIX], dense["M-FSDP, core attention auto"]
    helix, fsdp = ({**one["kernels_ms"], "all": one["any"]} for one in kernels)
    said = f"GEMMs for {helix['gemm']:.0f} of helix's {helix['all']:.0f} ms, for {fsdp['gemm']:.0f}"
    said += f" of Megatron-FSDP's {fsdp['all']:.0f}, which leaves"
    bare = [one["any"] - one["any_but_nccl"] for one in reversed(kernels)]
    assert "{} {:.0f} ms of NCCL bare where helix leaves {:.0f}".format(said, *bare) in WORDS


def test_few_query_groups_are_as_fast_as_said(script: ModuleType) -> None:
    call = rows(script, "qwen, two query groups", "referee")
    helix, tp = call[f"{HELIX}, a step"], call["TP=4"]
    ratio = helix["step_ms"] / tp["step_ms"]
    said = f"TP=4 takes {tp['step_ms']} ms, helix 4 x 1 with `step` {helix['step_ms']}"
    assert f"{said}, {ratio:.2f} times that, with twice the memory" in WORDS
    assert helix["memory_mib"] / tp["memory_mib"] == pytest.approx(2, rel=0.02)


def test_predictions_are_as_near_as_said(script: ModuleType) -> None:
    benchmark = script_module("benchmarks/predictions.py")
    found = [row for row in benchmark.four_gpus() if row.cell.split(",")[0] in script.CELLS]
    assert len(found) == sum(len(one["rows"]) for one in script.stored(script.FILE)["cells"])
    name = {row.cell: row.cell.split(",")[0] for row in found}

    def errors(key: str, *of: str) -> list[float]:
        return sorted(abs(row.errors()[key]) for row in found if name[row.cell] in of)

    def most(key: str, *of: str) -> int:
        return math.ceil(100 * errors(key, *of)[-1])

    *others, worst = errors("tokens_per_s", *script.CELLS)
    (row,) = (row for row in found if abs(row.errors()["tokens_per_s"]) == worst)
    assert (name[row.cell], row.here.layout.tp, row.errors()["tokens_per_s"] < 0) == (
        "qwen_forward",
        4,
        True,
    )
    said = f"TPS within {math.ceil(100 * others[-1])} % but for one row (TP=4's forward pass of"
    assert f"{said} Qwen's shape is predicted {100 * worst:.0f} % too slow)" in WORDS
    memory = [most("memory_gb", *of) for of in (("dense", "qwen"), ("moe",), ("long",))]
    said = "memory within {} %, of the MoE {} and of one long sequence {} %"
    assert said.format(*memory) in WORDS
    apart = [
        abs(row.predicted["tpot_ms"] - row.measured["tpot_ms"])
        for row in found
        if "tpot_ms" in row.measured
    ]
    assert "and TPOT within 0.02 ms" in WORDS
    assert 0.015 < max(apart) < 0.02
