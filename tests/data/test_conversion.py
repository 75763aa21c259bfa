"""Number formats and noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.conversion import convert, noisy_labels, share_of, with_noise
from stages.errors import DataError, UsageError


def to(x: np.ndarray, dtype: str | None = None, scale: float = 1.0, invert: bool = False) -> np.ndarray:
    return convert(x, dtype=dtype, scale=scale, invert=invert, where="here")


@pytest.mark.parametrize(
    ("given_type", "kept"),
    [
        ("uint8", "uint8"),
        ("int16", "int16"),
        ("float32", "float32"),
        ("float64", "float32"),
        ("int64", "float32"),
        ("?", "float32"),
    ],
)
def test_types_that_blocks_hold_are_kept_and_others_become_float(given_type: str, kept: str) -> None:
    x = np.array([[0, 1]], given_type)
    assert to(x).dtype == kept
    assert to(x).tolist() == [[0, 1]]


def test_values_are_rounded_scaled_and_never_wrapped() -> None:
    digits = np.array([[0.0, 7.5, 16.0]])
    assert to(digits, "uint8", 255 / 16).tolist() == [[0, 120, 255]]
    assert to(np.array([[1, 2]], np.uint8), None, 0.5).tolist() == [[0.5, 1.0]]
    assert to(np.array([[1, 2]], np.uint8), None, 0.5).dtype == np.float32
    for x in (np.array([[256]]), np.array([[-1]]), np.array([[255.6]])):
        with pytest.raises(DataError, match=r"here: values from .* expected 0 to 255 for uint8.*--scale"):
            to(x, "uint8")
    assert to(np.zeros((0, 3)), "uint8").shape == (0, 3)


def test_values_beyond_float32_are_refused() -> None:
    with pytest.raises(DataError, match=r"1e\+300.*float32"):
        to(np.array([[1e300]]))


def test_invert_is_for_uint8() -> None:
    assert to(np.array([[0, 255, 3]], np.uint8), invert=True).tolist() == [[255, 0, 252]]
    with pytest.raises(UsageError, match="--dtype uint8"):
        to(np.array([[0.5]]), invert=True)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.floats(0, 1), st.integers(0, 9))
def test_label_noise_changes_exactly_its_share_to_other_classes_of_the_data(
    y: list[int], share: float, seed: int
) -> None:
    labels = np.array(y)
    if len(set(y)) < 2:
        with pytest.raises(DataError, match="one class"):
            noisy_labels(labels, share, np.random.default_rng(seed))
        return
    noisy = noisy_labels(labels, share, np.random.default_rng(seed))
    assert int((noisy != labels).sum()) == round(share * len(y))
    assert set(noisy.tolist()) <= set(y)


def test_wrong_labels_are_uniform_over_the_other_classes() -> None:
    y = np.repeat([2, 5, 7, 11], 3000)
    noisy = noisy_labels(y, 1.0, np.random.default_rng(0))
    counts = [int((noisy[y == 5] == label).sum()) for label in (2, 7, 11)]
    assert sum(counts) == 3000
    assert max(abs(count - 1000) for count in counts) < 5 * np.sqrt(1000 * 2 / 3)


def test_share_of_counts() -> None:
    assert share_of(10, 0.25, np.random.default_rng(0)).sum() == 2  # round half to even
    assert share_of(10, 1.0, np.random.default_rng(0)).sum() == 10


def test_noise_has_the_stated_size_on_marked_samples_only() -> None:
    x = np.full((2, 100, 100), 128, np.uint8)
    out = with_noise(x, np.array([0, 1], np.uint8), 0.1, np.random.default_rng(0))
    assert np.array_equal(out[0], x[0])
    assert abs(out[1].astype(float).std() - 25.5) < 0.6
    assert x.max() == 128


def test_noise_is_clipped_not_wrapped() -> None:
    x = np.full((1, 1000), 32767, np.int16)
    out = with_noise(x, np.ones(1, np.uint8), 1.0, np.random.default_rng(0))
    assert (out == 32767).mean() > 0.4
    assert out.dtype == np.int16
    features = with_noise(np.zeros((1, 10_000), np.float32), np.ones(1, np.uint8), 2.0, np.random.default_rng(0))
    assert abs(features.std() - 2.0) < 0.08
