"""Integer allocation against brute force, and fair shares against their definition."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import UsageError
from stages.valuation.allocation import allocate, fair_shares


def cost(importance, counts):
    return float((np.asarray(importance) ** 2 / counts).sum())


def brute_force(importance, places, limit=None):
    """Least cost over all integer allocations with at least one place each."""
    most = [places] * len(importance) if limit is None else limit
    total = min(places, sum(most))
    options = product(*(range(1, m + 1) for m in most))
    return min(cost(importance, np.array(counts)) for counts in options if sum(counts) == total)


importances = st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=4)


@given(importances, st.integers(0, 5))
def test_allocation_is_the_integer_optimum(importance, extra):
    places = len(importance) + extra
    counts = allocate(np.array(importance), places)
    assert counts.sum() == places
    assert counts.min() >= 1
    assert cost(importance, counts) <= brute_force(importance, places) * (1 + 1e-12)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 3)), min_size=1, max_size=4), st.integers(0, 8))
def test_allocation_under_limits_is_the_integer_optimum(strata, extra):
    importance, limit = np.array([a for a, _ in strata]), [m for _, m in strata]
    places = len(strata) + extra
    counts = allocate(importance, places, limit=np.array(limit))
    assert (counts <= limit).all()
    assert counts.sum() == min(places, sum(limit))
    assert cost(importance, counts) <= brute_force(importance, places, limit) * (1 + 1e-12)


def test_rounding_neyman_would_be_worse():
    """4 places for (9, 6, 6): Neyman says 1.71, 1.14, 1.14; the extra place goes to the first."""
    assert allocate(np.array([9.0, 6.0, 6.0]), 4).tolist() == [2, 1, 1]
    assert allocate(np.array([1.0, 10.0]), 5).tolist() == [1, 4]


def test_without_importance_places_follow_size():
    assert allocate(np.zeros(3), 10, size=np.array([0.6, 0.3, 0.1])).tolist() == [6, 3, 1]


def test_more_strata_than_places_is_refused():
    with pytest.raises(UsageError, match="3 strata for 2 places"):
        allocate(np.ones(3), 2)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(8, 40))
def test_fair_shares_are_level(counts, places):
    shares = fair_shares(np.array(counts), places)
    assert shares.sum() == min(places, sum(counts))
    assert (shares <= counts).all()
    assert shares.min() >= 1
    cut = [share for share, count in zip(shares, counts, strict=True) if share < count]
    if cut:  # who has less than it could is within one place of everybody
        assert max(shares) - min(cut) <= 1


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(7, 12))
def test_a_share_that_cuts_never_grows(labels, places):
    counts, before = np.zeros(7, np.int64), np.zeros(7, np.int64)
    for label in labels:
        counts[label] += 1
        shares = fair_shares(counts, places)
        grew = shares > before
        assert (shares[grew] == counts[grew]).all()  # only by what has just arrived
        before = shares
