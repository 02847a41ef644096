"""How far predictions were off where they could be measured, and what they cannot tell apart then.

The errors are those of every step that was measured on two H100 and H200
(``benchmarks/predictions.py``, docs/performance.md). Two layouts of the same model on the same
machine err alike in part, so that a difference below the error may be there; it is not shown.
"""

from typing import NamedTuple

from megatron_helix.planner.time import Prediction

ERROR = {"tokens_per_s": 0.10, "memory_gb": 0.05, "tpot_ms": 0.25}  # relative
NEGLIGIBLE_TPOT_MS = 0.001  # of one prediction and its measurement
DECODE = (
    "Decode is predicted about twice too fast: on two H200 1.97 (TP=2) and 1.86 (helix 2 x 1) times"
    " the measured TPS, since the host and the short kernels of a step are not predicted."
)


class Ranking(NamedTuple):
    """What layouts are ranked by.

    Attributes:
        figure: a key of :data:`ERROR`.
        said: the figure, for a reader.
    """

    figure: str
    said: str


RANKINGS = {
    "tps": Ranking("tokens_per_s", "TPS"),
    "tpot": Ranking("tpot_ms", "TPOT"),
    "memory": Ranking("memory_gb", "memory"),
}


def figures(one: Prediction) -> dict[str, float]:
    """What :data:`ERROR` is of."""
    return {
        "tokens_per_s": one.tokens_per_s,
        "memory_gb": one.memory.total / 1e9,
        "tpot_ms": one.tpot_ms,
    }


def alike(one: Prediction, other: Prediction, rank_by: str = "tps") -> bool:
    """Whether two predictions differ by no more than the error of the figure they are ranked by."""
    key = RANKINGS[rank_by].figure
    low, high = sorted((figures(one)[key], figures(other)[key]))
    if key == "tpot_ms" and high - low <= NEGLIGIBLE_TPOT_MS:
        return True
    return low >= high * (1 - ERROR[key])


def may_not_fit(one: Prediction, memory_bytes: float) -> bool:
    """Whether the memory of a device is within the error of what is predicted to be needed."""
    needed = one.memory.total
    return needed <= memory_bytes < needed * (1 + ERROR["memory_gb"])


def said(rank_by: str = "tps") -> str:
    """The error of a figure, in words."""
    ranking = RANKINGS[rank_by]
    return f"{ERROR[ranking.figure]:.0%} of {ranking.said}, the planner's error"
