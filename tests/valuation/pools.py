"""Small pools with known gradients, and every outcome of a design with its probability."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product

import numpy as np

from stages.valuation.designs import Design, draw
from stages.valuation.fine import GradientView
from stages.valuation.gradients import Kernel


class Scripted:
    """Stands for a generator: `random` gives what was scripted."""

    def __init__(self, values):
        self.values = np.asarray(values, dtype=float)

    def random(self, size):
        assert size == len(self.values)
        return self.values


def pool(gradients, labels, mass=None, **others) -> GradientView:
    """A view of these gradients (n, d), equal masses unless given."""
    gradients = np.asarray(gradients, dtype=float)
    mass = np.full(len(gradients), 1 / len(gradients)) if mass is None else np.asarray(mass, dtype=float)
    return GradientView(np.asarray(labels), mass, Kernel(gradients @ gradients.T), **others)


def random_pool(rng, n=6, dim=3, classes=2, *, even=False):
    """Random gradients, labels (every class present) and masses; returns (gradients, view)."""
    gradients = rng.normal(size=(n, dim)) * rng.gamma(1.0, size=(n, 1)) + rng.normal(size=dim)
    labels = rng.permutation(np.arange(n) % classes)
    mass = np.full(n, 1 / n) if even else rng.dirichlet(np.full(n, 2.0))
    return gradients, pool(gradients, labels, mass)


def outcomes(design: Design) -> Iterator[tuple[float, np.ndarray]]:
    """Every distinct result of drawing: its probability and the weight of each candidate of the pool, (n,)."""
    for chance, script in _scripts(design):
        rows, times, weights = draw(design, Scripted(script))
        assert times.sum() == design.places.sum()
        full = np.zeros(len(design.strata.of))
        full[rows] = weights
        yield chance, full


def moments(design: Design, gradients) -> tuple[np.ndarray, float]:
    """Mean (d,) and total variance of the weighted gradient, by enumeration."""
    found = [(chance, full @ gradients) for chance, full in outcomes(design)]
    assert abs(sum(chance for chance, _ in found) - 1) < 1e-9
    mean = sum(chance * estimate for chance, estimate in found)
    return mean, float(sum(chance * ((estimate - mean) ** 2).sum() for chance, estimate in found))


def _scripts(design: Design):
    if design.probability is None:
        orders = list(permutations(range(len(design.strata.of))))
        yield from ((1 / len(orders), np.array(order) / 100) for order in orders)
        return
    sides = []
    for stratum, places in enumerate(design.places):
        chances = design.probability[design.strata.of == stratum]
        middles = np.cumsum(chances) - chances / 2
        sides += [[(c, m) for c, m in zip(chances, middles, strict=True) if c > 0]] * int(places)
    for sides_drawn in product(*sides):
        yield float(np.prod([c for c, _ in sides_drawn])), [m for _, m in sides_drawn]
