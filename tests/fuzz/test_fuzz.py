"""The fuzzer: what it draws, how it compares and shrinks, and a slice of its cases."""

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megatron_helix import cli
from megatron_helix.fuzz import compare, report, shrink, trial
from megatron_helix.fuzz.case import STEPS, Case, given, parse
from megatron_helix.fuzz.draw import draw, find
from megatron_helix.fuzz.hunt import smaller
from megatron_helix.fuzz.session import NO_ANSWER, CallFailed, Failure
from megatron_helix.fuzz.training import Step
from megatron_helix.fuzz.trial import Laboratory, Outcome
from megatron_helix.options import arguments
from megatron_helix.options.features.works import WORKS
from megatron_helix.partition import checkpoint

DRAWS = [draw(3, number) for number in range(400)]
ROWS = {example: row.feature for row in WORKS for example in row.examples}


def test_a_seed_draws_the_same_cases() -> None:
    assert [draw(3, number) for number in range(400)] == DRAWS
    assert [draw(8, number) for number in range(400)] != DRAWS
    assert len(set(DRAWS)) == len(DRAWS)


def test_a_line_says_all_of_a_case() -> None:
    assert str(Case()) == ""
    case = Case(m=3, n=2, sp=True, features=("--swiglu", "--window-size (8,0)"))
    assert str(case) == "m=3 n=2 sp; --swiglu; --window-size (8,0)"
    assert [parse(str(case)) for case in DRAWS] == DRAWS


@pytest.mark.parametrize("word", ["m=two", "m", "sp=1", "n=-1", "width=3", "--swiglu"])
def test_a_line_that_says_no_case_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=rf"^--case: must be fields and values .*'{word}'; the"):
        parse(f"layers=2 {word}")


def test_what_is_drawn_is_most_of_what_there_is() -> None:
    assert {case.ranks(case.tp) for case in DRAWS} == {2, 3, 4, 5, 6, 7, 8}
    assert {case.exchange for case in DRAWS} == {"auto", "activations", "weights", "scores"}
    assert {case.split for case in DRAWS} == {"auto", "batch", "sequence"}
    assert {case.gather for case in DRAWS} == {"microbatch", "once", "step"}
    layers = {(case.gather, case.gather_layers) for case in DRAWS}
    assert layers == {("microbatch", 0), *product(("once", "step"), (0, 1, 2))}
    assert {case.deep for case in DRAWS} == {"", "stock", "helix", "turned"}
    assert {(case.m > 1, case.n > 1) for case in DRAWS} == {(True, True), (True, False)}
    assert {case.stock_tp < case.tp for case in DRAWS} == {True, False}
    assert {bool(case.experts) for case in DRAWS} == {True, False}
    assert {case.pp for case in DRAWS} == {1, 2}
    assert {case.channels % case.m > 0 for case in DRAWS} == {True, False}
    assert {case.ffn % case.tp > 0 for case in DRAWS} == {True, False}
    assert any(case.experts and case.ffn % case.etp for case in DRAWS)
    assert {3, 5, 6, 7} <= {case.tp for case in DRAWS if case.stock_tp < case.tp}
    drawn = {ROWS[feature] for case in DRAWS for feature in case.features}
    assert drawn == {row.feature for row in WORKS if row.examples}


def test_a_feature_is_drawn_where_it_applies() -> None:
    needs = {example: set(row.needs) for row in WORKS for example in row.examples}
    assert all(needs[feature] <= case.tags for case in DRAWS for feature in case.features)
    everything = {tag for case in DRAWS for tag in case.tags}
    assert set().union(*needs.values()) <= everything, "a need that no case has"


def test_most_cases_are_such_that_helix_takes_them() -> None:
    refused = 0
    for case in DRAWS:
        try:
            arguments.complete(case.helix(), case.ranks(case.tp))
        except ValueError:
            refused += 1
    assert 0 < refused < len(DRAWS) / 5


def test_every_case_can_have_a_feature_that_is_asked_for() -> None:
    row = find("mtp-num")
    assert row.feature == "Multi-token prediction"
    cases = [draw(1, number, only=row, worlds=(4,)) for number in range(20)]
    assert all(case.features[0] in row.examples for case in cases)
    assert {case.ranks(case.tp) for case in cases} == {4}
    for name in ("no such feature", "parallel", "bfloat16"):
        with pytest.raises(ValueError, match=rf"^--only: must be part .* got '{name}'"):
            find(name)


def test_stock_has_the_ranks_that_its_heads_allow_and_the_same_batches() -> None:
    case = parse("heads=6 groups=2 m=4 n=1 dp=2 batches=3 micro=2")
    assert (case.tp, case.stock_tp, case.ranks(4), case.ranks(2)) == (4, 2, 8, 4)
    stock, helix = given(case.stock()), given(case.helix())
    assert stock["--tensor-model-parallel-size"] == ["2"]
    assert (helix["--helix-m"], helix["--helix-n"]) == (["4"], ["1"])
    for flag in ("--global-batch-size", "--micro-batch-size", "--num-query-groups", "--lr"):
        assert stock[flag] == helix[flag]
    assert stock["--global-batch-size"] == ["12"]
    assert parse("heads=8 groups=2 m=2 n=4").stock_tp == 8  # query groups may be fewer
    assert parse("heads=8 groups=3 m=2 n=4").stock_tp == 1


def test_a_features_flags_take_the_place_of_the_cases_own() -> None:
    flags = given(parse("layers=3; --num-layers 4 --swiglu; --window-size (8,0)").stock())
    assert (flags["--num-layers"], flags["--swiglu"]) == (["4"], [])
    assert flags["--window-size"] == ["(8,0)"]


@pytest.mark.parametrize(
    ("line", "turns"),
    [
        ("", False),
        ("experts=4 sp", False),  # every token to every expert
        ("experts=4 topk=2 sp", True),
        ("experts=4 sp; --moe-router-topk 2", True),
        ("experts=4 topk=2 sp; --moe-router-topk 4", False),
        ("experts=4 sp; --moe-expert-capacity-factor 1.0", True),
    ],
)
def test_a_token_may_turn_where_experts_are_chosen(line: str, turns: bool) -> None:
    assert parse(line).turns == turns


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


def test_shrinking_keeps_what_it_takes_to_fail() -> None:
    case = parse(
        "layers=3 heads=12 groups=4 m=4 n=2 pp=2 sp exchange=weights experts=4 ep=2 deep=stock"
        " micro=8; --swiglu; --qk-layernorm; --window-size (8,0); --mtp-num-layers 1"
    )

    def fails(tried: Case) -> bool:
        return "--qk-layernorm" in tried.features and tried.m > 2 and tried.heads >= 6

    found = shrink.shrink(case, fails, tries=200)
    assert found == parse("heads=6 m=3; --qk-layernorm")
    assert shrink.shrink(case, fails, tries=0) == case
    asked: list[Case] = []
    shrink.shrink(case, lambda tried: bool(asked.append(tried)), tries=10)
    assert len(asked) == len(set(asked)) == 10


NO_STEP = trial.DISCARDED, "KeyError: 'step'"


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("fuzz") / "laboratory", 8, 180.0) as here:
        yield here


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("sp exchange=weights split=batch deep=turned", trial.EQUAL, ""),
        ("heads=3 m=2 n=2", trial.REFUSED, "--helix-n: must be a positive divisor"),
        ("; --hybrid-layer-pattern M", trial.CRASHED, "is refused under --helix-m > 1"),
        ("; --bf16 --fp16", trial.DISCARDED, "AssertionError"),
        # Stock's own checkpoint, of a stage with experts behind one without: stock cannot go on.
        ("pp=2 experts=2 biasless sp deep=helix; --num-layers 2 --moe-layer-freq [0,1]", *NO_STEP),
        ("; --no-such-flag", trial.REFUSED, "must be a flag of Megatron's or helix's"),
        ("heads=3 m=2; --num-query-groups 2 --group-query-attention", trial.REFUSED, "divisor"),
    ],
)
def test_what_comes_of_a_case(laboratory: Laboratory, line: str, status: str, said: str) -> None:
    outcome = laboratory.attempt(parse(line))
    assert outcome.status == status, outcome.text
    assert said in outcome.text
    if status == trial.EQUAL:
        assert [len(steps) for steps in outcome.helix] == [STEPS, STEPS]
        assert {"gradient", "weight", "resumed loss"} <= outcome.margins.keys()
        first, last = (step.loss for step in outcome.helix[-1])
        assert first is not None
        assert last is not None
        assert last < first, "it does not learn"


def test_stock_is_as_it_was_after_helix(laboratory: Laboratory) -> None:
    """To the last bit, and with its own checks again: the ranks are those that helix ran in."""
    first = laboratory.attempt(parse("heads=4 n=2 m=2"))
    uneven = laboratory.attempt(parse("heads=3 m=4 sp exchange=weights gather=step"))
    again = laboratory.attempt(parse("heads=4 n=2 m=2"))
    assert [one.status for one in (first, uneven, again)] == [trial.EQUAL] * 3
    assert (again.stock, again.helix) == (first.stock, first.helix)
    refused = parse("heads=3 m=4")
    with pytest.raises(CallFailed, match=r"num_attention_heads \(3\) must be a multiple"):
        laboratory.train_stock(refused, tp=4)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Laboratory]]:
    """A laboratory whose ranks have a wrong helix."""
    made: list[Laboratory] = []

    def build(name: str, value: object) -> Laboratory:
        monkeypatch.setattr(name, value)
        made.append(Laboratory(tmp_path / "laboratory", 4, 120.0))
        return made[-1]

    yield build
    for one in made:
        one.__exit__()


def test_a_wrong_helix_is_found_and_made_small(wrong: Callable[..., Laboratory]) -> None:
    """Weights are drawn without a thought of who has which: the first loss shows it."""
    here = wrong("megatron_helix.layers.linear.in_tile_order", lambda init, *order, **own: init)
    case = parse("hidden=48 sp; --swiglu; --qk-layernorm")
    outcome = here.attempt(case)
    assert outcome.status == trial.DIFFERS
    assert outcome.text.startswith("loss of step 1, rank 0: stock")
    fault = smaller(here, outcome, tries=30)
    assert fault.case == Case(), "the smallest case there is"
    said = report.describe(fault)
    assert said.startswith("differs: loss of step 1")
    assert "\n  stock, step 1: loss " in said
    assert "\n  helix, step 2: loss " in said
    assert said.endswith("helix fuzz --case ''")


def test_a_wrong_order_that_no_sum_shows_is_found_by_name(
    wrong: Callable[..., Laboratory],
) -> None:
    """Tiles are saved in each other's places: losses and norms are stock's."""

    def swapped(shard: Any, order: torch.Tensor, **where: Any) -> Any:
        return checkpoint.tile_in_canonical_order(shard, torch.cat(order.chunk(2)[::-1]), **where)

    here = wrong("megatron_helix.layers.linear.tile_in_canonical_order", swapped)
    assert here.attempt(parse("sp")).status == trial.EQUAL
    outcome = here.attempt(parse("sp deep=stock"))
    assert outcome.status == trial.DIFFERS
    assert re.match(r"gradient of optimizer\S*linear_\w+.weight after step 1", outcome.text)


def test_a_helix_that_fails_where_stock_runs_is_at_fault(wrong: Callable[..., Laboratory]) -> None:
    def fail(*plan: object, **shape: object) -> None:
        raise RuntimeError("planted")

    here = wrong("megatron_helix.layers.transformer_layer.resolve", fail)
    outcome = here.attempt(Case())
    assert (outcome.status, outcome.text) == (trial.CRASHED, "RuntimeError: planted")
    assert "in fail\n" in outcome.trace
    assert outcome.failed


def test_a_helix_that_does_not_end_is_at_fault(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(*args: object) -> None:
        raise CallFailed(Failure(NO_ANSWER, "ranks [1] of 2 did not answer in 9 s"))

    monkeypatch.setattr(laboratory, "train_helix", hang)
    outcome = laboratory.attempt(Case())
    assert (outcome.status, outcome.failed) == (trial.HUNG, True)
    assert "did not answer" in outcome.text


@pytest.mark.parametrize(
    ("resumed", "status", "said"),
    [
        ("right", trial.EQUAL, ""),  # it was the rounding of the first step, enlarged
        ("wrong", trial.DIFFERS, "after loading what stock saved"),
        ("impossible", trial.DIFFERS, "grad_norm of step 2"),
    ],
)
def test_a_second_step_that_parts_is_taken_from_stocks_weights(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, resumed: str, status: str, said: str
) -> None:
    train = laboratory.train_helix

    def train_helix(case: Case, *more: str) -> compare.Run:
        from_stock = "--load" in more
        if from_stock and resumed == "impossible":
            raise CallFailed(Failure("KeyError", "no such state"))
        steps = train(case, *more)
        if from_stock and resumed == "right":
            return steps
        return [[*rest, replace(last, grad_norm=1.0001 * last.grad_norm)] for *rest, last in steps]

    monkeypatch.setattr(laboratory, "train_helix", train_helix)
    outcome = laboratory.attempt(Case())
    assert (outcome.status, outcome.failed) == (status, status == trial.DIFFERS)
    assert said in outcome.text


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases come out by what they have, and none runs."""

    def attempt(here: Laboratory, case: Case) -> Outcome:
        status = trial.EQUAL
        if case.experts:
            status = trial.DISCARDED
        elif case.pp > 1 and case.sp:
            status = trial.CRASHED
        return Outcome(case=case, status=status, text="said so", seconds=1.0)

    monkeypatch.setattr(Laboratory, "attempt", attempt)


@pytest.mark.usefixtures("judged")
def test_the_command_draws_again_what_megatron_discards_and_tells_every_fault_once(
    tmp_path: Path,
) -> None:
    file = tmp_path / "all" / "found.json"
    words = ["fuzz", "--draws", "20", "--seed", "3", "--world", "4", "--json", str(file)]
    found = CliRunner().invoke(cli.app, words)
    assert found.exit_code == 1, found.output
    content = json.loads(file.read_text())
    counts = content["counts"]
    assert counts[trial.EQUAL] + counts[trial.CRASHED] == 20
    assert counts[trial.DISCARDED] == len(content["cases"]) - 20 > 0
    assert [fault["case"] for fault in content["faults"]] == ["pp=2 sp"]
    assert content["faults"][0]["command"] == "helix fuzz --case 'pp=2 sp'"
    assert found.output.count("smaller, crashed: said so\n  helix fuzz --case 'pp=2 sp'") == 1
    assert re.search(r"equal +\S? *\d+", found.output)
    assert "20 of 20 cases: " in found.output


@pytest.mark.usefixtures("judged")
def test_the_command_tries_one_case() -> None:
    for line, code in (("m=2; --swiglu", 0), ("pp=2 sp; --swiglu", 1)):
        found = CliRunner().invoke(cli.app, ["fuzz", "--case", line])
        assert found.exit_code == code
        assert f"helix fuzz --case {shlex.quote(str(parse(line)))}" in found.output
