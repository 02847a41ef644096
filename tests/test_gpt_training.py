"""The entry point beside Megatron-LM's own: what of its flags it obeys."""

import re
from pathlib import Path

import pytest

from tests.distributed import pretrain_launched, tiny_gpt

EVALUATED = re.compile(r"validation loss at iteration 2 .*?lm loss value: ([0-9.E+-]+)")


def validation_loss(folder: Path, ranks: int) -> float:
    """What the last rank of a run printed after its second step."""
    said = (folder / "logs" / f"rank{ranks - 1:02d}.log").read_text()
    found = EVALUATED.search(said)
    assert found, said[-2000:]
    return float(found[1])


def test_evaluation_micro_batches_of_their_own(corpus_prefix: Path, tmp_path: Path) -> None:
    flags = (
        *("--eval-iters", "2", "--eval-interval", "2", "--split", "80,20,0"),
        *("--eval-micro-batch-size", "1", "--eval-global-batch-size", "8"),
    )
    layouts = {
        "one rank": (1, ()),
        "stock": (2, ("--tensor-model-parallel-size", "2")),
        "helix": (2, ("--helix-m", "2", "--helix-n", "1")),
    }
    found = {}
    for name, (ranks, layout) in layouts.items():
        argv = tiny_gpt(corpus_prefix, *flags, *layout, train_iters=2)
        pretrain_launched(argv, ranks, tmp_path / name)
        found[name] = validation_loss(tmp_path / name, ranks)
    for name in ("stock", "helix"):
        assert found[name] == pytest.approx(found["one rank"], rel=1e-5)
