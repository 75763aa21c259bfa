"""Sampling designs: how a batch is drawn from a pool so that its weighted gradient has the pool's as expectation.

The pool is n candidates with masses q_i (their weights in the loss of the whole pool, usually 1/n each); the estimated
quantity is sum q_i g_i. A design divides the pool into strata, gives each its places, and draws in one of two ways:

* `importance`: with replacement, candidate i of stratum s with probability P_i; its weight is q_i / (B_s P_i) per draw.
  With strata = classes and P_i proportional to q_i |g_i| this is Titan's C-IS (arXiv:2505.16563, Theorem 2, Lemma 2);
  with a single stratum it is importance sampling by gradient norm (Lemma 1).
* `equal`: without replacement, every candidate of the stratum alike; its weight is q_i n_s / B_s.

Both are unbiased whatever the strata, places and probabilities are, so they may depend on the gradients; both have a
closed-form variance, so the best of several designs can be taken before anything is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stages.artifacts.records import Array
from stages.valuation.allocation import allocate
from stages.valuation.gradients import Gradients

ROUNDING = 1e-12
"""A difference below this share of its terms is rounding and counts as zero."""


@dataclass(frozen=True)
class Strata:
    """A pool divided into strata, and the sums that closed-form variances are made of."""

    of: Array
    """int64 (n,): the stratum of each candidate, 0..K-1, none empty."""
    mass: Array
    """float64 (n,): q_i."""
    pull: Array
    """float64 (n,): q_i |g_i|."""
    squared_sum: Array
    """float64 (K,): |sum of q_i g_i|^2 over each stratum."""

    @property
    def number(self) -> int:
        return len(self.squared_sum)

    @cached_property
    def sizes(self) -> Array:
        """int64 (K,): candidates per stratum."""
        return np.bincount(self.of, minlength=self.number)

    @cached_property
    def masses(self) -> Array:
        """float64 (K,): W_s, the mass of each stratum."""
        return np.bincount(self.of, weights=self.mass, minlength=self.number)

    @cached_property
    def pulls(self) -> Array:
        """float64 (K,)."""
        return np.bincount(self.of, weights=self.pull, minlength=self.number)


@dataclass(frozen=True)
class Design:
    """How to draw. Build one with `importance_design` or `equal_design`."""

    strata: Strata
    places: Array
    """int64 (K,): draws per stratum."""
    probability: Array | None
    """float64 (n,), summing to 1 in each stratum; None draws without replacement, all alike."""
    variance: float
    """E |estimate - its mean|^2, in closed form."""

    @property
    def distinct(self) -> float:
        """How many different candidates are drawn, on average."""
        if self.probability is None:
            return float(self.places.sum())
        return float((1.0 - (1.0 - self.probability) ** self.places[self.strata.of]).sum())


def divide(of: Array, mass: Array, gradients: Gradients, products: Array | None = None) -> Strata:
    """The strata of a pool; `products` are the inner products of the strata's gradient sums, if already known."""
    known = gradients.group_products(of, int(of.max()) + 1, mass) if products is None else products
    return Strata(of, mass, mass * np.sqrt(gradients.squared_norms), np.diagonal(known).copy())


def importance_probabilities(strata: Strata, epsilon: float) -> Array:
    """P_i = (1 - epsilon) q_i |g_i| / sum + epsilon q_i / W_s within each stratum: float64 (n,).

    The second part (a defensive mixture) bounds every weight by 1/epsilon times its uniform value, so that a norm that
    is stale or wrong cannot make one draw dominate. A stratum whose gradients are all zero is drawn by mass alone.
    """
    uniform = strata.mass / strata.masses[strata.of]
    pulls = strata.pulls[strata.of]
    pointed = np.divide(strata.pull, pulls, out=uniform.copy(), where=pulls > 0)
    return np.asarray((1.0 - epsilon) * pointed + epsilon * uniform)


def importance_spread(strata: Strata, probability: Array) -> Array:
    """Variance of a single draw per stratum, sum (q_i |g_i|)^2 / P_i - |sum q_i g_i|^2: float64 (K,).

    With optimal probabilities and equal masses this is W_s^2 (beta_s - gamma_s) of Theorem 2.
    """
    share = np.divide(strata.pull**2, probability, out=np.zeros_like(probability), where=probability > 0)
    second = np.bincount(strata.of, weights=share, minlength=strata.number)
    return _positive(second - strata.squared_sum, second)


def equal_spread(strata: Strata) -> Array:
    """Sample variance of n_s q_i g_i within each stratum (divisor n_s - 1): float64 (K,); 0 for a single candidate."""
    second = strata.sizes * np.bincount(strata.of, weights=strata.pull**2, minlength=strata.number)
    return np.asarray(strata.sizes * _positive(second - strata.squared_sum, second) / np.maximum(strata.sizes - 1, 1))


def importance_design(strata: Strata, places: int, epsilon: float) -> Design:
    """Draw by gradient norm within strata; places by exact integer Neyman allocation."""
    probability = importance_probabilities(strata, epsilon)
    spread = importance_spread(strata, probability)
    counts = allocate(np.sqrt(spread), places, size=strata.masses)
    return Design(strata, counts, probability, float((spread / counts).sum()))


def equal_design(strata: Strata, places: int, *, blind: bool = False) -> Design:
    """Draw all alike within strata, without replacement; places by Neyman allocation, or if `blind` by mass alone.

    The variance is that of simple random sampling in strata: sum S_s^2 (1/B_s - 1/n_s).
    """
    spread = equal_spread(strata)
    weights = strata.masses if blind else np.sqrt(spread)
    counts = allocate(weights, places, size=strata.masses, limit=strata.sizes)
    return Design(strata, counts, None, float((spread * (1.0 / counts - 1.0 / strata.sizes)).sum()))


def random_variance(strata: Strata, places: int) -> float:
    """Variance of `places` draws with replacement by mass alone from the whole pool: Titan's reference (RS).

    (W sum q_i |g_i|^2 - |sum q_i g_i|^2) / B, for equal masses (mean |g|^2 - |mean g|^2) / B. `strata` is the pool as
    one stratum.
    """
    second = np.divide(strata.pull**2, strata.mass, out=np.zeros_like(strata.mass), where=strata.mass > 0)
    return float((strata.masses.sum() * second.sum() - strata.squared_sum.sum()) / places)


def draw(design: Design, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Distinct candidates, how often each was drawn, and their weights: int64 (m,), int64 (m,), float64 (m,).

    A candidate drawn twice appears once with the sum of its weights: the same gradient for one backward pass.
    """
    take: Callable[[Design, np.random.Generator], Array] = _with_replacement
    if design.probability is None:
        take = _without_replacement
    rows, times = np.unique(take(design, rng), return_counts=True)
    strata = design.strata
    stratum = strata.of[rows]
    chance = 1.0 / strata.sizes[stratum] if design.probability is None else design.probability[rows]
    return rows, times, times * strata.mass[rows] / (design.places[stratum] * chance)


def _with_replacement(design: Design, rng: np.random.Generator) -> Array:
    """One row per place, by inversion: strata lie one after the other on a line, each of length one."""
    strata = design.strata
    order = np.argsort(strata.of, kind="stable")
    ends = np.cumsum(strata.sizes)
    line = np.cumsum(design.probability[order])  # type: ignore[index]
    before = np.concatenate([[0.0], line[ends[:-1] - 1]])
    stratum = np.repeat(np.arange(strata.number), design.places)
    length = line[ends - 1] - before
    point = before[stratum] + rng.random(len(stratum)) * length[stratum]
    place = np.searchsorted(line, point, side="right")
    return np.asarray(order[np.clip(place, (ends - strata.sizes)[stratum], ends[stratum] - 1)])


def _without_replacement(design: Design, rng: np.random.Generator) -> Array:
    """The first B_s of each stratum in random order."""
    strata = design.strata
    order = np.lexsort((rng.random(len(strata.of)), strata.of))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(strata.sizes) - strata.sizes, strata.sizes)
    return np.asarray(order[rank < design.places[strata.of[order]]])


def _positive(difference: Array, scale: Array) -> Array:
    """The difference without rounding noise: zero where it is below `ROUNDING` of its terms."""
    return np.where(difference > ROUNDING * scale, difference, 0.0)
