"""Makes a failing case smaller while it still fails: fewest features first, then sizes."""

from collections.abc import Callable, Iterator
from dataclasses import Field, replace
from typing import Any

from megatron_helix.fuzz.case import SIZES, Case


def shrink(case: Case, fails: Callable[[Case], bool], *, tries: int) -> Case:
    """The smallest case that was found to fail.

    Args:
        case: that fails.
        fails: whether a case fails in the same way.
        tries: how many cases to ask about, at most.
    """
    asked = {case}
    progress = True
    while progress:
        progress = False
        for smaller in candidates(case):
            if smaller in asked:
                continue
            if len(asked) > tries:
                return case
            asked.add(smaller)
            if fails(smaller):
                case, progress = smaller, True
                break
    return case


def candidates(case: Case) -> Iterator[Case]:
    """Cases that are smaller in one respect, those that leave most away first."""
    features = case.features
    half = len(features) // 2
    if half > 1:
        yield replace(case, features=features[:half])
        yield replace(case, features=features[half:])
    for one in range(len(features)):
        yield replace(case, features=features[:one] + features[one + 1 :])
    for field in _LAYOUT + _MODEL:
        for value in _nearer(field, getattr(case, field.name)):
            yield replace(case, **{field.name: value})


# What costs most to look at comes first; a model must fit its layout, so that follows.
_FIRST = (
    *("deep", "pp", "dp", "gather", "gather_layers"),
    *("ep", "etp", "experts", "topk", "dispatcher", "batches"),
)
_NAMED = {field.name: field for field in SIZES}
_LAYOUT = [_NAMED[name] for name in _FIRST]
_MODEL = [field for field in SIZES if field.name not in _FIRST]


def _nearer(field: "Field[Any]", value: Any) -> Iterator[Any]:
    """The default of a field, and a number between."""
    default: Any = field.default
    if value == default:
        return
    yield default
    if isinstance(value, int) and not isinstance(value, bool):
        between = (value + default) // 2
        if between not in (value, default):
            yield between
