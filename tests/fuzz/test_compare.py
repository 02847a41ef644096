"""How the fuzzer tells rounding from a difference, in runs and in checkpoints."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_helix.fuzz import compare
from megatron_helix.fuzz.training import Step


def run_of(*losses: float, grad_norm: float = 1.0) -> compare.Run:
    """Two ranks, of which the last knows losses."""
    steps = [Step(loss, grad_norm, 10.0) for loss in losses]
    return [[replace(step, loss=None) for step in steps], steps]


def test_runs_that_differ_by_rounding_agree() -> None:
    near = 1 + compare.TOLERANCES["loss"] / 2
    differences, margins = compare.steps(run_of(5.0, 4.0), run_of(5.0, 4.0 * near))
    assert not differences
    assert margins == {"loss": pytest.approx(0.5, rel=1e-3), "grad_norm": 0.0, "params_norm": 0.0}


@pytest.mark.parametrize("found", [4.001, math.nan, math.inf])
def test_a_difference_is_told_where_it_is_first_seen(found: float) -> None:
    differences, _ = compare.steps(run_of(5.0, 4.0), run_of(5.0, found))
    assert [(one.what, one.where) for one in differences] == [("loss", "step 2, rank 1")]
    assert f"loss of step 2, rank 1: stock 4, helix {found:g}, " in str(differences[0])
    assert not compare.steps(run_of(5.0, 4.0), run_of(5.0, found), only=1)[0]


def test_every_rank_is_looked_at() -> None:
    found = run_of(5.0)
    found[0][0] = replace(found[0][0], grad_norm=1.001)
    (difference,) = compare.steps(run_of(5.0), found)[0]
    assert (difference.what, difference.where) == ("grad_norm", "step 1, rank 0")


GRADIENT, WEIGHT = "optimizer.state.exp_avg.layer.weight", "layer.weight"


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Compare two checkpoints that hold these tensors: what differs."""

    def run(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
        stored = {"one": one, "other": other}
        monkeypatch.setattr("megatron.core.dist_checkpointing.load_plain_tensors", stored.get)
        differences, _ = compare.checkpoints("one", "other", learning_rate=1e-2)
        return [f"{one.what} {one.where}" for one in differences]

    return run


def test_checkpoints_are_compared_weight_by_weight(compared: Callable[..., list[str]]) -> None:
    torch.manual_seed(0)
    content = {GRADIENT: torch.randn(6, 8), WEIGHT: torch.randn(6, 8)}
    assert not compared(content, {name: x * (1 + 1e-7) for name, x in content.items()})
    rows_swapped = {**content, GRADIENT: content[GRADIENT].flip(0)}
    assert compared(content, rows_swapped) == [f"gradient {GRADIENT} after step 1 (norms)"]
    not_updated = {**content, WEIGHT: content[WEIGHT] + 1e-2}
    assert compared(content, not_updated) == [f"weight {WEIGHT} after step 1 (norms)"]
    other_shape = {**content, WEIGHT: torch.randn(8, 6)}
    assert compared(content, other_shape) == [f"{WEIGHT} shape (8, 6) instead of (6, 8)"]
    assert compared(content, {WEIGHT: content[WEIGHT]}) == [f"{GRADIENT} the checkpoints' names"]


def test_a_gradient_that_cancels_is_held_to_the_whole_one(
    compared: Callable[..., list[str]],
) -> None:
    """Softmax sees no bias of keys: what a run finds of its gradient is roundoff."""
    bias = "optimizer.state.exp_avg.layer.bias"
    content = {GRADIENT: torch.ones(6, 8), bias: torch.full((8,), 1e-9)}
    assert not compared(content, {**content, bias: -content[bias]})
    assert compared(content, {**content, bias: 1e5 * content[bias]})
