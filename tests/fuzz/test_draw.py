"""What the fuzzer draws: cases, and the lines that say them."""

from itertools import product

import pytest

from megatron_helix.fuzz.case import Case, given, parse
from megatron_helix.fuzz.draw import draw, find
from megatron_helix.options import arguments
from megatron_helix.options.features.works import WORKS

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
