"""Merging strata: sums stay right, order of merging is the cheapest, and one class per stratum comes first."""

import numpy as np
import pytest

from stages.valuation.designs import divide
from stages.valuation.strata import merge_chain
from tests.valuation.pools import random_pool


def chain_of(view, labels):
    products = view.gradients.group_products(labels, labels.max() + 1, view.mass)
    pulls = np.bincount(labels, weights=view.mass * np.sqrt(view.gradients.squared_norms))
    return list(merge_chain(pulls, products))


def test_every_level_has_the_sums_of_its_strata():
    _, view = random_pool(np.random.default_rng(0), n=15, classes=5)
    levels = chain_of(view, view.labels)
    assert [len(level.pulls) for level in levels] == [5, 4, 3, 2, 1]
    for level in levels:
        of = level.of[view.labels]
        assert sorted(set(of.tolist())) == list(range(len(level.pulls)))
        strata = divide(of, view.mass, view.gradients)
        np.testing.assert_allclose(level.pulls, strata.pulls)
        np.testing.assert_allclose(np.diagonal(level.products), strata.squared_sum, rtol=1e-9)
        products = view.gradients.group_products(of, len(level.pulls), view.mass)
        np.testing.assert_allclose(level.products, products, rtol=1e-9)


def test_the_pair_that_raises_importance_least_goes_first():
    _, view = random_pool(np.random.default_rng(1), n=12, classes=4)
    of = chain_of(view, view.labels)[1].of

    def importance(labels):
        strata = divide(np.unique(labels, return_inverse=True)[1], view.mass, view.gradients)
        return np.sqrt(np.maximum(strata.pulls**2 - strata.squared_sum, 0)).sum()

    pairs = {(i, j): importance(np.where(view.labels == j, i, view.labels)) for i in range(4) for j in range(i + 1, 4)}
    best = min(pairs, key=pairs.get)
    assert of[best[0]] == of[best[1]]
    assert importance(of[view.labels]) == pytest.approx(pairs[best])


def test_what_can_be_reached_never_falls_along_the_chain():
    for seed in range(20):
        _, view = random_pool(np.random.default_rng(seed), n=18, classes=6)
        reachable = [level.least_variance(10) for level in chain_of(view, view.labels)]
        assert (np.diff(reachable) >= -1e-12).all()


def test_the_lightest_classes_merge_first_when_classes_are_orthogonal():
    masses = np.array([0.4, 0.1, 0.3, 0.05, 0.15])
    levels = list(merge_chain(masses, np.diag(masses**2)))
    assert levels[1].of[1] == levels[1].of[3]
    assert levels[2].of[1] == levels[2].of[4]  # 0.1 + 0.05 and 0.15 are the lightest two now
