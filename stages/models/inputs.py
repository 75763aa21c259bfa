"""The input adapter: raw samples of a block -> the float32 tensor that a model reads.

Images: channels repeated (1 to 3) or mixed to luma (3 to 1, ITU-R BT.601), resized by bilinear interpolation with
antialiasing where they shrink, then value * scale + offset. Sound: log-mel energies. Signals (sensors or a raw waveform
over time) and features: as they are, int16 as shares of full scale.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.artifacts.records import Array, Block, InputSpec, check_layout
from stages.errors import DataError

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights of red, green and blue."""

LAYOUTS_OF_KIND = {
    "image": ("NHW", "NHWC", "NCHW"),
    "sound": ("NT",),
    "signal": ("NTC", "NCT", "NT"),
    "features": ("ND",),
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


def adapt_block(block: Block, spec: InputSpec) -> Tensor:
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


def adapt(x: Array, layout: str, spec: InputSpec) -> Tensor:
    """Samples (N, ...) of uint8, int16 or float32 -> float32 (N, *spec.shape), contiguous.

    Raises `DataError` for a dtype, layout or shape that the model cannot read, and for values that are not finite
    (with the index of the first such sample).
    """
    x = np.asarray(x)
    _check(x, layout, spec)
    raw = torch.from_numpy(np.array(x, order="C"))
    if spec.kind == "image":
        values = _image(raw, layout, spec)
    elif spec.kind == "sound":
        values = log_mel(_waves(raw), spec)[:, None]
    elif spec.kind == "signal":
        values = _signal(raw, layout, spec)
    else:
        values = raw.float()
    return _scale(values, spec).contiguous()


def _check(x: Array, layout: str, spec: InputSpec) -> None:
    if layout not in LAYOUTS_OF_KIND[spec.kind]:
        wanted = f"{' or '.join(LAYOUTS_OF_KIND[spec.kind])} for {spec.kind} input"
        raise DataError("x", f"layout {layout}", wanted, "state what it is with `edgetrain pack --layout`")
    check_layout(layout, x.shape, "x")
    if x.dtype.name not in DTYPES:
        raise DataError("x", f"dtype {x.dtype}", ", ".join(DTYPES), "convert it with `edgetrain pack`")
    if spec.kind == "features" and x.shape[1:] != spec.shape:
        raise DataError("x", f"{x.shape[1]} features per sample", f"{spec.shape[0]}, as the model was built for")
    if min(x.shape[1:]) < 1:
        raise DataError("x", f"shape {x.shape}", "at least one value per sample")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        bad = int(np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))[0])
        raise DataError(f"x, sample {bad}", "a value that is not finite", "finite numbers")


def _scale(values: Tensor, spec: InputSpec) -> Tensor:
    axes = (1,) * (values.dim() - 2)
    return values * torch.tensor(spec.scale).view(-1, *axes) + torch.tensor(spec.offset).view(-1, *axes)


# ------------------------------------------------------------------------------------------------------------ images


def _image(raw: Tensor, layout: str, spec: InputSpec) -> Tensor:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) -> float32 (N, *spec.shape), not scaled yet."""
    images = raw[:, None] if layout == "NHW" else raw.permute(0, 3, 1, 2) if layout == "NHWC" else raw
    found, wanted = images.shape[1], spec.shape[0]
    values = images.float()
    if found != wanted and (found, wanted) == (3, 1):
        values = torch.tensordot(values, torch.tensor(LUMA), dims=([1], [0]))[:, None]
    elif found not in (wanted, 1):
        accepted = "1 or 3" if wanted == 1 else f"1 or {wanted}"
        raise DataError("x", f"{found} channels in layout {layout}", accepted)
    if values.shape[2:] != spec.shape[1:] and len(values):
        values = F.interpolate(values, spec.shape[1:], mode="bilinear", align_corners=False, antialias=True)
    elif not len(values):
        values = values.new_zeros(0, values.shape[1], *spec.shape[1:])
    return values.expand(-1, wanted, -1, -1)


# ------------------------------------------------------------------------------------------------- sound and signals


def _waves(raw: Tensor) -> Tensor:
    """float32; what int16 holds as shares of full scale."""
    return raw.float() / INT16_FULL_SCALE if raw.dtype == torch.int16 else raw.float()


def _signal(raw: Tensor, layout: str, spec: InputSpec) -> Tensor:
    """(N, T), (N, T, C) or (N, C, T) -> float32 (N, C, T), not scaled yet."""
    signals = raw[:, None] if layout == "NT" else raw.permute(0, 2, 1) if layout == "NTC" else raw
    if tuple(signals.shape[1:]) != spec.shape:
        (channels, steps), wanted = signals.shape[1:], spec.shape
        found = f"{channels} channels of {steps} values in layout {layout}"
        raise DataError("x", found, f"{wanted[0]} of {wanted[1]}, as the model was built for", "pack such windows")
    return _waves(signals)


def log_mel(waves: Tensor, spec: InputSpec) -> Tensor:
    """Log-mel energies: waves (N, T) in -1..1 -> (N, frames, bands) = ln(mel power + 1e-6).

    Frame f covers samples f * hop .. f * hop + window, weighted by a periodic Hann window; its power spectrum
    |rfft|^2 / window is summed by triangular filters, equally spaced on the HTK mel scale
    mel(f) = 2595 log10(1 + f / 700) from 20 Hz to half the sample rate. Recordings are padded with silence or cut at
    the end to the model's frames.
    """
    _, frames, bands = spec.shape
    window, hop = spec.window_samples, spec.hop_samples
    length = window + (frames - 1) * hop
    waves = F.pad(waves, (0, length - waves.shape[1]))  # a negative amount cuts
    pieces = waves.unfold(1, window, hop) * torch.hann_window(window)
    power = torch.fft.rfft(pieces).abs().square() / window
    return torch.log(power @ mel_filters(bands, window, spec.sample_rate_hz) + LOG_FLOOR)


@lru_cache(maxsize=8)
def mel_filters(bands: int, window: int, sample_rate_hz: int) -> Tensor:
    """Triangular filters (window // 2 + 1, bands) of peak 1 at their centres, HTK mel scale from 20 Hz to Nyquist."""
    low, high = (2595.0 * np.log10(1.0 + f / 700.0) for f in (20.0, sample_rate_hz / 2.0))
    edges = 700.0 * (10.0 ** (np.linspace(low, high, bands + 2) / 2595.0) - 1.0)
    bins = np.fft.rfftfreq(window, 1.0 / sample_rate_hz)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0.0, None).astype(np.float32))
