"""ProtoNet's closed forms: values by hand, gradients by torch's autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from stages.errors import DataError
from stages.fsl.protonet import (
    accuracy,
    cosine_logits,
    episode_loss,
    prototypes,
    query_loss,
    support_loss,
    transductive_loss,
)
from stages.losses import SHORTEST
from tests.rounding import gamma
from tests.test_losses import leaf, softmax_bound, within

Floats = NDArray[np.float32]
SCALE = 7.0


def singles(*rows: tuple[float, ...]) -> Floats:
    return np.array(rows, np.float32)


def test_prototypes_are_class_means() -> None:
    means = prototypes(singles((1, 0), (3, 0), (0, 5)), np.array([0, 0, 1]), 2)
    assert means.dtype == np.float32
    np.testing.assert_array_equal(means, [[2, 0], [0, 5]])


def test_logits_are_scaled_cosines() -> None:
    logits = cosine_logits(singles((3, 4)), singles((2, 0), (0, 0.5), (-3, -4)), 10.0)
    assert logits.dtype == np.float64
    # cos = 3/5, 4/5, -1 whatever the lengths
    np.testing.assert_allclose(logits, [[6, 8, -10]], rtol=gamma(16, torch.float64))


def test_a_zero_feature_is_equally_far_from_all() -> None:
    assert not cosine_logits(singles((0, 0)), singles((1, 0), (0, 1)), 10.0).any()


def test_loss_and_gradients_by_hand() -> None:
    support, query = singles((1, 0), (0, 1)), singles((1, 0))
    loss = episode_loss(support, np.array([0, 1]), query, np.array([0]), 2, 1.0)
    # logits (1, 0): -log(e / (e + 1)); r = (-a, a) with a = 1 / (1 + e)
    assert loss.value == pytest.approx(math.log(1 + math.exp(-1)), rel=gamma(16, torch.float64))
    a = 1 / (1 + math.e)
    # the query may turn towards or away from prototype 1, and prototype 1 towards or away from the query
    np.testing.assert_allclose(loss.query_gradient, [[0, a]], rtol=gamma(1))
    np.testing.assert_allclose(loss.support_gradient, [[0, 0], [a, 0]], rtol=gamma(1))
    assert loss.scale_gradient == pytest.approx(-a, rel=gamma(16, torch.float64))
    assert loss.query_gradient.dtype == loss.support_gradient.dtype == np.float32


# --------------------------------------------------------------------------------------------------- against autograd


def torch_logits(query: Tensor, support: Tensor, labels: NDArray[np.int64], ways: int, scale: Tensor | float) -> Tensor:
    member = functional.one_hot(torch.from_numpy(labels), ways).to(support.dtype)
    means = (member / member.sum(0)).T @ support
    return scale * functional.normalize(query, dim=1) @ functional.normalize(means, dim=1).T


class Case:
    """An episode, and how far its loss and gradients in float64 may lie from another computation's in float64."""

    def __init__(self, ways: int, shots: int, queries: int, seed: int, blank: str) -> None:
        rng = np.random.default_rng(seed)
        self.ways = ways
        self.labels = rng.permutation(np.concatenate([np.arange(ways), rng.integers(ways, size=ways * (shots - 1))]))
        self.support = rng.normal(size=(len(self.labels), 5)).astype(np.float32)
        self.query = rng.normal(size=(queries, 5)).astype(np.float32)
        self.query_labels = rng.integers(ways, size=queries)
        if blank == "query":
            self.query[0] = 0
        if blank == "class":
            self.support[self.labels == 0] = 0

    def bounds(self, rows: Floats) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Of a mean of losses over `rows`, of its gradient at each of them, and of that at the support's features.

        A mean is off by the rounding of its sum, relative to its length by as much more as its terms cancel: that
        moves a cosine, and `SCALE` times it a logit. The gradient at a vector is C (or N) products of a residual,
        the scale and a unit vector, over the vector's length.
        """
        shots = np.bincount(self.labels, minlength=self.ways)
        means = np.stack([self.support[self.labels == c].mean(0, dtype=np.float64) for c in range(self.ways)])
        sizes = np.array([np.linalg.norm(self.support[self.labels == c], axis=1).mean() for c in range(self.ways)])
        lengths = np.maximum(np.linalg.norm(means, axis=1), SHORTEST)
        unit = gamma(64 + len(self.labels) + len(rows), torch.float64) * (1 + sizes / lengths).max()
        logits = np.full((1, self.ways), SCALE)
        off = float(softmax_bound(logits, SCALE * unit)[0, 0]) * (8 * SCALE + 8)  # entropies are p ln p, |ln p| < 8 s
        pulled = 4 * SCALE * (off + unit) * max(self.ways, len(rows))
        own = pulled / np.maximum(np.linalg.norm(rows, axis=1), SHORTEST)
        return off, own[:, None], (pulled / lengths / shots)[self.labels][:, None]


cases = st.builds(
    Case,
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 2**31),
    st.sampled_from(["", "query", "class"]),
)


@settings(max_examples=60, deadline=None)
@given(cases, st.booleans())
def test_the_episodes_loss_is_autograds(case: Case, detach: bool) -> None:
    found = episode_loss(case.support, case.labels, case.query, case.query_labels, case.ways, SCALE, detach=detach)
    support, query, scale = leaf(case.support), leaf(case.query), torch.tensor(SCALE, dtype=torch.float64)
    scale.requires_grad_()
    logits = torch_logits(query, support.detach() if detach else support, case.labels, case.ways, scale)
    loss = functional.cross_entropy(logits, torch.from_numpy(case.query_labels))
    at_support, at_query, at_scale = torch.autograd.grad(
        loss, [support, query, scale], allow_unused=True, materialize_grads=True
    )
    off, own, of_support = case.bounds(case.query)
    assert abs(found.value - loss.item()) <= off
    within(found.query_gradient, at_query, own)
    within(found.support_gradient, at_support, of_support)
    assert abs(found.scale_gradient - at_scale.item()) <= off * case.ways
    assert detach <= (not found.support_gradient.any())


@settings(max_examples=60, deadline=None)
@given(cases)
def test_the_transductive_loss_is_autograds(case: Case) -> None:
    rows = np.concatenate([case.support, case.query])
    value, gradient = transductive_loss(rows, case.labels, case.ways, SCALE)
    at, size = leaf(rows), len(case.labels)
    logits = torch_logits(at, at[:size], case.labels, case.ways, SCALE)
    logs = functional.log_softmax(logits[size:], dim=1)
    loss = functional.cross_entropy(logits[:size], torch.from_numpy(case.labels)) - (logs.exp() * logs).sum(1).mean()
    (slope,) = torch.autograd.grad(loss, at)
    off, own, of_support = case.bounds(rows)
    own[:size] += of_support
    assert abs(value - loss.item()) <= 2 * off
    assert gradient.dtype == np.float32
    within(gradient, slope, own)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_prototypes_that_stand_still(case: Case) -> None:
    means = prototypes(case.support, case.labels, case.ways)
    value, gradient = query_loss(means, case.query_labels, SCALE)(case.query)
    other = episode_loss(means, np.arange(case.ways), case.query, case.query_labels, case.ways, SCALE, detach=True)
    assert value == other.value
    np.testing.assert_array_equal(gradient, other.query_gradient)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_support_loss_is_the_episode_loss_of_the_joined_features(case: Case) -> None:
    loss = support_loss(case.labels, case.query_labels, case.ways, SCALE)
    value, gradient = loss(np.concatenate([case.support, case.query]))
    apart = episode_loss(case.support, case.labels, case.query, case.query_labels, case.ways, SCALE)
    assert value == apart.value
    np.testing.assert_array_equal(gradient, np.concatenate([apart.support_gradient, apart.query_gradient]))


def test_detach_stops_the_gradient_at_the_prototypes_only() -> None:
    labels, features = np.array([0, 1]), singles((1.0, 0.2), (0.1, 1.0), (1.0, 0.5), (0.3, 1.0))
    flows, stops = (support_loss(labels, labels, 2, 10.0, detach=detach)(features)[1] for detach in (False, True))
    assert not stops[:2].any()
    assert np.abs(flows[:2]).min() > 0
    np.testing.assert_array_equal(flows[2:], stops[2:])


def test_a_loss_of_features_that_are_not_finite_is_not_finite() -> None:
    """It is the step that refuses it (`checked_step`)."""
    labels = np.array([0, 1])
    for bad in (math.nan, math.inf):
        features = singles((bad, 1), (1, 0), (0, 1), (1, 1))
        assert math.isnan(support_loss(labels, labels, 2, 10.0)(features)[0])
        assert math.isnan(transductive_loss(features, labels, 2, 10.0)[0])


# --------------------------------------------------------------------------------------------------------- the errors

LOSSES: dict[str, Callable[[Floats, NDArray[np.int64]], object]] = {
    "prototypes": lambda features, labels: prototypes(features, labels, 2),
    "support": lambda features, labels: episode_loss(features, labels, features, np.zeros(len(features), int), 2, 1.0),
    "query": lambda features, labels: episode_loss(np.eye(2, 3), np.arange(2), features, labels, 2, 1.0),
    "still": lambda features, labels: query_loss(np.eye(2, 3), labels, 1.0)(features),
}


def test_a_class_without_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="no sample of class 1"):
        prototypes(np.ones((2, 3), np.float32), np.array([0, 2]), 3)


@pytest.mark.parametrize("use", LOSSES)
@pytest.mark.parametrize(("labels", "message"), [([0, 2], r"labels 0\.\.2"), ([-1, 0], "labels -1"), ([0], "1 labels")])
def test_labels_that_do_not_fit_are_errors(use: str, labels: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LOSSES[use](np.ones((2, 3), np.float32), np.array(labels))


def test_accuracy_counts_the_largest_logit() -> None:
    assert accuracy(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([1, 1])) == 0.5
