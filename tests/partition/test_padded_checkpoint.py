"""Checkpoints of padded tiles and features: every layout goes on from them, and none is padded."""

from pathlib import Path

import pytest

from megatron_helix import pretrain_gpt
from tests.covering import THOROUGH, fast
from tests.distributed import living_ranks, pretrain, tiny_gpt
from tests.partition.checkpoint_case import (
    GRAD_NORM_TOLERANCE,
    LOSS_TOLERANCE,
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


# Degrees that divide neither heads nor head dimension. A sequence, features and a vocabulary that
# all of them share; of a head's eight rotary pairs three segments and five are not alike.
SHARED = (
    *(SP, "--seq-length", "60", "--max-position-embeddings", "60", "--ffn-hidden-size", "240"),
    *("--vocab-size", "300", "--make-vocab-size-divisible-by", "1"),
)
CHAIN = {
    2: ("--tensor-model-parallel-size", "2"),
    3: ("--helix-m", "3", "--helix-n", "1", "--helix-exchange", "weights"),
    5: ("--helix-m", "5", "--helix-n", "1", "--helix-exchange", "activations"),
    4: ("--tensor-model-parallel-size", "4"),
}


@THOROUGH
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_chain_of_segments_that_are_not_alike_is_one_curve(
    corpus_prefix: Path, tmp_path: Path, optimizer: str
) -> None:
    """Two steps under each layout; and, saved again at once, the same bits under all."""
    known = (*MODEL, *SHARED, *OPTIMIZERS[optimizer])

    def flags(ranks: int, *more: str, until: int) -> list[str]:
        iters = str(len(CHAIN) * SAVED_STEP)  # of the schedule of the whole curve
        stop = ("--exit-interval", str(until))
        every = ("--train-iters", iters, *stop)
        return tiny_gpt(corpus_prefix, *known, *CHAIN[ranks], *more, *every)

    uninterrupted = pretrain(flags(2, until=100), 2)
    losses, norms, load = [], [], ()
    first = None
    for turn, ranks in enumerate(CHAIN, start=1):
        until, folder = turn * SAVED_STEP, str(tmp_path / f"{ranks}")
        save = ("--save", folder, "--save-interval", str(until))
        curve = pretrain(flags(ranks, *load, *save, until=until), ranks)
        losses += curve.losses
        norms += curve.grad_norms
        load = ("--load", folder)
        first = first or folder
    assert losses == pytest.approx(uninterrupted.losses, rel=LOSS_TOLERANCE, abs=0)
    assert norms == pytest.approx(uninterrupted.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)

    assert first is not None
    expected, checkpoint = tensors_in(Path(first), SAVED_STEP), first
    for ranks in (3, 5, 4):
        again = str(tmp_path / f"again{ranks}")
        more = ("--load", checkpoint, "--save", again, "--save-interval", "100")
        argv = pretrain_gpt.prepare(
            tiny_gpt(
                *(corpus_prefix, *known, *CHAIN[ranks], *more, "--override-opt-param-scheduler"),
                train_iters=SAVED_STEP,
            ),
            ranks,
        )
        living_ranks().call(pretrain_gpt.train, argv, ranks=ranks)
        assert_same_bits(tensors_in(Path(again), SAVED_STEP), expected)
        checkpoint = again
