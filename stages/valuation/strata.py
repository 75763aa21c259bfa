"""Merging strata: from one per class down to a single one, for batches with fewer places than classes need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stages.artifacts.records import Array


@dataclass(frozen=True)
class Level:
    """One partition of K classes into k strata."""

    of: Array
    """int64 (K,): the stratum of each class, 0..k-1."""
    pulls: Array
    """float64 (k,): sum of q_i |g_i| of each stratum."""
    products: Array
    """float64 (k, k): inner products of the strata's sums of q_i g_i."""

    @property
    def importances(self) -> Array:
        """float64 (k,): sqrt((sum q|g|)^2 - |sum q g|^2), the root of a single draw's least variance."""
        return np.asarray(np.sqrt(np.maximum(self.pulls**2 - np.diagonal(self.products), 0.0)))

    def least_variance(self, places: int) -> float:
        """What importance sampling within these strata could reach with real-valued places: (sum a)^2 / B.

        Never falls from one level of a chain to the next.
        """
        return float(self.importances.sum() ** 2 / places)


def merge_chain(pulls: Array, products: Array) -> Iterator[Level]:
    """Partitions of K classes into K, K-1, ..., 1 strata, each from the one before by merging two strata.

    Merged are the two that raise the sum of importances least. The sum never falls by merging (the reverse triangle
    inequality: the vectors (sum q_i |g_i|, sum q_i g_i) of classes lie in a light cone), but the places freed may gain
    more. Greedy: not always the best partition of its size; every partition is unbiased, so what is lost is variance
    only.

    Args:
        pulls: float64 (K,): sum of q_i |g_i| of each class.
        products: float64 (K, K): inner products of the classes' sums of q_i g_i.
    """
    level = Level(np.arange(len(pulls)), pulls, products)
    yield level
    while len(level.pulls) > 1:
        level = _merged(level, *_cheapest_pair(level))
        yield level


def _cheapest_pair(level: Level) -> tuple[int, int]:
    """The pair (i < j) whose merging raises the sum of importances least."""
    squared, own = np.diagonal(level.products), level.importances
    together = (level.pulls[:, None] + level.pulls) ** 2 - (squared[:, None] + squared + 2.0 * level.products)
    cost = np.sqrt(np.maximum(together, 0.0)) - own[:, None] - own
    cost[np.tri(len(cost), dtype=bool)] = np.inf
    keep, drop = divmod(int(np.argmin(cost)), len(cost))
    return keep, drop


def _merged(level: Level, keep: int, drop: int) -> Level:
    """The level with stratum `drop` joined to `keep`, which comes before it."""
    rest = np.arange(len(level.pulls)) != drop
    pulls, products = level.pulls.copy(), level.products.copy()
    pulls[keep] += pulls[drop]
    products[keep] += products[drop]
    products[:, keep] += products[:, drop]
    of = np.where(level.of == drop, keep, level.of)
    return Level(of - (of > drop), pulls[rest], products[rest][:, rest])
