"""Every selection strategy: what it promises, and that the promises hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.valuation import fine
from stages.valuation.designs import importance_design
from stages.valuation.fine import SELECTIONS, GradientView
from stages.valuation.gradients import LastLayer
from tests.valuation.pools import moments, pool, random_pool

DESIGNS = {
    "titan": fine.least_variance,
    "c-is": fine.classified,
    "stratified": fine.by_label,
    "is": fine.flat_importance,
    "random": fine.at_random,
}
"""The designs behind the strategies that draw; `all` draws nothing, `forgetting` before it looks."""


def full_view(seed=0, n=12, classes=3, dim=4, present=None):
    """A view with everything a strategy may need, from a random linear classifier."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, dim))
    scores = features @ rng.normal(size=(dim, classes))
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    y = np.arange(n) % (present or classes)
    return GradientView(y, np.full(n, 1 / n), LastLayer(p - np.eye(classes)[y], features), p, y,
                        features.astype(np.float32))  # fmt: skip


def test_every_unbiased_strategy_is_enumerated_here():
    assert {name for name, strategy in SELECTIONS.items() if strategy.unbiased} == {*DESIGNS, "all", "forgetting"}


CASES = [(name, places, classes) for name in DESIGNS for places, classes in [(1, 2), (2, 2), (3, 2), (2, 3), (4, 3)]]
CASES += [(name, 9, 2) for name in ("titan", "stratified", "random")]
"""More places than candidates only where drawing ends then: the others have 5 ** 9 outcomes."""


@pytest.mark.parametrize(("name", "places", "classes"), CASES)
@pytest.mark.parametrize("even", [True, False], ids=["equal masses", "unequal masses"])
def test_unbiased_by_enumeration(name, places, classes, even):
    """Also with fewer places than classes, and with as many places as candidates or more."""
    gradients, view = random_pool(np.random.default_rng(places), n=5, classes=classes, even=even)
    design = DESIGNS[name](view, places, 0.2)
    mean, variance = moments(design, gradients)
    np.testing.assert_allclose(mean, view.mass @ gradients, rtol=1e-9, atol=1e-12)
    assert variance == pytest.approx(design.variance, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("places", [1, 2, 5, 12, 40])
def test_contract(name, places):
    """Distinct ascending rows, positive weights, all of the mass on average, the same from the same generator."""
    view = full_view()
    chosen = SELECTIONS[name].choose(view, places, 0.2, np.random.default_rng(7))
    assert (np.diff(chosen.rows) > 0).all()
    assert chosen.rows.min() >= 0
    assert chosen.rows.max() < 12
    assert (chosen.weights > 0).all()
    assert len(chosen.rows) == len(chosen.times) == len(chosen.weights)
    if name not in ("all", "forgetting"):
        assert chosen.times.sum() <= places
    again = SELECTIONS[name].choose(view, places, 0.2, np.random.default_rng(7))
    np.testing.assert_array_equal(again.rows, chosen.rows)
    np.testing.assert_array_equal(again.weights, chosen.weights)


@pytest.mark.parametrize("name", [name for name, strategy in SELECTIONS.items() if strategy.needs == "labels"])
def test_strategies_by_label_need_no_gradients(name):
    view = full_view()
    blind = GradientView(view.labels, view.mass)
    seen = SELECTIONS[name].choose(view, 5, 0.2, np.random.default_rng(1))
    unseen = SELECTIONS[name].choose(blind, 5, 0.2, np.random.default_rng(1))
    np.testing.assert_array_equal(seen.rows, unseen.rows)
    assert seen.variance is not None
    assert unseen.variance is None


@pytest.mark.parametrize("name", [name for name, strategy in SELECTIONS.items() if strategy.needs != "labels"])
def test_a_view_without_what_a_strategy_needs_is_refused(name):
    view = full_view()
    with pytest.raises(ValueError, match="needs"):
        SELECTIONS[name].choose(GradientView(view.labels, view.mass), 5, 0.2, np.random.default_rng(1))


seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=100)
def test_titan_is_never_worse_than_what_it_may_fall_back_to(seed, places, classes):
    _, view = random_pool(np.random.default_rng(seed), n=10, classes=classes)
    best = fine.least_variance(view, places, 0.2).variance
    rivals = [
        fine.classified(view, places, 0.2),
        fine.flat_importance(view, places, 0.2),
        fine.at_random(view, places, 0.2),
    ]
    if places >= classes:
        rivals.append(fine.by_label(view, places, 0.2))
    assert best <= min(design.variance for design in rivals) * (1 + 1e-9) + 1e-15
    reference = fine.reference_variances(view, places, 0.2)
    assert fine.classified(view, places, 0.2).variance <= reference["variance_is"] * (1 + 1e-9)
    assert reference["variance_is"] <= reference["variance_random"] * (1 + 1e-9)


@given(seeds, st.integers(1, 12), st.integers(1, 6))
@settings(max_examples=50)
def test_stopping_early_misses_nothing(seed, places, classes):
    """The walk down the chain ends once no later level can win; here every level is tried."""
    _, view = random_pool(np.random.default_rng(seed), n=12, classes=classes)
    every = [importance_design(strata, places, 0.1).variance for _, strata in fine.class_chain(view, places)]
    assert fine.classified(view, places, 0.1).variance == pytest.approx(min(every), rel=1e-12)


def test_classes_that_hardly_matter_are_merged():
    """Four places, three classes, two of them alike and nearly constant: their spare place goes to the third."""
    view = pool([[9, 0], [-9, 0], [9, 9], [9, 9.1], [9, 9], [9.1, 9]], [0, 0, 1, 1, 2, 2])
    design = fine.classified(view, 4, 0.0)
    assert design.strata.number == 2
    assert design.strata.of.tolist() == [0, 0, 1, 1, 1, 1]
    assert design.places.tolist() == [3, 1]


def test_a_batch_smaller_than_the_number_of_classes_covers_all_of_them():
    view = full_view(n=20, classes=10)
    for name in ("titan", "c-is", "stratified"):
        chosen = SELECTIONS[name].choose(view, 4, 0.2, np.random.default_rng(0))
        assert chosen.strata <= 4
        assert chosen.times.sum() <= 4


def test_one_class_only():
    chosen = SELECTIONS["c-is"].choose(full_view(present=1), 4, 0.2, np.random.default_rng(0))
    assert chosen.strata == 1


def test_all_gradients_zero_is_uniform():
    view = pool(np.zeros((6, 2)), [0, 0, 0, 1, 1, 1])
    chosen = SELECTIONS["titan"].choose(view, 4, 0.2, np.random.default_rng(0))
    assert chosen.variance == 0.0
    np.testing.assert_allclose(chosen.weights / chosen.times, 0.25)


def test_losses_and_entropy_rank_as_they_say():
    view = full_view()
    loss = -np.log(view.probabilities[np.arange(12), view.targets])
    order = np.argsort(loss)
    rng = np.random.default_rng(0)
    assert set(SELECTIONS["low-loss"].choose(view, 3, 0.2, rng).rows) == set(order[:3])
    high = SELECTIONS["high-loss"].choose(view, 3, 0.2, rng)
    assert set(high.rows) == set(order[-3:])
    np.testing.assert_allclose(high.weights, 1 / 3)
    entropy = -(view.probabilities * np.log(view.probabilities)).sum(1)
    assert set(SELECTIONS["entropy"].choose(view, 3, 0.2, rng).rows) == set(np.argsort(entropy)[-3:])


def test_bias_of_a_choice_without_chance():
    gradients = np.array([[2.0, 0], [0, 1], [1, 1]])
    view = pool(gradients, [0, 0, 1])
    chosen = fine.Chosen(np.array([0]), np.array([1]), np.array([1.0]), "fixed")
    assert fine.squared_bias(view, chosen) == pytest.approx(((gradients[0] - gradients.mean(0)) ** 2).sum())
    everything = SELECTIONS["all"].choose(view, 1, 0.2, np.random.default_rng(0))
    assert fine.squared_bias(view, everything) == pytest.approx(0.0, abs=1e-15)
