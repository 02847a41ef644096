"""A slice of what ``helix fuzz`` tries, the same cases every time: helix gives stock's numbers."""

import sys
from collections.abc import Iterator
from functools import cache

import pytest
from megatron.training.arguments import (
    core_transformer_config_from_args,
    parse_args,
    validate_args,
)

from megatron_helix import pretrain_gpt
from megatron_helix.fuzz import report, trial
from megatron_helix.fuzz.case import Case, parse
from megatron_helix.fuzz.draw import draw
from megatron_helix.fuzz.trial import Laboratory, Outcome
from megatron_helix.options import arguments
from megatron_helix.options.features.works import WORKS
from megatron_helix.upstream import patches

SEED, STREAM, CASES = 6, 600, 24
WORLDS = (2, 3, 4, 4, 5, 6)  # of eight ranks one case costs as much as three of four
MOVING = ("auto", "activations", "weights")

FOUND = (
    # A layer spec may have no norm where the flags ask for one; then the scores exchange had one.
    "exchange=scores; --qk-l2-norm",
    "exchange=scores biasless experts=2 sp; --qk-l2-norm",
    # The layer of a stage that has that of multi-token prediction alone had no norm, for stock has.
    "hidden=24 channels=24 ffn=24 seq=27 batches=2 untied m=3 pp=2 sp exchange=weights;"
    " --qk-l2-norm;"
    " --num-layers 2 --mtp-num-layers 1 --mtp-standalone"
    " --pipeline-model-parallel-layout Et|t|m|L",
)

ROWS = {example: row.feature for row in WORKS for example in row.examples}
FEATURES = set(ROWS.values())

# What some case of the slice must show, beside nearly all features.
SHOWN = {
    *(f"{kind}, split {split}" for kind in MOVING for split in ("auto", "batch", "sequence")),
    *("scores", "gather once, weights", "gather step, weights"),
    *(f"checkpoint {deep}" for deep in ("stock", "helix", "turned")),
    *(f"cut {cut}" for cut in ("2x1", "2x2", "4x1", "3x1", "5x1", "3x2", "2x3", "6x1")),
    *(f"segments padded True, {kind}" for kind in ("activations", "weights")),
    *(f"features padded True, {kind}" for kind in ("activations", "weights")),
    *(f"packed True, {kind}" for kind in ("activations", "weights")),
    *(f"experts padded True, {kind}" for kind in ("alltoall", "allgather")),
}


def aspects(case: Case) -> set[str]:
    """What a case stands for."""
    split = f", split {case.split}" if case.exchange != "scores" else ""
    exchange = f"{case.exchange}{split}"
    packed = any("--dataloader-inter-document-masking" in one for one in case.features)
    return {
        exchange,
        f"gather {case.gather}, {case.exchange}",
        f"cut {case.m}x{case.n}",
        f"stages {case.pp}, {exchange}",
        f"replicas {case.dp > 1}, {case.exchange}",
        f"checkpoint {case.deep}",
        f"checkpoint {case.deep}, {case.exchange}",
        f"experts {case.experts > 0}, {exchange}",
        f"expert ranks {case.ep > 1} {case.etp > 1}",
        f"stock on fewer ranks {case.stock_tp < case.tp}",
        f"sequence parallel {case.sp}, {case.exchange}",
        f"positions {case.positions}",
        f"segments padded {case.channels % case.m > 0}, {case.exchange}",
        f"features padded {case.ffn % case.tp > 0}, {case.exchange}",
        f"experts padded {case.experts > 0 and case.ffn % case.etp > 0}, {case.dispatcher}",
        f"packed {packed}, {case.exchange}",
        *(ROWS[feature] for feature in case.features),
    }


def runs(case: Case) -> bool:
    """Whether helix takes the case, and stock does: its checks, and channels that it can rotate."""
    ranks = case.ranks(case.stock_tp)
    try:
        arguments.complete(case.helix(), case.ranks(case.tp))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", str(ranks))
            patch.setattr(sys, "argv", ["train", *arguments.complete(case.stock(), ranks)])
            args = validate_args(parse_args(pretrain_gpt.flags_beside()))
            core_transformer_config_from_args(args)
    except (ValueError, AssertionError):
        return False
    return args.kv_channels % 2 == 0 or args.position_embedding_type not in ("rope", "yarn")


@cache
def chosen() -> tuple[Case, ...]:
    """Of the stream of draws those that show most for their cost, first what must be shown."""
    patches.read_flag_help_once()
    draws = [draw(SEED, number, worlds=WORLDS) for number in range(STREAM)]
    left = {case: aspects(case) for case in draws}
    picked: list[Case] = []
    missing = SHOWN | FEATURES
    while len(picked) < CASES:
        missing = missing or set().union(*left.values())
        best = max(left, key=lambda case: len(left[case] & missing) / cost(case))
        if runs(best):
            missing -= left[best]
            picked.append(best)
        del left[best]
        if not any(shown & missing for shown in left.values()):
            missing = set()
    return tuple(picked)


def cost(case: Case) -> float:
    """Of its runs: what they set up, and what they train."""
    ranks = case.ranks(case.tp) + case.ranks(case.stock_tp)
    return ranks * (2 + 0.2 * case.layers * case.batches) * (2 if case.deep else 1)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("slice") / "laboratory", max(WORLDS), 180.0) as here:
        yield here


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, Outcome]:
    return {}


@pytest.mark.parametrize("number", range(CASES))
def test_helix_gives_stocks_numbers(
    laboratory: Laboratory, outcomes: dict[Case, Outcome], number: int
) -> None:
    case = chosen()[number]
    outcomes[case] = laboratory.attempt(case)
    assert not outcomes[case].failed, report.describe(outcomes[case])
    assert outcomes[case].status != trial.REFUSED


@pytest.mark.parametrize("line", FOUND)
def test_what_a_hunt_has_found_stays_mended(laboratory: Laboratory, line: str) -> None:
    outcome = laboratory.attempt(parse(line))
    assert outcome.status == trial.EQUAL, report.describe(outcome)


@pytest.mark.parametrize("deep", ["helix", "turned"])
def test_padded_tiles_go_through_checkpoints(laboratory: Laboratory, deep: str) -> None:
    """Of five rotary pairs three segments are not alike."""
    case = parse(f"channels=10 seq=12 micro=3 m=3 sp exchange=weights deep={deep}")
    outcome = laboratory.attempt(case)
    assert outcome.status == trial.EQUAL, report.describe(outcome)


def test_the_slice_shows_every_exchange_split_and_feature(outcomes: dict[Case, Outcome]) -> None:
    equal = [case for case, outcome in outcomes.items() if outcome.status == trial.EQUAL]
    assert len(equal) > CASES * 3 / 4
    shown = set().union(*map(aspects, equal))
    assert {
        f"experts True, weights, split {split}" for split in ("auto", "batch", "sequence")
    } & shown
    assert shown >= SHOWN, SHOWN - shown
    assert len(FEATURES & shown) >= 0.9 * len(FEATURES), FEATURES - shown
