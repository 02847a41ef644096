"""The public models at degrees that stock refuses: trained and generated from as by one stock rank.

Each has its true head counts, and starts from the same weights on one rank of stock and on those of
helix, cut as ``--helix-n auto`` cuts them: at one degree tokens move, at the other one weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_helix import pretrain_gpt
from megatron_helix.inference.engine import Engine, micro_batches
from megatron_helix.inference.sampling import Sampling
from megatron_helix.inference.undisturbed import undisturbed
from megatron_helix.inference.unserved import require_live
from megatron_helix.options import arguments
from tests import distributed
from tests.covering import THOROUGH
from tests.distributed import Curve, run_distributed, tiny_gpt
from tests.models_case import MODELS, page_script, scaled

LOSS_TOLERANCE, GRAD_NORM_TOLERANCE = 1e-5, 1e-4  # see tests/test_parity.py
LOGIT_TOLERANCE = 1e-5  # of the largest; see tests/inference/test_decode.py
STEPS, NEW_TOKENS = 3, 5
PROMPTS = [[17, 250, 3, 99, 64], [8, 8, 31, 200, 77, 5, 123, 42], [211, 6, 19, 140, 90, 33]]

EXCHANGES = ("activations", "weights")
TP = "--tensor-model-parallel-size"
VOCABULARY = math.lcm(*range(1, 8))  # whose rows all degrees share alike

DEGREES = {
    "falcon_7b": (3, 7),
    "gemma3_1b": (5, 6),
    "gemma3_27b": (3, 5),
    "glm4_9b": (6, 5),
    "gpt2_xl": (7, 6),
    "gpt_oss_20b": (3, 5),
    "llama3.1_8b": (5, 3),
    "llama3.2_3b": (6, 7),
    "phi4_14b": (3, 6),
    "qwen2.5_14b": (7, 5),
    "qwen2.5_7b": (3, 7),
    "qwen3_0.6b": (5, 6),
    "qwen3_30b_a3b": (6, 3),
    "smollm2_135m": (6, 5),
    "starcoder2_3b": (7, 3),
}
# What is left away of a model. Stock sums gradients of experts' biases over tensor-parallel ranks,
# so that they depend on the degree, and cannot train such an expert on one rank at all.
WITHOUT = {"gpt_oss_20b": ("--disable-bias-linear", "--add-qkv-bias")}
# Norms with weights around zero: see below.
REFUSED = ("gemma3_1b", "gemma3_27b")

SOON = (("qwen3_30b_a3b", 3),)


@dataclass
class Seen:
    """What a rank saw.

    Attributes:
        curve: of the training.
        tokens: greedy ones behind the prompts, before the first step and after the last.
        logits: that they were taken from, ``[step, prompt, V]``.
    """

    curve: Curve = field(default_factory=Curve)
    tokens: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


def train(argv: list[str]) -> Seen:
    """Train on this rank, and generate around it."""
    seen = Seen()

    def look(model: list[Any], curve: Curve) -> None:  # before the first step, after the last
        if len(curve.losses) == len(seen.tokens) * STEPS:
            _say(model, seen)

    seen.curve = distributed.train(argv, before=look, after=look)
    return seen


def _say(model: list[Any], seen: Seen) -> None:
    """Greedy tokens, as a rollout takes them from the live model, and their logits."""
    require_live(get_args(), on_cpu=True)
    (stage,) = unwrap_model(model)
    with undisturbed(stage):
        sampler = Sampling().sampler(torch.device("cpu"), VOCABULARY)
        engine = Engine(stage, sampler, live=True)
        parts = micro_batches(PROMPTS, NEW_TOKENS, count=1, size=engine.tp_size)
        steps = [*engine.prefill(parts), *engine.decode(parts)]
    seen.tokens.append(parts[0].tokens.clone())
    seen.logits.append(torch.stack([step.logits for step in steps if step.logits is not None]))


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """What docs/models.md is computed with."""
    return page_script()


@pytest.fixture(scope="module")
def flags(corpus_prefix: Path) -> Callable[..., list[str]]:
    """Flags of a model that its degrees can share, on so many ranks of stock or of helix."""

    def of(name: str, ranks: int, *layout: str) -> list[str]:
        model, length = scaled(name), math.lcm(*DEGREES[name])
        length *= -(-30 // length)
        experts = ("--expert-tensor-parallel-size", str(ranks)) if model.num_experts else ()
        return tiny_gpt(
            corpus_prefix,
            *(*model.flags(), *WITHOUT.get(name, ()), TP, str(ranks), *experts, *layout),
            *("--seq-length", str(length), "--max-position-embeddings", str(length)),
            *("--vocab-size", str(VOCABULARY), "--make-vocab-size-divisible-by", "1"),
            *("--micro-batch-size", "3", "--global-batch-size", "6"),
            # Weights that say something, and updates that roundoff does not turn.
            *("--init-method-std", "0.2", "--lr", "1e-2", "--adam-eps", "1e-3"),
            train_iters=STEPS,
        )

    return of


def helix(exchange: str) -> tuple[str, ...]:
    """Flags of a partition."""
    return ("--sequence-parallel", "--helix-n", "auto", "--helix-exchange", exchange)


@pytest.fixture(scope="module")
def stock(flags: Callable[..., list[str]]) -> Callable[[str], Seen]:
    """One rank of stock, once for each model."""

    @cache
    def run(name: str) -> Seen:
        (seen,) = run_distributed(train, 1, pretrain_gpt.prepare(flags(name, 1), 1))
        return seen

    return run


CASES = [
    pytest.param(name, degree, exchange, marks=() if (name, degree) in SOON else THOROUGH)
    for name, degrees in DEGREES.items()
    for degree, exchange in zip(degrees, EXCHANGES, strict=True)
]


@pytest.mark.parametrize(("name", "degree", "exchange"), CASES)
def test_a_degree_that_stock_refuses_trains_and_generates(
    page: ModuleType,
    flags: Callable[..., list[str]],
    stock: Callable[[str], Seen],
    name: str,
    degree: int,
    exchange: str,
) -> None:
    assert not page.stock_takes(MODELS[name], degree)
    expected = stock(name)
    assert len(expected.curve.losses) == len(expected.curve.grad_norms) == STEPS
    argv = pretrain_gpt.prepare(flags(name, degree, *helix(exchange)), degree)
    for rank, seen in enumerate(run_distributed(train, degree, argv)):
        curve = seen.curve
        assert curve.losses == pytest.approx(expected.curve.losses, rel=LOSS_TOLERANCE, abs=0)
        norms = pytest.approx(expected.curve.grad_norms, rel=GRAD_NORM_TOLERANCE, abs=0)
        assert curve.grad_norms == norms
        for when, logits, reference in zip(
            ("before", "after"), seen.logits, expected.logits, strict=True
        ):
            error = (logits - reference).abs().max() / reference.abs().max()
            assert error <= LOGIT_TOLERANCE, f"rank {rank}, {when} the training: {error:.1e}"
        assert all(map(torch.equal, seen.tokens, expected.tokens)), f"rank {rank}"


def test_all_models_and_odd_degrees_are_shown(page: ModuleType) -> None:
    assert list(DEGREES) == list(MODELS)
    assert {degree for degrees in DEGREES.values() for degree in degrees} == {3, 5, 6, 7}
    cuts = {
        (layout.cut.m, layout.cut.n)
        for name, degrees in DEGREES.items()
        for layout in (page.helix(MODELS[name], degree) for degree in degrees)
    }
    assert cuts == {(3, 1), (5, 1), (6, 1), (7, 1), (3, 2), (2, 3)}


@pytest.mark.parametrize("name", REFUSED)
def test_norms_with_weights_around_zero_are_refused_on_a_cpu(name: str) -> None:
    said = r"^--apply-layernorm-1p: needs TransformerEngine's norms, which do not run on a CPU"
    words = [*MODELS[name].flags(), "--helix-device", "cpu", TP, "3", "--helix-n", "auto"]
    with pytest.raises(ValueError, match=said):
        arguments.complete(words, 3)
