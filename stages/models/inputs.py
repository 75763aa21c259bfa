"""The input adapter: raw samples of a block -> the float32 array that a model reads.

Images: channels repeated (1 to 3) or mixed to luma (3 to 1, ITU-R BT.601), resized by bilinear or bicubic interpolation
with antialiasing where they shrink, the middle cut out where the model wants that, then value * scale + offset. Sound:
log-mel energies. Signals (sensors or a raw waveform over time), features and tokens: as they are, int16 signals as
shares of full scale. Only a few samples at a time are floats of their own size: beside its samples and its result the
adapter needs little memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from stages.artifacts.records import Array, Block, InputSpec, check_layout
from stages.errors import DataError
from stages.models.resizing import chunks, resize

Floats = NDArray[np.float32]

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights of red, green and blue."""

LAYOUTS_OF_KIND = {
    "image": ("NHW", "NHWC", "NCHW"),
    "sound": ("NT",),
    "signal": ("NTC", "NCT", "NT"),
    "features": ("ND",),
    "tokens": ("ND",),
}
DTYPES = ("uint8", "int16", "float32")
INT16_FULL_SCALE = 32768.0
LOUDEST = 2.0
"""Recordings of floats reach from -1 to 1, a little more where they were mixed; beyond they are no such floats."""
BYTE = 255
STANDARDISED = 16.0
"""Values on both sides of 0 that reach no further have had a mean taken off and been divided."""
BYTE_SCALE = 0.1
"""A model that multiplies pictures by less than this reads values from 0 to 255."""
LOG_FLOOR = 1e-6
"""Added to mel energies before the logarithm: silence is ln(1e-6), about -13.8."""


def adapt_block(block: Block, spec: InputSpec) -> Floats:
    """The samples of a block as the model's input: `adapt`, for samples whose rate and range of values it can read.

    Every command that gives samples to a model does it here. Raises `DataError` as `adapt` does, and for recordings of
    another rate than the model's or pictures whose values are from 0 to 1 where it reads 0 to 255.
    """
    rate = 0 if block.prepared is None else block.prepared.sample_rate_hz
    if spec.sample_rate_hz and rate and rate != spec.sample_rate_hz:
        fix = f"bring them to it with `edgetrain pack --rate {spec.sample_rate_hz}`"
        raise DataError("x", f"{rate} samples per second", f"{spec.sample_rate_hz}, the model's", fix)
    x = np.asarray(block.x[:])
    _check_range(x, spec)
    return adapt(x, block.layout, spec)


def _check_range(x: Array, spec: InputSpec) -> None:
    """Refuse numbers that must mean something else than the model reads: fractions for bytes, integers for shares."""
    plain = {"image": np.dtype(np.uint8), "sound": np.dtype(np.int16)}.get(spec.kind, x.dtype)
    if x.dtype == plain or not x.size or (x.dtype.kind == "f" and not np.isfinite(x).all()):
        return
    low, high = float(x.min()), float(x.max())
    peak = max(-low, high)
    of_bytes = spec.kind == "image" and max(spec.scale) < BYTE_SCALE
    fractions = x.dtype.kind == "f" and 0 < peak <= 1
    if of_bytes and (fractions or (low < 0 and peak <= STANDARDISED) or high > 2 * BYTE):
        fix = "bring them there, from 0 to 1 with `edgetrain pack --scale 255 --dtype uint8`"
        raise DataError("x", f"pictures of values from {low:g} to {high:g}", "0 to 255, as the model reads", fix)
    if spec.kind == "sound" and peak > LOUDEST:
        fix = "bring them there, 16-bit values with `edgetrain pack --dtype int16`"
        raise DataError("x", f"recordings of values from {low:g} to {high:g}", "-1 to 1, or int16", fix)


def adapt(x: Array, layout: str, spec: InputSpec) -> Floats:
    """Samples (N, ...) of uint8, int16 or float32 -> float32 (N, *spec.shape), contiguous.

    The result may be `x` itself where the model reads the samples as they are: treat both as values, not as storage.
    What scaling takes beyond float32 becomes infinite. Raises `DataError` for a dtype, layout or shape that the model
    cannot read, and for values that are not finite (with the index of the first such sample).
    """
    x = np.asarray(x)
    _check(x, layout, spec)
    with np.errstate(over="ignore", invalid="ignore"):
        if spec.kind == "image":
            return _image(x, layout, spec)
        if spec.kind == "sound":
            return _scaled(log_mel(x, spec)[:, None], spec)
        return _scaled(_signal(x, layout, spec) if spec.kind == "signal" else x, spec)


def _check(x: Array, layout: str, spec: InputSpec) -> None:
    if layout not in LAYOUTS_OF_KIND[spec.kind]:
        wanted = f"{' or '.join(LAYOUTS_OF_KIND[spec.kind])} for {spec.kind} input"
        raise DataError("x", f"layout {layout}", wanted, "state what it is with `edgetrain pack --layout`")
    check_layout(layout, x.shape, "x")
    if x.dtype.name not in DTYPES:
        raise DataError("x", f"dtype {x.dtype}", ", ".join(DTYPES), "convert it with `edgetrain pack`")
    if spec.kind in ("features", "tokens") and x.shape[1:] != spec.shape:
        raise DataError("x", f"{x.shape[1]} {spec.kind} per sample", f"{spec.shape[0]}, as the model was built for")
    if min(x.shape[1:]) < 1:
        raise DataError("x", f"shape {x.shape}", "at least one value per sample")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        bad = int(np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))[0])
        raise DataError(f"x, sample {bad}", "a value that is not finite", "finite numbers")
    if spec.kind == "tokens" and x.dtype.kind == "f" and (x % 1).any():
        bad = int(np.flatnonzero((x % 1).any(1))[0])
        raise DataError(f"x, sample {bad}", "a token that is no whole number", "numbers of the embedding's entries")


def _scaled(values: Array, spec: InputSpec) -> Floats:
    """Numbers (N, *spec.shape) -> value * scale + offset, by channel."""
    if _ready(values, spec):
        return values
    scale, offset = _per_channel(spec)
    result = np.multiply(values, scale, order="C")
    result += offset
    return result


def _ready(values: Array, spec: InputSpec) -> bool:
    """Whether nothing has to be done. What is read-only is copied: not every library takes it."""
    as_it_is = set(spec.scale) == {1.0} and set(spec.offset) == {0.0}
    whole = values.dtype == np.float32 and values.flags.c_contiguous and values.flags.writeable
    return as_it_is and whole and values.shape[1:] == spec.shape


def _per_channel(spec: InputSpec) -> tuple[Floats, Floats]:
    """Scales and offsets (C or 1, 1, ...) that broadcast over (N, *spec.shape)."""
    axes = (1,) * (len(spec.shape) - 1)
    return np.array(spec.scale, np.float32).reshape(-1, *axes), np.array(spec.offset, np.float32).reshape(-1, *axes)


# ------------------------------------------------------------------------------------------------------------ images


def _image(x: Array, layout: str, spec: InputSpec) -> Floats:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) -> float32 (N, *spec.shape)."""
    images = x[:, None] if layout == "NHW" else x.transpose(0, 3, 1, 2) if layout == "NHWC" else x
    found, wanted, size = images.shape[1], spec.shape[0], spec.shape[1:]
    to_luma = (found, wanted) == (3, 1)
    if not to_luma and found not in (wanted, 1):
        accepted = "1 or 3" if wanted == 1 else f"1 or {wanted}"
        raise DataError("x", f"{found} channels in layout {layout}", accepted)
    if _ready(images, spec) and not spec.crop:
        return images
    whole = _before_the_cut(images.shape[2:], spec)
    top, left = (round((a - b) / 2) for a, b in zip(whole, size, strict=True))
    scale, offset = _per_channel(spec)
    result = np.empty((len(x), *spec.shape), np.float32)
    for part in chunks(len(x), found * max(prod(images.shape[2:]), prod(whole))):
        values = resize(images[part], whole, cubic=spec.interpolation == "bicubic")
        values = values[:, :, top : top + size[0], left : left + size[1]]
        np.multiply(_luma(values) if to_luma else values, scale, out=result[part])
        result[part] += offset
    return result


def _before_the_cut(found: Sequence[int], spec: InputSpec) -> tuple[int, int]:
    """Height and width of the resized picture: the model's, or with a cut so large that its shorter side is the model's
    divided by `crop`, in the picture's proportions (torchvision's Resize and CenterCrop)."""
    height, width = spec.shape[1:]
    if not spec.crop:
        return height, width
    short = max(int(max(height, width) / spec.crop), height, width)
    tall, wide = found
    if tall <= wide:
        return short, max(int(short * wide / tall), width)
    return max(int(short * tall / wide), height), short


def _luma(colours: Floats) -> Floats:
    """(N, 3, H, W) -> (N, 1, H, W)."""
    n, _, *size = colours.shape
    return (np.array(LUMA, np.float32) @ colours.reshape(n, 3, -1)).reshape(n, 1, *size)


# ------------------------------------------------------------------------------------------------- sound and signals


def _waves(x: Array) -> Floats:
    """float32; what int16 holds as shares of full scale."""
    return x * np.float32(1 / INT16_FULL_SCALE) if x.dtype == np.int16 else x.astype(np.float32, copy=False)


def _signal(x: Array, layout: str, spec: InputSpec) -> Floats:
    """(N, T), (N, T, C) or (N, C, T) -> float32 (N, C, T), not scaled yet."""
    signals = x[:, None] if layout == "NT" else x.transpose(0, 2, 1) if layout == "NTC" else x
    if signals.shape[1:] != spec.shape:
        (channels, steps), wanted = signals.shape[1:], spec.shape
        found = f"{channels} channels of {steps} values in layout {layout}"
        raise DataError("x", found, f"{wanted[0]} of {wanted[1]}, as the model was built for", "pack such windows")
    return _waves(signals)


def log_mel(waves: Array, spec: InputSpec) -> Floats:
    """Log-mel energies: waves (N, T) in -1..1, or int16 -> float32 (N, frames, bands) = ln(mel power + 1e-6).

    Frame f covers samples f * hop .. f * hop + window, weighted by a periodic Hann window; its power spectrum
    |rfft|^2 / window is summed by triangular filters, equally spaced on the HTK mel scale
    mel(f) = 2595 log10(1 + f / 700) from 20 Hz to half the sample rate. Recordings are padded with silence or cut at
    the end to the model's frames. All in single precision; numpy before 2.0 makes the transform in double.
    """
    _, frames, bands = spec.shape
    window, hop = spec.window_samples, spec.hop_samples
    length = window + (frames - 1) * hop
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)).astype(np.float32)
    filters = mel_filters(bands, window, spec.sample_rate_hz)
    result = np.empty((len(waves), frames, bands), np.float32)
    for part in chunks(len(waves), 3 * frames * window):  # what a frame weighs, and its spectrum
        kept = _waves(waves[part, :length])
        whole = np.pad(kept, ((0, 0), (0, length - kept.shape[1])))
        spectrum = np.fft.rfft(sliding_window_view(whole, window, axis=1)[:, ::hop] * hann)
        power = np.square(spectrum.real)
        power += np.square(spectrum.imag)
        np.matmul(power.astype(np.float32, copy=False), filters, out=result[part])
    result /= window
    result += LOG_FLOOR
    return np.log(result, out=result)


@lru_cache(maxsize=8)
def mel_filters(bands: int, window: int, sample_rate_hz: int) -> Floats:
    """Triangular filters (window // 2 + 1, bands) of peak 1 at their centres, HTK mel scale from 20 Hz to Nyquist."""
    low, high = (2595.0 * np.log10(1.0 + f / 700.0) for f in (20.0, sample_rate_hz / 2.0))
    edges = 700.0 * (10.0 ** (np.linspace(low, high, bands + 2) / 2595.0) - 1.0)
    bins = np.fft.rfftfreq(window, 1.0 / sample_rate_hz)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    filters = np.clip(np.minimum(rising, falling), 0.0, None).astype(np.float32)
    filters.setflags(write=False)  # every caller gets the same
    return filters
