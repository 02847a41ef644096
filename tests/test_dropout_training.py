"""Training with dropout: copies stay copies, what is recomputed is the same, masks are stock's.

On four ranks: 2 x 2, or 2 x 1 on two pipeline stages.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.covering import THOROUGH, covering, fast
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

STEPS = 2
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
PLAIN = [run for run in (*HELIX, *STOCK) if run.recompute == "none"]
AS_STOCK = [
    Run("activations-batch", False, "none", 1, HIDDEN_ALONE),
    Run("activations-batch", True, "none", 2, HIDDEN_ALONE),
    Run("activations-sequence", False, "none", 2, HIDDEN_ALONE),
    Run("activations-sequence", True, "none", 1, HIDDEN_ALONE),
    Run("scores", False, "none", 1, HIDDEN_ALONE),
    Run("scores", True, "none", 2, HIDDEN_ALONE),
]


def without_recompute(run: Run) -> Run:
    """The same without recomputation."""
    return replace(run, recompute="none")


def in_stock(run: Run) -> Run:
    """The same on a tensor-parallel group that is not cut."""
    return replace(run, exchange="stock")


SOON = ("activations-sequence", "weights-batch", "scores")


def few(runs: list[Run]) -> list[Any]:
    """Once each of these exchanges in the fast suite; all of them: tests/layers/test_dropout.py."""
    rows = covering([(run.exchange,) for run in runs])
    return [
        pytest.param(run, marks=row.marks if run.exchange in SOON else THOROUGH)
        for run, row in zip(runs, rows, strict=True)
    ]


def flags_of(corpus: Path, *flags: str) -> list[str]:
    """The small model, for some steps.

    Without biases: stock Megatron never ends the recomputation of an MLP that has one.
    """
    return tiny_gpt(corpus, *NO_BIAS, *flags, train_iters=STEPS)


@cache
def trained(run: Run, corpus: Path) -> list[Trained]:
    """What every rank has at the end of a run."""
    return train({"": flags_of(corpus, *run.flags)}, 4)[""]


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


# The fast suite's are those of the next test, which trains them without recomputation, too.
@pytest.mark.parametrize("run", few([*RECOMPUTED, *PLAIN]), ids=str)
def test_copies_stay_copies(corpus_prefix: Path, run: Run) -> None:
    ranks = trained(run, corpus_prefix)
    assert len(losses(ranks)) == STEPS
    assert losses(ranks)[-1] < losses(ranks)[0]
    assert_copies_are_equal(ranks)


@pytest.mark.parametrize("run", few(RECOMPUTED), ids=str)
def test_recomputation_changes_no_bit(corpus_prefix: Path, run: Run) -> None:
    again, once = trained(run, corpus_prefix), trained(without_recompute(run), corpus_prefix)
    assert losses(again) == losses(once)
    for one, other in zip(again, once, strict=True):
        assert one.grad_norms == other.grad_norms
        assert_equal(one.copied | one.cut, other.copied | other.cut)


@pytest.mark.parametrize("run", few(AS_STOCK), ids=str)
def test_the_stream_s_masks_are_stock_s(corpus_prefix: Path, run: Run) -> None:
    """With another mask on one rank alone losses are 1e-4 apart."""
    actual, expected = trained(run, corpus_prefix), trained(in_stock(run), corpus_prefix)
    assert losses(actual) == pytest.approx(losses(expected), rel=LOSS_TOLERANCE, abs=0)
    tolerance = {"rel": GRAD_NORM_TOLERANCE, "abs": 0}
    assert actual[0].grad_norms == pytest.approx(expected[0].grad_norms, **tolerance)


WEIGHTS = EXCHANGES["weights-batch"]
CUT = ("--helix-m", "2", "--helix-n", "2")
BESIDES = {  # what else a model or a run may ask for, cut 2 x 2
    "experts": (*MOE, *WEIGHTS, "--moe-router-topk", "2", "--moe-input-jitter-eps", "0.1"),
    "vocabulary": (*SP, *LARGE, *UNTIED, *WEIGHTS),
    "two-predictions": (*SP, "--mtp-num-layers", "1", *WEIGHTS),
    "gathered-once": (*SP, *WEIGHTS, "--helix-gather", "step"),
}
OTHERS = {
    "stock": ("--tensor-model-parallel-size", "4"),
    "one-segment": ("--helix-m", "1", "--helix-n", "4"),
    "stock-sp": (*SP, "--tensor-model-parallel-size", "4"),
    "one-segment-sp": (*SP, "--helix-m", "1", "--helix-n", "4"),
    "data-parallel": ("--helix-m", "2", "--helix-n", "1"),
    **{name: (*CUT, *flags) for name, flags in BESIDES.items()},
    **{f"{name}-full": (*CUT, *flags, *FULL_RECOMPUTE) for name, flags in BESIDES.items()},
}


@cache
def trained_besides(name: str, corpus: Path) -> list[Trained]:
    """One of :data:`OTHERS`, with dropout."""
    return train({"": flags_of(corpus, *RATES, *OTHERS[name])}, 4)[""]


@pytest.mark.parametrize("name", fast(["experts", "data-parallel"], [*BESIDES, "data-parallel"]))
def test_copies_of_other_models_stay_copies(corpus_prefix: Path, name: str) -> None:
    assert_copies_are_equal(trained_besides(name, corpus_prefix))


@pytest.mark.parametrize("name", fast(["experts"], BESIDES))
def test_recomputation_of_other_models_changes_no_bit(corpus_prefix: Path, name: str) -> None:
    full, once = (trained_besides(run, corpus_prefix) for run in (f"{name}-full", name))
    for one, other in zip(full, once, strict=True):
        assert one.losses == other.losses
        assert one.grad_norms == other.grad_norms
        assert_equal(one.copied | one.cut, other.copied | other.cut)


@pytest.mark.parametrize("name", fast(["-sp"], ["", "-sp"]))
def test_one_segment_is_stock_to_the_last_bit(corpus_prefix: Path, name: str) -> None:
    names = (f"one-segment{name}", f"stock{name}")
    for one, other in zip(*(trained_besides(run, corpus_prefix) for run in names), strict=True):
        assert one.losses == other.losses
        assert_equal(one.copied | one.cut, other.copied | other.cut)


RESUMED = [
    Run("stock", False, "none", 1),
    Run("activations-batch", True, "none", 1),
    Run("scores", True, "none", 1),  # with a state of its own
]


@pytest.mark.parametrize(
    "run", fast([run for run in RESUMED if run.exchange == "scores"], RESUMED), ids=str
)
def test_a_run_that_is_resumed_drops_what_it_would_have(
    corpus_prefix: Path, tmp_path: Path, run: Run
) -> None:
    flags, checkpoint = flags_of(corpus_prefix, *run.flags), str(tmp_path / "checkpoint")
    runs = {
        "whole": [*flags, "--save", checkpoint, "--save-interval", "1"],
        "rest": [*flags, "--load", checkpoint, "--ckpt-step", "1"],
    }
    whole, rest = train(runs, 4).values()
    assert losses(rest) == losses(whole)[1:]
    for one, other in zip(rest, whole, strict=True):
        assert_equal(one.copied | one.cut, other.copied | other.cut)
        assert torch.equal(one.cuda_state, other.cuda_state)
