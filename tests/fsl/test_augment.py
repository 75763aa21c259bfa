"""Augmentation: what the words mean, and what is done given the draws, against torch in double precision."""

from __future__ import annotations

from dataclasses import replace
from math import radians

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from stages.artifacts.records import Array, InputSpec
from stages.errors import UsageError
from stages.fsl.augment import (
    HANDWRITING,
    PSEUDO_QUERY,
    Augmentation,
    Floats,
    augment,
    jitter,
    linear_maps,
    recolour,
    shift,
    soften,
    warp,
)
from tests.models.test_resizing import exactly_resized
from tests.rounding import gamma

IMAGE = InputSpec("image", (3, 8, 8))
SOUND = InputSpec("sound", (1, 10, 4))
SIGNAL = InputSpec("signal", (3, 20))
FEATURES = InputSpec("features", (6,))
STILL = Augmentation(probability=1.0, color=False, translation=0.0)
EVERYTHING = replace(HANDWRITING, color=True, flip=True)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def samples(spec: InputSpec, count: int = 6) -> Floats:
    return rng(99).random((count, *spec.shape), np.float32)


@pytest.mark.parametrize("spec", [IMAGE, SOUND, SIGNAL, FEATURES], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("how", [PSEUDO_QUERY, EVERYTHING], ids=["pseudo-query", "everything"])
def test_same_seed_same_result_and_the_input_stays(spec: InputSpec, how: Augmentation) -> None:
    x = samples(spec)
    before = x.copy()
    how = replace(how, probability=1.0)
    once, again, other = (augment(x, spec, rng(seed), how) for seed in (1, 1, 2))
    assert np.array_equal(x, before)
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert not np.array_equal(once, x)
    assert once.shape == x.shape
    assert np.isfinite(once).all()
    assert once.dtype == np.float32
    assert once.flags.c_contiguous
    assert not np.shares_memory(once, x)


def test_probability_zero_changes_nothing() -> None:
    x = samples(IMAGE)
    assert not np.shares_memory(augment(x, IMAGE, rng(), replace(EVERYTHING, probability=0.0)), x)
    assert np.array_equal(augment(x, IMAGE, rng(), replace(EVERYTHING, probability=0.0)), x)


def changed_rows(coin: str, seed: int) -> Array:
    x = samples(IMAGE, 40)
    how = Augmentation(probability=0.5, coin=coin)
    return (augment(x, IMAGE, rng(seed), how) != x).reshape(40, -1).any(1)


def test_one_coin_for_the_batch_or_one_per_sample() -> None:
    for seed in range(10):
        rows = changed_rows("batch", seed)
        assert rows.all() or not rows.any()
    assert {bool(changed_rows("batch", seed).all()) for seed in range(10)} == {True, False}
    assert 5 < changed_rows("sample", 0).sum() < 35


def test_flip_mirrors() -> None:
    x = samples(IMAGE)
    how = replace(STILL, flip=True, coin="sample")
    y = augment(x, IMAGE, rng(3), how)
    mirrored = (y == x[..., ::-1]).all(axis=(1, 2, 3))
    assert (mirrored | (y == x).all(axis=(1, 2, 3))).all()
    assert 0 < mirrored.sum() < len(x)


def test_shift_moves_whole_pixels_and_fills_the_rest() -> None:
    x = np.broadcast_to(np.arange(8, dtype=np.float32), (200, 3, 8, 8))  # every row is 0..7
    edge = augment(x, IMAGE, rng(), replace(STILL, translation=0.125))[:, 0, 0]
    expected = {(0, 0, 1, 2, 3, 4, 5, 6), tuple(range(8)), (1, 2, 3, 4, 5, 6, 7, 7)}
    assert {tuple(row.tolist()) for row in edge} == expected
    zero = augment(x + 1, IMAGE, rng(), replace(STILL, translation=0.125, fill="zero"))[:, 0]
    assert (zero[:, 3, 0] == 0).any()
    assert (zero[:, 3, 7] == 0).any()


def test_sound_shifts_in_time_only() -> None:
    bands = np.broadcast_to(np.arange(4, dtype=np.float32), (50, 1, 10, 4))
    assert np.array_equal(augment(bands, SOUND, rng(), replace(STILL, translation=0.2)), bands)
    frames = np.broadcast_to(np.arange(10, dtype=np.float32)[:, None], (50, 1, 10, 4))
    assert not np.array_equal(augment(frames, SOUND, rng(), replace(STILL, translation=0.2)), frames)


def test_signals_shift_in_time_with_all_channels_together() -> None:
    x = np.broadcast_to(np.arange(20, dtype=np.float32), (50, 3, 20))
    y = augment(x, SIGNAL, rng(), replace(STILL, translation=0.2))
    assert np.array_equal(y[:, 0], y[:, 2])
    assert {int(row[10]) for row in y[:, 0]} == set(range(6, 15))


def test_color_keeps_grey_pictures_grey() -> None:
    grey = np.repeat(samples(InputSpec("image", (1, 8, 8))), 3, axis=1)
    y = augment(grey, IMAGE, rng(), Augmentation(probability=1.0, translation=0.0))
    # The mean of three equal numbers may be off by a rounding; all channels are added the same one.
    assert np.array_equal(y[:, 0], y[:, 1])
    assert np.array_equal(y[:, 0], y[:, 2])


@pytest.mark.parametrize("name", ["rotation_deg", "zoom", "shear", "elastic", "soften"])
def test_distortions_change_shapes_but_not_uniform_pictures(name: str) -> None:
    how = replace(STILL, **{name: 10.0 if name == "rotation_deg" else 0.9})
    flat = np.full((6, 3, 8, 8), 0.25, np.float32)
    np.testing.assert_allclose(augment(flat, IMAGE, rng(), how), flat, rtol=gamma(40))
    assert not np.allclose(augment(samples(IMAGE), IMAGE, rng(), how), samples(IMAGE))


@pytest.mark.parametrize(
    "wrong", [{"probability": 1.5}, {"coin": "dice"}, {"fill": "red"}, {"translation": 0.5}, {"zoom": -1.0}], ids=str
)
def test_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(UsageError):
        Augmentation(**wrong)


# ---------------------------------------------------------------------------------------- what is done, given the draws

SMALL = st.integers(1, 12)


def exact(x: Array) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float64))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 5), channels=st.sampled_from([1, 3]), height=SMALL, width=SMALL, seed=st.integers(0, 99))
def test_recolour_is_diffaugments(n: int, channels: int, height: int, width: int, seed: int) -> None:
    x = rng(seed).normal(0, 1, (n, channels, height, width)).astype(np.float32)
    b, s, c = (rng(seed).uniform(*ends, (n, 1, 1, 1)).astype(np.float32) for ends in ((-0.5, 0.5), (0, 2), (0.5, 1.5)))
    y, bright, vivid, strong = map(exact, (x, b, s, c))
    y = y + bright
    grey = y.mean(dim=1, keepdim=True)
    y = (y - grey) * vivid + grey
    mean = y.mean(dim=(1, 2, 3), keepdim=True)
    y = (y - mean) * strong + mean
    recolour(x, b, s, c)
    # No value is beyond 6, no draw beyond 2; the means are sums of all values of a sample.
    np.testing.assert_allclose(x, y, rtol=0, atol=gamma(channels * height * width + 10) * 6 * 2 * 1.5 * 3)


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    n=st.integers(0, 4),
    height=SMALL,
    width=SMALL,
    axes=st.integers(1, 2),
    fill=st.sampled_from(["edge", "zero"]),
)
def test_shift_moves_every_sample_by_its_own_steps(
    data: st.DataObject, n: int, height: int, width: int, axes: int, fill: str
) -> None:
    """Place (i, j) shows what was at (i - down, j - right), or at the border next to it."""
    x = rng().random((n, 2, height, width), np.float32)
    sizes = (height, width)[:axes]
    steps = [[data.draw(st.integers(1 - size, size - 1)) for size in sizes] for _ in range(n)]
    expected = x.copy()
    for sample, moves in enumerate(steps):
        down, right = (*moves, 0)[:2]
        for i in range(height):
            for j in range(width):
                row, column = min(max(i - down, 0), height - 1), min(max(j - right, 0), width - 1)
                outside = (row, column) != (i - down, j - right)
                expected[sample, :, i, j] = 0 if fill == "zero" and outside else x[sample, :, row, column]
    shift(x, np.array(steps, np.int64).reshape(n, axes), fill)
    assert np.array_equal(x, expected)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3), height=SMALL, width=SMALL, seed=st.integers(0, 99), strength=st.sampled_from([0.1, 1.0, 3.0]),
    elastic=st.booleans(), fill=st.sampled_from(["edge", "zero"]),
)  # fmt: skip
def test_warp_is_grid_sample(
    n: int, height: int, width: int, seed: int, strength: float, elastic: bool, fill: str
) -> None:
    draws = rng(seed)
    x = draws.uniform(-1, 1, (n, 2, height, width)).astype(np.float32)
    linear = np.eye(2) + strength * draws.uniform(-1, 1, (n, 2, 2))
    coarse = (0.3 * strength * draws.uniform(-1, 1, (n, 2, 4, 4))).astype(np.float32) if elastic else None
    maps = torch.cat([exact(linear), torch.zeros(n, 2, 1, dtype=torch.float64)], dim=2)
    grid = functional.affine_grid(maps, [n, 1, height, width], align_corners=False)
    if coarse is not None:
        smooth = functional.interpolate(exact(coarse), (height, width), mode="bicubic", align_corners=True)
        grid = grid + smooth.permute(0, 2, 3, 1)
    padding = "border" if fill == "edge" else "zeros"
    expected = functional.grid_sample(exact(x), grid, mode="bilinear", padding_mode=padding, align_corners=False)
    warp(x, linear, coarse, fill)
    # A place is a sum of 2 products and 2 x 4 x 4 weighted displacements, whose weights' sizes sum to below 2 per axis,
    # in units of half a side; then 3 more roundings. Between pixels at most 2 apart, values follow their place.
    reach = float(np.abs(linear).sum(axis=2).max()) + (4 * float(np.abs(coarse).max()) if coarse is not None else 0.0)
    off = gamma(16) * (reach + 3) * max(height, width) / 2
    np.testing.assert_allclose(x, expected, rtol=0, atol=2 * 2 * off + gamma(8) * 2)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5), height=SMALL, width=SMALL, share=st.floats(0.25, 0.5), seed=st.integers(0, 99))
def test_soften_shrinks_and_enlarges_the_chosen(n: int, height: int, width: int, share: float, seed: int) -> None:
    x = rng(seed).uniform(-1, 1, (n, 2, height, width)).astype(np.float32)
    rows = np.flatnonzero(rng(seed).random(n) < 0.5)
    expected = x.astype(np.float64)
    small = (max(1, round(share * height)), max(1, round(share * width)))
    expected[rows] = exactly_resized(exactly_resized(x[rows], small), (height, width))
    before = x.copy()
    soften(x, rows, share)
    np.testing.assert_allclose(x, expected, rtol=0, atol=gamma(2 * (height + width) + 12))
    others = np.setdiff1d(np.arange(n), rows)
    assert np.array_equal(x[others], before[others])


@pytest.mark.parametrize("shape", [(40, 3, 20), (400, 3)], ids=["signals", "features"])
def test_jitter_follows_each_channels_or_features_deviation(shape: tuple[int, ...]) -> None:
    sizes = np.array([1.0, 10.0, 0.0]).reshape(3, *[1] * (len(shape) - 2))
    x = ((rng().normal(0, 1, shape) + 5) * sizes).astype(np.float32)
    noise = rng(1).standard_normal(shape, np.float32)
    over = (0, 2) if len(shape) == 3 else (0,)
    deviation = x.astype(np.float64).std(axis=over, keepdims=True)
    expected = x + 0.5 * deviation * noise
    slack = gamma(8) * (np.abs(x) + np.abs(noise) * (deviation + np.abs(x).max(axis=over, keepdims=True)))
    before = x.copy()
    jitter(x, noise.copy(), 0.5)
    assert (np.abs(x - expected) <= slack).all()
    assert np.array_equal(x[:, 2], before[:, 2])  # a channel that never changes stays as it is


def test_augment_adds_normal_noise_of_the_share_asked_for() -> None:
    for spec in (SIGNAL, FEATURES):
        x = rng(2).normal(0, 1, (2000, *spec.shape)).astype(np.float32)
        added = augment(x, spec, rng(1), Augmentation(probability=1.0, translation=0.0, jitter=0.5)) - x
        # Of n >= 12000 squares of a normal deviate of deviation 1/2: mean 1/4, deviation sqrt(2 / n) / 4.
        assert abs(float(np.square(added).mean()) - 0.25) < 6 * np.sqrt(2 / added.size) / 4


def test_linear_maps_turn_zoom_and_shear_as_far_as_they_may() -> None:
    turned = linear_maps(500, rng(), replace(STILL, rotation_deg=20.0))
    np.testing.assert_allclose(turned @ turned.transpose(0, 2, 1), np.broadcast_to(np.eye(2), (500, 2, 2)), atol=1e-12)
    angles = np.arctan2(turned[:, 1, 0], turned[:, 0, 0])
    assert radians(19) < angles.max() <= radians(20)
    assert -radians(20) <= angles.min() < -radians(19)

    zoomed = linear_maps(500, rng(), replace(STILL, zoom=0.5))
    assert (zoomed[:, [0, 1], [1, 0]] == 0).all()
    sizes = np.sqrt(zoomed[:, 0, 0] * zoomed[:, 1, 1])  # the stretch of one axis is the other's shrinking
    assert 1 / 1.5 <= sizes.min() < 0.7 < 1.45 < sizes.max() <= 1.5 * (1 + 1e-12)
    stretch = zoomed[:, 0, 0] / sizes
    assert 1.5 ** (-1 / 3) * (1 - 1e-12) <= stretch.min() < 0.9 < 1.1 < stretch.max() <= 1.5 ** (1 / 3) * (1 + 1e-12)

    sheared = linear_maps(500, rng(), replace(STILL, shear=0.3))
    assert (sheared[:, [0, 1, 1], [0, 0, 1]] == [1, 0, 1]).all()
    assert -0.3 <= sheared[:, 0, 1].min() < -0.28
    assert 0.28 < sheared[:, 0, 1].max() <= 0.3


def test_samples_of_a_batch_are_drawn_apart() -> None:
    """One picture many times over: nothing of what is drawn per sample is the same for all."""
    x = np.repeat(samples(IMAGE, 1), 12, axis=0)
    for how in (PSEUDO_QUERY, replace(EVERYTHING, soften=0.0)):
        y = augment(x, IMAGE, rng(), replace(how, probability=1.0))
        assert len(np.unique(y.reshape(12, -1), axis=0)) == 12


def test_a_coin_per_sample_leaves_the_rest_bit_for_bit() -> None:
    x = samples(IMAGE, 40)
    y = augment(x, IMAGE, rng(), replace(EVERYTHING, probability=0.5))
    same = (y == x).all(axis=(1, 2, 3))
    assert 5 < same.sum() < 35
