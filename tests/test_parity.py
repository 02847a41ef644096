"""Megatron's own training loop, three optimizer steps, with and without helix: the same numbers.

Loss and gradient norm of every step agree with stock tensor parallelism on as many ranks: every
exchange and split with every kind of model, and each of them with what else a run can ask for.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from tests.covering import THOROUGH, covering, fast, one_of_each
from tests.distributed import Curve, measured, pretrain, tiny_gpt

# Single precision has a unit roundoff of 6e-8. Sums over some thousand terms in another order are
# ten times that apart, and optimizer steps carry it on. A loss, the mean of 256 of them, keeps
# to 1e-5; a gradient norm passes through the whole model once more: 1e-4. What a wrong layout or a
# forgotten sum does to the first gradient norm is orders of magnitude larger.
LOSS_TOLERANCE = 1e-5
GRAD_NORM_TOLERANCE = 1e-4
STEPS = 3

SP = ("--sequence-parallel",)
NO_BIAS = ("--disable-bias-linear",)
MOE = (
    *(*SP, *NO_BIAS, "--num-experts", "4", "--moe-token-dispatcher-type", "alltoall"),
    *("--moe-router-load-balancing-type", "none"),
    *("--expert-model-parallel-size", "4", "--expert-tensor-parallel-size", "1"),
)
PP2 = ("--pipeline-model-parallel-size", "2")
LEARNED_POSITIONS = ("--position-embedding-type", "learned_absolute")
# More tokens in a micro-batch than a head group has vocabulary, from n = 1 on.
LARGE = (
    *("--seq-length", "64", "--max-position-embeddings", "64"),
    *("--micro-batch-size", "8", "--global-batch-size", "16"),
)
UNTIED = ("--untie-embeddings-and-output-weights",)
MODELS = {
    "dense": (),
    "dense_sp": SP,
    "gated_sp": (
        *(*SP, *NO_BIAS, *UNTIED, "--swiglu", "--normalization", "RMSNorm", "--qk-layernorm"),
    ),
    # Every token to every expert: else a token near a tie between two may turn to the other by
    # roundoff, which moves the loss by 1e-5. Only the first step is before any such turn.
    "moe_sp": (*MOE, "--moe-router-topk", "4"),
    "moe_top2_sp": (*MOE, "--moe-router-topk", "2"),
    "output_gate_sp": (
        *(*SP, "--attention-output-gate", "--rotary-percent", "0.5"),
        *("--group-query-attention", "--num-query-groups", "2"),
    ),
    "positions_sp": (*SP, *LEARNED_POSITIONS),
    "triples_sp": (*SP, "--micro-batch-size", "3", "--global-batch-size", "6"),
    "large_tied": (*SP, *LARGE),
    "large_untied": (*SP, *LARGE, *UNTIED),
    "pp2": PP2,
    "large_pp2": (*SP, *LARGE, *PP2),
}

EXCHANGES = {
    "activations-batch": ("--helix-exchange", "activations", "--helix-split", "batch"),
    "activations-sequence": ("--helix-exchange", "activations", "--helix-split", "sequence"),
    "weights-batch": ("--helix-exchange", "weights", "--helix-split", "batch"),
    "weights-sequence": ("--helix-exchange", "weights", "--helix-split", "sequence"),
    "scores": ("--helix-exchange", "scores"),
    "auto": (),
}
ONCE = ("--helix-gather", "once")
STEP = ("--helix-gather", "step")
PREFIX = ("--helix-core-attention", "prefix")
DP2 = ("--use-distributed-optimizer",)
FULL_RECOMPUTE = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)


def recompute(*modules: str) -> tuple[str, ...]:
    """The flags that recompute these parts of a layer."""
    return ("--recompute-granularity", "selective", "--recompute-modules", *modules)


Stock = Callable[[str], Curve]
Helix = Callable[..., Curve]


@pytest.fixture(scope="module")
def stock(corpus_prefix: Path) -> Stock:
    """Stock Megatron on a tensor-parallel group of four, trained once for each model."""
    runs: dict[str, Curve] = {}

    def run(model: str) -> Curve:
        if model not in runs:
            flags = tiny_gpt(corpus_prefix, *MODELS[model], "--tensor-model-parallel-size", "4")
            runs[model] = pretrain(flags, 8 if "pp2" in model else 4)
        return runs[model]

    return run


@pytest.fixture
def helix(corpus_prefix: Path) -> Helix:
    """The same with the group cut m x n."""

    def run(model: str, m: int, n: int, exchange: str, *flags: str) -> Curve:
        cut = ("--helix-m", str(m), "--helix-n", str(n), *EXCHANGES[exchange])
        argv = tiny_gpt(corpus_prefix, *MODELS[model], *cut, *flags)
        doubled = PP2[0] in argv or DP2[0] in argv
        return pretrain(argv, 8 if doubled else 4)

    return run


def assert_same_training(actual: Curve, expected: Curve, steps: int = STEPS) -> None:
    """Loss and gradient norm of every step agree."""
    assert len(actual.losses) == steps
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE, abs=0)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)


@pytest.mark.parametrize(
    ("model", "exchange", "cut"),
    one_of_each(
        ["dense_sp", "moe_sp"],
        product(
            ["dense_sp", "gated_sp", "moe_sp"],
            [name for name in EXCHANGES if name != "auto"],
            [(2, 2), (4, 1)],
        ),
    ),
)
def test_training_is_as_stock(
    stock: Stock, helix: Helix, model: str, exchange: str, cut: tuple[int, int]
) -> None:
    assert_same_training(helix(model, *cut, exchange), stock(model))


@pytest.mark.parametrize(
    ("model", "m", "n", "exchange"),
    one_of_each(
        ["dense"],
        [
            ("dense", 2, 2, "activations-batch"),
            ("dense", 4, 1, "activations-sequence"),
            ("dense", 2, 2, "scores"),
            ("output_gate_sp", 2, 2, "activations-batch"),
            ("output_gate_sp", 4, 1, "weights-sequence"),
            ("positions_sp", 4, 1, "activations-batch"),
            ("positions_sp", 2, 2, "weights-sequence"),
            ("positions_sp", 4, 1, "scores"),
        ],
    ),
)
def test_other_models_train_as_stock(
    stock: Stock, helix: Helix, model: str, m: int, n: int, exchange: str
) -> None:
    """Without sequence parallelism, grouped queries with gates, learned positions."""
    assert_same_training(helix(model, m, n, exchange), stock(model))


@THOROUGH  # in the fast suite: tests/test_token_order.py
@pytest.mark.parametrize(("m", "n", "exchange"), [(2, 2, "activations-batch"), (4, 1, "auto")])
def test_sparse_experts_start_as_stock(
    stock: Stock, helix: Helix, m: int, n: int, exchange: str
) -> None:
    expected, actual = stock("moe_top2_sp"), helix("moe_top2_sp", m, n, exchange)
    assert actual.losses[0] == pytest.approx(expected.losses[0], rel=LOSS_TOLERANCE)
    assert actual.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=GRAD_NORM_TOLERANCE)


@pytest.mark.parametrize("model", fast(["moe_top2_sp"], ["dense", "gated_sp", "moe_top2_sp"]))
def test_one_segment_is_stock_to_the_last_bit(stock: Stock, helix: Helix, model: str) -> None:
    expected, actual = stock(model), helix(model, 1, 4, "auto")
    assert actual.losses == expected.losses
    assert actual.grad_norms == expected.grad_norms


@pytest.mark.parametrize(
    ("model", "m", "n", "exchange", "micro_batch"),
    covering(
        [
            ("triples_sp", 2, 2, "activations-sequence", 3),
            ("triples_sp", 4, 1, "weights-sequence", 3),
            ("triples_sp", 2, 2, "auto", 3),
            # Eight micro-batches a step: one sequence beside several ranks.
            ("dense_sp", 4, 1, "activations-sequence", 1),
            ("dense_sp", 2, 2, "weights-sequence", 1),
            ("dense_sp", 2, 2, "scores", 1),
        ],
        of=(1,),
    ),
)
def test_micro_batches_that_m_does_not_divide(
    stock: Stock, helix: Helix, model: str, m: int, n: int, exchange: str, micro_batch: int
) -> None:
    actual = helix(model, m, n, exchange, "--micro-batch-size", str(micro_batch))
    assert_same_training(actual, stock(model))


@pytest.mark.parametrize(
    ("model", "m", "n", "exchange", "flags"),
    one_of_each(
        ["dense_sp", "moe_sp"],
        [
            ("dense_sp", 2, 2, "weights-batch", FULL_RECOMPUTE),
            ("dense_sp", 4, 1, "activations-sequence", FULL_RECOMPUTE),
            ("dense_sp", 2, 2, "scores", FULL_RECOMPUTE),
            ("moe_sp", 4, 1, "weights-batch", FULL_RECOMPUTE),
            ("dense_sp", 2, 2, "weights-sequence", recompute("core_attn")),
            ("dense_sp", 4, 1, "activations-batch", recompute("core_attn")),
            ("gated_sp", 4, 1, "weights-batch", recompute("core_attn", "mlp")),
            ("gated_sp", 2, 2, "weights-batch", (*STEP, *recompute("mlp"))),
        ],
    ),
)
def test_recomputation_changes_nothing(
    stock: Stock, helix: Helix, model: str, m: int, n: int, exchange: str, flags: tuple[str, ...]
) -> None:
    assert_same_training(helix(model, m, n, exchange, *flags), stock(model))


@pytest.mark.parametrize(
    ("model", "m", "n", "exchange", "flags"),
    [
        ("dense_sp", 2, 2, "weights-sequence", ()),
        *(
            pytest.param(*case, marks=THOROUGH)
            for case in [
                ("dense", 4, 1, "activations-sequence", ()),
                ("gated_sp", 4, 1, "weights-sequence", FULL_RECOMPUTE),
                ("output_gate_sp", 2, 2, "activations-sequence", recompute("core_attn")),
                ("pp2", 2, 2, "weights-batch", SP),
            ]
        ),
    ],
)
def test_attention_in_pieces_trains_as_stock(
    stock: Stock, helix: Helix, model: str, m: int, n: int, exchange: str, flags: tuple[str, ...]
) -> None:
    assert_same_training(helix(model, m, n, exchange, *PREFIX, *flags), stock(model))


def test_a_stock_layout_has_attention_in_pieces_too(stock: Stock, corpus_prefix: Path) -> None:
    flags = tiny_gpt(corpus_prefix, *MODELS["dense"], "--tensor-model-parallel-size", "4", *PREFIX)
    assert_same_training(pretrain(flags, 4), stock("dense"))


@pytest.mark.parametrize(
    ("model", "m", "n", "exchange", "kept"),
    one_of_each(
        ["dense_sp", "moe_sp"],
        [
            ("dense_sp", 2, 2, "weights-batch", STEP),
            ("gated_sp", 2, 2, "weights-batch", ONCE),
            ("gated_sp", 4, 1, "weights-sequence", STEP),
            ("moe_sp", 4, 1, "weights-batch", ONCE),
            ("moe_sp", 2, 2, "weights-batch", STEP),
        ],
    ),
)
def test_weights_gathered_once_a_step(
    stock: Stock, helix: Helix, model: str, m: int, n: int, exchange: str, kept: tuple[str, ...]
) -> None:
    assert_same_training(helix(model, m, n, exchange, *kept), stock(model))


@pytest.mark.parametrize(
    ("model", "m", "n", "exchange", "flags"),
    one_of_each(  # experts: tests/partition/test_checkpoint.py
        ["pp2", "dense_sp"],
        [
            ("pp2", 2, 2, "activations-batch", ()),
            ("pp2", 2, 2, "weights-batch", SP),
            ("pp2", 4, 1, "weights-sequence", (*SP, *FULL_RECOMPUTE)),
            ("pp2", 4, 1, "weights-batch", (*SP, *STEP)),
            ("dense_sp", 2, 2, "auto", DP2),
            ("dense_sp", 2, 2, "weights-batch", (*DP2, *STEP)),
            ("moe_sp", 4, 1, "weights-sequence", (*DP2, "--micro-batch-size", "1")),
        ],
    ),
)
def test_beside_pipeline_and_data_parallelism(
    stock: Stock,
    helix: Helix,
    model: str,
    m: int,
    n: int,
    exchange: str,
    flags: tuple[str, ...],
) -> None:
    assert_same_training(helix(model, m, n, exchange, *flags), stock(model))


@pytest.mark.parametrize(
    ("model", "m", "n", "flags"),
    [
        ("large_tied", 2, 2, ()),
        ("large_pp2", 2, 2, ()),
        *(  # a head of its own: tests/layers/test_vocabulary.py
            pytest.param(*case, marks=THOROUGH)
            for case in [
                ("large_tied", 4, 1, FULL_RECOMPUTE),
                ("large_untied", 4, 1, ()),
                ("large_untied", 2, 2, (*STEP, *DP2, "--micro-batch-size", "4")),
            ]
        ),
    ],
)
def test_embedding_and_head_in_the_order_of_the_block(
    stock: Stock, helix: Helix, model: str, m: int, n: int, flags: tuple[str, ...]
) -> None:
    assert_same_training(helix(model, m, n, "weights-batch", *flags), stock(model))


def test_no_stream_of_tokens_goes_over_all_ranks(corpus_prefix: Path, tmp_path: Path) -> None:
    """Nor a vocabulary, where embedding and head keep the order of the block."""
    cuts = {
        "stock": ("--tensor-model-parallel-size", "4"),
        "helix": ("--helix-m", "2", "--helix-n", "2", *EXCHANGES["weights-batch"]),
    }
    over_all = {}
    for name, cut in cuts.items():
        argv = tiny_gpt(corpus_prefix, *MODELS["large_tied"], *cut, train_iters=2)
        over_all[name] = [
            key
            for key, nbytes in measured(argv, 4, tmp_path / name).sent_bytes.items()
            if nbytes and key.startswith("TENSOR_") and key.endswith(("_gather", "_scatter"))
        ]
    assert over_all["stock"]
    assert not over_all["helix"]


def test_learnable_softmax_offsets(corpus_prefix: Path, helix: Helix, tmp_path: Path) -> None:
    """From a common checkpoint: Megatron draws them alike on every tensor-parallel rank.

    One rank is the reference. Of several, stock counts only the first one's offsets in the gradient
    norm.
    """
    model = (*NO_BIAS, "--softmax-type", "learnable")
    checkpoint = str(tmp_path / "checkpoint")
    save = ("--save", checkpoint, "--save-interval", "1")
    argv = tiny_gpt(corpus_prefix, *model, *save, train_iters=STEPS + 1)
    whole = pretrain(argv, 1)
    expected = replace(whole, losses=whole.losses[1:], grad_norms=whole.grad_norms[1:])
    load = ("--load", checkpoint, "--ckpt-step", "1", "--train-iters", str(STEPS + 1))
    for m, n, exchange in ((2, 2, "weights-batch"), (4, 1, "activations-sequence")):
        cut = (*SP, "--helix-m", str(m), "--helix-n", str(n), *EXCHANGES[exchange])
        argv = tiny_gpt(corpus_prefix, *model, *cut, *load)
        assert_same_training(pretrain(argv, 4), expected)


@pytest.mark.parametrize("model", fast(["dense_sp", "moe_sp"], MODELS))
def test_stock_learns(stock: Stock, model: str) -> None:
    """A model that does not train would agree with everything."""
    losses, grad_norms = stock(model).losses, stock(model).grad_norms
    # Untrained, a byte is as good as any other of 256; each step lowers the loss a little.
    assert losses[0] == pytest.approx(math.log(256), rel=0.1)
    assert losses[-1] < losses[0]
    assert all(norm is not None and math.isfinite(norm) and norm > 0 for norm in grad_norms)
    assert len(set(losses)) == len(losses)


@THOROUGH
def test_a_model_is_the_same_however_parallel_it_is(stock: Stock) -> None:
    """The first weights are drawn on the CPU: nothing that a GPU would draw may move them."""
    assert_same_training(stock("dense_sp"), stock("dense"))


@THOROUGH
def test_models_differ(stock: Stock) -> None:
    """Flags that Megatron ignored would make two of the models one."""
    models = [model for model in MODELS if model != "dense_sp"]
    assert len({round(stock(model).losses[-1], 4) for model in models}) == len(models)
