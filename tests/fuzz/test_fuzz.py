"""The fuzzer at work: what comes of a case, how a failing one is made small, and the command."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megatron_helix import cli
from megatron_helix.fuzz import compare, report, shrink, trial
from megatron_helix.fuzz.case import STEPS, Case, parse
from megatron_helix.fuzz.hunt import smaller
from megatron_helix.fuzz.session import NO_ANSWER, CallFailed, Failure
from megatron_helix.fuzz.trial import Laboratory, Outcome
from megatron_helix.partition import checkpoint
from tests.covering import THOROUGH


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


# Stock's own checkpoint, of a stage with experts behind one without: stock cannot go on.
LATE_EXPERTS = "pp=2 experts=2 biasless sp deep=helix; --num-layers 2 --moe-layer-freq [0,1]"
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
        pytest.param(LATE_EXPERTS, *NO_STEP, marks=THOROUGH),
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


def test_what_stock_cannot_go_on_from_is_no_fault_of_helix(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot_load(train: Any) -> Any:
        def trained(*case: Any, **more: Any) -> compare.Run:
            if "--load" in case:
                raise CallFailed(Failure("KeyError", "'step'"))
            return train(*case, **more)

        return trained

    for layout in ("train_stock", "train_helix"):
        monkeypatch.setattr(laboratory, layout, cannot_load(getattr(laboratory, layout)))
    outcome = laboratory.attempt(parse("deep=helix"))
    assert (outcome.status, outcome.text) == NO_STEP


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
