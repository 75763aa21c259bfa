"""The input adapter: layouts, channels, sizes, scaling, sound, and what it refuses."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from math import ceil, log2
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts.records import Array, Block, InputSpec, Preparation
from stages.errors import DataError
from stages.models.inputs import LOG_FLOOR, LUMA, adapt, adapt_block, log_mel, mel_filters
from tests.models.test_resizing import exactly_resized
from tests.rounding import gamma


def image(*shape: int, scale: tuple[float, ...] = (1.0,), offset: tuple[float, ...] = (0.0,)) -> InputSpec:
    return InputSpec("image", shape, scale, offset)


def pixels(*shape: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_the_three_layouts_of_images_agree() -> None:
    x = pixels(4, 3, 6, 5)
    expected = x.astype(np.float32)
    assert np.array_equal(adapt(x, "NCHW", image(3, 6, 5)), expected)
    assert np.array_equal(adapt(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), "NHWC", image(3, 6, 5)), expected)
    assert np.array_equal(adapt(x[:, 0], "NHW", image(1, 6, 5)), expected[:, :1])


def test_grey_is_repeated_and_colour_becomes_luma() -> None:
    grey = pixels(2, 4, 4)
    repeated = adapt(grey, "NHW", image(3, 4, 4))
    assert np.array_equal(repeated[:, 0], repeated[:, 2])
    colour = np.array([[[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]]], np.uint8)
    luma = adapt(colour, "NHWC", image(1, 1, 4))
    np.testing.assert_allclose(luma.flatten(), [76.245, 149.685, 29.07, 255.0], rtol=1e-6)  # 255 * 0.299, 0.587, 0.114


def test_scaling_is_per_channel() -> None:
    x = np.array([[[[0, 255]]]], np.uint8)
    assert adapt(x, "NCHW", image(1, 1, 2, scale=(2 / 255,), offset=(-1.0,))).flatten().tolist() == [-1.0, 1.0]
    two = adapt(np.ones((1, 2, 1, 1), np.float32), "NCHW", image(2, 1, 1, scale=(2.0, 3.0), offset=(0.5, 0.0)))
    assert two.flatten().tolist() == [2.5, 3.0]


def test_shrinking_averages_instead_of_skipping() -> None:
    stripes = np.tile(np.array([200, 0, 0, 0], np.uint8), (1, 16, 4))  # (1, 16, 16): one bright column in four
    small = adapt(stripes, "NHW", image(1, 4, 4))
    np.testing.assert_allclose(small.mean(), 50, rtol=0.15)  # two columns around each centre would see 0
    constant = np.full((2, 9, 7), 50, np.uint8)
    np.testing.assert_allclose(adapt(constant, "NHW", image(1, 28, 28)), 50, rtol=1e-6)


def test_enlarging_is_plain_bilinear() -> None:
    x = np.array([[[0, 100]]], np.uint8)
    wide = adapt(x, "NHW", image(1, 1, 4)).flatten()
    np.testing.assert_allclose(wide, [0, 25, 75, 100], atol=1e-4)  # pixel centres at 1/4 steps, edges held


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 3), height=st.integers(1, 9), width=st.integers(1, 9), target=st.integers(1, 9))
def test_any_size_becomes_the_models(n: int, height: int, width: int, target: int) -> None:
    x = np.full((n, height, width, 3), 7, np.uint8)
    found = adapt(x, "NHWC", image(3, target, 4))
    assert found.shape == (n, 3, target, 4)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, 7, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(["NHW", "NHWC", "NCHW"]), dtype=st.sampled_from(["uint8", "int16", "float32"]),
    colours=st.sampled_from([1, 3]), wanted=st.sampled_from([1, 3]), size=st.tuples(*[st.integers(1, 30)] * 4),
)  # fmt: skip
def test_pictures_are_resized_mixed_and_scaled(
    layout: str, dtype: str, colours: int, wanted: int, size: tuple[int, int, int, int]
) -> None:
    height, width, *target = size
    scales, offsets = ((0.02, 0.03, 0.05), (-1.0, 0.5, 0.0)) if wanted == 3 else ((0.02,), (-1.0,))
    plain = np.random.default_rng(height).normal(100, 40, (2, colours, height, width)).clip(0, 255).astype(dtype)
    x = plain.transpose(0, 2, 3, 1) if layout == "NHWC" else plain
    if layout == "NHW":
        plain = plain[:, :1]
        x = plain[:, 0]
    values = plain.astype(np.float64)
    if (values.shape[1], wanted) == (3, 1):
        values = np.tensordot(values, LUMA, axes=(1, 0))[:, None]
    exact = exactly_resized(values, (target[0], target[1])) * np.reshape(scales, (-1, 1, 1)) + np.reshape(
        offsets, (-1, 1, 1)
    )
    found = adapt(x, layout, image(wanted, *target, scale=scales, offset=offsets))
    assert found.dtype == np.float32
    atol = gamma(height + width + 14) * (255 * max(scales) + 1)  # both axes, luma, scale and offset, weights of each
    np.testing.assert_allclose(found, np.broadcast_to(exact, found.shape), rtol=0, atol=atol)


def test_large_pictures_become_floats_a_few_rows_at_a_time() -> None:
    x = np.zeros((3, 1500, 2000, 3), np.uint8)
    floats = 4 * x[0].size
    for layout, pictures in (("NHWC", x), ("NCHW", x.reshape(3, 3, 1500, 2000))):
        tracemalloc.start()
        adapt(pictures, layout, image(3, 32, 32))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < floats / 2


@pytest.mark.parametrize(
    ("x", "layout", "spec"),
    [
        (np.ones((2, 3, 4, 5), np.float32), "NCHW", image(3, 4, 5)),
        (np.ones((2, 4, 5), np.float32), "NHW", image(1, 4, 5)),
        (np.ones((2, 3, 4), np.float32), "NCT", InputSpec("signal", (3, 4), (1.0,) * 3, (0.0,) * 3)),
        (np.ones((2, 4), np.float32), "NT", InputSpec("signal", (1, 4))),
        (np.ones((2, 4), np.float32), "ND", InputSpec("features", (4,))),
    ],
)
def test_what_the_model_reads_as_it_is_is_not_copied(x: Array, layout: str, spec: InputSpec) -> None:
    assert np.shares_memory(adapt(x, layout, spec), x)
    x.setflags(write=False)
    found = adapt(x, layout, spec)
    assert found.flags.writeable
    assert found.tolist() == x.reshape(2, *spec.shape).tolist()
    x.setflags(write=True)
    scaled = adapt(x, layout, replace(spec, scale=(2.0,)))
    assert not np.shares_memory(scaled, x)
    assert (scaled == 2).all()


def test_what_float32_cannot_hold_becomes_infinite_without_a_warning() -> None:
    assert np.isinf(adapt(np.full((1, 2), 1e38, np.float32), "ND", InputSpec("features", (2,), (100.0,)))).all()


def test_samples_do_not_depend_on_their_chunk() -> None:
    x = pixels(5, 11, 13)
    whole = adapt(x, "NHW", image(3, 8, 8))
    parts = np.concatenate([adapt(x[:2], "NHW", image(3, 8, 8)), adapt(x[2:], "NHW", image(3, 8, 8))])
    assert np.array_equal(whole, parts)


def test_the_samples_are_not_touched() -> None:
    x = np.ones((2, 3), np.float32)
    x.setflags(write=False)
    adapt(x, "ND", InputSpec("features", (3,), (2.0,), (1.0,)))
    assert (x == 1).all()


def test_the_layouts_of_signals_agree() -> None:
    """Two channels of three steps by hand; int16 is a share of full scale, and scales are per channel."""
    spec = InputSpec("signal", (2, 3), (1.0, 2.0), (0.0, 0.5))
    time_first = np.array([[[1, 10], [2, 20], [3, 30]]], np.float32)
    expected = [[[1.0, 2, 3], [20.5, 40.5, 60.5]]]
    assert np.array_equal(adapt(time_first, "NTC", spec), expected)
    assert np.array_equal(adapt(time_first.transpose(0, 2, 1), "NCT", spec), expected)
    wave = np.array([[-32768, 0, 16384]], np.int16)
    assert np.array_equal(adapt(wave, "NT", InputSpec("signal", (1, 3))), [[[-1.0, 0.0, 0.5]]])


@pytest.mark.parametrize(
    ("x", "layout", "spec", "message"),
    [
        (pixels(2, 4, 4, 4), "NHWC", image(3, 4, 4), "4 channels in layout NHWC, expected 1 or 3"),
        (pixels(2, 4, 4, 2), "NHWC", image(1, 4, 4), "2 channels in layout NHWC, expected 1 or 3"),
        (pixels(2, 4, 4).astype(np.float64), "NHW", image(1, 4, 4), "float64, expected uint8, int16, float32"),
        (pixels(2, 4, 4), "NHWC", image(1, 4, 4), "layout 'NHWC' with shape"),
        (pixels(2, 4), "NT", image(1, 4, 4), "layout NT, expected NHW or NHWC or NCHW for image"),
        (np.zeros((2, 4), np.float32), "ND", InputSpec("features", (5,)), "4 features per sample, expected 5"),
        (
            np.zeros((2, 4, 3), np.float32),
            "NTC",
            InputSpec("signal", (3, 5)),
            "3 channels of 4 values .* expected 3 of 5",
        ),
        (np.zeros((2, 4), np.float32), "NT", InputSpec("signal", (3, 4)), "1 channels of 4 values .* expected 3 of 4"),
        (np.zeros((2, 4, 3), np.float32), "NHW", InputSpec("signal", (3, 4)), "layout NHW, expected NTC or NCT or NT"),
        (np.zeros((2, 0, 4), np.uint8), "NHW", image(1, 4, 4), "at least one value"),
    ],
)
def test_what_cannot_be_read_is_named(x: Array, layout: str, spec: InputSpec, message: str) -> None:
    with pytest.raises(DataError, match=message):
        adapt(x, layout, spec)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_sample_that_is_not_finite_is_named(bad: float) -> None:
    x = np.zeros((5, 4), np.float32)
    x[[2, 4], 1] = bad
    with pytest.raises(DataError, match="sample 2: a value that is not finite"):
        adapt(x, "ND", InputSpec("features", (4,)))


# -------------------------------------------------------------------------------------------------------------- sound

SOUND = InputSpec("sound", (1, 5, 8), sample_rate_hz=8000, window_samples=320, hop_samples=160)


def naive_log_mel(wave: Array, spec: InputSpec) -> Array:
    """The documented formula, written as loops with an explicit DFT."""
    _, frames, bands = spec.shape
    window, hop, rate = spec.window_samples, spec.hop_samples, spec.sample_rate_hz
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)

    def mel(f: float) -> float:
        return 2595 * np.log10(1 + f / 700)

    edges = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(mel(20), mel(rate / 2), bands + 2)]
    out: Any = np.zeros((frames, bands))
    for frame in range(frames):
        piece = wave[frame * hop : frame * hop + window] * hann
        for k in range(window // 2 + 1):
            f = k * rate / window
            power = abs(np.sum(piece * np.exp(-2j * np.pi * k * np.arange(window) / window))) ** 2 / window
            for band in range(bands):
                left, centre, right = edges[band : band + 3]
                out[frame, band] += power * max(0.0, min((f - left) / (centre - left), (right - f) / (right - centre)))
    return np.log(out + LOG_FLOOR)


@pytest.mark.parametrize("steps", [960, 700, 1200])
def test_log_mel_is_the_documented_formula(steps: int) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, steps).astype(np.float32)
    whole = np.zeros(960)
    whole[: min(steps, 960)] = wave[:960]
    found = log_mel(wave[None], SOUND)
    assert found.dtype == np.float32
    exact, slack = naive_log_mel(whole, SOUND), log_mel_slack(whole, SOUND)
    assert (np.abs(found[0] - exact) <= slack).all()
    assert np.array_equal(found, log_mel(np.stack([wave] * 40), SOUND)[33:34])  # whatever is worked on at a time


def log_mel_slack(wave: Array, spec: InputSpec) -> Array:
    """How far log-mel energies in float32 may lie from the exact ones, (frames, bands).

    A sample goes through its weight and at most log2(window) stages of the transform, of at most 10 roundings each
    (sums of radices up to 5, a rounded complex twiddle factor). So a coefficient X is off by e = gamma sum |piece|, its
    power by 2 |X| e + e^2; powers enter a band with the filters, which bound what a sum of that many adds.
    """
    _, frames, bands = spec.shape
    window, hop = spec.window_samples, spec.hop_samples
    pieces = np.stack([wave[f * hop : f * hop + window] for f in range(frames)]) * np.hanning(window + 1)[:-1]
    size = np.abs(np.fft.rfft(pieces))
    off = gamma(10 * ceil(log2(window)) + 2) * np.abs(pieces).sum(axis=1, keepdims=True)
    filters = mel_filters(bands, window, spec.sample_rate_hz).astype(np.float64)
    mel = size**2 / window @ filters
    error = (2 * size * off + off**2) / window @ filters + gamma(len(filters) + 6) * (mel + LOG_FLOOR)
    # |ln(y + d) - ln y| <= d / (y - d), and float32's logarithm is good to 4 units in the last place.
    return error / (mel + LOG_FLOOR - error) + gamma(8) * np.abs(np.log(mel + LOG_FLOOR))


def test_a_tone_lights_its_band() -> None:
    t = np.arange(960) / 8000
    for hz in (300, 1000, 3000):
        energy = log_mel(np.sin(2 * np.pi * hz * t)[None].astype(np.float32), SOUND)[0].mean(0)
        filters = mel_filters(8, 320, 8000)
        assert int(energy.argmax()) == int(filters[hz // 25].argmax())


def test_silence_is_the_floor_and_recordings_are_padded_or_cut() -> None:
    silence = adapt(np.zeros((2, 10), np.int16), "NT", SOUND)
    assert silence.shape == (2, 1, 5, 8)
    np.testing.assert_allclose(silence, np.log(LOG_FLOOR), rtol=1e-6)
    long = np.random.default_rng(0).integers(-9999, 9999, (1, 2000)).astype(np.int16)
    assert np.array_equal(adapt(long, "NT", SOUND), adapt(long[:, :960], "NT", SOUND))


def test_int16_is_read_as_minus_one_to_one() -> None:
    wave = np.random.default_rng(0).integers(-9999, 9999, (3, 960)).astype(np.int16)
    floats = (wave / 32768).astype(np.float32)
    assert np.array_equal(adapt(wave, "NT", SOUND), adapt(floats, "NT", SOUND))


def test_every_filter_of_the_default_front_end_hears_something() -> None:
    for bands, window, rate in ((40, 640, 16000), (40, 320, 8000), (10, 320, 8000)):
        filters = mel_filters(bands, window, rate)
        assert filters.shape == (window // 2 + 1, bands)
        assert bool((filters.max(0) > 0).all())
        assert float(filters.max()) <= 1.0


# ------------------------------------------------------------------------------------------ blocks, by what they mean


BYTES = InputSpec("image", (1, 2, 2), (2 / 255,), (-1.0,))


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_pictures_of_fractions_are_not_read_as_bytes(low: float) -> None:
    x = np.linspace(low, 1, 8, dtype=np.float32).reshape(2, 2, 2)
    block = Block(x, np.zeros(2, np.int64), "NHW")
    with pytest.raises(DataError, match=r"pictures of values from -?\d to 1, expected 0 to 255.*--scale 255"):
        adapt_block(block, BYTES)
    assert adapt_block(replace(block, x=np.abs(x) * 255), BYTES).shape == (2, 1, 2, 2)
    assert adapt_block(replace(block, x=x * 0), BYTES).max() == -1
    fractions = replace(BYTES, scale=(2.0,))
    assert np.array_equal(adapt_block(block, fractions), adapt(x, "NHW", fractions))


@pytest.mark.parametrize("values", [(-2.1, 2.6), (0, 65535), (-1, 0)])
def test_standardised_and_sixteen_bit_pictures_are_not_read_as_bytes(values: tuple[float, float]) -> None:
    block = Block(np.array([[values]], np.float32), np.zeros(1, np.int64), "NHW")
    with pytest.raises(DataError, match="expected 0 to 255"):
        adapt_block(block, BYTES)
    noisy = np.array([[[-20.0, 270.0]]], np.float32)  # bytes with noise
    assert np.isfinite(adapt_block(replace(block, x=noisy), BYTES)).all()


def test_recordings_of_integers_are_not_read_as_fractions() -> None:
    x = np.full((1, 640), 9000, np.float32)
    block = Block(x, np.zeros(1, np.int64), "NT")
    with pytest.raises(DataError, match=r"recordings of values from 9000 to 9000, expected -1 to 1.*--dtype int16"):
        adapt_block(block, SOUND)
    assert np.isfinite(adapt_block(replace(block, x=x.astype(np.int16)), SOUND)).all()


def test_a_rate_that_is_known_must_be_the_models() -> None:
    block = Block(np.zeros((1, 640), np.int16), np.zeros(1, np.int64), "NT")
    for rate in (0, 8000):
        adapt_block(replace(block, prepared=Preparation(sample_rate_hz=rate)), SOUND)
    with pytest.raises(DataError, match=r"44100 samples per second, expected 8000, the model's; .*--rate 8000"):
        adapt_block(replace(block, prepared=Preparation(sample_rate_hz=44100)), SOUND)
