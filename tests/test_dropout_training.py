"""Training with dropout: copies stay copies, what is recomputed is the same, masks are stock's.

On four ranks: 2 x 2, or 2 x 1 on two pipeline stages.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import batched, combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import tiny_gpt
from tests.test_parity import (
    EXCHANGES,
    FULL_RECOMPUTE,
    GRAD_NORM_TOLERANCE,
    LARGE,
    LOSS_TOLERANCE,
    MOE,
    NO_BIAS,
    PP2,
    SP,
    UNTIED,
    recompute,
)
from tests.training_case import Trained, train

STEPS = 3
RATES = ("--attention-dropout", "0.1", "--hidden-dropout", "0.1")
HIDDEN_ALONE = ("--attention-dropout", "0", "--hidden-dropout", "0.1")
RECOMPUTE = {
    "none": (),
    "full": FULL_RECOMPUTE,
    "core_attn": recompute("core_attn"),
    "mlp": recompute("mlp"),
}


@dataclass(frozen=True)
class Run:
    """One training of the small model."""

    exchange: str
    sp: bool
    recompute: str
    stages: int
    rates: tuple[str, ...] = RATES

    def __str__(self) -> str:
        words = [self.exchange, *["sp"] * self.sp, self.recompute, f"pp{self.stages}"]
        return "-".join([*words, *["hidden"] * (self.rates is HIDDEN_ALONE)])

    @property
    def flags(self) -> tuple[str, ...]:
        """Its flags."""
        size = 4 // self.stages
        cut = ("--tensor-model-parallel-size", str(size))
        if self.exchange != "stock":
            cut = ("--helix-m", "2", "--helix-n", str(size // 2), *EXCHANGES[self.exchange])
        stages = PP2 if self.stages == 2 else ()
        return (*self.rates, *cut, *SP * self.sp, *RECOMPUTE[self.recompute], *stages)


# Every two of exchange, sequence parallelism, recomputation and stages, in some run.
HELIX = [
    Run("activations-batch", False, "none", 1),
    Run("activations-batch", True, "full", 2),
    Run("activations-batch", True, "core_attn", 1),
    Run("activations-batch", False, "mlp", 2),
    Run("activations-sequence", True, "none", 2),
    Run("activations-sequence", False, "full", 1),
    Run("activations-sequence", False, "core_attn", 2),
    Run("activations-sequence", True, "mlp", 1),
    Run("weights-batch", True, "none", 2),
    Run("weights-batch", True, "full", 1),
    Run("weights-batch", True, "core_attn", 2),
    Run("weights-batch", True, "mlp", 1),
    Run("weights-sequence", True, "none", 1),
    Run("weights-sequence", True, "full", 2),
    Run("weights-sequence", True, "core_attn", 1),
    Run("weights-sequence", True, "mlp", 2),
    Run("scores", False, "none", 2),
    Run("scores", True, "full", 1),
    Run("scores", True, "core_attn", 2),
    Run("scores", False, "mlp", 1),
]
STOCK = [
    Run("stock", False, "none", 1),
    Run("stock", True, "full", 1),
    Run("stock", True, "none", 2),
    Run("stock", False, "full", 2),
]
RECOMPUTED = [run for run in (*HELIX, *STOCK) if run.recompute != "none"]
AS_STOCK = [
    Run("activations-batch", False, "none", 1, HIDDEN_ALONE),
    Run("activations-batch", True, "none", 2, HIDDEN_ALONE),
    Run("activations-sequence", False, "none", 2, HIDDEN_ALONE),
    Run("activations-sequence", True, "none", 1, HIDDEN_ALONE),
    Run("weights-sequence", True, "none", 1, HIDDEN_ALONE),
    Run("weights-sequence", True, "none", 2, HIDDEN_ALONE),
    Run("scores", False, "none", 1, HIDDEN_ALONE),
    Run("scores", True, "none", 2, HIDDEN_ALONE),
]


def without_recompute(run: Run) -> Run:
    """The same without recomputation."""
    return replace(run, recompute="none")


def in_stock(run: Run) -> Run:
    """The same on a tensor-parallel group that is not cut."""
    return replace(run, exchange="stock")


ALL = {
    *(*HELIX, *STOCK, *AS_STOCK),
    *map(without_recompute, RECOMPUTED),
    *map(in_stock, AS_STOCK),
}
TOGETHER = list(batched(sorted(ALL, key=str), 8))  # on the same ranks


def flags_of(corpus: Path, *flags: str) -> list[str]:
    """The small model, for some steps.

    Without biases: stock Megatron never ends the recomputation of an MLP that has one.
    """
    return tiny_gpt(corpus, *NO_BIAS, *flags, train_iters=STEPS)


@cache
def trained_together(number: int, corpus: Path) -> dict[str, list[Trained]]:
    """The runs of one number."""
    return train({str(run): flags_of(corpus, *run.flags) for run in TOGETHER[number]}, 4)


def trained(run: Run, corpus: Path) -> list[Trained]:
    """What every rank has at the end of a run."""
    (number,) = (i for i, runs in enumerate(TOGETHER) if run in runs)
    return trained_together(number, corpus)[str(run)]


def losses(ranks: list[Trained]) -> list[float]:
    """Of every step."""
    return ranks[-1].losses


def assert_copies_are_equal(ranks: list[Trained]) -> None:
    """What several ranks hold is the same on all of them, to the last bit."""
    for one, other in combinations(ranks, 2):
        if (one.pp, one.dp) == (other.pp, other.dp):
            assert one.copied
            assert_equal(one.copied, other.copied)
            assert torch.equal(one.cuda_state, other.cuda_state)
        if (one.pp, one.tp) == (other.pp, other.tp):  # they differ by data parallelism
            assert_equal(one.copied | one.cut, other.copied | other.cut)
            assert torch.equal(one.cuda_state, other.cuda_state)
        tied = [rank.cut.get(name) for rank, name in ((one, EMBEDDING), (other, HEAD))]
        if one.tp == other.tp and all(weight is not None for weight in tied):
            assert torch.equal(*tied)


EMBEDDING = "module.embedding.word_embeddings.weight"
HEAD = "module.output_layer.weight"


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same names, and the same tensors."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_every_two_of_what_a_run_can_ask_for_meet() -> None:
    choices = [(run.exchange, run.sp, run.recompute, run.stages) for run in HELIX]
    values = [
        [name for name in EXCHANGES if name != "auto"],
        [False, True],
        list(RECOMPUTE),
        [1, 2],
    ]
    for first, second in combinations(range(4), 2):
        met = {(choice[first], choice[second]) for choice in choices}
        for pair in product(values[first], values[second]):
            impossible = str(pair[0]).startswith("weights") and pair[1] is False
            assert pair in met or impossible, pair


@pytest.mark.parametrize("run", [*HELIX, *STOCK], ids=str)
def test_copies_stay_copies(corpus_prefix: Path, run: Run) -> None:
    ranks = trained(run, corpus_prefix)
    assert len(losses(ranks)) == STEPS
    assert losses(ranks)[-1] < losses(ranks)[0]
    assert_copies_are_equal(ranks)


@pytest.mark.parametrize("run", RECOMPUTED, ids=str)
def test_recomputation_changes_no_bit(corpus_prefix: Path, run: Run) -> None:
    again, once = trained(run, corpus_prefix), trained(without_recompute(run), corpus_prefix)
    assert losses(again) == losses(once)
    for one, other in zip(again, once, strict=True):
        assert one.grad_norms == other.grad_norms
        assert_equal(one.copied | one.cut, other.copied | other.cut)


@pytest.mark.parametrize("run", AS_STOCK, ids=str)
def test_the_stream_s_masks_are_stock_s(corpus_prefix: Path, run: Run) -> None:
    """With another mask on one rank alone losses are 1e-4 apart."""
    actual, expected = trained(run, corpus_prefix), trained(in_stock(run), corpus_prefix)
    assert losses(actual) == pytest.approx(losses(expected), rel=LOSS_TOLERANCE, abs=0)
    tolerance = {"rel": GRAD_NORM_TOLERANCE, "abs": 0}
    assert actual[0].grad_norms == pytest.approx(expected[0].grad_norms, **tolerance)


@cache
def trained_besides(corpus: Path) -> dict[str, list[Trained]]:
    """What else a model or a run may ask for, with dropout and cut 2 x 2."""
    helix = ("--helix-m", "2", "--helix-n", "2")
    runs = {
        "stock": ("--tensor-model-parallel-size", "4"),
        "one-segment": ("--helix-m", "1", "--helix-n", "4"),
        "stock-sp": (*SP, "--tensor-model-parallel-size", "4"),
        "one-segment-sp": (*SP, "--helix-m", "1", "--helix-n", "4"),
        "data-parallel": ("--helix-m", "2", "--helix-n", "1"),
    }
    weights = EXCHANGES["weights-batch"]
    besides = {
        "experts": (*MOE, *weights, "--moe-router-topk", "2", "--moe-input-jitter-eps", "0.1"),
        "vocabulary": (*SP, *LARGE, *UNTIED, *weights),
        "two-predictions": (*SP, "--mtp-num-layers", "1", *weights),
        "gathered-once": (*SP, *weights, "--helix-gather", "step"),
    }
    for name, flags in besides.items():
        runs |= {name: (*helix, *flags), f"{name}-full": (*helix, *flags, *FULL_RECOMPUTE)}
    return train({name: flags_of(corpus, *RATES, *flags) for name, flags in runs.items()}, 4)


BESIDES = ["experts", "vocabulary", "two-predictions", "gathered-once"]


@pytest.mark.parametrize("name", [*BESIDES, "data-parallel"])
def test_copies_of_other_models_stay_copies(corpus_prefix: Path, name: str) -> None:
    assert_copies_are_equal(trained_besides(corpus_prefix)[name])


@pytest.mark.parametrize("name", BESIDES)
def test_recomputation_of_other_models_changes_no_bit(corpus_prefix: Path, name: str) -> None:
    runs = trained_besides(corpus_prefix)
    for one, other in zip(runs[f"{name}-full"], runs[name], strict=True):
        assert one.losses == other.losses
        assert one.grad_norms == other.grad_norms
        assert_equal(one.copied | one.cut, other.copied | other.cut)


@pytest.mark.parametrize("name", ["", "-sp"])
def test_one_segment_is_stock_to_the_last_bit(corpus_prefix: Path, name: str) -> None:
    runs = trained_besides(corpus_prefix)
    for one, other in zip(runs[f"one-segment{name}"], runs[f"stock{name}"], strict=True):
        assert one.losses == other.losses
        assert_equal(one.copied | one.cut, other.copied | other.cut)


RESUMED = [
    Run("stock", False, "none", 1),
    Run("activations-batch", True, "none", 1),
    Run("scores", True, "none", 1),  # with a state of its own
]


def trained_twice(corpus: Path, folder: Path) -> dict[str, list[Trained]]:
    """Each of :data:`RESUMED`, and its steps after the first again, from the checkpoint."""
    runs = {}
    for run in RESUMED:
        flags, checkpoint = flags_of(corpus, *run.flags), str(folder / str(run))
        runs[f"{run}-whole"] = [*flags, "--save", checkpoint, "--save-interval", "1"]
        runs[f"{run}-rest"] = [*flags, "--load", checkpoint, "--ckpt-step", "1"]
    return train(runs, 4)


@pytest.fixture(scope="module")
def resumed(corpus_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trainings of :func:`trained_twice`."""
    return trained_twice(corpus_prefix, tmp_path_factory.mktemp("resumed"))


@pytest.mark.parametrize("run", RESUMED, ids=str)
def test_a_run_that_is_resumed_drops_what_it_would_have(
    resumed: dict[str, list[Trained]], run: Run
) -> None:
    rest, whole = resumed[f"{run}-rest"], resumed[f"{run}-whole"]
    assert losses(rest) == losses(whole)[1:]
    for one, other in zip(rest, whole, strict=True):
        assert_equal(one.copied | one.cut, other.copied | other.cut)
        assert torch.equal(one.cuda_state, other.cuda_state)
