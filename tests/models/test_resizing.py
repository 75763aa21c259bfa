"""Resizing against torch in double precision, within what rounding allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from stages.artifacts.records import Array
from stages.models.resizing import CHUNK_FLOATS, OUTPUTS, bands_of, chunks, cubic_weights, resize
from tests.rounding import gamma

UNIT = 2.0**-24
SIZES = st.integers(1, 40) | st.sampled_from([47, 48, 49, 96, 131, 400])


def exactly_resized(x: Array, size: tuple[int, int]) -> Array:
    """torch's, in float64, line by line: it returns the first row everywhere where pictures are or become one wide."""
    tall, wide = size
    across = lines(torch.from_numpy(x.astype(np.float64)), wide)
    return lines(across.transpose(2, 3), tall).transpose(2, 3).numpy()


def lines(x: Tensor, wanted: int) -> Tensor:
    """(N, C, H, W) -> (N, C, H, wanted)."""
    alone = x.reshape(-1, 1, 1, x.shape[-1])
    resized = functional.interpolate(alone, (1, wanted), mode="bilinear", align_corners=False, antialias=True)
    return resized.reshape(*x.shape[:-1], wanted)


def slack(x: Array) -> float:
    """Both axes are sums whose weights, each rounded thrice at most, make 1."""
    return gamma(sum(x.shape[2:]) + 6) * float(np.abs(x).max(initial=0))


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 2), channels=st.sampled_from([1, 3]), height=SIZES, width=SIZES, tall=SIZES, wide=SIZES,
    kind=st.sampled_from(["float32", "uint8", "int16"]), order=st.sampled_from(["NCHW", "NHWC", "mirrored"]),
)  # fmt: skip
@example(n=1, channels=3, height=20, width=400, tall=90, wide=9, kind="uint8", order="NHWC")  # the width first
def test_any_picture_in_any_order_is_resized_as_torch_does(
    n: int, channels: int, height: int, width: int, tall: int, wide: int, kind: str, order: str
) -> None:
    shape = (n, height, width, channels) if order == "NHWC" else (n, channels, height, width)
    x = np.random.default_rng(height + width).normal(100, 30, shape).clip(0, 255).astype(kind)
    x = x.transpose(0, 3, 1, 2) if order == "NHWC" else x[..., ::-1] if order == "mirrored" else x
    before = x.copy()
    found = resize(x, (tall, wide))
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert found.shape == (n, channels, tall, wide)
    assert np.array_equal(x, before)
    if n:
        np.testing.assert_allclose(found, exactly_resized(x, (tall, wide)), rtol=0, atol=slack(x))


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    x = np.random.default_rng(0).random((5, 3, 37, 23), np.float32)
    whole = resize(x, (20, 50))
    assert all(np.array_equal(whole[i : i + 1], resize(x[i : i + 1], (20, 50))) for i in range(5))


@pytest.mark.parametrize(("found", "wanted"), [(8, 8), (4000, 224), (96, 128), (7, 100), (1, 5), (5, 1)])
def test_bands_cover_every_output_once_with_weights_of_sum_one(found: int, wanted: int) -> None:
    dense = np.zeros((wanted, found))
    for band in bands_of(found, wanted):
        assert len(band.weights) <= OUTPUTS
        dense[band.outputs, band.inputs] += band.weights
    np.testing.assert_allclose(dense.sum(axis=1), 1, rtol=0, atol=found * UNIT)
    assert (dense >= 0).all()
    assert (dense > 0).sum(axis=1).max() <= 2 * max(1, found / wanted) + 1  # a triangle's foot


def test_weights_by_hand() -> None:
    """4 to 2: centres at 1 and 3, feet 2 to each side: 3/4, 3/4, 1/4 over their sum, what lies outside left away."""
    (band,) = bands_of(4, 2)
    np.testing.assert_allclose(band.weights, np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7, rtol=2 * UNIT)


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 5, 8, 28, 96])
@pytest.mark.parametrize("found", [1, 2, 4, 7])
def test_cubic_weights_are_torchs(found: int, wanted: int) -> None:
    columns = torch.eye(found, dtype=torch.float64)[None, :, :, None]  # channel j holds a 1 at place j
    exact = functional.interpolate(columns, (wanted, 1), mode="bicubic", align_corners=True)[0, :, :, 0].T
    np.testing.assert_allclose(cubic_weights(found, wanted), exact, rtol=0, atol=2 * UNIT)


def test_cubic_weights_by_hand() -> None:
    """Halfway between two of four points: (-3, 19, 19, -3) / 32 with a = -3/4."""
    np.testing.assert_allclose(cubic_weights(4, 7)[3], np.array([-3, 19, 19, -3]) / 32, rtol=UNIT)


def test_what_is_kept_cannot_be_changed() -> None:
    for weights in (bands_of(4, 2)[0].weights, cubic_weights(4, 7)):
        with pytest.raises(ValueError, match="read-only"):
            weights[0, 0] = 1


@given(count=st.integers(0, 50), each=st.integers(0, 3 * CHUNK_FLOATS))
def test_chunks_follow_each_other_and_are_as_large_as_they_may_be(count: int, each: int) -> None:
    parts = list(chunks(count, each))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert all(size == 1 or size * each <= CHUNK_FLOATS for size in sizes)
    assert all((size + 1) * each > CHUNK_FLOATS for size in sizes[:-1])
