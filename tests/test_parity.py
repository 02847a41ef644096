"""Megatron's own training loop, five optimizer steps, with and without helix: the same numbers.

Loss and gradient norm of every step agree with stock tensor parallelism on as many ranks, for every
exchange and split, with sequence parallelism, grouped queries, MoE, pipeline and data parallelism.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_helix.experiment.metrics import RunMetrics
from tests.distributed import pretrain, tiny_gpt

# Single precision has a unit roundoff of 6e-8. Sums over some thousand terms in another order are
# ten times that apart, and five optimizer steps carry it on. A loss, the mean of 256 of them, keeps
# to 1e-5; a gradient norm passes through the whole model once more: 1e-4. What a wrong layout or a
# forgotten sum does to the first gradient norm is orders of magnitude larger.
LOSS_TOLERANCE = 1e-5
GRAD_NORM_TOLERANCE = 1e-4

SP = ("--sequence-parallel",)
MOE = (
    *(*SP, "--disable-bias-linear", "--num-experts", "4"),
    *("--moe-token-dispatcher-type", "alltoall", "--moe-router-load-balancing-type", "none"),
    *("--expert-model-parallel-size", "4", "--expert-tensor-parallel-size", "1"),
)
MODELS = {
    "dense": (),
    "dense_sp": SP,
    "swiglu_sp": (*SP, "--swiglu", "--disable-bias-linear"),
    "gqa_sp": (*SP, "--group-query-attention", "--num-query-groups", "2"),
    "qk_norm_sp": (*SP, "--qk-layernorm", "--normalization", "RMSNorm", "--disable-bias-linear"),
    "gate_sp": (*SP, "--attention-output-gate", "--rotary-percent", "0.5"),
    # Every token to every expert: else a token near a tie between two may turn to the other by
    # roundoff, which moves the loss by 1e-5. Only the first step is before any such turn.
    "moe_sp": (*MOE, "--moe-router-topk", "4"),
    "moe_top2_sp": (*MOE, "--moe-router-topk", "2"),
    "pp2": ("--pipeline-model-parallel-size", "2"),
    "pp2_sp": (*SP, "--pipeline-model-parallel-size", "2"),
    "dp2_sp": (*SP, "--use-distributed-optimizer"),
}
WORLD_SIZES = {"pp2": 8, "pp2_sp": 8, "dp2_sp": 8}  # else 4: all of them tensor-parallel

Stock = Callable[[str], RunMetrics]
Helix = Callable[..., RunMetrics]


@pytest.fixture(scope="module")
def stock(corpus_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """Stock Megatron on a tensor-parallel group of four, trained once for each model."""
    runs: dict[str, RunMetrics] = {}

    def run(model: str) -> RunMetrics:
        if model not in runs:
            flags = tiny_gpt(corpus_prefix, *MODELS[model], "--tensor-model-parallel-size", "4")
            folder = tmp_path_factory.mktemp(f"stock-{model}")
            runs[model] = pretrain(flags, WORLD_SIZES.get(model, 4), folder)
        return runs[model]

    return run


@pytest.fixture
def helix(corpus_prefix: Path, tmp_path: Path) -> Helix:
    """The same with the group cut m x n."""

    def run(model: str, m: int, n: int, *flags: str) -> RunMetrics:
        cut = ("--helix-m", str(m), "--helix-n", str(n), *flags)
        flags = tuple(tiny_gpt(corpus_prefix, *MODELS[model], *cut))
        return pretrain(flags, WORLD_SIZES.get(model, 4), tmp_path)

    return run


def exchange(name: str, split: str = "auto") -> tuple[str, ...]:
    """The flags that ask for an exchange."""
    return ("--helix-exchange", name, "--helix-split", split)


@pytest.mark.parametrize(
    ("model", "m", "n", "flags"),
    [
        ("dense", 2, 2, exchange("activations", "batch")),
        ("dense", 4, 1, exchange("activations", "sequence")),
        ("dense", 2, 2, exchange("scores")),
        ("dense_sp", 4, 1, exchange("activations", "batch")),
        ("dense_sp", 2, 2, exchange("weights", "batch")),
        ("dense_sp", 4, 1, exchange("weights", "sequence")),
        ("dense_sp", 2, 2, (*exchange("weights", "batch"), "--helix-gather", "step")),
        ("swiglu_sp", 2, 2, exchange("weights", "batch")),
        ("swiglu_sp", 4, 1, exchange("weights", "batch")),
        ("gqa_sp", 2, 2, exchange("activations", "sequence")),
        ("gqa_sp", 4, 1, exchange("weights", "batch")),
        ("qk_norm_sp", 2, 2, exchange("weights", "sequence")),
        ("qk_norm_sp", 4, 1, exchange("activations", "batch")),
        ("qk_norm_sp", 2, 2, exchange("scores")),
        ("gate_sp", 2, 2, exchange("activations", "batch")),
        ("moe_sp", 2, 2, exchange("activations", "batch")),
        ("moe_sp", 4, 1, exchange("weights", "batch")),
        ("pp2", 2, 2, exchange("activations", "batch")),
        ("pp2_sp", 2, 2, exchange("weights", "batch")),
        ("dp2_sp", 2, 2, exchange("auto")),
        ("dp2_sp", 4, 1, exchange("weights", "sequence")),
    ],
    ids=lambda value: "-".join(value[1::2]) if isinstance(value, tuple) else None,
)
def test_training_is_as_stock(
    stock: Stock, helix: Helix, model: str, m: int, n: int, flags: tuple[str, ...]
) -> None:
    expected, actual = stock(model), helix(model, m, n, *flags)
    assert len(actual.losses) == 5
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE, abs=0)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


@pytest.mark.parametrize(("m", "n", "name"), [(2, 2, "activations"), (4, 1, "weights")])
def test_sparse_experts_start_as_stock(
    stock: Stock, helix: Helix, m: int, n: int, name: str
) -> None:
    expected, actual = stock("moe_top2_sp"), helix("moe_top2_sp", m, n, *exchange(name))
    assert actual.losses[0] == pytest.approx(expected.losses[0], rel=LOSS_TOLERANCE)
    assert actual.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=GRAD_NORM_TOLERANCE)


@pytest.mark.parametrize("model", ["dense", "dense_sp", "moe_top2_sp"])
def test_one_segment_is_stock_to_the_last_bit(stock: Stock, helix: Helix, model: str) -> None:
    expected, actual = stock(model), helix(model, 1, 4)
    assert actual.losses == expected.losses
    assert actual.grad_norms == expected.grad_norms


@pytest.mark.parametrize("model", MODELS)
def test_stock_learns(stock: Stock, model: str) -> None:
    """A model that does not train would agree with everything."""
    losses, grad_norms = stock(model).losses, stock(model).grad_norms
    # Untrained, a byte is as good as any other of 256; each step lowers the loss a little.
    assert losses[0] == pytest.approx(math.log(256), rel=0.1)
    assert losses[-1] < losses[0]
    assert all(math.isfinite(norm) and norm > 0 for norm in grad_norms)
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize(
    ("model", "same_as"), [("dense_sp", "dense"), ("pp2_sp", "pp2"), ("dp2_sp", "dense")]
)
def test_a_model_is_the_same_however_parallel_it_is(stock: Stock, model: str, same_as: str) -> None:
    """The first weights are drawn on the CPU: nothing that a GPU would draw may move them."""
    expected, actual = stock(same_as), stock(model)
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE, abs=0)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


def test_models_differ(stock: Stock) -> None:
    """Flags that Megatron ignored would make two of the models one."""
    models = [model for model in MODELS if model not in ("dense_sp", "pp2_sp", "dp2_sp")]
    assert len({round(stock(model).losses[-1], 4) for model in models}) == len(models)
