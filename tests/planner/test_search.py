"""The search through layouts: all that can run, ranked, and why the first is the first."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_helix.planner import accuracy, search, verdict
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.time import predict
from megatron_helix.run_config.batch import BatchConfig
from megatron_helix.run_config.files import read_config
from megatron_helix.run_config.layout import LayoutConfig
from megatron_helix.run_config.model import ModelConfig
from tests.covering import THOROUGH
from tests.planner.planner_case import (
    DENSE,
    MACHINES,
    MOE,
    NARROW,
    SIXTEEN,
    SMALL,
    multiplied,
)


@THOROUGH
def test_a_thousand_gpus_have_so_many_layouts_of_the_widest_model() -> None:
    """Experts multiply them; a prediction takes below a millisecond of one core."""
    batch = BatchConfig(sequences=4096, sequence_length=2048)
    found = sum(1 for _ in search.deployments(MOE, SIXTEEN.scaled(1024), batch, "train"))
    assert 5000 < found < 13_000


@THOROUGH
def test_a_thousand_gpus_are_searched_in_full() -> None:
    machine = SIXTEEN.scaled(1024)
    batch = BatchConfig(sequences=4096, sequence_length=2048)
    found = search.search(DENSE, machine, batch)
    # A prediction takes about a millisecond: so many layouts are some seconds.
    assert 1000 < len(found.ranked) + found.too_large < 5000
    speeds = [one.tokens_per_s for one in found.ranked]
    assert speeds == sorted(speeds, reverse=True)
    assert any(one.deployment.layout.is_helix for one in found.ranked)


@pytest.mark.parametrize("rank_by", search.RANKINGS)
def test_the_explanation_is_two_sentences_and_names_the_winner(rank_by: str) -> None:
    found = search.search(DENSE, SIXTEEN, SMALL, rank_by=rank_by)
    words = verdict.explain(found, rank_by)
    best = found.ranked[0].deployment.layout
    assert words.startswith(best.name)
    assert words.count(". ") == 1
    assert words.endswith(".")
    assert best.is_helix or "m = 1 suffices" in words


@pytest.mark.parametrize("rank_by", search.RANKINGS)
def test_what_is_within_the_error_is_a_tie(rank_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crowned is only what is ahead by more; an error of nothing makes a winner of the first."""
    found = search.search(DENSE, SIXTEEN, SMALL, rank_by=rank_by)
    best, *others = found.cuts()
    alike = [other for other in others if accuracy.alike(best, other, rank_by)]
    words = verdict.explain(found, rank_by)
    if alike:
        assert ", is first, in a tie; " in words
        assert f"{len(alike)} other cut" in words
        assert f"not distinguishable from it, within {accuracy.said(rank_by)}" in words
    else:
        assert ", wins; " in words
    key = accuracy.RANKINGS[rank_by].figure
    for one in (best, *others):
        figures = [accuracy.figures(each) for each in (best, one)]
        low, high = sorted(figure[key] for figure in figures)
        assert accuracy.alike(one, best, rank_by) == (
            low >= high * (1 - accuracy.ERROR[key])
            or (rank_by == "tpot" and high - low <= accuracy.NEGLIGIBLE_TPOT_MS)
        )
    monkeypatch.setattr(accuracy, "ERROR", dict.fromkeys(accuracy.ERROR, 0.0))
    monkeypatch.setattr(accuracy, "NEGLIGIBLE_TPOT_MS", 0.0)
    ahead = accuracy.figures(best)[key]
    behind = [one for one in found.ranked if accuracy.figures(one)[key] != ahead]
    assert behind
    apart = replace(found, ranked=[best, *behind])
    assert ", wins; " in verdict.explain(apart, rank_by)


def test_what_needs_as_much_loses_nothing() -> None:
    """Without FSDP, which is not for fp16, a stock and a helix layout need the same memory."""
    found = search.search(DENSE, SIXTEEN, SMALL, rank_by="memory")
    best, second = found.cuts()[:2]
    assert best.memory.total == second.memory.total
    assert "loses nothing" in verdict.explain(found, "memory")


def test_what_a_small_model_loses_in_memory_is_said_in_digits_that_count() -> None:
    model = read_config(ModelConfig, Path("configs/models/tiny_dense.yaml"))
    machine, batch = SIXTEEN.scaled(4), BatchConfig(sequences=16, sequence_length=64)
    ranked = [
        predict(
            Deployment(model, LayoutConfig(name=f"tp{tp}", tp=tp, micro_batch=1), batch, 4), machine
        )
        for tp in (4, 2)
    ]
    words = verdict.explain(search.Found(ranked=ranked, too_large=0), "memory")
    assert re.search(r"loses 0\.00\d*[1-9]\d* GB a device", words), words


def test_decode_is_said_to_be_predicted_too_fast() -> None:
    found = search.search(DENSE, SIXTEEN, SMALL, phase="decode")
    assert verdict.explain(found, "tps").endswith(accuracy.DECODE)


def test_a_layout_that_leaves_a_device_little_may_not_fit() -> None:
    best = search.search(DENSE, SIXTEEN, SMALL).ranked[0]
    needed = best.memory.total
    given = (0.99, 1.0, 1.04, 1.06)
    fits = [accuracy.may_not_fit(best, needed * factor) for factor in given]
    assert fits == [False, True, True, False]


def test_nothing_that_does_not_fit_is_ranked() -> None:
    small = multiplied(SIXTEEN, "memory", factor=0.1)
    found = search.search(DENSE, small, SMALL)
    assert found.too_large
    assert all(one.memory.total <= small.memory.rate for one in found.ranked)
    with pytest.raises(ValueError, match=r"no layout of dense fits in 0 GB.*use more devices"):
        search.search(DENSE, multiplied(SIXTEEN, "memory", factor=1e-4), SMALL)


def test_a_phase_that_is_none_is_refused_before_the_search() -> None:
    with pytest.raises(
        ValueError, match="phase: must be one of train, forward, prefill, decode, got 'x'"
    ):
        search.search(DENSE, SIXTEEN, SMALL, phase="x")


def test_where_stock_cannot_share_the_features_helix_is_searched() -> None:
    model = NARROW.model_copy(update={"ffn_hidden_size": 1001})
    layouts = {
        (here.layout.tp, here.layout.m, here.layout.n)
        for here in search.deployments(model, SIXTEEN, SMALL, "train")
    }
    assert (None, 1, 16) in layouts
    assert (16, None, None) not in layouts


@pytest.mark.parametrize("gather", ["once", "step"])
def test_where_not_all_layers_can_keep_their_weights_as_many_do_as_fit(gather: str) -> None:
    machine = MACHINES["h200_2"]
    model = DENSE.model_copy(update={"num_layers": 12})

    def needs(keys: dict) -> float:
        layout = LayoutConfig(name="one", **keys)
        here = Deployment(model, layout, SMALL, machine.devices, "train", "fp16", machine)
        return predict(here.check(), machine).memory.total

    cut = {"m": 2, "n": 1, "exchange": "weights", "micro_batch": 64}
    keys = {**cut, "gather": gather}
    room = (needs({**keys, "gather_layers": 5}) + needs({**keys, "gather_layers": 6})) / 2
    machine = multiplied(machine, "memory", factor=room / machine.memory.rate)
    found = search.search(model, machine, SMALL, precision="fp16").ranked
    kept = [
        one.deployment.layout.gather_layers
        for one in found
        if cut.items() <= one.deployment.layout.model_dump().items()
        and one.deployment.layout.gather == gather
    ]
    assert kept == [5]
    assert all(one.memory.total <= room for one in found)
    assert any(one.deployment.layout.name == f"helix_2x1_weights_{gather}5_mb64" for one in found)
