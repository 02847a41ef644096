"""Megatron's features beside helix, one by one: the numbers of stock."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.covering import THOROUGH, fast
from tests.distributed import Curve, pretrain, pretrain_launched, tiny_gpt

LOSS_TOLERANCE, GRAD_NORM_TOLERANCE = 1e-5, 1e-4  # see tests/test_parity.py

TP = "--tensor-model-parallel-size"
SP = "--sequence-parallel"
HELIX = ("--helix-m", "2", "--helix-n", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
MOE = (
    *("--disable-bias-linear", "--num-experts", "4", "--moe-router-topk", "4"),
    *("--moe-token-dispatcher-type", "alltoall", "--moe-aux-loss-coeff", "0.1"),
)
EP4 = ("--expert-model-parallel-size", "4", "--expert-tensor-parallel-size", "1")
BALANCING = "--moe-router-load-balancing-type"

FEATURES = {
    "multi-token prediction": ("--mtp-num-layers", "1"),
    "virtual pipeline": (
        *(*PP2, "--num-layers", "4", "--num-layers-per-virtual-pipeline-stage", "1"),
    ),
    "overlapped data parallelism": (
        *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "expert tensor parallelism": (
        *(*MOE, BALANCING, "none"),
        *("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "2"),
    ),
    "shared experts": (
        *(*MOE, *EP4, BALANCING, "none", "--moe-shared-expert-intermediate-size", "64"),
    ),
    "auxiliary loss": (*MOE, *EP4, BALANCING, "aux_loss"),
    "auxiliary loss by sequence": (*MOE, *EP4, BALANCING, "seq_aux_loss"),
    "sliding window": ("--window-size", "(8,0)"),
    "biases and norms of queries and keys": (
        *("--disable-bias-linear", "--add-qkv-bias", "--qk-l2-norm"),
    ),
    "losses by token, documents apart": (
        *("--calculate-per-token-loss", "--reset-attention-mask", "--reset-position-ids"),
        "--eod-mask-loss",
    ),
    "rotary variants": (
        *("--rotary-interleaved", "--use-rope-scaling", "--no-rope-freq", "[0,1]"),
    ),
    "maximal update": (
        *("--use-mup", "--mup-base-hidden-size", "32", "--untie-embeddings-and-output-weights"),
    ),
    "dense and sparse layers in turn": (
        *(*MOE, *EP4, BALANCING, "none", "--moe-layer-freq", "[0,1]"),
        *("--moe-ffn-hidden-size", "64", "--moe-router-dtype", "fp32"),
    ),
}
RANKS = {"virtual pipeline": 8, "overlapped data parallelism": 8}  # else 4

# The roundoff of a type shows in how far apart two stock degrees are; helix, whose sums run in
# again another order, may be as far from either, and no more than a few times that.
# So large that the first updates overflow and are left out, then it doubles again.
DYNAMIC = (
    "--train-iters",
    "5",
    "--initial-loss-scale",
    "262144",
    "--hysteresis",
    "1",
    "--loss-scale-window",
    "2",
)
PRECISIONS = {
    "bf16": ("--bf16",),
    "fp16": ("--fp16", *DYNAMIC),
    "bf16, gradients too": ("--bf16", "--grad-reduce-in-bf16"),
    "bf16, softmax in fp32": ("--bf16", "--attention-softmax-in-fp32"),
    "fp16, cross entropy too": ("--fp16", *DYNAMIC, "--fp16-lm-cross-entropy"),
}
TIMES_STOCKS_OWN_DIFFERENCE = 4

Train = Callable[..., Curve]


@pytest.fixture
def train(corpus_prefix: Path) -> Train:
    """Train the tiny GPT with these flags on so many ranks."""

    def run(world_size: int, *flags: str) -> Curve:
        return pretrain(tiny_gpt(corpus_prefix, SP, *flags), world_size)

    return run


@pytest.mark.parametrize("feature", fast(["auxiliary loss"], FEATURES))
def test_a_feature_of_megatron_gives_the_same_numbers(train: Train, feature: str) -> None:
    flags, ranks = FEATURES[feature], RANKS.get(feature, 4)
    stock = train(ranks, TP, "4", *flags)
    splits = ("--helix-split", "sequence") if "by sequence" in feature else ()
    for exchange in (("activations",), ("weights", *splits)):
        helix = train(ranks, *HELIX, *flags, "--helix-exchange", *exchange)
        assert helix.losses == pytest.approx(stock.losses, rel=LOSS_TOLERANCE, abs=0)
        assert helix.grad_norms == pytest.approx(stock.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


@pytest.mark.parametrize("precision", fast(["fp16"], PRECISIONS))
def test_half_precision_is_as_near_to_stock_as_stock_to_itself(
    train: Train, precision: str
) -> None:
    flags = PRECISIONS[precision]
    stock, other = train(4, TP, "4", *flags), train(4, TP, "2", *flags)
    allowed = TIMES_STOCKS_OWN_DIFFERENCE * _difference(stock, other)
    for exchange in ("activations", "weights"):
        helix = train(4, *HELIX, *flags, "--helix-exchange", exchange)
        assert len(helix.losses) == len(stock.losses)
        assert _difference(stock, helix) <= allowed
        assert helix.loss_scales == stock.loss_scales
        assert helix.skipped_steps == stock.skipped_steps
    assert (0 < stock.skipped_steps < len(stock.losses)) == ("--fp16" in flags)


@THOROUGH
def test_deterministic_mode_gives_the_same_numbers(
    corpus_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Ring")  # Megatron asks for one that is deterministic
    large = ("--micro-batch-size", "8", "--global-batch-size", "16", "--vocab-size", "64")
    weights = (*HELIX, "--helix-exchange", "weights")
    stock, helix, again = (
        pretrain_launched(
            tiny_gpt(corpus_prefix, SP, *layout, *large, "--deterministic-mode"), 4, tmp_path / name
        )
        for name, layout in (("stock", (TP, "4")), ("helix", weights), ("again", weights))
    )
    assert helix.losses == pytest.approx(stock.losses, rel=LOSS_TOLERANCE, abs=0)
    assert helix.grad_norms == pytest.approx(stock.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)
    assert again.losses == helix.losses
    assert again.grad_norms == helix.grad_norms


CONTEXT = {
    "stock": (TP, "4"),
    "activations": (*HELIX, "--helix-exchange", "activations"),
    "weights": ("--helix-m", "4", "--helix-n", "1", "--helix-exchange", "weights"),
}


@pytest.fixture(scope="module")
def whole_context(corpus_prefix: Path) -> Curve:
    """Stock without context parallelism."""
    return pretrain(tiny_gpt(corpus_prefix, SP, TP, "4"), 4)


@pytest.mark.parametrize("layout", fast(["activations", "weights"], CONTEXT))
def test_context_parallelism_gives_the_same_numbers(
    train: Train, whole_context: Curve, layout: str
) -> None:
    """Stock with it says that the test's attention is right, as every layout does."""
    size = ("--context-parallel-size", "2")
    spec = ("--spec", "tests.context_parallel_case", "layer_spec")
    found = train(8, *CONTEXT[layout], *size, *spec)
    norms = pytest.approx(whole_context.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)
    assert found.losses == pytest.approx(whole_context.losses, rel=LOSS_TOLERANCE, abs=0)
    assert found.grad_norms == norms


def _difference(a: Curve, b: Curve) -> float:
    """Largest relative difference of a loss."""
    return max(abs(x - y) / abs(x) for x, y in zip(a.losses, b.losses, strict=True))
