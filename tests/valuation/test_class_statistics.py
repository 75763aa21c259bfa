"""Running statistics against one sample at a time, against plain means, and Titan's score's degeneracy."""

import numpy as np
import pytest

from stages.valuation.class_statistics import ClassStatistics, by_class


def stream(n=60, dim=5, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return labels, rng.normal(size=(n, dim)) * 3 + labels[:, None]


def filled(decay, cuts, labels, features):
    statistics = ClassStatistics(decay)
    for rows in np.split(np.arange(len(labels)), cuts):
        statistics.update(labels[rows], features[rows])
    return statistics


@pytest.mark.parametrize("cuts", [[], [1, 2, 30], range(1, 60)], ids=["whole", "cut", "one by one"])
def test_chunks_change_nothing(cuts):
    """Exponential weights decay ** (how many newer of the class), whatever the chunks."""
    labels, features = stream()
    statistics = filled(0.9, cuts, labels, features)
    own = features[labels == 1]
    weights = 0.9 ** np.arange(len(own) - 1, -1, -1)
    weights /= weights.sum()
    one = np.array([1])
    np.testing.assert_allclose(statistics.means(one)[0], weights @ own)
    spread = weights @ (own**2).sum(1) - ((weights @ own) ** 2).sum()
    np.testing.assert_allclose(statistics.spreads(one)[0], spread)


def test_scores_by_their_definitions():
    labels, features = stream()
    statistics = filled(1.0, [], labels, features)
    rep, div = statistics.representativeness(labels, features), statistics.diversity(labels, features)
    for i in range(5):
        own = features[labels == labels[i]]
        assert rep[i] == pytest.approx(-((features[i] - own.mean(0)) ** 2).sum())
        assert div[i] == pytest.approx(((features[i] - own) ** 2).sum(1).mean())


def test_the_published_score_is_constant_within_a_class():
    """Rep + Div = trace of the class's feature covariance, whatever the sample."""
    labels, features = stream(300)
    statistics = filled(1.0, [], labels, features)
    score = statistics.representativeness(labels, features) + statistics.diversity(labels, features)
    for label, rows in by_class(labels):
        spread = features[rows].var(0).sum()
        np.testing.assert_allclose(score[rows], spread, rtol=1e-9, err_msg=f"class {label}")
        assert np.ptp(score[rows]) / spread < 1e-9
        assert statistics.representativeness(labels[rows], features[rows]).std() / spread > 0.1


def test_by_class_keeps_the_order_of_arrival():
    assert [(label, rows.tolist()) for label, rows in by_class(np.array([5, 2, 5, 2, 9]))] == [
        (2, [1, 3]), (5, [0, 2]), (9, [4])]  # fmt: skip
