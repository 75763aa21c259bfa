"""Rounds on demand: what is counted, what is bounded, and that no choice of the moment biases the estimate."""

from itertools import pairwise

import numpy as np
import pytest

from stages.artifacts.records import Block
from stages.valuation.buffer import CandidateBuffer
from stages.valuation.demand import DemandBuffer


def block(labels, first=0, **others):
    y = np.asarray(labels, np.int64)
    return Block(np.arange(first, first + len(y), dtype=np.float32)[:, None], y, "ND", **others)


def demand(keep=4, least=1, backlog=64, seed=0):
    return DemandBuffer(CandidateBuffer("quota", keep, features=None, decay=1.0, seed=seed), least, backlog=backlog)


def look(buffer):
    arrived = buffer.take()
    assert arrived is not None
    buffer.score(arrived)


def test_rounds_end_when_asked_and_count_what_they_dropped():
    buffer = demand()
    for first, labels in ((0, [0, 0, 0, 1]), (4, [0, 0])):
        buffer.arrive(block(labels, first))
        look(buffer)
    found = buffer.close()
    assert (found.round, len(found)) == (0, 4)
    np.testing.assert_array_equal(found.per_class["seen"], [5, 1])
    np.testing.assert_array_equal(found.per_class["dropped"], [2, 0])
    np.testing.assert_array_equal(found.per_class["missed"], [0, 0])
    buffer.arrive(block([1, 1], 6))
    look(buffer)
    second = buffer.close()
    assert (second.round, second.columns["index"].tolist()) == (1, [6, 7])
    assert buffer.close() is None


def test_a_round_waits_for_the_fewest_samples():
    buffer = demand(least=3)
    buffer.arrive(block([0, 1]))
    look(buffer)
    assert not buffer.wants_to_close()
    buffer.arrive(block([0], 2))
    look(buffer)
    assert buffer.wants_to_close()


def test_more_than_the_fewest_samples_are_enough():
    buffer = demand(least=2)
    buffer.arrive(block([0, 1, 0]))
    look(buffer)
    assert buffer.wants_to_close()


def test_nothing_waits_unless_something_arrived():
    buffer = demand()
    assert buffer.take() is None
    buffer.arrive(block([0, 1]))
    look(buffer)
    assert buffer.take() is None


def test_a_backlog_that_is_just_full_loses_nothing():
    for first in (9, 10):
        buffer = demand(keep=10, backlog=10)
        buffer.arrive(block([0] * first))
        look(buffer)
        assert buffer.close().per_class["missed"].tolist() == [0]
    buffer = demand(keep=10, backlog=10)
    buffer.arrive(block([0] * 11))
    look(buffer)
    assert buffer.close().per_class["missed"].tolist() == [6]


def test_the_backlog_is_bounded_and_what_exceeds_it_is_counted_by_class():
    buffer = demand(keep=6, backlog=10)
    labels = np.array([0] * 30 + [1] * 9 + [2])
    for first in range(0, 40, 4):
        buffer.arrive(block(labels[first : first + 4], first))
        assert buffer._count <= 10
    look(buffer)
    found = buffer.close()
    np.testing.assert_array_equal(found.per_class["seen"], [30, 9, 1])
    assert found.per_class["missed"].sum() >= 30
    kept = np.bincount(found.y, minlength=3)
    np.testing.assert_array_equal(found.per_class["dropped"], [30, 9, 1] - kept)
    assert kept.min() >= 1, "no class is lost"
    masses = np.bincount(found.y, weights=found.columns["weight"], minlength=3)
    np.testing.assert_allclose(masses, [30 / 40, 9 / 40, 1 / 40], rtol=1e-6)
    assert all(a < b for a, b in pairwise(found.columns["index"].tolist()))


def test_what_one_round_missed_is_not_counted_again_in_the_next():
    buffer = demand(keep=6, backlog=10)
    buffer.arrive(block([0] * 30))
    look(buffer)
    assert buffer.close().per_class["missed"].tolist() == [25]  # half a backlog was kept
    buffer.arrive(block([0, 0, 0, 0], 30))
    look(buffer)
    second = buffer.close()
    assert second.per_class["seen"].tolist() == [4]
    assert second.per_class["missed"].tolist() == [0]
    assert second.columns["weight"].tolist() == [0.25] * 4


def test_a_class_missed_altogether_leaves_its_mass_to_the_others():
    buffer = demand(keep=2, backlog=2)
    buffer.arrive(block([0, 1, 2, 3]))
    look(buffer)
    found = buffer.close()
    assert found.columns["weight"].sum() == pytest.approx(1.0)
    np.testing.assert_array_equal(found.per_class["seen"], [1, 1, 1, 1])


@pytest.mark.parametrize(("backlog", "piece"), [(64, 3), (6, 12)], ids=["all looked at", "half of it missed"])
def test_the_weighted_candidates_estimate_the_windows_mean(backlog, piece):
    """Over many seeds the mean is the window's, whether or not the backlog overflowed."""
    labels = np.array([0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0])
    values = np.arange(12.0)
    estimates = []
    for seed in range(2000):
        buffer = demand(keep=4, backlog=backlog, seed=seed)
        for first in range(0, 12, piece):
            buffer.arrive(block(labels[first : first + piece], first))
            look(buffer)
        found = buffer.close()
        estimates.append(float(found.columns["weight"] @ values[found.columns["index"]]))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - values.mean()) < 4 * error
