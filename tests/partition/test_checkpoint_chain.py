"""A training that goes from layout to layout, of which two pad heads and features with zeros.

Its losses are those of a training that stayed where it began, and what is only loaded and saved
again is the same to the last bit.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import load_plain_tensors

from tests.covering import fast
from tests.distributed import pretrain, run_distributed, tiny_gpt

LOSS_TOLERANCE, GRAD_NORM_TOLERANCE = 1e-5, 1e-4  # see tests/test_parity.py
STEPS = 2  # of a layout: the second one shows the optimizer state that came along
FEATURES, PAIRS = 124, 8  # of the MLP and, rotary, of a head

# A sequence and a vocabulary that all of the layouts share.
MODEL = (
    *("--group-query-attention", "--num-query-groups", "2", "--qk-layernorm", "--swiglu"),
    *("--num-layers", "1", "--kv-channels", str(2 * PAIRS), "--ffn-hidden-size", str(FEATURES)),
    *("--seq-length", "60", "--max-position-embeddings", "60", "--micro-batch-size", "1"),
    *("--vocab-size", "300", "--make-vocab-size-divisible-by", "1", "--global-batch-size", "2"),
    *("--weight-decay", "0.1", "--sequence-parallel"),
)
LAYOUTS = {
    2: ("--tensor-model-parallel-size", "2"),
    3: ("--helix-m", "3", "--helix-n", "1", "--helix-exchange", "weights"),
    5: ("--helix-m", "5", "--helix-n", "1", "--helix-exchange", "activations"),
    4: ("--tensor-model-parallel-size", "4"),
}
OPTIMIZERS = {
    "whole": (),
    "distributed": (
        *("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"),
        "--untie-embeddings-and-output-weights",
    ),
}

Flags = Callable[..., list[str]]


@pytest.fixture
def flags(corpus_prefix: Path, optimizer: str) -> Flags:
    """Those of a layout of so many ranks, until a step of the whole training."""

    def of(ranks: int, *more: str, until: int) -> list[str]:
        known = (*MODEL, *OPTIMIZERS[optimizer], *LAYOUTS[ranks], *more)
        stop = ("--exit-interval", str(until))
        return tiny_gpt(corpus_prefix, *known, *stop, train_iters=len(LAYOUTS) * STEPS)

    return of


def turns(tmp_path: Path) -> Iterator[tuple[int, tuple[str, ...], int]]:
    """Ranks, flags that load what the last ones saved and save, and the step to end at."""
    load: tuple[str, ...] = ()
    for turn, ranks in enumerate(LAYOUTS, start=1):
        until, folder = turn * STEPS, str(tmp_path / str(ranks))
        yield ranks, (*load, "--save", folder, "--save-interval", str(until)), until
        load = ("--load", folder)


@pytest.mark.parametrize("optimizer", fast([], OPTIMIZERS))
def test_a_chain_of_layouts_is_one_curve(flags: Flags, tmp_path: Path, optimizer: str) -> None:
    assert [ranks for ranks in LAYOUTS if FEATURES % ranks and PAIRS % ranks] == [3, 5]
    uninterrupted = pretrain(flags(2, until=100), 2)
    curves = [
        pretrain(flags(ranks, *more, until=until), ranks) for ranks, more, until in turns(tmp_path)
    ]
    losses = [loss for curve in curves for loss in curve.losses]
    norms = [norm for curve in curves for norm in curve.grad_norms]
    assert len(losses) == len(norms) == len(LAYOUTS) * STEPS
    assert losses == pytest.approx(uninterrupted.losses, rel=LOSS_TOLERANCE, abs=0)
    assert norms == pytest.approx(uninterrupted.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


@pytest.mark.parametrize("optimizer", fast([], OPTIMIZERS))
@pytest.mark.parametrize("precision", [("--bf16",)], ids=["bf16"])
def test_what_is_passed_on_keeps_its_bits(
    flags: Flags, tmp_path: Path, optimizer: str, precision: tuple[str, ...]
) -> None:
    """Weights, those in single precision, and both moments; from the first layout to the last."""
    first = tmp_path / "first"
    save = ("--save", str(first), "--save-interval", str(STEPS))
    pretrain(flags(2, *precision, *save, until=STEPS), 2)
    expected, last = tensors(first), first
    assert sum("linear_fc1.weight" in name for name in expected) == 4
    assert sum("linear_qkv.weight" in name for name in expected) == 4
    for ranks in (3, 5, 4):
        again = tmp_path / str(ranks)
        more = ("--load", str(last), "--save", str(again), "--save-interval", "100")
        # The end of its schedule is that of a run of no steps.
        ends = ("--train-iters", str(STEPS), "--override-opt-param-scheduler")
        pretrain(flags(ranks, *precision, *more, *ends, until=100), ranks)
        found = tensors(again)
        assert found.keys() == expected.keys()
        changed = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not changed, f"{ranks} ranks"
        last = again


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, as Megatron puts it together on one rank."""
    folder = str(checkpoint / f"iter_{STEPS:07d}")
    (content,) = run_distributed(lambda: load_plain_tensors(folder), 1)
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
