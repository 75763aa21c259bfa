"""Gradients of candidates as selection needs them: norms and inner products, never one stored gradient per sample.

Two representations share one interface. `LastLayer` is the closed form for softmax cross-entropy on a linear layer:
the gradient of sample i is the outer product of its residual r_i = p_i - e_y and its features with a one for the bias,
(h_i, 1), so that <g_i, g_j> = <r_i, r_j> (<h_i, h_j> + 1). `Kernel` holds the inner products themselves and serves
every other parameter set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from stages.artifacts.records import Array


class Gradients(Protocol):
    """What selection asks of the gradients of n candidates."""

    @property
    def squared_norms(self) -> Array:
        """float64 (n,)."""
        ...

    def inner_products(self) -> Array:
        """float64 (n, n): <g_i, g_j>."""
        ...

    def group_products(self, group: Array, groups: int, mass: Array) -> Array:
        """float64 (K, K): <G_a, G_b> of the sums G_a = sum of mass_i g_i over the samples of group a."""
        ...


@dataclass(frozen=True)
class LastLayer:
    """Closed-form gradients of the last linear layer, weights and bias (docs/choosing-samples.md).

    Any layer's gradient that is an outer product fits; for a head without bias the added one is a constant feature.
    """

    residuals: Array
    """float64 (n, C): probabilities minus the one-hot label."""
    features: Array
    """float64 (n, D)."""

    @cached_property
    def squared_norms(self) -> Array:
        """|p - e_y|^2 (|h|^2 + 1): float64 (n,)."""
        residual = np.einsum("nc,nc->n", self.residuals, self.residuals)
        feature = np.einsum("nd,nd->n", self.features, self.features)
        return np.asarray(residual * (feature + 1.0))

    def inner_products(self) -> Array:
        """float64 (n, n)."""
        return np.asarray((self.residuals @ self.residuals.T) * (self.features @ self.features.T + 1.0))

    def group_products(self, group: Array, groups: int, mass: Array) -> Array:
        """float64 (K, K), through whichever is smaller: the n x n inner products or the K summed gradients."""
        samples, classes = self.residuals.shape
        if samples * samples <= groups * classes * (self.features.shape[1] + 1):
            return Kernel(self.inner_products()).group_products(group, groups, mass)
        sums = np.stack([self._sum(np.flatnonzero(group == index), mass) for index in range(groups)])
        return np.asarray(sums @ sums.T)

    def _sum(self, rows: Array, mass: Array) -> Array:
        """The weighted sum of these rows' gradients, flat: float64 (C * D + C,)."""
        weighted = self.residuals[rows] * mass[rows, None]
        return np.concatenate([(weighted.T @ self.features[rows]).ravel(), weighted.sum(axis=0)])


@dataclass(frozen=True)
class Kernel:
    """Gradients known by their inner products only."""

    products: Array
    """float64 (n, n), symmetric, positive semi-definite."""

    @cached_property
    def squared_norms(self) -> Array:
        """float64 (n,)."""
        return np.diagonal(self.products).copy()

    def inner_products(self) -> Array:
        """float64 (n, n)."""
        return self.products

    def group_products(self, group: Array, groups: int, mass: Array) -> Array:
        """float64 (K, K)."""
        members = np.zeros((len(group), groups))
        members[np.arange(len(group)), group] = mass
        return np.asarray(members.T @ self.products @ members)
