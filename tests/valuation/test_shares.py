"""A buffer that is cut down as samples arrive keeps what a single look at the whole window would keep."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.valuation.allocation import fair_shares
from stages.valuation.shares import ClassShares


def kept(labels, keys, places, chunk):
    """Rows that stay when samples arrive `chunk` at a time."""
    shares, rows = ClassShares(places), np.zeros(0, np.int64)
    for start in range(0, len(labels), chunk):
        shares.arrive(labels[start : start + chunk])
        rows = np.concatenate([rows, np.arange(start, min(start + chunk, len(labels)))])
        rows = rows[shares.keep(labels[rows], keys[rows])]
        assert len(rows) == min(places, start + chunk, len(labels))
    return shares, rows


streams = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(lambda labels: np.array(labels) * 3)


@given(streams, st.integers(6, 15), st.integers(1, 30), st.integers(0, 99))
def test_enough_places_for_all_classes(labels, places, chunk, seed):
    keys = np.random.default_rng(seed).random(len(labels))
    shares, rows = kept(labels, keys, places, chunk)
    present, counts = np.unique(labels, return_counts=True)
    expected = set()
    for label, share in zip(present, fair_shares(counts, places), strict=True):
        own = np.flatnonzero(labels == label)
        expected |= set(own[np.argsort(-keys[own])][:share].tolist())
    assert set(rows.tolist()) == expected
    assert shares.low.tolist() == present.tolist()
    assert shares.counts.tolist() == counts.tolist()


@given(streams, st.integers(1, 5), st.integers(1, 30), st.integers(0, 99))
def test_more_classes_than_places(labels, places, chunk, seed):
    keys = np.random.default_rng(seed).random(len(labels))
    shares, rows = kept(labels, keys, places, chunk)
    stratum = shares.of(labels)
    assert len(shares.counts) <= places
    assert (labels >= shares.low[stratum]).all()
    assert (labels <= shares.high[stratum]).all()
    np.testing.assert_array_equal(np.bincount(stratum, minlength=len(shares.counts)), shares.counts)
    for index, share in enumerate(fair_shares(shares.counts, places)):
        own = np.flatnonzero(stratum == index)
        best = own[np.argsort(-keys[own])]
        assert set(rows[stratum[rows] == index].tolist()) == set(best[:share].tolist())
        if share < len(own):
            assert shares.dropped[index] == keys[best[share]]


def test_neighbours_with_the_fewest_samples_are_merged():
    shares = ClassShares(2)
    shares.arrive(np.array([0, 0, 0, 0, 0, 3, 6]))
    assert (shares.low.tolist(), shares.counts.tolist()) == ([0, 3], [5, 2])


def test_merged_strata_remember_the_highest_key_that_either_dropped():
    shares = ClassShares(1)
    shares.arrive(np.array([6, 6]))
    assert shares.keep(np.array([6, 6]), np.array([0.8, 0.9])).tolist() == [1]
    shares.arrive(np.array([0]))
    assert shares.keep(np.array([6, 0]), np.array([0.9, 0.1])).tolist() == [0]
    assert shares.dropped.tolist() == [0.8]


def test_a_class_within_a_merged_interval_joins_it():
    shares = ClassShares(2)
    shares.arrive(np.array([10, 30, 50, 50, 50]))
    assert (shares.low.tolist(), shares.high.tolist()) == ([10, 50], [30, 50])
    shares.arrive(np.array([20]))
    assert shares.counts.tolist() == [3, 3]
