"""What the pages have of one GPU is stored, and never passes for more than it is."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.script_module import script_module

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text()
EXACT = (ROOT / "docs" / "exactness.md").read_text()
NAME = "one rank alone, links modelled"
HELIX = "helix 2x1 weights"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """What writes them."""
    return script_module("docs/one_gpu.py")


def test_the_tables_are_current(script: ModuleType) -> None:
    pages = [page.read_text() for page in script.PAGES]
    assert pages == [PAGE, EXACT]
    assert [script.page(page) for page in pages] == pages, "call python docs/one_gpu.py"
    marks = re.findall(r"<!-- one GPU: (\w+) -->", PAGE + EXACT)
    assert sorted(marks) == sorted(script.PARTS)


@pytest.mark.parametrize(
    ("page", "figure", "other"),
    [
        (PAGE, "| 2204 |", "| 2104 |"),
        (PAGE, "| 28,978 |", "| 29,978 |"),
        (EXACT, "| 0.94 |", "| 0.84 |"),
    ],
)
def test_a_figure_changed_by_hand_is_found(
    script: ModuleType, page: str, figure: str, other: str
) -> None:
    forged = page.replace(figure, other)
    assert forged != page
    assert script.page(forged) == page


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
    assert len(beside) == 11
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


def on_two_gpus(script: ModuleType) -> Iterator[tuple[str, str]]:
    """How many times as fast ``prefix`` made layouts of the dense model there, in one call."""
    for cell in script.stored("two_h200_rivals")["cells"]:
        steps = {str(row["layout"]): row["step_ms"] for row in cell["rows"]}
        for row in cell["rows"]:
            plain = {key: of for key, of in row["layout"].items() if key != "core_attention"}
            if plain != row["layout"] and str(plain) in steps:
                yield (
                    row["arm"].split(" ")[0].rstrip(","),
                    f"{steps[str(plain)] / row['step_ms']:.3f}",
                )


def test_the_dense_model_is_as_much_faster_as_said(script: ModuleType) -> None:
    rows = script.stored("one_h200_dense")["rows"]
    cells = {(row["phase"], row["length"], row["core"]): row for row in rows}
    assert len(cells) == len(rows) == 6
    for row in rows:
        tokens = row["sequences"] * row["length"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["step_ms"] * 1e3, rel=1e-4)
        assert row["mfu"] == pytest.approx(row["tflops"] / 989, abs=1e-3)

    def faster(phase: str, length: int) -> str:
        spec, auto = (cells[phase, length, core]["step_ms"] for core in ("spec", "auto"))
        return f"{spec / auto:.3f}"

    helix, tp2, fsdp = (
        [ratio for kind, ratio in on_two_gpus(script) if kind == name]
        for name in ("helix", "TP=2", "M-FSDP")
    )
    said = [
        f"Training is {faster('train', 2048)} times as fast at length 2048",
        f"and {faster('train', 8192)} times at 8192",
        f"Prefill is {faster('prefill', 8192)} times as fast at 8192",
        f"made helix {' and '.join(helix)} times as fast at 16 x 2048",
        f"TP=2 {' and '.join(tp2)} times and Megatron-FSDP {' and '.join(fsdp)} times",
    ]
    words = " ".join(PAGE.split())
    assert [one for one in said if one not in words] == []


def test_ranks_are_as_near_to_stock_as_said(script: ModuleType) -> None:
    results = script.stored("one_h200_exactness")
    rows = [*results["packed"], *results["sequence"]]
    assert len(rows) == 7
    for row in (*rows, *results["batch"]):
        for kind in ("", "norms_"):
            stock = max(row[f"{kind}tp2_to_fp32"], row[f"{kind}tp1_to_fp32"])
            assert row[f"{kind}ratio"] == pytest.approx(row[f"{kind}to_fp32"] / stock, rel=1e-3)
    norms = sorted(row["norms_ratio"] for row in rows)
    farthest = max(row["ratio"] for row in rows)
    assert 1.4e-4 < max(row["to_tp2"] for row in rows) <= 1.5e-4
    words = " ".join(EXACT.split())
    for said in (
        "losses are at most 1.5e-4 of themselves from TP=2's",
        f"at most {farthest:.2f} times as far from single precision's",
        f"are {norms[0]:.2f} to {norms[-1]:.2f} times as far",
        "losses are {:.2f} to {:.2f} times as far from single precision's as stock's, gradient"
        " norms {:.2f} to {:.2f} times".format(
            *(
                end(row[key] for row in results["batch"])
                for key in ("ratio", "norms_ratio")
                for end in (min, max)
            )
        ),
    ):
        assert said in words


def test_fp16_is_within_its_band_as_said(script: ModuleType) -> None:
    found = script.stored("one_h200_exactness")["fp16_band"]
    loss, norm = (found[key] for key in ("loss", "grad_norm"))
    for key in ("loss", "grad_norm"):
        assert found[key]["apart"] <= found[key]["band"]
        farthest = max(unfused[key] for unfused in found["of_unfused"].values())
        assert found[key]["band"] >= 2 * farthest * (1 - 1e-3)
    words = " ".join(EXACT.split()).replace("e-4", "e-04").replace("e-3", "e-03")
    assert (
        f"losses are at most {loss['apart']:.1e} apart, gradient norms {norm['apart']:.1e}" in words
    )
    assert f"The band is {loss['band']:.1e} and {norm['band']:.1e}" in words
