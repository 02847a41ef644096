"""Draws cases: a layout, a model that it can cut, and features of the table that fit both."""

import random
from collections.abc import Sequence
from dataclasses import replace

from megatron_helix.basics.errors import UserError
from megatron_helix.fuzz.case import Case
from megatron_helix.options.features.rows import Works
from megatron_helix.options.features.works import WORKS

FEATURES_OF_A_CASE = (0, 1, 2, 2, 3, 4)  # with these odds
DEEP = 1 / 5  # of all cases: these save a checkpoint, and somebody else goes on from it
UNEVEN = 1 / 4  # of all cases: the segments of heads, or the features of ranks, need not be alike
CARELESS = 1 / 20  # of all cases: their heads and micro-batches may not fit the layout
WORLDS = (2, 3, 4, 4, 5, 6, 6, 7, 8, 8)  # those that can be cut in more ways more often


def draw(
    seed: int, number: int, *, worlds: Sequence[int] = WORLDS, only: Works | None = None
) -> Case:
    """The case of this seed and number: always the same one.

    Args:
        seed: of a run of the fuzzer.
        number: of the draw.
        worlds: numbers of ranks to take from.
        only: a feature that every case must have.
    """
    dice = random.Random(f"{seed}/{number}")
    kept = random.Random(f"{seed}/{number}/kept").choice((0, 1, 2))
    while True:
        case = _sizes(dice, _layout(dice, dice.choice(worlds)))
        if case.gather != "microbatch":
            case = replace(case, gather_layers=kept)
        if only is None or set(only.needs) <= case.tags:
            return replace(case, features=_features(dice, case, only))


def _layout(dice: random.Random, world: int) -> Case:
    """How ``world`` ranks are cut, and what moves between them."""
    cuts = [
        Case(m=m, n=n, pp=pp, dp=world // (m * n * pp))
        for pp in (1, 1, 2)
        for m in range(2, world + 1)
        for n in range(1, world + 1)
        if world % (m * n * pp) == 0
    ]
    # Ranks that only repeat each other's work are worth less than those that share it.
    cut = dice.choices(cuts, weights=[cut.tp * cut.pp for cut in cuts])[0]
    exchange = dice.choice(("auto", "activations", "activations", "weights", "weights", "scores"))
    gathers = ("microbatch", "microbatch", "once", "step")
    weights = exchange in ("auto", "weights")
    return replace(
        cut,
        sp=exchange == "weights" or dice.random() < 0.6,
        exchange=exchange,
        split=dice.choice(("auto", "batch", "sequence")) if exchange != "scores" else "auto",
        gather=dice.choice(gathers) if weights else "microbatch",
    )


def _sizes(dice: random.Random, cut: Case) -> Case:
    """A model and batches for the layout."""
    careless = dice.random() < CARELESS
    m, n, tp = (dice.choice((1, 2, 3)), 1, 1) if careless else (cut.m, cut.n, cut.tp)
    positions = dice.choice(("rope", "rope", "learned_absolute", "none"))
    unit = m * dice.choice((2, 2, 4)) if positions == "rope" else m
    channels = [k for k in range(unit, 33, unit) if k >= 4] or [unit]
    if dice.random() < UNEVEN:
        pair = 2 if positions == "rope" else 1
        channels = [k for k in range(pair * m, 33, pair) if k >= 4] or channels
    ffn = cut.tp * dice.choice((4, 7, 8, 12))
    if dice.random() < UNEVEN:
        ffn = dice.randrange(max(16, cut.tp), 97)
    groups = n * dice.choice([k for k in (1, 1, 2, 3, 4) if n * k <= 12])
    heads = groups * dice.choice([k for k in (1, 1, 2, 3) if groups * k <= 12] or [1])
    by_sequence = cut.split == "sequence" or (cut.split == "auto" and dice.random() < 0.3)
    experts = dice.choice((0, 0, 0, 2, 4))
    sp = cut.sp or experts > 0  # Megatron wants it beside experts
    whole = sp or by_sequence
    seq = tp * dice.choice([k for k in range(2, 17) if k * tp <= 64]) if whole else 0
    case = replace(
        cut,
        sp=sp,
        layers=cut.pp * dice.choice((1, 1, 2, 3) if cut.pp == 1 else (1, 1, 2)),
        hidden=dice.choice((24, 32, 40, 48)),
        heads=heads,
        groups=groups if groups < heads else 0,
        channels=dice.choice(channels),
        ffn=ffn,
        seq=seq or dice.randrange(8, 49),
        micro=dice.choice((1, 2, 3, 4)) if by_sequence else m * dice.choice((1, 1, 2)),
        batches=dice.choice((1, 1, 2, 3) if cut.pp == 1 else (1, 2, 3, 4)),
        positions=positions,
        gated=dice.random() < 0.4,
        biasless=dice.random() < 0.4 or experts > 0,  # stock experts with biases fail on a CPU
        untied=dice.random() < 0.4,
        experts=experts,
        deep=dice.choice(("stock", "helix", "turned")) if dice.random() < DEEP else "",
    )
    case = replace(case, vocab=dice.randrange(128, 257))
    return _experts(dice, case) if experts else case


def _experts(dice: random.Random, case: Case) -> Case:
    """How experts are dealt out: their number on a rank is the same for stock and helix."""
    ranks = case.stock_tp * case.dp
    ep = dice.choice([k for k in (1, 2, 4) if case.experts % k == 0 and ranks % k == 0])
    etp = dice.choice([k for k in (1, 1, 2, case.tp) if case.tp * case.dp % (ep * k) == 0])
    # Experts' optimizer state goes to no other tensor-parallel size, in stock either.
    same_size = case.stock_tp == case.tp or not case.deep
    return replace(
        case,
        ep=ep,
        etp=etp,
        deep=case.deep if same_size else "turned",
        topk=dice.choice((0, 0, 2)) if case.experts > 2 else 0,
        dispatcher=dice.choice(("alltoall", "allgather")),
    )


def _features(dice: random.Random, case: Case, only: Works | None) -> tuple[str, ...]:
    fit = [row for row in WORKS if row.examples and set(row.needs) <= case.tags and row != only]
    wanted = min(dice.choice(FEATURES_OF_A_CASE), len(fit))
    rows = [*([only] if only else ()), *dice.sample(fit, wanted)]
    return tuple(dice.choice(row.examples) for row in rows)


def find(name: str) -> Works:
    """The row of the table whose name or flags have these words.

    Raises:
        UserError: when no row, or none with an example, or several have them.
    """
    low = name.lower()
    rows = [row for row in WORKS if low in f"{row.feature} {row.names}".lower()]
    exact = [row for row in rows if low in (row.feature.lower(), *row.names.lower().split())]
    rows = exact if len(exact) == 1 else rows
    if len(rows) != 1 or not rows[0].examples:
        found = ", ".join(repr(row.feature) for row in rows) or "none"
        raise UserError(
            f"--only: must be part of the name or the flags of one feature that has examples, got"
            f" {name!r}, which is of {found}; docs/compatibility.md has all names"
        )
    return rows[0]
