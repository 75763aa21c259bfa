"""Places of a buffer shared among the classes of a window, while the window arrives."""

from __future__ import annotations

import numpy as np

from stages.artifacts.records import Array
from stages.valuation.allocation import fair_shares


class ClassShares:
    """Strata of the labels met so far, what arrived in each, and the highest key that had to go.

    Every class is a stratum of its own while there are places for all. When more classes appear than there are places,
    neighbouring strata (in order of label) with the fewest samples are merged until one place each suffices; a stratum
    is then an interval of labels, and a class that appears within it later joins it. Both rules look at labels and
    counts only, never at keys: so within a stratum the samples with the highest of independent random keys are a
    uniform random sample of all that arrived.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.low = np.zeros(0, np.int64)
        self.high = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)
        self.dropped = np.zeros(0)

    def of(self, labels: Array) -> Array:
        """The stratum of each label: int64 (n,)."""
        return np.searchsorted(self.low, labels, side="right") - 1

    def arrive(self, labels: Array) -> None:
        """Count a chunk's labels."""
        present, numbers = np.unique(labels, return_counts=True)
        inside = self.of(present)
        fresh = present[(inside < 0) | (present > np.append(self.high, -1)[inside])]
        self._insert(fresh)
        np.add.at(self.counts, self.of(present), numbers)
        while len(self.counts) > self.places:
            self._merge(int(np.argmin(self.counts[:-1] + self.counts[1:])))

    def keep(self, labels: Array, keys: Array) -> Array:
        """Rows that stay, ascending: the highest keys of each stratum, as many as its share: int64 (m,)."""
        stratum = self.of(labels)
        order = np.lexsort((-keys, stratum))
        sizes = np.bincount(stratum, minlength=len(self.counts))
        rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        stays = rank < fair_shares(self.counts, self.places)[stratum[order]]
        gone = order[~stays]
        np.maximum.at(self.dropped, stratum[gone], keys[gone])
        return np.sort(order[stays])

    def _insert(self, labels: Array) -> None:
        at = np.searchsorted(self.low, labels)
        self.low, self.high = np.insert(self.low, at, labels), np.insert(self.high, at, labels)
        self.counts, self.dropped = np.insert(self.counts, at, 0), np.insert(self.dropped, at, -np.inf)

    def _merge(self, left: int) -> None:
        """Join stratum `left` and the next one."""
        self.high[left] = self.high[left + 1]
        self.counts[left] += self.counts[left + 1]
        self.dropped[left] = max(self.dropped[left], self.dropped[left + 1])
        self.low, self.high = np.delete(self.low, left + 1), np.delete(self.high, left + 1)
        self.counts, self.dropped = np.delete(self.counts, left + 1), np.delete(self.dropped, left + 1)
