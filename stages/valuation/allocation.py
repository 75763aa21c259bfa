"""Places of a batch over strata: the exact integer optimum of Neyman allocation, and fair shares of a buffer."""

from __future__ import annotations

import heapq
from math import sqrt

import numpy as np

from stages.artifacts.records import Array
from stages.errors import require

_GAIN = 1.0 / sqrt(2.0)
"""1 / sqrt(n (n + 1)) at n = 1."""


def allocate(importance: Array, places: int, *, size: Array | None = None, limit: Array | None = None) -> Array:
    """Integers n >= 1 with sum `places` that minimise sum(importance**2 / n): int64 (K,).

    Every stratum has one place first, whatever its importance: without one its part of the loss would be missing.
    Each further place goes where it lowers the sum most, which is where importance / sqrt(n (n + 1)) is largest (the
    equal-proportions rule; Wright, *Statistics and Probability Letters* 2012: the exact Neyman optimum, which rounding
    is not). Ties, and strata without importance, are decided by `size` in the same way, then by order.

    `limit` caps n from above (drawing without replacement); places beyond the sum of the limits stay unused. Raises
    `UsageError` when there are more strata than places: merge strata first (`strata.merge_chain`).

    >>> allocate(np.array([2.0, 1.0, 0.0]), 6)
    array([3, 2, 1])
    """
    strata = len(importance)
    require(strata <= places, "batch", f"{strata} strata for {places} places", "at least one place per stratum")
    counts = [1] * strata
    limits = [places] * strata if limit is None else limit.tolist()
    sizes = [1.0] * strata if size is None else size.tolist()
    claims = [
        (-a * _GAIN, -s * _GAIN, index)
        for index, (a, s) in enumerate(zip(importance.tolist(), sizes, strict=True))
        if limits[index] > 1
    ]
    heapq.heapify(claims)
    for _ in range(places - strata):
        if not claims:
            break
        by_importance, by_size, index = claims[0]
        counts[index] += 1
        if counts[index] == limits[index]:
            heapq.heappop(claims)
            continue
        n = counts[index]
        shrink = sqrt((n - 1) / (n + 1))  # 1 / sqrt(n (n + 1)) over 1 / sqrt((n - 1) n)
        heapq.heapreplace(claims, (by_importance * shrink, by_size * shrink, index))
    return np.array(counts, dtype=np.int64)


def fair_shares(counts: Array, places: int) -> Array:
    """Places per stratum, as equal as the strata's `counts` allow: int64 (K,), never more than the count.

    Small strata keep all they have; the others share the rest evenly, and what is left over goes to the first ones.
    As counts grow and strata appear, the share of one that has more than its share never grows again: so a buffer
    that drops what exceeds the shares never misses it later.

    >>> fair_shares(np.array([50, 2, 40]), 11)
    array([5, 2, 4])
    """
    low, high = 0, places
    while low < high:  # the highest level at which everybody's share still fits
        level = (low + high + 1) // 2
        low, high = (level, high) if int(np.minimum(counts, level).sum()) <= places else (low, level - 1)
    shares = np.minimum(counts, low).astype(np.int64)
    left = places - int(shares.sum())
    shares[np.flatnonzero(counts > low)[: max(left, 0)]] += 1
    return shares
