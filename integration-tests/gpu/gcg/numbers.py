"""Order statistics. Percentiles are values of the sample: no interpolation."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Percentiles of one sample, in its own unit."""

    n: int
    p50: float
    p90: float
    p99: float
    max: float


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not below `percent` of the sample (nearest rank)."""
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[max(rank, 1) - 1]


def median(values: Sequence[float]) -> float:
    """The median: of an even number of values the mean of the middle two."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> Spread:
    """Its percentiles."""
    return Spread(
        len(values),
        percentile(values, 50),
        percentile(values, 90),
        percentile(values, 99),
        max(values),
    )


def changed(now: float, before: float) -> float:
    """By how many percent it changed."""
    return (now / before - 1) * 100
