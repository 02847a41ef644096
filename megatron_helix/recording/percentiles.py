"""The 99th percentile of times, where there are enough of them to speak of one."""

from collections.abc import Sequence

import numpy

FEWEST = 20  # of fewer it is the longest, all but its name


def p99(times: Sequence[float]) -> float | None:
    """The 99th percentile; None of fewer than :data:`FEWEST` times."""
    return float(numpy.percentile(times, 99)) if len(times) >= FEWEST else None
