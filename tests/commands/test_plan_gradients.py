"""``helix plan`` with Megatron's flags for the precision of gradients, under the run's names."""

import json

import pytest
from typer.testing import CliRunner

from megatron_helix import cli

PLAN = (
    *("plan", "--model", "configs/models/dense.yaml"),
    *("--hardware", "configs/hardware/h200_2.yaml", "--batch", "16"),
)
BF16 = ("--precision", "bf16")
REPLICAS, HELIX, FSDP = ON_TWO = ("tp1_mb8", "helix_2x1_weights_mb16", "tp1_megatron_fsdp_mb8")
EACH = [word for name in ON_TWO for word in ("--layout", name)]


def memory(*words: str) -> dict[str, float]:
    """GB of what is planned, by layout."""
    said = CliRunner().invoke(cli.app, [*PLAN, *BF16, *words, "--json"])
    assert said.exit_code == 0, said.output
    return {row["layout"]: row["memory_gb"] for row in json.loads(said.output)["layouts"]}


@pytest.mark.parametrize(
    ("words", "less", "more"),
    [
        (("--grad-reduce-in-bf16",), {REPLICAS, HELIX}, set()),
        (("--megatron-fsdp-main-grads-dtype", "fp32"), set(), {FSDP}),
        (("--megatron-fsdp-main-grads-dtype", "bf16"), set(), set()),
    ],
)
def test_a_flag_changes_the_layouts_that_read_it(words: tuple, less: set, more: set) -> None:
    before, after = memory(*EACH), memory(*EACH, *words)
    assert {name for name in ON_TWO if after[name] < before[name]} == less
    assert {name for name in ON_TWO if after[name] > before[name]} == more


def test_the_search_reads_it() -> None:
    """The least memory becomes more: where few activations are kept, widening is the highest."""
    first = ("--top", "1", "--rank-by", "memory")
    (wide,), (narrow,) = (
        memory(*first, *words).values() for words in ((), ("--grad-reduce-in-bf16",))
    )
    assert narrow > wide


def test_what_a_run_would_not_read_is_refused() -> None:
    said = CliRunner().invoke(cli.app, [*PLAN, "--layout", "tp2_mb4", "--grad-reduce-in-bf16"])
    assert "is read in bf16 alone, got fp16; add --precision bf16" in str(said.exception)
