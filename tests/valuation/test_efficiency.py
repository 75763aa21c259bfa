"""`auto`: prices by hand, and choices where the best one is plain."""

import numpy as np
import pytest

from stages.errors import UsageError
from stages.valuation.efficiency import PROBE_EVERY, Costs, Moments, Option, Tuner, moments
from tests.valuation.pools import pool, random_pool


def tuner_for(found: Moments, *, batch=10, max_batch=10, size=30, **costs) -> Tuner:
    tuner = Tuner(batch, max_batch, Costs(**costs))
    tuner._moments, tuner._size = found, size
    return tuner


def found(random, stratified, titan, *, signal=0.0, pool=0.0):
    return Moments(signal, pool, {("random", 10): random, ("stratified", 10): stratified, ("titan", 10): titan})


def test_costs_by_hand():
    assert Costs(update=3.0).of(30, 10) == 60.0
    assert Costs(update=3.0, overlap=True).of(30, 10) == 30.0
    assert Costs(update=1.5, overlap=True).of(30, 10) == 30.0  # scoring is the bottleneck
    with pytest.raises(UsageError, match="--update-cost"):
        Costs(update=0.5)


def test_prices_by_hand():
    """(signal + pool + variance) x cost; half of the pool has twice the pool's variance."""
    tuner = tuner_for(found(8.0, 4.0, 1.0, signal=2.0, pool=1.0))
    assert tuner.price(Option("random", 30, 10)) == (2 + 1 + 8) * 30
    assert tuner.price(Option("stratified", 30, 10)) == (2 + 1 + 4) * 30
    assert tuner.price(Option("titan", 30, 10)) == (2 + 1 + 1) * 60
    assert tuner.price(Option("titan", 15, 10)) == (2 + 2 + 1) * 45


@pytest.mark.parametrize(
    ("variances", "more", "costs", "expected"),
    [
        ((9, 9, 0.1), {}, {}, Option("titan", 15, 10)),  # noise dominates: scoring pays, and half of it pays more
        ((9, 9, 0.1), {"pool": 9.0}, {"overlap": True}, Option("titan", 30, 10)),  # free on a second processor
        ((9, 2, 1.9), {}, {}, Option("stratified", 30, 10)),  # stratification gives most of the gain
        ((9, 9, 0.1), {"signal": 100.0}, {}, Option("random", 30, 10)),  # little noise: cheap steps
        ((9, 9, 0.1), {"signal": 9.0}, {"update": 1.2}, Option("random", 30, 10)),  # a sparse plan's updates are cheap
        ((9, 9, 0.1), {"signal": 9.0}, {"update": 1.2, "overlap": True}, Option("titan", 15, 10)),
    ],
)
def test_choices_that_are_plain(variances, more, costs, expected):
    assert tuner_for(found(*variances, **more), **costs).choose(30) == expected


def test_a_larger_batch_is_chosen_where_it_is_allowed_and_pays():
    variances = {(name, batch): 30.0 / batch for name in ("random", "stratified", "titan") for batch in (10, 20, 30)}
    wide = Moments(0.0, 5.0, variances)
    assert tuner_for(wide, max_batch=10).choose(30).batch == 10
    assert tuner_for(wide, max_batch=30).choose(30).batch == 10  # halving the variance costs twice: no gain
    idle = Moments(0.0, 0.1, variances | {("titan", 30): 0.0})
    assert tuner_for(idle, max_batch=30, overlap=True, update=1.0).choose(30) == Option("titan", 30, 30)


def test_moments_of_a_pool():
    gradients, view = random_pool(np.random.default_rng(0), n=12, classes=3, even=True)
    got = moments(view, (4,), 0.2)
    within = sum(gradients[view.labels == c].var(0, ddof=1).sum() / 9 / 4 for c in range(3))  # W^2 s^2 / n
    assert got.pool == pytest.approx(within)
    assert got.signal == pytest.approx(max((gradients.mean(0) ** 2).sum() - within, 0.0))
    spread = gradients.var(0, ddof=1).sum()
    assert got.batch["random", 4] == pytest.approx(spread * (1 / 4 - 1 / 12))
    assert got.batch["titan", 4] <= got.batch["stratified", 4] <= got.batch["random", 4] * 2


def test_the_signal_is_the_streams_and_not_the_pools_noise():
    rng = np.random.default_rng(1)
    signals = [moments(pool(rng.normal(size=(30, 5)), np.zeros(30, int)), (4,), 0.0).signal for _ in range(200)]
    assert np.mean(signals) < 0.1 * 5 / 30 * 5  # the plain |mean|^2 would be 5 / 30


def test_the_first_rounds_and_then_few_are_observed():
    tuner = Tuner(10, 10, Costs())
    due = [number for number in range(4 * PROBE_EVERY) if tuner.due()]
    assert due == [0, 1, 2, 4, 8, 16, 32, 50, 64, 100, 128, 150]


def test_old_observations_fade():
    tuner = Tuner(2, 2, Costs())
    rng = np.random.default_rng(2)
    for scale in [1.0] + [100.0] * 40:
        view = pool(scale * rng.normal(size=(8, 3)), np.arange(8) % 2)
        tuner.observe(view, 0.2)
    last = moments(view, (2,), 0.2)
    assert tuner._moments.pool == pytest.approx(last.pool, rel=0.6)


def test_the_choice_is_explained():
    tuner = tuner_for(found(8.0, 4.0, 4.0))
    assert tuner.explain(tuner.choose(30)) == (
        "stratified, batch 10 (cost per progress of others: titan 1.50x, random 2.00x)"
    )
