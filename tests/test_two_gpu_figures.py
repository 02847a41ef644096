"""What the performance page has of two GPUs in one call is stored, and its words say the same."""

import re
from types import ModuleType

import pytest

from tests.performance_page import PAGE, WORDS, Rows, rows
from tests.script_module import script_module

HELIX = "helix 2x1 weights"
PLAIN = f"{HELIX}, sequence split"
STEP = f"{PLAIN}, a step"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """What writes them."""
    return script_module("docs/two_gpus.py")


def test_the_tables_are_current(script: ModuleType) -> None:
    assert script.page(PAGE) == PAGE, "call python docs/two_gpus.py"
    marks = re.findall(r"<!-- two GPUs: (\w+) -->", PAGE)
    assert sorted(marks) == sorted(script.PARTS)


@pytest.mark.parametrize(
    ("figure", "other"),
    [("| 481.3 |", "| 471.3 |"), ("| 1378.2 |", "| 1368.2 |"), ("| 49,453 |", "| 59,453 |")],
)
def test_a_figure_changed_by_hand_is_found(script: ModuleType, figure: str, other: str) -> None:
    forged = PAGE.replace(figure, other)
    assert forged != PAGE
    assert script.page(forged) == PAGE


def test_long_sequences_are_as_far_from_context_parallelism_as_said(script: ModuleType) -> None:
    calls = [rows(script, name) for name in script.LENGTHS.values()]

    def more(arm: str, key: str = "step_ms") -> list[float]:
        """Than context parallelism, at each length, in %."""
        return [100 * (call[arm][key] / call["CP=2, p2p"][key] - 1) for call in calls]

    ahead = [-one for one in more(STEP)]
    said = "helix is {:.1f} % ahead of context parallelism at length 8192, {:.1f} % at 32,768 and"
    assert f"{said.format(*ahead)} {ahead[2]:.1f} % at 131,072" in WORDS
    memory = sorted(more(STEP, "memory_mib"))
    assert f"with {memory[0]:.0f} to {memory[-1]:.0f} % more memory" in WORDS
    slower, less = more(PLAIN), [-one for one in more(PLAIN, "memory_mib")]
    assert f"it is {slower[0]:.0f} % behind with {less[0]:.0f} % less memory at 8192" in WORDS
    said = "{:.1f} and {:.1f} % behind with {:.0f} and {:.0f} % less at the others"
    assert said.format(*slower[1:], *less[1:]) in WORDS
    long = rows(script, script.LENGTHS[32768])
    times = long[STEP]["memory_mib"] / long["CP=2, p2p"]["memory_mib"]
    kernels = long[STEP]["kernels_ms"]
    bare = kernels["any"] - kernels["any_but_nccl"]
    said = f"of the {kernels['any']} ms in which a kernel runs (rank 0, profiled) all but {bare}"
    assert said in WORDS
    assert f"takes {ahead[1]:.1f} % less time than context parallelism for {times:.2f}" in WORDS


def test_layers_that_keep_are_as_fast_as_said(script: ModuleType) -> None:
    first, again, third = (rows(script, name) for name in script.KEPT)

    def less(call: Rows, arm: str, key: str = "step_ms") -> float:
        return 100 * (1 - call[f"{arm}, sums in bf16"][key] / call["M-FSDP"][key])

    four = f"{HELIX}, gathered once, 4 layers"
    assert all(-0.5 < less(call, four, "memory_mib") < 0.5 for call in (again, third))
    gains = "{:.1f} to {:.1f}".format(*(less(call, four) for call in (again, third)))
    assert f"helix takes {gains} % less time than it (four layers" in WORDS
    plain = sorted(less(call, HELIX) for call in (first, again))
    assert f"less memory {plain[0]:.1f} to {plain[1]:.1f} % less" in WORDS
    eight = f"{HELIX}, gathered once, 8 layers"
    step = f"{HELIX}, a step, 4 layers"
    more = [-less(call, arm, "memory_mib") for call, arm in ((third, step), (first, eight))]
    assert "with {:.0f} to {:.0f} % more memory".format(*more) in WORDS
    assert f"{less(first, eight):.1f}" == f"{less(third, step):.1f}"
    assert f"memory {less(first, eight):.1f} % less" in WORDS
    small = f"{HELIX}, a step, micro-batches of 2"
    assert f"with {less(third, small, 'memory_mib'):.0f} % less memory" in WORDS
    assert f"less memory {less(third, small):.1f} % less (`step`" in WORDS


def test_forward_passes_are_as_far_from_rivals_as_said(script: ModuleType) -> None:
    longer, sharded = [], []
    for model in ("source", "qwen"):
        call = rows(script, f"{model} forward, beside rivals", "two_h200_matrix")
        longer.append(100 * (call[HELIX]["step_ms"] / call["DP=2"]["step_ms"] - 1))
        assert round(call[HELIX]["memory_gb"] / call["DP=2"]["memory_gb"], 1) == 0.7
        fsdp = call["M-FSDP"]
        sharded.append(f"{100 * (1 - fsdp['step_ms'] / call[HELIX]['step_ms']):.1f}")
        sharded.append(f"{fsdp['memory_gb'] / call[HELIX]['memory_gb']:.2f}")
        if "TP=2" in call:
            less = 100 * (1 - call[HELIX]["step_ms"] / call["TP=2"]["step_ms"])
            assert f"and {less:.0f} % less than TP=2" in WORDS
    assert "helix takes {:.0f} and {:.0f} % longer".format(*longer) in WORDS
    said = "Megatron-FSDP takes {} and {} % less than helix for {} and {} times its memory"
    assert said.format(*sharded[::2], *sharded[1::2]) in WORDS


def test_the_dense_model_is_as_much_faster_as_said(script: ModuleType) -> None:
    call = rows(script, "dense, rows of 8192", "two_h200_matrix")
    faster = [
        call[f"{arm}, core attention spec"]["step_ms"]
        / call[f"{arm}, core attention auto"]["step_ms"]
        for arm in ("TP=2", HELIX)
    ]
    said = "8192 is {:.3f} times as fast under TP=2 and {:.3f} times under helix".format(*faster)
    assert said in WORDS


def test_figures_of_a_row_agree(script: ModuleType) -> None:
    for cell in script.stored("two_h200_matrix")["cells"]:
        tokens = cell["batch"]["sequences"] * cell["batch"]["sequence_length"]
        for row in cell["rows"]:
            assert row["tokens_per_s"] == pytest.approx(tokens / row["step_ms"] * 1e3, rel=1e-3)
            assert row["mfu"] == pytest.approx(row["tflops"] / 989, abs=1e-3)


def test_rivals_of_the_last_call_are_as_far_away_as_said(script: ModuleType) -> None:
    seed, qwen = (rows(script, f"{m}, a layer gathered by one kernel") for m in ("seed", "qwen"))
    fp8 = {row["arm"]: row for row in script.stored("two_h200_fp8")["rows"]}
    step, once = f"{HELIX}, a step", f"{HELIX}, gathered once"

    def apart(call: Rows, arm: str, rival: str) -> float:
        """How much longer the arm takes, in %."""
        return 100 * (call[arm]["step_ms"] / call[rival]["step_ms"] - 1)

    def size(call: Rows, arm: str, rival: str) -> str:
        return f"{call[arm]['memory_mib'] / call[rival]['memory_mib']:.2f} times"

    auto = "M-FSDP, core attention auto"
    bf16 = [qwen[arm]["step_ms"] / fp8[arm]["step_ms"] for arm in (HELIX, step)]
    for said in (
        f"{-apart(seed, HELIX, 'M-FSDP'):.1f} % faster than Megatron-FSDP at"
        f" {size(seed, HELIX, 'M-FSDP')} its memory and {-apart(seed, HELIX, 'DP=2'):.1f} %"
        f" faster than DP=2 at {size(seed, HELIX, 'DP=2')}",
        f"helix is {apart(seed, HELIX, auto):.1f} % slower at its memory, and gathered `once`"
        f" {-apart(seed, once, auto):.1f} % faster at {size(seed, once, auto)}",
        f"helix takes {-apart(qwen, HELIX, 'M-FSDP'):.1f} % less time than Megatron-FSDP for 3 %"
        f" more memory. With `step` it takes {-apart(qwen, step, 'DP=2'):.1f} % less than DP=2 at"
        f" DP's memory, gathered `once` {apart(qwen, once, 'DP=2'):.1f} % more at"
        f" {size(qwen, once, 'DP=2')}",
        f"`step` takes {apart(fp8, step, 'DP=2'):.1f} % longer at {size(fp8, step, 'DP=2')} its"
        f" memory, plain helix {apart(fp8, HELIX, 'DP=2'):.1f} % longer at"
        f" {size(fp8, HELIX, 'DP=2')}",
        f"Megatron-FSDP takes {apart(fp8, 'M-FSDP', HELIX):.0f} % longer than helix at"
        f" {size(fp8, 'M-FSDP', HELIX)} its memory, {apart(fp8, 'M-FSDP', step):.0f} % longer",
        "helix is {:.2f} times as fast as in bf16, with `step` {:.2f} times".format(*bf16),
    ):
        assert said in WORDS
    assert size(seed, HELIX, auto) == "1.00 times"
    assert size(qwen, HELIX, "M-FSDP") == "1.03 times"
    assert size(qwen, step, "DP=2") == "1.00 times"
