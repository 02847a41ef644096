"""Whole trainings whose tokens attend gap by gap, as on GPUs, on CPU ranks: the same numbers.

With a kernel of plain products in the place of TransformerEngine's (:mod:`tests.gap_case`).
"""

from pathlib import Path

import pytest

from megatron_helix import pretrain_gpt
from tests.covering import fast
from tests.distributed import Curve, pretrain, run_distributed, tiny_gpt, train
from tests.gap_case import by_gaps
from tests.packed_case import LENGTHS, dataset
from tests.test_packed_parity import PACKED, ROW_BY_ROW
from tests.test_parity import (
    EXCHANGES,
    FULL_RECOMPUTE,
    MODELS,
    ONCE,
    PP2,
    assert_same_training,
)

CASES = {
    "2x1": ("2x1", MODELS["dense_sp"], EXCHANGES["weights-sequence"]),
    "recomputed": ("2x2", MODELS["gated_sp"], (*EXCHANGES["weights-sequence"], *FULL_RECOMPUTE)),
    "activations": ("4x1", MODELS["output_gate_sp"], EXCHANGES["activations-sequence"]),
    "packed": ("4x1", PACKED, ("--helix-exchange", "weights", *ONCE)),
    "packed, recomputed in a pipeline": (
        *("2x1", (*PACKED, *PP2, *ROW_BY_ROW)),
        ("--helix-exchange", "weights", *FULL_RECOMPUTE),
    ),
}


def trained(argv: list[str]) -> Curve:
    """Train on this rank."""
    with by_gaps() as calls:
        curve = train(argv)
    assert any(not block.causal for block in calls)
    return curve


@pytest.mark.parametrize("name", fast(["recomputed", "packed, recomputed in a pipeline"], CASES))
def test_training_gap_by_gap_is_as_stock(name: str, corpus_prefix: Path, tmp_path: Path) -> None:
    cut, model, exchange = CASES[name]
    m, n = map(int, cut.split("x"))
    packs = model[: len(PACKED)] == PACKED
    data = dataset(tmp_path / "rows", LENGTHS["very unequal"]) if packs else corpus_prefix
    ranks = m * n * (2 if PP2[0] in model else 1)
    whole = tiny_gpt(data, *model, "--tensor-model-parallel-size", str(m * n))
    stock = pretrain(whole, ranks)
    flags = tiny_gpt(data, *model, "--helix-m", str(m), "--helix-n", str(n), *exchange)
    curves = run_distributed(trained, ranks, pretrain_gpt.prepare(flags, ranks))
    for curve in curves:
        if curve.losses:  # the last stage of a pipeline has them
            assert_same_training(curve, stock)
