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
    class_names,
    empty_head,
    extend,
    imprint,
    logits,
    probabilities,
    prototype_head,
    rows,
)
from tests.rounding import exact_logits, gamma

FEW = gamma(16)
"""Relative error of so many operations in float32: what hand values of two dimensions take."""

F3 = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]])


def linear(known: tuple[bool, ...] = (True, True, True), names: tuple[str, ...] | None = None) -> Head:
    weight = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]], np.float32)
    return Head("linear", np.array([2, 5, 9]), weight, np.array([0.0, 0.5, 0.0], np.float32), np.array(known), names)


def test_linear_scores_by_hand() -> None:
    np.testing.assert_allclose(logits(linear(), F3), [[1, 2.5, 1], [0, -0.5, -1], [3, 1, -2.5]])


def test_prototype_scores_are_scaled_cosines() -> None:
    head = prototype_head(torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), np.array([4, 4, 1]), None)
    assert head.labels.tolist() == [1, 4]
    np.testing.assert_allclose(head.weight, [[0, 2], [2, 0]])
    found = logits(head, torch.tensor([[0.0, 5.0], [1.0, 1.0]]))
    np.testing.assert_allclose(found, [[10, 0], [50**0.5 * 2**0.5 / 2**0.5, 50**0.5]], rtol=FEW)


@settings(max_examples=40, deadline=None)
@given(known=st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_row_nobody_has_seen_counts_as_uniform(known: list[bool]) -> None:
    head = linear(tuple(known))
    found = probabilities(head, F3)
    np.testing.assert_allclose(found.sum(1), 1, rtol=FEW)
    unseen = ~np.array(known)
    np.testing.assert_allclose(found[:, unseen], 1 / 3, rtol=gamma(64))
    if sum(known) == 2:  # the seen ones keep their ratio
        scores = logits(linear(), F3)[:, known]
        ratio = torch.softmax(scores, 1)
        np.testing.assert_allclose(found[:, known] / found[:, known].sum(1, keepdim=True), ratio, rtol=gamma(64))


def test_imprinting_by_hand() -> None:
    head = empty_head(np.array([1, 3]), None, 2)
    features = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 1.0]])
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
    features = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1) * 7
    y = np.arange(30) % 3
    head = imprint(empty_head(y, None, 8), features, y, np.ones(30))
    expected = exact_logits(prototype_head(features, y, None), features.double())
    # length 7 and cosine scale 10: dot products of 8 terms and the normalisations, about 40 operations on each side
    assert float((logits(head, features) - expected).abs().max()) <= 2 * gamma(40) * 10


@pytest.mark.parametrize("features", [torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])])
def test_a_mean_of_zero_imprints_a_row_of_zeros(features: torch.Tensor) -> None:
    head = imprint(empty_head(np.array([0]), None, 2), features, np.array([0, 0]), np.ones(2))
    assert head.known.all()
    assert not head.weight.any()


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(DataError, match="rows of 2 features, expected 3"):
        logits(linear(), torch.zeros(1, 3))


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
        lambda: prototype_head(torch.ones(2, 3), np.array([2, -1]), None),
        lambda: empty_head(np.array([-1]), None, 3),
    ):
        with pytest.raises(DataError, match="have no label"):
            make()
