"""What a search found, in sentences: what bounds the first layout, and what is no worse."""

from collections.abc import Sequence

from megatron_helix.planner import accuracy
from megatron_helix.planner.search import Found
from megatron_helix.planner.time import Prediction
from megatron_helix.run_config.layout import LayoutConfig


def explain(found: Found, rank_by: str) -> str:
    """Two sentences: what bounds the first layout, and what the next best loses.

    What the planner cannot tell apart (:mod:`megatron_helix.planner.accuracy`) is no winner and no
    loser; of a decode step a third sentence says how far predictions are off.
    """
    best, *others = found.cuts()
    alike = [other for other in others if accuracy.alike(best, other, rank_by)]
    sentences = [_first(best, tied=bool(alike)), _next(found, alike, rank_by)]
    if best.deployment.phase == "decode":
        sentences.append(accuracy.DECODE)
    return " ".join(sentences)


def of_memory(shown: Sequence[Prediction], memory_bytes: float) -> list[str]:
    """A sentence for each layout that a device cannot hold, or perhaps not."""
    lines = []
    for one in shown:
        too_large = one.memory.total > memory_bytes
        if too_large or accuracy.may_not_fit(one, memory_bytes):
            lines.append(
                f"{one.deployment.layout.name} {'does' if too_large else 'may'} not fit: it needs"
                f" {one.memory.total / 1e9:.3g} GB, and a device has {memory_bytes / 1e9:.3g} GB"
                + ("." if too_large else f" (within {accuracy.said('memory')}).")
            )
    return lines


def _first(best: Prediction, *, tied: bool) -> str:
    shares = {
        bound: sum(term.seconds for term in best.terms if term.bound == bound) for bound in _BOUNDS
    }
    bound = max(shares, key=shares.__getitem__)
    reached = (
        f"{shares[bound] / best.step_s:.0%} of the step, and {best.roofline:.0%} of its roofline"
    )
    comes = "is first, in a tie" if tied else "wins"
    return f"{_named(best)}, {comes}; {_BOUNDS[bound]} bounds it ({reached} is reached)."


def _next(found: Found, alike: list[Prediction], rank_by: str) -> str:
    cuts = found.cuts()
    if len(cuts) == 1:
        return "Nothing else fits."
    best, other = cuts[:2]
    loses = f"{_named(other, brackets=True)}, loses {_loss(best, other, rank_by)}"
    words = f"The next best cut, {loses}"
    if alike:
        many = f"{len(alike)} other cuts are" if len(alike) > 1 else "1 other cut is"
        within = f"within {accuracy.said(rank_by)}"
        words = f"{many} not distinguishable from it, {within}: the next best, {loses}"
    return f"{words}{_one_axis(found, other, rank_by)}."


def _one_axis(found: Found, second: Prediction, rank_by: str) -> str:
    """Whether tensor parallelism alone (m = 1) is as good, by the best of the other kind."""
    best = found.ranked[0]
    is_helix = best.deployment.layout.is_helix
    kinds = [one for one in found.ranked if one.deployment.layout.is_helix != is_helix]
    if not kinds:
        return "" if is_helix else "; no helix layout fits, m = 1 suffices"
    rival = kinds[0]
    tied = accuracy.alike(best, rival, rank_by)
    if is_helix and not tied:
        return ""
    suffices = "; m = 1 may suffice" if is_helix else "; m = 1 suffices"
    if rival is second:
        return suffices
    name, loss = rival.deployment.layout.name, _loss(best, rival, rank_by)
    words = f"{suffices}: the best {_kind(rival.deployment.layout)}, {name}, loses {loss}"
    return words + (", in the tie" if tied else "")


def _loss(best: Prediction, other: Prediction, rank_by: str) -> str:
    key = accuracy.RANKINGS[rank_by].figure
    if accuracy.figures(best)[key] == accuracy.figures(other)[key]:
        return "nothing"
    return {
        "tps": f"{1 - other.tokens_per_s / best.tokens_per_s:.1%} of the TPS",
        "tpot": f"{other.tpot_ms - best.tpot_ms:.3f} ms of TPOT",
        "memory": f"{(other.memory.total - best.memory.total) / 1e9:.3g} GB a device",
    }[rank_by]


_BOUNDS = {
    "compute": "arithmetic",
    "memory": "memory bandwidth",
    "link": "the links",
    "launch": "launching kernels",
    "waiting": "waiting for other stages",
}


def _named(one: Prediction, *, brackets: bool = False) -> str:
    layout = one.deployment.layout
    kind = f"a {_kind(layout)}"
    return f"{layout.name} ({kind})" if brackets else f"{layout.name}, {kind}"


def _kind(layout: LayoutConfig) -> str:
    return "helix layout" if layout.is_helix else "stock layout"
