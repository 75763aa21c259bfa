"""The criteria against hand-computed values, and what every entry of the table must hold."""

from dataclasses import replace

import numpy as np
import pytest

from stages.importance.criteria import CRITERIA, Evidence

EVIDENCE = Evidence(
    fisher=np.array([6.0, 1.0, 2.0]),
    parameters=np.array([100.0, 50.0, 10.0]),
    macs=np.array([400.0, 100.0, 800.0]),
    most_parameters=200.0,
    most_macs=1600.0,
    weight_l2=np.array([3.0, 1.0, 2.0]),
    rng=np.random.default_rng(0),
)

BY_HAND = {
    "score": [6 / (0.5 * 0.25), 1 / (0.25 * 0.0625), 2 / (0.05 * 0.5)],  # 48, 64, 80
    "fisher": [6, 1, 2],
    "fisher-memory": [6 / 0.5, 1 / 0.25, 2 / 0.05],
    "fisher-compute": [6 / 0.25, 1 / 0.0625, 2 / 0.5],
    "l2": [3, 1, 2],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    np.testing.assert_allclose(CRITERIA[name](EVIDENCE), BY_HAND[name], rtol=1e-12)


def test_every_criterion_but_the_control_is_checked_by_hand():
    assert CRITERIA.keys() - BY_HAND.keys() == {"random"}


@pytest.mark.parametrize("name", CRITERIA)
def test_one_finite_number_per_layer_that_is_not_negative(name):
    values = CRITERIA[name](EVIDENCE)
    assert values.shape == (3,)
    assert np.isfinite(values).all()
    assert (values >= 0).all()


@pytest.mark.parametrize("name", sorted(CRITERIA.keys() - {"random"}))
def test_the_models_largest_layer_scales_all_scores_alike(name):
    """The normalisers of Eq. 3 are constants of the network: they may not change the ranking."""
    other = replace(EVIDENCE, most_parameters=777.0, most_macs=9999.0)
    np.testing.assert_array_equal(np.argsort(CRITERIA[name](EVIDENCE)), np.argsort(CRITERIA[name](other)))


def test_random_follows_its_generator_alone():
    def draw(seed):
        return CRITERIA["random"](replace(EVIDENCE, rng=np.random.default_rng(seed)))

    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
