"""The candidate buffer: what it keeps, what it says, and that its weights make the candidates stand for the window."""

from itertools import permutations

import numpy as np
import pytest

from stages.artifacts.records import Block
from stages.errors import DataError
from stages.valuation.buffer import CandidateBuffer
from stages.valuation.coarse import FILTERS
from tests.valuation.pools import Scripted


def block(y, x=None, **others):
    y = np.asarray(y, np.int64)
    x = np.arange(len(y), dtype=np.float32)[:, None] if x is None else np.asarray(x, np.float32)
    return Block(x, y, "ND", **others)


def raw(samples):
    return np.asarray(samples.x, np.float64)


def buffer(strategy="quota", keep=3, seed=0, decay=1.0):
    return CandidateBuffer(strategy, keep, features=raw, decay=decay, seed=seed)


def expected_weights(strategy, labels, keep, x=None):
    """Mean weight of every sample over all orders of the draws: exact for strategies that only compare draws."""
    total, orders = np.zeros(len(labels)), list(permutations(range(len(labels))))
    for order in orders:
        candidates = buffer(strategy, keep)
        candidates._rng = Scripted((np.array(order) + 0.5) / len(labels))
        candidates.add(block(labels, x))
        found = candidates.close_round()
        total[found.columns["index"]] += found.columns["weight"]
    return total / len(orders)


@pytest.mark.parametrize("strategy", [name for name, strategy in FILTERS.items() if strategy.unbiased])
@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 2, 2], [0, 1, 2, 3, 4, 4], [7, 7, 7, 3, 5, 5]])
def test_candidates_stand_for_the_window(strategy, labels):
    """Every sample weighs 1 / window on average; [0, 1, 2, 3, 4, 4] has more classes than places."""
    np.testing.assert_allclose(expected_weights(strategy, labels, 3), 1 / 6, rtol=1e-6)


def test_the_published_score_fails_the_same_test():
    x = [[0.0], [10], [20], [5], [5.1], [5.2]]
    assert expected_weights("rep-div", [0, 0, 0, 1, 1, 1], 3, x).max() > 0.3


def test_priority_sampling_is_unbiased_before_its_weights_are_normalised():
    """E sum over kept of max(1, dropped key / worth) = number of samples; here of each half of them."""
    x = np.r_[np.linspace(-1, 1, 10), [5, 6]][:, None]
    estimates = np.zeros((1000, 2))
    for number, estimate in enumerate(estimates):
        candidates = buffer("priority", 5, seed=number)
        candidates.add(block([0] * 12, x))
        kept = candidates._kept.columns["index"]
        stands_for = np.maximum(candidates._shares.dropped[0] / candidates._worth, 1)
        estimate[:] = stands_for[kept < 6].sum(), stands_for[kept >= 6].sum()
    error = np.abs(estimates.mean(0) - 6) / (estimates.std(0) / np.sqrt(len(estimates)))
    assert error.max() < 4


@pytest.mark.parametrize("strategy", FILTERS)
def test_contract(strategy):
    rng = np.random.default_rng(0)
    labels, x = rng.integers(0, 4, 50), rng.normal(size=(50, 3))
    candidates = buffer(strategy, keep=12)
    for rows in np.split(np.arange(50), [7, 20, 21]):
        candidates.add(block(labels[rows], x[rows]))
    found = candidates.close_round()
    assert len(found) == 12
    assert found.round == 0
    assert (np.diff(found.columns["index"]) > 0).all()
    np.testing.assert_array_equal(found.y, labels[found.columns["index"]])
    np.testing.assert_array_equal(found.x, x[found.columns["index"]].astype(np.float32))
    np.testing.assert_array_equal(found.per_class["seen"], np.bincount(labels))
    assert found.columns["weight"].dtype == np.float32
    assert found.columns["weight"].min() > 0
    assert found.columns["weight"].sum() == pytest.approx(1.0, abs=1e-6)
    assert found.facts == {"filter": strategy}


def test_classes_share_the_places():
    candidates = buffer(keep=9)
    candidates.add(block([0] * 90 + [1] * 8 + [2] * 2))
    found = candidates.close_round()
    assert np.bincount(found.y).tolist() == [4, 3, 2]
    shares = np.bincount(found.y, weights=found.columns["weight"])
    np.testing.assert_allclose(shares, [0.9, 0.08, 0.02], rtol=1e-6)


def test_extremes_are_kept_by_rep_and_div():
    x = [[0.0], [0.1], [-0.1], [9], [-9], [0]]
    for strategy, expected in (("rep", {0, 5}), ("div", {3, 4})):
        candidates = buffer(strategy, keep=2)
        candidates.add(block([0] * 6, x))
        assert set(candidates.close_round().columns["index"].tolist()) == expected


def test_the_published_score_drops_whole_classes():
    """Titan's literal score (arXiv:2505.16563, section 3.3): it ranks classes by feature variance."""
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 10
    candidates = buffer("rep-div", keep=30)
    candidates.add(block(labels, rng.normal(size=(100, 4)) * (1 + labels[:, None])))
    assert len(set(candidates.close_round().y.tolist())) == 3


def test_camel_keeps_what_others_are_near_to():
    candidates = buffer("camel", keep=2)
    for part in ([[0.0], [0.1]], [[0.2], [9.0]]):
        candidates.add(block([0] * 2, part))
    found = candidates.close_round()
    np.testing.assert_allclose(np.sort(found.columns["weight"]), [0.25, 0.75])


def test_a_window_is_forgotten_and_the_stream_is_not():
    candidates = buffer(keep=2)
    candidates.add(block([0, 0, 0]))
    candidates.close_round()
    candidates.add(block([4, 4, 4]))
    found = candidates.close_round()
    assert (found.round, found.labels.tolist(), found.per_class["seen"].tolist()) == (1, [4], [3])
    assert found.columns["index"].min() >= 3


def test_names_and_unseen_classes_stay():
    candidates = buffer(keep=2)
    candidates.add(block([2, 2, 0], labels=np.array([0, 1, 2]), names=("a", "b", "c")))
    found = candidates.close_round()
    assert found.names == ("a", "b", "c")
    assert found.per_class["seen"].tolist() == [1, 0, 2]


def test_columns_travel_and_old_weights_do_not():
    candidates = buffer(keep=2)
    columns = {"index": np.array([70, 80, 90]), "weight": np.ones(3, np.float32), "drawer": np.array([1, 2, 3])}
    candidates.add(block([0, 0, 0], columns=columns))
    found = candidates.close_round()
    np.testing.assert_array_equal(found.columns["index"], found.columns["drawer"] * 10 + 60)
    np.testing.assert_allclose(found.columns["weight"], 0.5)


def test_unlabelled_samples_are_refused_by_their_place():
    candidates = buffer(keep=2)
    candidates.add(block([0, 0]))
    with pytest.raises(DataError, match=r"sample 3: label -1, expected a class label >= 0; .*pack"):
        candidates.add(block([0, -1]))


@pytest.mark.parametrize("strategy", [name for name, strategy in FILTERS.items() if strategy.needs != "labels"])
def test_features_that_are_not_finite_are_refused_by_their_place(strategy):
    candidates = buffer(strategy, keep=2)
    candidates.add(block([0, 0]))
    with pytest.raises(DataError, match="sample 3"):
        candidates.add(block([0, 0, 0], [[1.0], [np.nan], [1]]))
