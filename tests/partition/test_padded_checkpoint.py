"""Checkpoints of padded tiles and features: every layout goes on from them, and none is padded."""

from pathlib import Path

import pytest

from tests.covering import fast
from tests.distributed import pretrain, tiny_gpt
from tests.partition.checkpoint_case import (
    MODEL,
    OPTIMIZERS,
    SAVED_STEP,
    SP,
    STEPS,
    assert_goes_on,
    assert_same_bits,
    passed_on,
    tensors_in,
)

# Three ranks divide neither the features of the MLP nor those of experts.
UNEVEN = (
    *("--num-attention-heads", "6", "--kv-channels", "12", "--ffn-hidden-size", "250"),
    *("--seq-length", "30", "--vocab-size", "270", "--make-vocab-size-divisible-by", "1"),
)
HELIX_3X1 = (SP, "--helix-m", "3", "--helix-n", "1", "--helix-split", "sequence")
UNEVEN_EXPERTS = (
    *("--disable-bias-linear", "--num-experts", "2", "--moe-ffn-hidden-size", "40"),
    *("--moe-router-load-balancing-type", "none", "--moe-token-dispatcher-type", "alltoall"),
    *("--moe-shared-expert-intermediate-size", "46", "--moe-layer-freq", "[0,1]"),
    # Stock takes experts' moments to no other degree, either.
    *("--no-save-optim", "--no-load-optim"),
)
UNEVEN_MODELS = {
    "biases": (),
    "gated": ("--swiglu", "--disable-bias-linear", *OPTIMIZERS["distributed"]),
    "gated_biases": ("--swiglu",),
    "experts": UNEVEN_EXPERTS,
    "gated_experts": ("--swiglu", *UNEVEN_EXPERTS),
}


@pytest.mark.parametrize("model", fast(["gated"], UNEVEN_MODELS))
def test_padding_of_features_is_in_no_checkpoint(
    corpus_prefix: Path, tmp_path: Path, model: str
) -> None:
    """From stock to helix, whose ranks do not divide the features, and back: bit for bit."""
    sizes = tiny_gpt(corpus_prefix, *MODEL, *UNEVEN, *UNEVEN_MODELS[model])
    stock = [*sizes, SP, "--tensor-model-parallel-size", "2", "--train-iters", str(STEPS)]
    save = ("--save", str(tmp_path / "checkpoint"), "--save-interval", str(SAVED_STEP))
    uninterrupted, first = pretrain([*stock, *save], 2), tmp_path / "checkpoint"
    checkpoint, expected = first, tensors_in(first, SAVED_STEP)
    # A weight and two moments; weights of a dense MLP, of an expert and of a shared one.
    assert sum("linear_fc1.weight" in key for key in expected) >= 3
    for layout, flags, ranks in (
        ("helix_3x1", [*sizes, *HELIX_3X1], 3),
        ("stock_tp1", sizes, 1),
    ):
        checkpoint = passed_on(checkpoint, tmp_path / layout, flags, ranks)
        assert_same_bits(tensors_in(checkpoint, SAVED_STEP), expected)
    if "experts" not in model:
        load = ("--load", str(first), "--ckpt-step", str(SAVED_STEP), "--train-iters", str(STEPS))
        assert_goes_on(pretrain([*sizes, *HELIX_3X1, *load], 3), uninterrupted)
