"""Samples into another number format, and noise on samples and labels."""

from __future__ import annotations

import numpy as np

from stages.artifacts.records import Array
from stages.errors import DataError, UsageError

FULL_SCALE = {"uint8": 255.0, "int16": 32768.0, "float32": 1.0}
"""dtype of x -> the value that counts as 1, in which noise is measured."""


def convert(x: Array, *, dtype: str | None, scale: float, invert: bool, where: str) -> Array:
    """x scaled, in its dtype (the stated one; uint8, int16 as they are and anything else float32), and inverted."""
    kind = np.dtype(dtype or (x.dtype if x.dtype.name in FULL_SCALE and scale == 1.0 else "float32"))
    if scale != 1.0:
        x = x.astype(np.float64) * scale
    if kind != x.dtype:
        x = _cast(x, kind, where)
    if invert:
        if kind != np.uint8:
            raise UsageError("--invert", f"samples of {kind}", "uint8", "add `--dtype uint8`")
        x = 255 - x
    return x


def _cast(x: Array, dtype: np.dtype[np.generic], where: str) -> Array:
    """Numbers as another dtype, rounded to the nearest where that is an integer type; never wrapped around."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            floats = x.astype(dtype)
        if not np.isfinite(floats).all():
            raise DataError(
                where, f"values up to {np.abs(x).max():g}", f"what {dtype} holds", "bring them there with `--scale`"
            )
        return floats
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max  # type: ignore[type-var]
    values = np.rint(x) if x.dtype.kind == "f" else x
    if len(x) and (values.min() < low or values.max() > high):
        raise DataError(
            where,
            f"values from {values.min():g} to {values.max():g}",
            f"{low} to {high} for {dtype}",
            "bring them there with `--scale`",
        )
    return values.astype(dtype)


def with_noise(x: Array, marked: Array, std: float, rng: np.random.Generator) -> Array:
    """x with Gaussian noise on the marked samples, clipped to the range of an integer dtype."""
    rows = np.flatnonzero(marked)
    noise = rng.standard_normal((len(rows), *x.shape[1:]), dtype=np.float32) * std * FULL_SCALE[x.dtype.name]
    values = x[rows] + noise
    if x.dtype.kind != "f":
        limits = np.iinfo(x.dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    out = x.copy()
    out[rows] = values.astype(x.dtype)
    return out


def noisy_labels(y: Array, share: float, rng: np.random.Generator) -> Array:
    """`y` with round(share * N) labels replaced by another of its classes, each equally likely."""
    classes = np.unique(y)
    if len(classes) < 2:
        raise DataError("--label-noise", "samples of one class", "two classes at least")
    wrong = np.flatnonzero(share_of(len(y), share, rng))
    shift = rng.integers(1, len(classes), size=len(wrong))
    noisy = y.copy()
    noisy[wrong] = classes[(np.searchsorted(classes, y[wrong]) + shift) % len(classes)]
    return noisy


def share_of(count: int, share: float, rng: np.random.Generator) -> Array:
    """uint8 (N,) with round(share * N) ones."""
    marks = np.zeros(count, np.uint8)
    marks[rng.permutation(count)[: round(share * count)]] = 1
    return marks
