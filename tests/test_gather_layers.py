"""``--helix-gather-layers``: the numbers of stock, and what every layer gathers, by the ledger.

Without biases and with a batch split an all-gather over the dim group is of weights alone.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_helix.exchange.traffic import BlockShape
from megatron_helix.partition.layout import HelixLayout
from tests.covering import THOROUGH, fast
from tests.distributed import measured, pretrain, tiny_gpt
from tests.test_parity import (
    FULL_RECOMPUTE,
    GRAD_NORM_TOLERANCE,
    LOSS_TOLERANCE,
    NO_BIAS,
    ONCE,
    PP2,
    SP,
    STEP,
    recompute,
)

MICRO_BATCHES = 2
VIRTUAL = (*PP2, "--num-layers", "8", "--num-layers-per-virtual-pipeline-stage", "2")


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        gather: how often layers gather that keep what they have.
        asked: as how many do, at most.
        kept: how many of a rank do.
        anew: how many of a rank do not, and are in a training without the flag.
        flags: of its own.
        passes: in which a weight is gathered that is not kept, of a micro-batch.
    """

    gather: tuple[str, ...]
    asked: int
    kept: int
    anew: int
    flags: tuple[str, ...] = ()
    passes: int = 2


CASES = {
    "once": Case(ONCE, 1, 1, 1),
    "stages": Case(STEP, 1, 1, 1, (*PP2, "--num-layers", "4")),
    "virtual stages": Case(STEP, 1, 2, 2, VIRTUAL),
    "recomputed": Case(STEP, 1, 1, 1, FULL_RECOMPUTE, passes=3),
    "attention recomputed": Case(ONCE, 1, 1, 1, recompute("core_attn")),
    "several tokens predicted": Case(STEP, 2, 2, 1, ("--mtp-num-layers", "1")),
    "more than there are": Case(ONCE, 3, 2, 0),
}


@pytest.mark.parametrize("name", fast(["stages", "several tokens predicted"], CASES))
def test_the_first_layers_of_a_chunk_keep_what_they_gather(
    corpus_prefix: Path, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    model = tiny_gpt(corpus_prefix, *SP, *NO_BIAS, *case.flags)
    ranks = 8 if PP2[0] in case.flags else 4
    asked = ("--helix-gather-layers", str(case.asked))
    exchange = ("--helix-exchange", "weights", "--helix-split", "batch", *case.gather, *asked)
    found = measured([*model, "--helix-m", "2", "--helix-n", "2", *exchange], ranks, tmp_path)
    stock = pretrain([*model, "--tensor-model-parallel-size", "4"], ranks)
    assert found.losses == pytest.approx(stock.losses, rel=LOSS_TOLERANCE, abs=0)
    assert found.grad_norms == pytest.approx(stock.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)

    layout = HelixLayout(m=2, n=2, num_attention_heads=4, num_query_groups=4, kv_channels=16)
    shape = BlockShape(hidden=64, ffn=256, gated=False, num_layers=2)
    layer = 4 * shape.weights(layout) // layout.size  # bytes
    gathered = case.kept + case.anew * case.passes * MICRO_BATCHES
    assert found.sent_bytes["HELIX_DIM_GROUP/all_gather"] == gathered * layer
    sent = found.sent_bytes.get("HELIX_DIM_GROUP/send", 0)
    assert sent == (case.kept * layer if case.gather == STEP else 0)


@THOROUGH
def test_a_layer_of_every_stage_more_is_a_layer_of_the_traffic_less(
    corpus_prefix: Path, tmp_path: Path
) -> None:
    """From none that keeps its weights to all."""
    four = ("--num-layers", "4", *SP, *NO_BIAS, "--helix-m", "2", "--helix-n", "2")
    model = tiny_gpt(corpus_prefix, *four, *("--helix-exchange", "weights"), train_iters=2)
    asked = [(), *((*ONCE, "--helix-gather-layers", str(layers)) for layers in (1, 2, 3)), ONCE]
    sent = [
        measured([*model, *flags], 4, tmp_path / str(number)).sent_bytes
        for number, flags in enumerate(asked)
    ]
    gathered = [bytes_of["HELIX_DIM_GROUP/all_gather"] for bytes_of in sent]
    less = [more - fewer for more, fewer in pairwise(gathered)]
    assert less == [less[0]] * 4
    assert less[0] > 0
