"""Heads: scores, rows that nobody has seen, imprinting, classes by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts.records import Array, Block, Head
from stages.errors import DataError
from stages.models.heads import (
    class_means,
    class_names,
    cross_entropy,
    empty_head,
    even_unknown,
    extend,
    imprint,
    logits,
    probabilities,
    prototype_head,
    rows,
)
from tests.rounding import exact_logits, gamma
from tests.test_losses import even, leaf, softmax_bound, within

FEW = gamma(16)
"""Relative error of so many operations in float32: what hand values of two dimensions take."""

F3 = np.array([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]], np.float32)


def linear(known: tuple[bool, ...] = (True, True, True), names: tuple[str, ...] | None = None) -> Head:
    weight = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]], np.float32)
    return Head("linear", np.array([2, 5, 9]), weight, np.array([0.0, 0.5, 0.0], np.float32), np.array(known), names)


def test_linear_scores_by_hand() -> None:
    np.testing.assert_allclose(logits(linear(), F3), [[1, 2.5, 1], [0, -0.5, -1], [3, 1, -2.5]])


def test_prototype_scores_are_scaled_cosines() -> None:
    head = prototype_head(np.array([[3, 0], [1, 0], [0, 2]], np.float32), np.array([4, 4, 1]), None)
    assert head.labels.tolist() == [1, 4]
    np.testing.assert_allclose(head.weight, [[0, 2], [2, 0]])
    found = logits(head, np.array([[0, 5], [1, 1]], np.float32))
    np.testing.assert_allclose(found, [[10, 0], [50**0.5 * 2**0.5 / 2**0.5, 50**0.5]], rtol=FEW)


@settings(max_examples=40, deadline=None)
@given(known=st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_row_nobody_has_seen_counts_as_uniform(known: list[bool]) -> None:
    head = linear(tuple(known))
    found = probabilities(head, F3)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.sum(1), 1, rtol=gamma(64, torch.float64))
    unseen = ~np.array(known)
    np.testing.assert_allclose(found[:, unseen], 1 / 3, rtol=gamma(64, torch.float64))
    if sum(known) == 2:  # the seen ones keep their ratio
        ratio = torch.softmax(torch.from_numpy(logits(linear(), F3)[:, known]), 1)
        seen = found[:, known]
        np.testing.assert_allclose(seen / seen.sum(1, keepdims=True), ratio, rtol=gamma(64, torch.float64))


def test_imprinting_by_hand() -> None:
    head = empty_head(np.array([1, 3]), None, 2)
    features = np.array([[3, 4], [3, 4], [0, 1]], np.float32)
    found = imprint(head, features, np.array([0, 0, 1]), np.array([1.0, 3.0, 1.0]))
    radius = (1 * 5 + 3 * 5 + 1 * 1) / 5  # weighted mean norm
    np.testing.assert_allclose(found.weight, [[6 / radius, 8 / radius], [0, 10 / radius]], rtol=FEW)
    assert found.known.all()
    assert not head.known.any()
    assert not head.weight.any()


def test_imprinting_leaves_known_rows_and_weighs_samples() -> None:
    head = imprint(linear((True, False, False)), F3, np.array([0, 1, 1]), np.array([1.0, 1.0, 3.0]))
    np.testing.assert_array_equal(head.weight[0], linear().weight[0])
    assert head.known.tolist() == [True, True, False]
    mean = np.array([9.0, 0.5])  # 1 * (0, -1) + 3 * (3, 0.5)
    np.testing.assert_allclose(head.weight[1] / np.linalg.norm(head.weight[1]), mean / np.linalg.norm(mean), rtol=FEW)
    assert head.bias[1] == 0


def test_an_imprinted_class_scores_its_scaled_cosine() -> None:
    drawn = np.random.default_rng(0).normal(size=(30, 8))
    features = (7 * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    y = np.arange(30) % 3
    head = imprint(empty_head(y, None, 8), features, y, np.ones(30))
    expected = exact_logits(prototype_head(features, y, None), torch.from_numpy(features).double()).numpy()
    # rows of both heads and the features are float32, scores of 10 at most: a rounding in each factor of 8 products
    assert np.abs(logits(head, features) - expected).max() <= 2 * gamma(40) * 10


@pytest.mark.parametrize("features", [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]])
def test_a_mean_of_zero_imprints_a_row_of_zeros(features: list[list[float]]) -> None:
    head = imprint(empty_head(np.array([0]), None, 2), np.float32(features), np.array([0, 0]), np.ones(2))
    assert head.known.all()
    assert not head.weight.any()


def test_features_of_another_width_are_refused() -> None:
    wide = np.zeros((1, 3), np.float32)
    for use in (lambda: logits(linear(), wide), lambda: cross_entropy(linear(), wide, np.array([0]))):
        with pytest.raises(DataError, match="rows of 2 features, expected 3"):
            use()


def test_the_rows_of_prototypes_are_means_of_any_number_of_samples() -> None:
    found = class_means(np.array([[1, 0], [2, 8], [4, 0], [5, 4]], np.float32), np.array([0, 1, 0, 0]), 2)
    np.testing.assert_allclose(found, [[10 / 3, 4 / 3], [2, 8]], rtol=gamma(4, torch.float64))


def test_scores_of_columns_that_nobody_has_seen_by_hand() -> None:
    scores = np.log([[1.0, 7.0, 3.0]])
    # the mean likelihood of the known columns: (1 + 3) / 2
    found = even_unknown(scores, np.array([True, False, True]))
    np.testing.assert_allclose(found, np.log([[1.0, 2.0, 3.0]]), atol=gamma(16, torch.float64))
    assert not even_unknown(scores, np.zeros(3, bool)).any()
    np.testing.assert_array_equal(even_unknown(scores, np.ones(3, bool)), scores)


def test_the_gradient_at_features_by_hand() -> None:
    # two rows: scores 0 and ln 3 at (0, ln 3), so r = (1/4, -1/4) for row 1, and W^T r = r
    head = Head("linear", np.arange(2), np.eye(2, dtype=np.float32), np.zeros(2, np.float32), np.ones(2, bool))
    losses, gradient = cross_entropy(head, np.float32([[0.0, np.log(3)]]), np.array([1]))
    assert losses.dtype == np.float64
    assert gradient.dtype == np.float32
    np.testing.assert_allclose(losses, [np.log(4 / 3)], rtol=FEW)
    np.testing.assert_allclose(gradient, [[0.25, -0.25]], rtol=FEW)
    # a feature at 45 degrees to both prototypes: r = (1/2, -1/2), turned along (1, -1) / 2 by scale / sqrt(2) / length
    means = prototype_head(np.eye(2, dtype=np.float32), np.arange(2), None, scale=3.0)
    losses, gradient = cross_entropy(means, np.float32([[2.0, 2.0]]), np.array([1]))
    np.testing.assert_allclose(losses, [np.log(2)], rtol=FEW)
    np.testing.assert_allclose(gradient, 1.5 / 8**0.5 * np.array([[1.0, -1.0]]), rtol=FEW)


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["linear", "prototypes"]),
    known=st.lists(st.booleans(), min_size=2, max_size=5),
    width=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_each_samples_loss_and_gradient_are_autograds(kind: str, known: list[bool], width: int, seed: int) -> None:
    rng, classes = np.random.default_rng(seed), len(known)
    weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((classes, width), (classes,)))
    features, targets = rng.normal(0, 2, (6, width)).astype(np.float32), rng.integers(classes, size=6)
    seen = np.array(known) if kind == "linear" else np.ones(classes, bool)
    head = Head(kind, np.arange(classes), weight, bias, seen, scale=7.0)
    losses, gradient = cross_entropy(head, features, targets)

    at = leaf(features)
    scores = exact_logits(head, at)
    expected = torch.nn.functional.cross_entropy(
        even(scores, torch.from_numpy(seen)), torch.from_numpy(targets), reduction="none"
    )
    if seen.any():
        (slope,) = torch.autograd.grad(expected.sum(), at)
    else:
        slope = torch.zeros_like(at)
    units = gamma(4 * width + classes + 16, torch.float64)
    pull = np.abs(weight).sum(0).max() if kind == "linear" else 7 / np.linalg.norm(features, axis=1, keepdims=True)
    sizes = np.abs(features) @ np.abs(weight).T + np.abs(bias) if kind == "linear" else np.full((1, 1), 7.0)
    bound = 2 * softmax_bound(scores.detach().numpy(), units * sizes.max(axis=1, keepdims=True))
    within(losses, expected, bound[:, 0])
    within(gradient, slope, 2 * classes * (bound + units) * pull)


NAMED = ("cat", "dog", "emu")


@pytest.mark.parametrize(
    ("head_names", "names", "y", "expected"),
    [
        (None, None, [9, 2, 2, 5], [2, 0, 0, 1]),
        (NAMED, None, [9, 2], [2, 0]),
        (None, {2: "x", 9: "y"}, [9, 2], [2, 0]),
        (NAMED, {0: "emu", 1: "cat"}, [0, 1, 1], [2, 0, 0]),
        (NAMED, {2: "emu", 9: "cat"}, [2, 9], [2, 0]),
        (("10", "11", "2"), None, [2, 10, 11], [2, 0, 1]),
        (None, {0: "9", 1: "2", 2: "5"}, [0, 1, 2], [2, 0, 1]),
    ],
)
def test_classes_find_their_rows(head_names: Any, names: Any, y: list[int], expected: list[int]) -> None:
    found = rows(linear(names=head_names), np.array(y), names)
    assert found.dtype == np.int64
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("head_names", "names", "y", "message"),
    [
        (None, None, [2, 3], "class 3, expected one of the 3 classes"),
        (NAMED, {2: "owl"}, [2], r"class 2 \(owl\)"),
        (NAMED, {2: "cat"}, [2, 5], "class 5 without a name"),
    ],
)
def test_unknown_classes_are_refused(head_names: Any, names: Any, y: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows(linear(names=head_names), np.array(y), names)


def test_extending_keeps_rows_and_order() -> None:
    old = linear(names=NAMED)
    new = extend(old, np.array([7, 2, 11, 7]), {7: "owl", 2: "cat", 11: "ant"})
    assert new.labels.tolist() == [2, 5, 7, 9, 11]
    assert new.names == ("cat", "dog", "owl", "emu", "ant")
    assert new.known.tolist() == [True, True, False, True, False]
    np.testing.assert_array_equal(new.weight[[0, 1, 3]], old.weight)
    np.testing.assert_array_equal(new.bias, np.float32([0, 0.5, 0, 0, 0]))
    assert extend(new, np.array([7])).names == new.names


def test_extending_matches_by_name_before_integer() -> None:
    same = extend(linear(names=NAMED), np.array([0, 1]), {0: "emu", 1: "cat"})
    assert same.labels.tolist() == [2, 5, 9]
    with pytest.raises(DataError, match=r"class 5 \(owl\), expected 'dog'"):
        extend(linear(names=NAMED), np.array([5]), {5: "owl"})


def test_names_are_dropped_when_a_new_class_has_none() -> None:
    assert extend(linear(names=NAMED), np.array([3])).names is None
    first = extend(empty_head(np.zeros(0, np.int64), {}, 4), np.array([3, 1]), {1: "a", 3: "b"})
    assert first.names == ("a", "b")
    assert first.weight.shape == (2, 4)


def test_names_of_a_block() -> None:
    x: Array = np.zeros((2, 3), np.float32)
    block = Block(x, np.array([4, 6]), "ND", labels=np.array([4, 6]), names=("a", "b"))
    assert class_names(block) == {4: "a", 6: "b"}
    assert class_names(Block(x, np.array([4, 6]), "ND")) is None


@pytest.mark.parametrize("use", [rows, extend], ids=["rows", "extend"])
def test_samples_without_a_label_belong_to_no_class(use: Any) -> None:
    with pytest.raises(DataError, match=r"1 of 2 samples have no label \(y = -1\)"):
        use(linear(), np.array([2, -1]))
    for make in (
        lambda: prototype_head(np.ones((2, 3), np.float32), np.array([2, -1]), None),
        lambda: empty_head(np.array([-1]), None, 3),
    ):
        with pytest.raises(DataError, match="have no label"):
            make()
