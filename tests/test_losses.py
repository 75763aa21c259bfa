"""Closed-form losses: values by hand, gradients by torch's autograd in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from stages.losses import SHORTEST, Doubles, cosines, cross_entropy, entropy, log_softmax, single, softmax
from tests.rounding import gamma

Array = NDArray[np.float64]


def leaf(values: NDArray[np.floating]) -> Tensor:
    """The values in float64, for autograd."""
    return torch.from_numpy(np.array(values, np.float64)).requires_grad_()


def softmax_bound(scores: Array, moved: Array | float = 0.0) -> Array:
    """How far two computations of ln softmax, softmax or cross-entropy in float64 may lie apart, per sample (N, 1).

    Each score is off by `moved`, the largest and the logarithm of a sum of C exponentials are taken off: numbers up to
    twice the largest score. A softmax is at most 1, and off by no more than twice what its logarithm is off by.
    """
    count = scores.shape[1]
    largest = np.abs(scores).max(axis=1, keepdims=True)
    return 2 * (2 * moved + gamma(count + 16, torch.float64) * (2 * largest + math.log(count) + 2))


def within(found: NDArray[np.floating], exact: Tensor, bound: Array | float) -> None:
    """Assert that float64 results lie within a bound, element by element; float32 ones have been rounded once more."""
    expected = exact.detach().numpy()
    rounding = 2.0**-24 * (np.abs(expected) + bound) if found.dtype == np.float32 else 0.0
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= bound + rounding).all(), (found, expected)


def drawn(seed: int, *shape: int, spread: float = 3.0) -> Array:
    return np.random.default_rng(seed).normal(0, spread, shape)


def test_by_hand() -> None:
    scores = np.log([[1.0, 3.0], [2.0, 2.0]])
    np.testing.assert_allclose(softmax(scores), [[0.25, 0.75], [0.5, 0.5]], rtol=gamma(16, torch.float64))
    losses, residuals = cross_entropy(scores, np.array([1, 0]))
    np.testing.assert_allclose(losses, -np.log([0.75, 0.5]), rtol=gamma(32, torch.float64))
    np.testing.assert_allclose(residuals, [[0.25, -0.25], [-0.5, 0.5]], rtol=gamma(16, torch.float64))
    values, slopes = entropy(scores)
    # H = -1/4 ln 1/4 - 3/4 ln 3/4; the gradient -p (ln p + H) is 0 at the largest entropy
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    np.testing.assert_allclose(values, [expected, math.log(2)], rtol=gamma(32, torch.float64))
    first = -0.25 * (math.log(0.25) + expected)
    np.testing.assert_allclose(slopes, [[first, -first], [0, 0]], atol=gamma(32, torch.float64))


def test_scores_of_any_size_overflow_nothing() -> None:
    scores = np.array([[1e6, 0.0], [-1e6, 0.0]])
    np.testing.assert_array_equal(log_softmax(scores), [[0, -1e6], [-1e6, 0]])
    losses, residuals = cross_entropy(scores, np.array([1, 1]))
    np.testing.assert_array_equal(losses, [1e6, 0])
    np.testing.assert_array_equal(residuals, [[1, -1], [0, 0]])
    values, slopes = entropy(scores)
    assert not values.any()
    assert not slopes.any()


def test_what_is_not_finite_passes_without_a_warning() -> None:
    scores = np.array([[math.inf, 0.0], [math.nan, 0.0]])
    rows = np.array([0, 0])
    assert np.isnan(cross_entropy(scores, rows)[0]).all()
    assert np.isnan(cross_entropy(scores, rows, np.array([True, False]))[0]).all()
    assert np.isnan(entropy(scores)[0]).all()
    found = cosines(scores, np.eye(2))
    assert np.isnan(found.values).any(axis=1).all()
    assert np.isnan(found.pull(np.ones((2, 2)))).any()
    assert single(np.array([1e300]))[0] == math.inf


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**31))
def test_cross_entropy_is_torchs(count: int, classes: int, seed: int) -> None:
    scores, rows = drawn(seed, count, classes), np.random.default_rng(seed).integers(classes, size=count)
    losses, residuals = cross_entropy(scores, rows)
    at = leaf(scores)
    expected = functional.cross_entropy(at, torch.from_numpy(rows), reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), at)
    bound = softmax_bound(scores)
    within(losses, expected, bound[:, 0])
    within(residuals, slope, bound)


def even(scores: Tensor, known: Tensor) -> Tensor:
    """Scores with the unknown columns at the mean likelihood of the known ones, so that their softmax is 1 / C each."""
    if not known.any():
        return torch.zeros_like(scores)
    return torch.where(known, scores, scores[:, known].logsumexp(1, keepdim=True) - math.log(int(known.sum())))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 2**31))
def test_columns_that_nobody_has_seen_count_as_uniform(known: list[bool], seed: int) -> None:
    classes, seen = len(known), np.array(known)
    rows = np.arange(classes)
    scores = drawn(seed, classes, classes)
    scores[:, ~seen] = math.nan  # whatever stands there
    losses, residuals = cross_entropy(scores, rows, seen)
    at = leaf(np.where(seen, scores, 0))
    expected = functional.cross_entropy(even(at, torch.from_numpy(seen)), torch.from_numpy(rows), reduction="none")
    slope = torch.autograd.grad(expected.sum(), at, allow_unused=True)[0] if seen.any() else torch.zeros_like(at)
    bound = softmax_bound(at.detach().numpy())
    within(losses, expected, 2 * bound[:, 0])
    within(residuals, slope, 2 * bound)
    assert not residuals[~seen].any()
    assert not residuals[:, ~seen].any()
    np.testing.assert_array_equal(losses[~seen], np.full((~seen).sum(), np.log(classes)))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**31))
def test_entropy_is_autograds(count: int, classes: int, seed: int) -> None:
    scores = drawn(seed, count, classes)
    values, slopes = entropy(scores)
    at = leaf(scores)
    logs = functional.log_softmax(at, dim=1)
    expected = -(logs.exp() * logs).sum(1)
    (slope,) = torch.autograd.grad(expected.sum(), at)
    # sums of p ln p with |ln p| <= 2 |scores| + ln C, and once more times p
    bound = softmax_bound(scores) * (4 * (2 * np.abs(scores).max() + math.log(classes)) + classes + 4)
    within(values, expected, bound[:, 0])
    within(slopes, slope, bound)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from([0, 1e-13, 1e-5])
)
def test_cosines_and_their_gradients_are_torchs(count: int, classes: int, width: int, seed: int, short: float) -> None:
    """Vectors that are zero or shorter than what a length is clipped to, too."""
    one, other, gradient = drawn(seed, count, width), drawn(seed + 1, classes, width), drawn(seed + 2, count, classes)
    one[0] *= short / np.linalg.norm(one[0])
    found = cosines(one, other)
    a, b = leaf(one), leaf(other)
    expected = functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T
    slopes = torch.autograd.grad(expected, [a, b], torch.from_numpy(gradient))
    unit = gamma(4 * width + count + classes + 16, torch.float64)
    within(found.values, expected, unit)
    for pulled, slope, vectors, weights in (
        (found.pull(gradient), slopes[0], one, gradient),
        (found.pull_others(gradient), slopes[1], other, gradient.T),
    ):
        length = np.maximum(np.linalg.norm(vectors, axis=1), SHORTEST)
        within(pulled, slope, 2 * unit * (np.abs(weights).sum(axis=1) / length)[:, None])


def test_a_gradient_of_cosines_by_hand() -> None:
    # cos((2, 0), (1, 1)) = sqrt(1/2): only turning towards (0, 1) helps, by cos'(45 degrees) / length
    found = cosines(np.array([[2.0, 0.0]]), np.array([[1.0, 1.0]]))
    half = math.sqrt(0.5)
    assert found.values[0, 0] == pytest.approx(half, rel=gamma(16, torch.float64))
    exact = gamma(16, torch.float64)
    np.testing.assert_allclose(found.pull(np.ones((1, 1))), [[0, half / 2]], atol=exact)
    # from (1, 1), of length sqrt(2), turning towards (1, -1) / sqrt(2) by sin(45 degrees) / sqrt(2)
    np.testing.assert_allclose(found.pull_others(np.ones((1, 1))), [[half / 2, -half / 2]], atol=exact)


def test_inputs_are_left_alone() -> None:
    scores, kept = drawn(0, 3, 3), drawn(0, 3, 3)
    results: list[Doubles] = [log_softmax(scores), *cross_entropy(scores, np.arange(3)), *entropy(scores)]
    found = cosines(scores, scores)
    found.pull(scores)
    found.pull_others(scores)
    assert all(result.dtype == np.float64 for result in results)
    np.testing.assert_array_equal(scores, kept)
