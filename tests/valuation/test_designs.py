"""Designs against enumeration of every outcome: unbiased, variance as in closed form, and the orders that hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.valuation.designs import (
    divide,
    draw,
    equal_design,
    importance_design,
    importance_probabilities,
    importance_spread,
    random_variance,
)
from tests.valuation.pools import moments, pool, random_pool

TOY = pool([(3, 0), (0, 3), (1, 1), (1, 1)], [0, 0, 1, 1])
"""Two classes of two gradients, small enough to enumerate every draw."""


def by_class(view):
    return divide(np.unique(view.labels, return_inverse=True)[1], view.mass, view.gradients)


def as_one(view):
    return divide(np.zeros(len(view.labels), int), view.mass, view.gradients)


@pytest.mark.parametrize(("places", "variance"), [((1, 1), 1.125), ((2, 1), 0.5625), ((3, 1), 0.375)])
def test_toy_is_exact(places, variance):
    strata = by_class(TOY)
    spread = importance_spread(strata, importance_probabilities(strata, 0.0))
    assert spread.tolist() == pytest.approx([1.125, 0.0])  # W^2 (beta - gamma), with beta - gamma = 4.5 and 0
    assert float((spread / np.array(places)).sum()) == pytest.approx(variance, abs=1e-15)


def test_toy_references():
    design = importance_design(by_class(TOY), 4, 0.0)
    assert design.places.tolist() == [3, 1]  # the class without importance must receive a place
    assert design.variance == pytest.approx(0.375)
    assert importance_design(as_one(TOY), 4, 0.0).variance == pytest.approx(0.43658, abs=1e-5)
    assert random_variance(as_one(TOY), 4) == pytest.approx(0.59375)


@pytest.mark.parametrize("strata_of", [by_class, as_one])
@pytest.mark.parametrize("make", [lambda s, b: importance_design(s, b, 0.0), lambda s, b: importance_design(s, b, 0.2),
                                  equal_design, lambda s, b: equal_design(s, b, blind=True)],
                         ids=["importance", "defensive", "equal", "blind"])  # fmt: skip
@pytest.mark.parametrize("even", [True, False], ids=["equal masses", "unequal masses"])
@pytest.mark.parametrize("places", [2, 4])
def test_enumeration_gives_the_mean_and_the_closed_form_variance(strata_of, make, even, places):
    gradients, view = random_pool(np.random.default_rng(places), even=even)
    design = make(strata_of(view), places)
    mean, variance = moments(design, gradients)
    np.testing.assert_allclose(mean, view.mass @ gradients, rtol=1e-9)
    assert variance == pytest.approx(design.variance, rel=1e-9)


def test_monte_carlo_agrees():
    """The mean and the variance that the closed form promises, with the generator that is really used."""
    rng = np.random.default_rng(5)
    gradients, view = random_pool(rng, n=30, dim=8, classes=3)
    design = importance_design(by_class(view), 10, 0.2)
    estimates = np.zeros((6000, 8))
    for estimate in estimates:
        rows, _, weights = draw(design, rng)
        estimate[:] = weights @ gradients[rows]
    error = np.linalg.norm(estimates.mean(0) - view.mass @ gradients)
    assert error <= 4 * np.sqrt(design.variance / len(estimates))
    assert estimates.var(0).sum() == pytest.approx(design.variance, rel=0.05)


def bias_in_standard_errors(estimates, truth):
    return abs(np.mean(estimates) - truth) / (np.std(estimates) / np.sqrt(len(estimates)))


def test_a_rule_that_is_biased_fails_the_same_test():
    """Weights 1 / (N p) need draws with replacement."""
    rng = np.random.default_rng(0)
    values = rng.gamma(1.0, size=30)
    p = values / values.sum()
    norms = values + 0.3  # estimated quantity: its mean
    estimates = {replace: [np.mean(norms[rows] / (30 * p[rows])) for rows in
                           (rng.choice(30, 20, replace=replace, p=p) for _ in range(3000))]
                 for replace in (True, False)}  # fmt: skip
    assert bias_in_standard_errors(estimates[True], norms.mean()) < 4
    assert bias_in_standard_errors(estimates[False], norms.mean()) > 10


pools = st.integers(0, 2**32 - 1).map(lambda seed: random_pool(np.random.default_rng(seed), n=12, classes=4))


@given(pools)
@settings(max_examples=200)
def test_classified_importance_sampling_beats_flat_beats_random(found):
    """Real-valued allocation: (sum a)^2 / B <= flat IS <= RS."""
    _, view = found
    strata = by_class(view)
    spread = importance_spread(strata, importance_probabilities(strata, 0.0))
    classified = float(np.sqrt(spread).sum() ** 2) / 10
    flat = importance_design(as_one(view), 10, 0.0).variance
    assert classified <= flat * (1 + 1e-9)
    assert flat <= random_variance(as_one(view), 10) * (1 + 1e-9)


def test_variance_identity():
    """V(g) - V(|g|) = (mean |g|)^2 - |mean g|^2, uniform over the class (Titan, arXiv:2505.16563, Lemma 2)."""
    gradients, view = random_pool(np.random.default_rng(3), classes=1, even=True)
    norms = np.linalg.norm(gradients, axis=1)
    spread = importance_spread(as_one(view), importance_probabilities(as_one(view), 0.0))
    assert gradients.var(0).sum() - norms.var() == pytest.approx(float(spread[0]))


def test_one_class_is_flat_importance_sampling_with_weights_mean_over_own():
    """Weights mean(s) / s_i per 1/B (idiap's BiasedReweightingPolicy, k = 1)."""
    gradients, view = random_pool(np.random.default_rng(4), classes=1, even=True)
    rows, times, weights = draw(importance_design(by_class(view), 5, 0.0), np.random.default_rng(0))
    norms = np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(weights, times * norms.mean() / norms[rows] / 5)


def test_equal_norms_are_drawn_uniformly():
    angles = np.linspace(0, 3, 7)
    view = pool(np.c_[np.cos(angles), np.sin(angles)], np.zeros(7, int))
    np.testing.assert_allclose(importance_probabilities(as_one(view), 0.0), 1 / 7)


def test_zero_gradients_are_drawn_by_mass():
    view = pool(np.zeros((4, 2)), [0, 0, 1, 1], mass=[0.1, 0.3, 0.2, 0.4])
    np.testing.assert_allclose(importance_probabilities(by_class(view), 0.2), [0.25, 0.75, 1 / 3, 2 / 3])
    assert importance_design(by_class(view), 3, 0.2).variance == 0.0


def test_epsilon_bounds_the_weights():
    view = pool([[1e-9, 0], [5, 0], [0, 4]], [0, 0, 0])
    design = importance_design(as_one(view), 2, 0.2)
    assert (view.mass / (2 * design.probability)).max() <= 1 / 0.2 / 2 * (1 + 1e-12)


def test_duplicates_are_merged():
    view = pool([[1.0, 0], [1, 0]], [0, 0])
    rows, times, weights = draw(importance_design(as_one(view), 50, 0.0), np.random.default_rng(0))
    assert rows.tolist() == [0, 1]
    assert times.sum() == 50
    assert weights.sum() == pytest.approx(1.0)
