"""Intervals of 95 %: of a share (Wilson), and of a mean over tasks (Student)."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from stages.artifacts.records import Array

LEVEL = 0.95


class Interval(NamedTuple):
    """A value with its lower and upper bound."""

    value: float
    low: float
    high: float


def wilson(hits: int, count: int) -> Interval:
    """Share of hits with Wilson's score interval (1927); it stays inside 0..1 and is never empty.

    >>> wilson(8, 10)
    Interval(value=0.8, low=0.490, high=0.943)
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, max(0.0, centre - reach), min(1.0, centre + reach))


def half_width(values: Array) -> float:
    """Half the interval of a mean: t(0.975, n - 1) * s / sqrt(n); NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan")
    from scipy.special import stdtrit  # a tenth of the memory of scipy.stats

    return float(stdtrit(len(values) - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / sqrt(len(values)))
