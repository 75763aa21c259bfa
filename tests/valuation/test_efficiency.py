"""`auto`: prices by hand, choices where the best one is plain, and choices taken again."""

import json

import numpy as np
import pytest

from stages.errors import DataError
from stages.valuation.costs import Costs, Line, Meter
from stages.valuation.efficiency import EARLY, PROBE_EVERY, Moments, Option, Tuner, Yield, moments, recorded
from tests.valuation.pools import pool, random_pool

LATER = 3
"""A round that is not observed, so nothing is tried out in it."""


def tuner_for(found: Moments, *, batch=10, max_batch=10, size=30, update=3.0, overlap=False) -> Tuner:
    tuner = Tuner(batch, max_batch, Meter(update, overlap=overlap))
    tuner._moments, tuner._size, tuner._first = found, size, 0
    return tuner


def found(random, stratified, flat, titan, *, signal=0.0, pool=0.0, window=0.0):
    names = ("random", "stratified", "is", "titan")
    batch = {
        (name, 10): Yield(value, 10.0) for name, value in zip(names, (random, stratified, flat, titan), strict=True)
    }
    return Moments(signal, window, pool, batch)


def test_prices_by_hand():
    """Cost / (2 - M / M0), M = signal + window + pool + variance; half of the pool has twice the pool's variance."""
    tuner, costs = tuner_for(found(8.0, 4.0, 2.0, 1.0, signal=2.0, pool=1.0, window=0.5)), Costs()
    assert tuner.price(Option("random", 30, 10), costs) == 30
    assert tuner.price(Option("stratified", 30, 10), costs) == pytest.approx(30 / (2 - 7.5 / 11.5))
    assert tuner.price(Option("is", 30, 10), costs) == pytest.approx(60 / (2 - 5.5 / 11.5))
    assert tuner.price(Option("titan", 30, 10), costs) == pytest.approx(60 / (2 - 4.5 / 11.5))
    assert tuner.price(Option("titan", 15, 10), costs) == pytest.approx(45 / (2 - 5.5 / 11.5))
    assert tuner.price(Option("all", 30, 30), costs) == pytest.approx(90 / (2 - 3.5 / 11.5))
    with_overhead = Costs(score=Line(5, 1), update=Line(100, 3))
    assert tuner.price(Option("random", 30, 10), with_overhead) == 135


def test_a_signal_lost_in_noise_counts_as_none():
    lost, none = (tuner_for(found(8.0, 4.0, 2.0, 1.0, signal=signal)) for signal in (-2.0, 0.0))
    for option in none.options(30):
        assert lost.price(option, Costs()) == none.price(option, Costs())


def test_a_choice_that_varies_more_than_the_step_size_bears_is_no_option():
    tuner = tuner_for(found(8.0, 16.0, 20.0, 1.0))
    assert tuner.price(Option("stratified", 30, 10), Costs()) == float("inf")
    assert tuner.price(Option("is", 30, 10), Costs()) == float("inf")


def test_where_nothing_varies_the_cheapest_is_taken():
    tuner = tuner_for(found(0.0, 0.0, 0.0, 0.0))
    decision = tuner.decide(LATER, 30)
    assert decision.option == Option("random", 30, 10)
    assert tuner.explain(decision).endswith("(nothing varies)")


def test_progress_is_that_of_gradient_descent_on_a_parabola():
    """f(x) = x^2 / 2 from x = 1 with noise of variance V: E f falls by eta - eta^2 (1 + V) / 2, eta = 1 / (1 + V0)."""
    reference, lesser, steps = 4.0, 1.0, 200_000
    rng, eta = np.random.default_rng(0), 1 / (1 + reference)
    falls = [
        0.5 - 0.5 * np.mean((1 - eta * (1 + np.sqrt(v) * rng.normal(size=steps))) ** 2) for v in (reference, lesser)
    ]
    tuner = tuner_for(found(reference, lesser, 9.0, 9.0, signal=1.0))
    prices = [tuner.price(Option(name, 30, 10), Costs()) for name in ("random", "stratified")]
    assert prices[0] / prices[1] == pytest.approx(falls[1] / falls[0], rel=0.02)


@pytest.mark.parametrize(
    ("variances", "more", "costs", "expected"),
    [
        ((9, 9, 5, 0.1), {}, {}, Option("titan", 15, 10)),  # noise dominates: scoring pays, half of it pays more
        ((9, 9, 0.1, 5), {}, {}, Option("is", 15, 10)),
        ((9, 9, 5, 0.1), {"pool": 9.0}, {"overlap": True}, Option("titan", 30, 10)),  # free on a second processor
        ((9, 2, 5, 1.9), {}, {}, Option("stratified", 30, 10)),  # stratification gives most of the gain
        ((9, 9, 5, 0.1), {"signal": 100.0}, {}, Option("random", 30, 10)),  # little noise: cheap steps
        ((9, 9, 5, 0.1), {"window": 100.0}, {}, Option("random", 30, 10)),  # noise that no choice takes away
        ((9, 9, 5, 0.1), {"window": 9.0}, {"update": 1.2}, Option("random", 30, 10)),  # a sparse plan's cheap updates
        ((9, 9, 5, 0.1), {"window": 9.0}, {"update": 1.2, "overlap": True}, Option("titan", 15, 10)),
    ],
)
def test_choices_that_are_plain(variances, more, costs, expected):
    assert tuner_for(found(*variances, **more), **costs).decide(LATER, 30).option == expected


def wide(scale=30.0, pool=5.0):
    names = ("random", "stratified", "is", "titan")
    return Moments(0.0, 0.0, pool, {(n, b): Yield(scale / b, float(b)) for n in names for b in (10, 20)})


def flat_cost(tuner: Tuner) -> Tuner:
    """An update costs the same whatever it trains on."""
    clock = iter(range(1000))
    tuner.meter = Meter(3.0, clock=lambda: float(next(clock)))
    tuner.meter.close_round(0)
    tuner.meter.time(lambda: None)
    tuner.meter.close_round(30)
    tuner.meter.updates([(10, 100.0), (20, 101.0)])
    return tuner


def test_a_larger_batch_is_chosen_where_it_is_allowed_and_pays():
    tuner = tuner_for(wide(), max_batch=20)
    assert tuner.decide(LATER, 30).option.batch == 10  # half the variance for twice the cost: no gain
    assert flat_cost(tuner_for(wide(), max_batch=20)).decide(LATER, 20).option == Option("all", 20, 20)
    assert flat_cost(tuner_for(wide(), max_batch=20)).decide(LATER, 30).option == Option("random", 30, 20)


def test_what_was_chosen_stands_until_the_next_observation():
    tuner = tuner_for(found(9, 2, 5, 1.9))
    first = tuner.decide(LATER, 30)
    tuner._moments = found(1, 2, 5, 1.9)
    assert tuner.decide(LATER + 2, 30) is first
    assert tuner.decide(LATER + 2, 29).option == Option("random", 29, 10)  # another pool, another choice
    assert tuner.decide(16, 29).observed
    assert tuner.decide(17, 30).option.strategy == "random"


def test_training_on_all_is_an_option_where_it_is_allowed():
    names = [option.strategy for option in tuner_for(wide(), max_batch=20).options(30)]
    assert "all" not in names
    assert list(tuner_for(wide(), max_batch=20).options(12))[-1] == Option("all", 12, 12)
    assert list(tuner_for(wide(), max_batch=20).options(8)) == [Option("all", 8, 8)]


def test_both_ends_of_the_batch_sizes_are_tried_in_the_early_rounds():
    tuner = tuner_for(wide(), max_batch=20)
    assert [tuner.decide(number, 30).option.batch for number in (0, 1, 4, 16)] == [10, 20, 10, 20]
    assert {tuner_for(wide()).decide(number, 30).option.batch for number in EARLY} == {10}


def test_moments_of_a_pool():
    gradients, view = random_pool(np.random.default_rng(0), n=12, classes=3, even=True)
    got = moments(view, (4,), 0.2, 60)
    within = sum(gradients[view.labels == c].var(0, ddof=1).sum() / 9 / 4 for c in range(3))  # W^2 s^2 / n
    assert got.pool == pytest.approx(within)
    between = np.array([gradients[view.labels == c].mean(0) for c in range(3)])
    assert got.window == pytest.approx(between.var(0).sum() / 60)
    assert got.signal == pytest.approx((gradients.mean(0) ** 2).sum() - within - got.window)
    spread = gradients.var(0, ddof=1).sum()
    assert got.batch["random", 4].variance == pytest.approx(spread * (1 / 4 - 1 / 12))
    variances = {name: each.variance for (name, _), each in got.batch.items()}
    assert variances["titan"] <= min(variances["stratified"], variances["is"])
    assert got.batch["is", 4].distinct < 4 == got.batch["random", 4].distinct


def test_the_signal_is_the_streams_and_not_the_pools_noise():
    rng = np.random.default_rng(1)
    signals = [moments(pool(rng.normal(size=(30, 5)), np.arange(30) % 2), (4,), 0.0, 30).signal for _ in range(300)]
    assert abs(np.mean(signals)) < 4 * np.std(signals) / np.sqrt(300)
    assert np.std(signals) / np.sqrt(300) < 0.1 * 5 / 30  # which the plain |mean|^2 would be


def test_the_first_rounds_and_then_few_are_observed():
    tuner = Tuner(10, 10, Meter(3.0))
    due = [number - 7 for number in range(7, 7 + 4 * PROBE_EVERY) if tuner.due(number)]
    assert due == [0, 1, 4, 16, 50, 100, 150]


def test_old_observations_fade():
    tuner = Tuner(2, 2, Meter(3.0))
    rng = np.random.default_rng(2)
    for scale in [1.0] + [100.0] * 40:
        view = pool(scale * rng.normal(size=(8, 3)), np.arange(8) % 2)
        tuner.observe(view, 0.2, 8)
    last = moments(view, (2,), 0.2, 8)
    assert tuner._moments.pool == pytest.approx(last.pool, rel=0.6)


def test_the_choice_is_explained():
    tuner = tuner_for(found(8.0, 4.0, 4.5, 4.0))
    assert tuner.explain(tuner.decide(LATER, 30)) == (
        "stratified, batch 10 (cost per progress of others, in forward passes: random 1.50x, titan 1.50x, is 1.57x)"
    )


def test_a_replayed_run_decides_as_the_first_did():
    rng = np.random.default_rng(3)
    first = Tuner(2, 4, Meter(3.0))
    rows = []
    for number in range(6):
        if first.due(number):
            first.observe(pool(rng.normal(size=(8, 3)), np.arange(8) % 2), 0.2, 8)
        decision = first.decide(number, 8)
        rows.append({"round": number, "candidates": 8, "strategy": decision.option.strategy, **decision.facts()})
    rows.append({"round": 6, "candidates": 0})  # an empty round
    lines = [json.loads(json.dumps(row)) for row in rows]
    again = Tuner(2, 4, Meter(1.0), recorded(lines, "metrics"))
    for number in range(6):
        assert again.due(number) == bool(rows[number]["auto_observed"])
        decision = again.decide(number, 8)
        assert decision.facts() == {name: rows[number][name] for name in decision.facts()}
        assert again.explain(decision).endswith("(replayed)")
    with pytest.raises(DataError, match="round 6: not in the run that is replayed"):
        again.decide(6, 8)


@pytest.mark.parametrize("row", [{"candidates": 3}, {"round": 1, "candidates": 3, "strategy": "titan"}, []], ids=str)
def test_a_record_of_something_else_is_refused(row):
    with pytest.raises(DataError, match=r"metrics\.jsonl: a line without .*--metrics"):
        recorded([row], "metrics.jsonl")
