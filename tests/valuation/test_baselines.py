"""The rivals' scores by hand."""

import numpy as np
import pytest

from stages.valuation.baselines import entropies, highest, losses, ocs_scores
from stages.valuation.coreset import coreset, distances


def test_loss_and_entropy():
    p = np.array([[0.5, 0.5], [1.0, 0.0]])
    np.testing.assert_allclose(losses(p, np.array([0, 0])), [np.log(2), 0.0])
    np.testing.assert_allclose(entropies(p), [np.log(2), 0.0])
    assert np.isfinite(losses(p, np.array([1, 1]))).all()


def test_ocs_is_cosine_to_the_mean_minus_mean_cosine_to_the_others():
    g = np.random.default_rng(0).normal(size=(5, 3))
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    mean = g.mean(0) / np.linalg.norm(g.mean(0))
    expected = [unit[i] @ mean - np.mean([unit[i] @ unit[j] for j in range(5) if j != i]) for i in range(5)]
    np.testing.assert_allclose(ocs_scores(g @ g.T), expected)


def test_ocs_of_zero_gradients_is_zero():
    np.testing.assert_array_equal(ocs_scores(np.zeros((3, 3))), 0.0)


def test_ties_go_to_the_first():
    assert highest(np.array([1.0, 3, 3, 3, 0]), 2).tolist() == [1, 2]


def test_distances():
    x = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    expected = np.linalg.norm(x[:, None] - x, axis=2)
    np.testing.assert_allclose(distances(x), expected, atol=1e-3)


def test_coreset_takes_one_of_each_cluster_and_its_mass():
    x = np.array([[0.0], [0.1], [0.2], [10], [10.1], [50]], np.float32)
    rows, masses = coreset(x, np.full(6, 1.0), 3)
    assert len(set((x[rows, 0] > 5).astype(int) + (x[rows, 0] > 30))) == 3
    assert sorted(masses.tolist()) == [1, 2, 3]


def test_coreset_of_identical_points_keeps_everyone_something():
    rows, masses = coreset(np.zeros((4, 2), np.float32), np.full(4, 0.25), 2)
    assert len(set(rows.tolist())) == 2
    assert masses.min() > 0
    assert masses.sum() == pytest.approx(1.0)


def test_coreset_with_more_places_than_points():
    rows, masses = coreset(np.arange(6.0, dtype=np.float32).reshape(3, 2), np.array([0.2, 0.3, 0.5]), 9)
    assert rows.tolist() == [0, 1, 2]
    np.testing.assert_allclose(masses, [0.2, 0.3, 0.5])
