"""Greedy facility location over input distances: the baseline that looks at no model."""

from __future__ import annotations

import numpy as np

from stages.artifacts.records import Array


def distances(points: Array) -> Array:
    """Euclidean distances between the rows of (n, d): float64 (n, n)."""
    squares = np.einsum("nd,nd->n", points, points, dtype=np.float64)
    products = (points @ points.T).astype(np.float64)
    return np.asarray(np.sqrt(np.maximum(squares[:, None] + squares - 2.0 * products, 0.0)))


def coreset(points: Array, mass: Array, places: int) -> tuple[Array, Array]:
    """`places` points that stand for all, and the mass each stands for: int64 (m,) ascending, float64 (m,).

    Each step takes the point that lowers sum_j mass_j min_i |x_j - x_i| most, the greedy rule of Camel (Li et al.,
    SIGMOD 2022) on raw inputs; then every point gives its mass to the nearest chosen one. Biased: chosen points are
    not a random sample.
    """
    far = distances(points)
    chosen: list[int] = []
    nearest = np.full(len(points), np.inf)
    cost = far @ mass
    for _ in range(min(places, len(points))):
        cost[chosen] = np.inf
        chosen.append(int(np.argmin(cost)))
        nearest = np.minimum(nearest, far[chosen[-1]])
        cost = np.minimum(far, nearest) @ mass
    rows = np.sort(np.array(chosen, dtype=np.int64))
    owner = np.argmin(far[:, rows], axis=1)
    owner[rows] = np.arange(len(rows))  # duplicates of each other stand for themselves
    return rows, np.bincount(owner, weights=mass, minlength=len(rows))
