"""What ``one_gpu_parity.py`` says of a set's curves: figures, and whether they keep the bar."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from matrix_turns import Device
from one_gpu_sets import GRAPHS, HELIX, KEPT, KINDS, PARTLY, RECIPES
from one_gpu_turns import Curve

from megatron_helix.experiment.results import largest_difference

Row = dict[str, Any]

RATIO = 1.5  # bar of distances: helix's over stock's


class Comparison(NamedTuple):
    """A row in the making.

    Attributes:
        label: what it is of.
        names: trainings whose curves it needs.
        judge: figures of these curves, with ``good``, whether the bar is kept.
    """

    label: Row
    names: tuple[str, ...]
    judge: Callable[..., Row]


def rows(name: str, curves: Mapping[str, Curve], device: Device) -> Iterator[Row]:
    """The comparisons of a set; ``failed``, and not good, where a training is not whole."""
    for label, names, judge in COMPARISONS[name](device):
        told = (f"{each}: {curves[each].failed}" for each in names if curves[each].failed)
        failed = next(told, None)
        said = {"good": False, "failed": failed} if failed else judge(*map(curves.get, names))
        yield {**label, **said}


def _fp8(_device: Device) -> Iterator[Comparison]:
    for recipe in RECIPES:
        for name in (*HELIX, *KEPT):
            names = "bf16-tp2", f"{recipe}-tp2", f"{recipe}-{name}"
            yield Comparison({"recipe": recipe, "layout": name}, names, _quantized)
    for name in (*HELIX, *KEPT):
        names = "bf16-tp2", f"bf16-{name}"
        yield Comparison({"recipe": "bf16", "layout": name}, names, _rounded)


def _quantized(exact: Curve, stock: Curve, helix: Curve) -> Row:
    """Mean distances of losses to stock's in bf16: helix's over that of stock's same recipe."""
    apart, of_stock = _apart(helix, exact), _apart(stock, exact)
    skipped = helix.skipped + stock.skipped
    good = apart <= RATIO * of_stock and not skipped
    figures = {"ratio": _ratio(apart, of_stock), "apart": apart, "stock": of_stock}
    return {"good": good, **figures, "skipped": skipped}


def _rounded(exact: Curve, helix: Curve) -> Row:
    """The floor of these distances: helix's in bf16, which has no bar."""
    return {"good": True, "apart": _apart(helix, exact), "skipped": helix.skipped}


def _apart(one: Curve, other: Curve) -> float:
    pairs = zip(one.losses, other.losses, strict=True)
    return statistics.fmean(abs(a - b) for a, b in pairs)


def _ratio(mine: float, of_stock: float) -> float:
    return mine / of_stock if of_stock else math.inf


def _packed(_device: Device) -> Iterator[Comparison]:
    for kind in KINDS:
        yield from _beside_stock(kind, _nearness)


def _batch(_device: Device) -> Iterator[Comparison]:
    yield from _beside_stock("rows", _nearness, *PARTLY)


def _sequence(device: Device) -> Iterator[Comparison]:
    yield from _beside_stock("rows", _by_gaps if device == "cuda" else _nearness)


def _beside_stock(kind: str, judge: Callable[..., Row], *more: str) -> Iterator[Comparison]:
    for name in (*HELIX, *KEPT, *more):
        names = (f"{kind}-{name}", *(f"{kind}-{one}" for one in ("tp2", "tp1", "fp32")))
        yield Comparison({"rows": kind, "layout": name}, names, judge)


def _nearness(helix: Curve, tp2: Curve, tp1: Curve, fp32: Curve) -> Row:
    """Distance to single precision: helix's over the larger one of stock's on two ranks and one.

    Distances are the largest relative ones of a step. Gradient norms are shown, and have no bar.
    """

    def distances(what: str) -> tuple[float, float]:
        exact = getattr(fp32, what)
        mine, *stocks = (largest_difference(getattr(one, what), exact) for one in (helix, tp2, tp1))
        return mine, max(stocks)

    mine, of_stock = distances("losses")
    of_norm, of_stocks_norm = distances("norms")
    return {
        "good": mine <= RATIO * of_stock,
        "ratio": _ratio(mine, of_stock),
        "to tp2": largest_difference(list(helix.losses), list(tp2.losses)),
        "tp1 to tp2": largest_difference(list(tp1.losses), list(tp2.losses)),
        "to fp32": mine,
        "norms' ratio": _ratio(of_norm, of_stocks_norm),
    }


def _by_gaps(helix: Curve, *stock: Curve) -> Row:
    """The same, of attention gap by gap alone."""
    said = _nearness(helix, *stock)
    return {**said, "gap by gap": helix.by_gaps, "good": said["good"] and helix.by_gaps}


def _graphs(_device: Device) -> Iterator[Comparison]:
    for exchange, (eager, *captured) in GRAPHS.items():
        for graph in captured:
            names = f"{exchange}-{eager}", f"{exchange}-{graph}"
            yield Comparison({"layout": exchange, "graphs": graph}, names, _equality)


def _equality(one: Curve, other: Curve) -> Row:
    """Equal losses and gradient norms, to the last bit."""
    equal = (one.losses, one.norms) == (other.losses, other.norms)
    return {"good": equal, "equal": equal, "steps": len(other.losses)}


COMPARISONS: dict[str, Callable[[Device], Iterator[Comparison]]] = {
    "fp8": _fp8,
    "packed": _packed,
    "batch": _batch,
    "sequence": _sequence,
    "graphs": _graphs,
}
