"""Pictures resized: bilinear or bicubic with antialiasing, one axis after the other, as products with banded matrices.

Resizing is linear along each axis. Output i of `wanted` has its centre at c = (i + 1/2) found / wanted, in pixels of
the input, and weighs the pixel whose centre lies at j + 1/2 by the triangle max(0, 1 - |j + 1/2 - c| / r), the weights
of one output divided by their sum. r = max(1, found / wanted): a shrinking picture is averaged over all that an output
covers, a growing one is interpolated between neighbours and held at the edges. This is what
`torch.nn.functional.interpolate(mode="bilinear", align_corners=False, antialias=True)` computes. Bicubic weighs by
Keys' cubic with a = -1/2, of reach 2 r, instead of the triangle, as its `mode="bicubic"` does.

The weights of neighbouring outputs lie beside each other, so a few outputs at a time are one small matrix product with
the few rows or columns that they see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import Array

Floats = NDArray[np.float32]

OUTPUTS = 16
"""At most so many outputs in one product: fewer multiply fewer zeros, more make better use of the processor."""
INPUTS = 64
"""About so many inputs in one product where a large picture shrinks: so many of its lines are floats at a time."""
CHUNK_FLOATS = 1 << 19
"""Values that are worked on at a time, 2 MiB: what a cache may hold, and small beside the samples themselves."""


@dataclass(frozen=True, eq=False)
class Band:
    """Consecutive outputs along an axis, and the inputs that they are sums of."""

    outputs: slice
    inputs: slice
    weights: Floats
    """(outputs, inputs), each row of sum 1."""


def chunks(count: int, each: int) -> Iterator[slice]:
    """Consecutive samples of `each` values, as many at a time as make `CHUNK_FLOATS`; at least one."""
    step = max(1, CHUNK_FLOATS // max(1, each))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


@lru_cache(maxsize=64)
def bands_of(found: int, wanted: int, cubic: bool = False) -> tuple[Band, ...]:
    """The weights by which `found` values become `wanted`, in bands of a few rows."""
    scale = found / wanted
    rows = max(1, min(OUTPUTS, int(INPUTS / scale) - 1))
    radius = max(scale, 1.0)
    reach = 2 * radius if cubic else radius
    centres = scale * (np.arange(wanted) + 0.5)
    bands = []
    for start in range(0, wanted, rows):
        own = centres[start : start + rows, None]
        first, last = max(int(own[0, 0] - reach), 0), min(ceil(own[-1, 0] + reach), found)
        away = np.abs(np.arange(first, last) + 0.5 - own) / radius
        weights = _keys(away) if cubic else np.clip(1 - away, 0, None)
        weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
        weights.setflags(write=False)  # every caller gets the same
        bands.append(Band(slice(start, start + len(own)), slice(first, last), weights))
    return tuple(bands)


def _keys(s: NDArray[np.float64], a: float = -0.5) -> NDArray[np.float64]:
    """R. G. Keys (1981), equation 4."""
    near, far = ((a + 2) * s - (a + 3)) * s * s + 1, a * (((s - 5) * s + 8) * s - 4)
    found: NDArray[np.float64] = np.where(s <= 1, near, np.where(s < 2, far, 0.0))
    return found


@lru_cache(maxsize=64)
def cubic_weights(found: int, wanted: int) -> Floats:
    """(wanted, found): `found` values become `wanted` by cubic convolution, the first and the last staying in place.

    R. G. Keys, Cubic convolution interpolation for digital image processing (1981), equation 4 with a = -3/4, edges
    held: `torch.nn.functional.interpolate(mode="bicubic", align_corners=True)` along one axis.
    """
    a = -0.75
    places = np.linspace(0, found - 1, wanted)
    below = np.floor(places).astype(np.int64)
    weights = np.zeros((wanted, found))
    for tap in range(-1, 3):
        s = np.abs(places - below - tap)
        near, far = ((a + 2) * s - (a + 3)) * s * s + 1, a * (((s - 5) * s + 8) * s - 4)
        np.add.at(weights, (np.arange(wanted), np.clip(below + tap, 0, found - 1)), np.where(s <= 1, near, far))
    held = weights.astype(np.float32)
    held.setflags(write=False)
    return held


def resize(images: Array, size: Sequence[int], *, cubic: bool = False) -> Floats:
    """Numbers (N, C, H, W) of any dtype, in any order in memory -> float32 (N, C, *size), contiguous.

    What shrinks goes first, the height before the width: rows lie beside each other in memory, so that large pictures
    of bytes become floats a few rows at a time. A sample's result does not depend on the samples beside it.
    """
    (height, width), (tall, wide) = images.shape[2:], size
    if wide < width and tall > height:
        return _along_height(_along_width(_floats(images), wide, cubic), tall, cubic)
    if tall != height and images.strides[1] < images.strides[3] and images.transpose(0, 2, 3, 1).flags.c_contiguous:
        lines = images.transpose(0, 2, 3, 1).reshape(len(images), height, -1)
        shrunk = _along_height(lines, tall, cubic).reshape(len(images), tall, width, -1).transpose(0, 3, 1, 2)
        return _along_width(_floats(shrunk), wide, cubic)
    return _along_width(_floats(_along_height(images, tall, cubic)), wide, cubic)


def _floats(x: Array) -> Floats:
    return np.ascontiguousarray(x, np.float32)


def _along_height(x: Array, wanted: int, cubic: bool) -> Array:
    """(..., H, W) -> float32 (..., wanted, W); the same array where nothing changes."""
    if x.shape[-2] == wanted:
        return x
    result = np.empty((*x.shape[:-2], wanted, x.shape[-1]), np.float32)
    for band in bands_of(x.shape[-2], wanted, cubic):
        np.matmul(band.weights, _floats(x[..., band.inputs, :]), out=result[..., band.outputs, :])
    return result


def _along_width(x: Floats, wanted: int, cubic: bool) -> Floats:
    """(..., W) -> (..., wanted); the same array where nothing changes."""
    if x.shape[-1] == wanted:
        return x
    result = np.empty((*x.shape[:-1], wanted), np.float32)
    for band in bands_of(x.shape[-1], wanted, cubic):
        np.matmul(x[..., band.inputs], band.weights.T, out=result[..., band.outputs])
    return result
