"""FSDP, torch's and Megatron's, on CPU ranks: the training that stock data parallelism is."""

from pathlib import Path

import pytest

from tests.covering import THOROUGH, fast
from tests.distributed import Curve, pretrain, tiny_gpt

LOSS_TOLERANCE, GRAD_NORM_TOLERANCE = 1e-5, 1e-4  # see tests/test_parity.py
FSDP2 = ("--use-torch-fsdp2", "--ckpt-format", "torch_dist")
MEGATRON = ("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params")
MEGATRON += ("--ckpt-format", "fsdp_dtensor", "--use-distributed-optimizer")
MEGATRON += ("--overlap-grad-reduce", "--overlap-param-gather")
UNTIED = "--untie-embeddings-and-output-weights"
MOE = ("--num-experts", "4", "--moe-router-topk", "2", "--disable-bias-linear", "--swiglu")
MOE += ("--moe-router-load-balancing-type", "none")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform")
CASES = {
    "dense": (2, ()),
    "dense, several micro-batches": (2, ("--micro-batch-size", "2")),
    "moe": (2, MOE),
    "moe, tensor parallelism": (4, (*MOE, *TP2)),
    "uneven shards": (3, ("--micro-batch-size", "2", "--global-batch-size", "12")),
    "full recompute": (2, (*RECOMPUTE, "--recompute-num-layers", "1")),
    "tensor parallelism": (4, TP2),
}


def same(found: Curve, wanted: Curve) -> None:
    """The same training, up to the rounding of sums."""
    assert found.losses == pytest.approx(wanted.losses, rel=LOSS_TOLERANCE, abs=0)
    assert found.grad_norms == pytest.approx(wanted.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


@pytest.mark.parametrize("case", fast(["moe"], CASES))
def test_it_trains_as_data_parallelism_does(corpus_prefix: Path, case: str) -> None:
    ranks, flags = CASES[case]
    stock, *sharded = (
        pretrain(tiny_gpt(corpus_prefix, UNTIED, *flags, *more), ranks)
        for more in ((), FSDP2, MEGATRON)
    )
    for kind in sharded:
        same(kind, stock)


@THOROUGH
def test_whole_experts_beside_tensor_parallelism_are_another_training(corpus_prefix: Path) -> None:
    """Of megatron-core 0.19: why such a layout is refused, and when it no longer need be."""
    flags = (UNTIED, *MOE, *TP2, "--expert-tensor-parallel-size", "1")
    stock, sharded = (pretrain(tiny_gpt(corpus_prefix, *flags, *more), 4) for more in ((), FSDP2))
    assert sharded.grad_norms != pytest.approx(stock.grad_norms, rel=10 * GRAD_NORM_TOLERANCE)


def test_checkpoints_go_to_other_layouts_and_come_from_them(
    corpus_prefix: Path, tmp_path: Path
) -> None:
    """By Megatron's own loading, and by the start that loads before anything is wrapped."""

    def train(*flags: str, steps: int = 2) -> Curve:
        return pretrain(tiny_gpt(corpus_prefix, UNTIED, *flags, train_iters=steps), 2)

    folder = str(tmp_path / "saved")
    saved = ("--save", folder, "--save-interval", "1", "--no-save-optim", "--no-save-rng")
    train(*FSDP2, *saved, steps=1)
    loaded = ("--load", folder, "--finetune", "--no-load-optim", "--no-load-rng")
    stock = train(*loaded)
    same(train(*FSDP2, *loaded), stock)
    early = ("--helix-initial-weights", folder)
    assert train(*early) == stock
    same(train("--tensor-model-parallel-size", "2", *early), stock)
    assert train().losses != pytest.approx(stock.losses, rel=LOSS_TOLERANCE)


def test_initial_weights_in_another_format_are_refused(corpus_prefix: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--helix-initial-weights: must be .* torch_dist format"):
        pretrain(tiny_gpt(corpus_prefix, "--helix-initial-weights", str(tmp_path)), 2)
