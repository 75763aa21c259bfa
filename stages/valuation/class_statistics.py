"""Running statistics of features per class: the state of Titan's coarse filter (paper section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stages.artifacts.records import Array


class ClassStatistics:
    """Mean feature and mean squared feature norm of each class, old samples fading by `decay` per newer one.

    With decay = 1 they are plain running means. Chunks of any size give what one sample at a time would. Arithmetic
    is in the features' own precision, sums over time are kept in float64.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._weight: dict[int, float] = {}
        self._mean: dict[int, Array] = {}
        self._square: dict[int, float] = {}

    def update(self, labels: Array, features: Array) -> None:
        """Take in a chunk in order of arrival: int64 (n,), float (n, F)."""
        squares = np.einsum("nf,nf->n", features, features)
        for label, rows in by_class(labels):
            fade = self.decay ** np.arange(len(rows) - 1, -1, -1.0)
            old = self._weight.get(label, 0.0) * self.decay ** len(rows)
            weight = old + float(fade.sum())
            mean = (fade.astype(features.dtype) @ features[rows]).astype(np.float64) / weight
            square = float(fade @ squares[rows]) / weight
            if label in self._mean:
                mean += (old / weight) * self._mean[label]
                square += (old / weight) * self._square[label]
            self._weight[label], self._mean[label], self._square[label] = weight, mean, square

    def representativeness(self, labels: Array, features: Array) -> Array:
        """Rep(x, y) = -|f - mean_y|^2: float64 (n,)."""
        return np.asarray(-self.squared_distances(labels, features))

    def diversity(self, labels: Array, features: Array) -> Array:
        """Div(x, y) = E |f - f'|^2 = |f|^2 + E |f'|^2 - 2 <f, mean_y>: float64 (n,)."""
        result = np.empty(len(labels))
        for label, rows in by_class(labels):
            own, mean = features[rows], self._mean[label].astype(features.dtype)
            result[rows] = np.einsum("nf,nf->n", own, own) + self._square[label] - 2.0 * (own @ mean)
        return result

    def squared_distances(self, labels: Array, features: Array) -> Array:
        """|f - mean_y|^2: float64 (n,)."""
        result = np.empty(len(labels))
        for label, rows in by_class(labels):
            offset = features[rows] - self._mean[label].astype(features.dtype)
            result[rows] = np.einsum("nf,nf->n", offset, offset)
        return result

    def spreads(self, labels: Array) -> Array:
        """Variance of the features of each sample's class, E |f'|^2 - |mean_y|^2: float64 (n,)."""
        values = {label: max(self._square[label] - float(mean @ mean), 0.0) for label, mean in self._mean.items()}
        return np.array([values[int(label)] for label in labels], dtype=np.float64)

    def means(self, labels: Array) -> Array:
        """The mean feature of each sample's class: float64 (n, F)."""
        return np.stack([self._mean[int(label)] for label in labels])


def by_class(labels: Array) -> Iterator[tuple[int, Array]]:
    """Each label that is present, ascending, with its rows in order of arrival."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    yield from zip(present.tolist(), np.split(order, starts[1:]), strict=True)
