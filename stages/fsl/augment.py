"""Augmentation of model inputs: P>M>F's pseudo-query (DiffAugment), and distortions for meta-training.

The pseudo-query of a support set is its augmented copy (P>M>F, arXiv:2204.07305; DiffAugment, arXiv:2006.10738).
`Augmentation()` is P>M>F's: colour and translation, one coin of 0.9 for the whole batch. Changed: no mirror image
unless `flip` asks for it, because characters and traffic signs must not flip; shifted pictures are filled with their
edge (`fill="edge"`) rather than with zeros, because zero is grey, not background, in inputs scaled to -1..1.

What the words mean by the kind of input (`InputSpec.kind`):

* image (N, C, H, W): everything below;
* sound (N, 1, frames, bands): colour is a gain added to the log-mel energies, translation a shift in time only;
  the geometric distortions and `flip` do not apply;
* signal (N, C, T): colour is Gaussian jitter of `jitter` times each channel's deviation over the batch, translation a
  shift in time;
* features (N, D): colour is Gaussian jitter of `jitter` times each feature's deviation over the batch; nothing else.

All random numbers come from an explicit `numpy.random.Generator`: the same seed, the same draws, on every machine. What
is done, given the draws, is a function of its own below. These change a batch in place, a few samples at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, prod

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import Array, InputSpec
from stages.errors import require
from stages.models.resizing import chunks, cubic_weights, resize

Floats = NDArray[np.float32]

LATTICE = 4
"""Points per axis at which elastic displacements are drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """What may be done to a batch, and how strongly. The geometric distortions are off by default."""

    probability: float = 0.9
    """That a sample (or the batch, see `coin`) is augmented at all."""
    coin: str = "batch"
    """`batch`: one toss for the whole batch, as P>M>F; `sample`: one toss per sample."""
    color: bool = True
    """Brightness +U(-.5, .5), saturation *U(0, 2), contrast *U(.5, 1.5), drawn per sample."""
    translation: float = 0.125
    """Largest shift as a share of the size, per axis."""
    flip: bool = False
    """Mirror left-right with probability 1/2, tossed per batch or per sample as `coin` says."""
    fill: str = "edge"
    """What a shift uncovers: `edge` repeats the border, `zero` puts 0."""
    rotation_deg: float = 0.0
    """Largest rotation, either way."""
    zoom: float = 0.0
    """Sizes vary by factors from 1/(1+zoom) to 1+zoom, the two axes separately by a third of that."""
    shear: float = 0.0
    """Largest horizontal shear: shift per unit of height."""
    elastic: float = 0.0
    """Deviation of a smooth random displacement, as a share of the size: handwriting-like distortion."""
    soften: float = 0.0
    """Probability, per sample, of a loss of detail: shrunk to between a quarter and a half of the size, and back."""
    jitter: float = 0.1
    """Features and signals: deviation of the noise in units of each feature's or channel's own deviation."""

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "augmentation", f"probability {self.probability}", "0..1")
        require(0 <= self.soften <= 1, "augmentation", f"soften {self.soften}", "0..1")
        require(self.coin in ("batch", "sample"), "augmentation", f"coin {self.coin!r}", "batch or sample")
        require(self.fill in ("edge", "zero"), "augmentation", f"fill {self.fill!r}", "edge or zero")
        require(0 <= self.translation < 0.5, "augmentation", f"translation {self.translation}", "0 to below 0.5")
        for name in ("rotation_deg", "zoom", "shear", "elastic", "jitter"):
            require(getattr(self, name) >= 0, "augmentation", f"{name} {getattr(self, name)}", "at least 0")

    @property
    def distorts(self) -> bool:
        """Whether any geometric distortion beyond the shift is on."""
        return max(self.rotation_deg, self.zoom, self.shear, self.elastic) > 0


PSEUDO_QUERY = Augmentation()
"""P>M>F's fine-tuning augmentation, less the mirror image."""

HANDWRITING = Augmentation(
    probability=1.0, coin="sample", color=False, rotation_deg=15, zoom=0.5, shear=0.5, elastic=0.03, soften=0.5
)
"""For meta-training on rendered glyphs: what hands do to printed shapes."""


def augment(x: Floats, spec: InputSpec, rng: np.random.Generator, how: Augmentation = PSEUDO_QUERY) -> Floats:
    """An augmented copy of model inputs: float32 (N, *spec.shape) -> the same shape, contiguous. `x` is left alone."""
    chosen = _toss(len(x), how.probability, how.coin, rng)
    result = np.array(x, np.float32, order="C")
    if chosen.any():
        _BY_KIND[spec.kind](result, rng, how)
        result[~chosen] = x[~chosen]
    return result


def _image(x: Floats, rng: np.random.Generator, how: Augmentation) -> None:
    if how.flip:
        mirrored = _toss(len(x), 0.5, how.coin, rng)
        x[mirrored] = x[mirrored, ..., ::-1]
    if how.color:
        recolour(x, _uniform(x, -0.5, 0.5, rng), _uniform(x, 0.0, 2.0, rng), _uniform(x, 0.5, 1.5, rng))
    if how.translation:
        shift(x, _steps(x, how.translation, rng, axes=(2, 3)), how.fill)
    if how.distorts:
        linear = linear_maps(len(x), rng, how)
        coarse = rng.standard_normal((len(x), 2, LATTICE, LATTICE), np.float32) if how.elastic else None
        warp(x, linear, None if coarse is None else coarse * np.float32(2 * how.elastic), how.fill)
    if how.soften:
        chosen = _toss(len(x), how.soften, "sample", rng)
        soften(x, np.flatnonzero(chosen), 0.25 + 0.25 * rng.random())


def _sound(x: Floats, rng: np.random.Generator, how: Augmentation) -> None:
    if how.color:
        x += _uniform(x, -0.5, 0.5, rng)
    if how.translation:
        shift(x, _steps(x, how.translation, rng, axes=(2,)), how.fill)


def _signal(x: Floats, rng: np.random.Generator, how: Augmentation) -> None:
    if how.color:
        jitter(x, rng.standard_normal(x.shape, np.float32), how.jitter)
    if how.translation:
        shift(x, _steps(x, how.translation, rng, axes=(2,)), how.fill)


def _features(x: Floats, rng: np.random.Generator, how: Augmentation) -> None:
    if how.color:
        jitter(x, rng.standard_normal(x.shape, np.float32), how.jitter)


def _tokens(x: Floats, rng: np.random.Generator, how: Augmentation) -> None:
    """Another number is another word: tokens stay as they are."""


_BY_KIND = {"image": _image, "sound": _sound, "signal": _signal, "features": _features, "tokens": _tokens}


# ------------------------------------------------------------------------------------------------------------- draws


def _toss(size: int, probability: float, coin: str, rng: np.random.Generator) -> NDArray[np.bool_]:
    tosses = rng.random(1 if coin == "batch" else size) < probability
    return np.broadcast_to(tosses, size)


def _uniform(x: Floats, low: float, high: float, rng: np.random.Generator) -> Floats:
    """One number per sample, (N, 1, 1, 1)."""
    return rng.uniform(low, high, (len(x), 1, 1, 1)).astype(np.float32)


def _steps(x: Floats, share: float, rng: np.random.Generator, axes: tuple[int, ...]) -> NDArray[np.int64]:
    """(N, axes) whole steps drawn from -r..r, r = round-half-up(share * size)."""
    reaches = (int(share * x.shape[axis] + 0.5) for axis in axes)
    return np.stack([rng.integers(-reach, reach + 1, len(x)) for reach in reaches], axis=1)


def linear_maps(size: int, rng: np.random.Generator, how: Augmentation) -> Array:
    """Random maps from output to input coordinates: rotation, zoom and shear, float64 (N, 2, 2)."""
    turn, zoom, stretch, shear = rng.uniform(-1, 1, (4, size))
    angle = turn * (how.rotation_deg * pi / 180)
    scale = (1 + how.zoom) ** zoom
    stretch = (1 + how.zoom) ** (stretch / 3)
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    sheared = np.array([[stretch, shear * how.shear], [np.zeros(size), 1 / stretch]])
    maps: Array = scale[:, None, None] * (turned.transpose(2, 0, 1) @ sheared.transpose(2, 0, 1))
    return maps


# ------------------------------------------------------------------------------------- what is done, given the draws


def jitter(x: Floats, noise: Floats, share: float) -> None:
    """Add noise of deviation 1, times `share` of each channel's (N, C, T) or feature's (N, D) deviation, in place.

    `noise` (x.shape) is used up.
    """
    over = (0, 2) if x.ndim == 3 else (0,)
    spread = x - x.mean(axis=over, keepdims=True, dtype=np.float64).astype(np.float32)
    variance = np.square(spread, out=spread).mean(axis=over, keepdims=True, dtype=np.float64)
    noise *= (share * np.sqrt(variance)).astype(np.float32)
    x += noise


def recolour(x: Floats, brightness: Floats, saturation: Floats, contrast: Floats) -> None:
    """DiffAugment's rand_brightness, rand_saturation and rand_contrast, in its order, in place; draws (N, 1, 1, 1).

    x + b, then (x - g) s + g with g the mean over the channels, then (x - m) c + m with m the mean over the sample. The
    means move with the values and saturation keeps m, so all three together are c s x + (c (1 - s) g + (1 - c) m + b)
    with g and m of the sample as it was.
    """
    for part in chunks(len(x), 4 * prod(x.shape[1:])):
        some, b, s, c = x[part], brightness[part], saturation[part], contrast[part]
        grey = some.mean(axis=1, keepdims=True)
        level = grey.reshape(len(grey), -1).mean(axis=1).reshape(-1, 1, 1, 1)
        grey *= c * (1 - s)
        grey += (1 - c) * level + b
        some *= c * s
        some += grey


def shift(x: Floats, steps: NDArray[np.int64], fill: str) -> None:
    """Move every sample (C, *sizes) in place by whole steps (N, axes) along its first axes after the channels.

    What that uncovers becomes the border that was there, or 0. |step| < size.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, moves in enumerate(steps.tolist()):
        alike.setdefault(tuple(moves), []).append(row)
    for together, rows in alike.items():
        if any(together):
            x[rows] = _moved(x[rows], together, fill)


def _moved(x: Floats, moves: tuple[int, ...], fill: str) -> Floats:
    """A copy of samples (n, C, *sizes) that all move alike."""
    result = np.empty_like(x)
    sizes = x.shape[2 : 2 + len(moves)]
    covered = (slice(max(0, move), min(size, size + move)) for move, size in zip(moves, sizes, strict=True))
    seen = (slice(max(0, -move), min(size, size - move)) for move, size in zip(moves, sizes, strict=True))
    result[:, :, *covered] = x[:, :, *seen]
    for axis, (move, size) in enumerate(zip(moves, sizes, strict=True), start=2):
        lines = result.swapaxes(0, axis)
        bare, border = (slice(0, move), move) if move >= 0 else (slice(size + move, size), size + move - 1)
        lines[bare] = lines[border] if fill == "edge" else 0
    return result


def warp(x: Floats, linear: Array, coarse: Floats | None, fill: str) -> None:
    """One bilinear resampling of images in place: output (u, v) shows the input at `linear` (N, 2, 2) @ (u, v) + d.

    u runs to the right and v down, from -1 to 1 between the outer edges of the outermost pixels. d is `coarse`
    (N, 2, 4, 4), displacements in these units on a lattice over the picture, interpolated bicubically: neighbouring
    pixels move together. Beyond the border is the border again (`fill="edge"`) or 0. As
    `torch.nn.functional.grid_sample` with `align_corners=False`.
    """
    height, width = x.shape[2:]
    wide = width + 2
    u = ((2 * np.arange(width) + 1) / width - 1).astype(np.float32)
    v = ((2 * np.arange(height) + 1) / height - 1).astype(np.float32)[:, None]
    beyond = 0 if fill == "edge" else 1
    for part in chunks(len(x), 8 * prod(x.shape[1:])):
        some = x[part]
        maps = linear[part].astype(np.float32)[..., None, None]
        right, down = maps[:, 0, 0] * u + maps[:, 0, 1] * v, maps[:, 1, 0] * u + maps[:, 1, 1] * v
        if coarse is not None:
            smooth = cubic_weights(LATTICE, height) @ coarse[part] @ cubic_weights(LATTICE, width).T
            right += smooth[:, 0]
            down += smooth[:, 1]
        # A frame of zeros: what lies beyond the border, and a right and lower neighbour for every pixel.
        framed = np.zeros((*some.shape[:2], height + 2, wide), np.float32)
        framed[..., 1:-1, 1:-1] = some
        column, across = _cells(right, width, beyond)
        row, along = _cells(down, height, beyond)
        row *= wide
        row += column
        planes = np.arange(0, framed.size, (height + 2) * wide).reshape(*some.shape[:2], 1, 1)
        corner = planes + row[:, None]
        flat, across, along = framed.reshape(-1), across[:, None], along[:, None]
        upper = _between(flat.take(corner), flat[1:].take(corner), across)
        flat = flat[wide:]
        lower = _between(flat.take(corner), flat[1:].take(corner), across)
        some[:] = _between(upper, lower, along)


def _cells(places: Floats, size: int, beyond: int) -> tuple[NDArray[np.int64], Floats]:
    """Places -1..1 along an axis of `size` pixels -> the pixel before, counted in the frame, and the way to the next.

    Places further than `beyond` pixels from the outermost centres are brought there.
    """
    places *= np.float32(size / 2)
    places += np.float32((size + 1) / 2)
    np.clip(places, 1 - beyond, size + beyond, out=places)
    before = np.minimum(places.astype(np.int64), size)
    places -= before
    return before, places


def _between(a: Floats, b: Floats, way: Floats) -> Floats:
    """a + way * (b - a); a and b are used up."""
    b -= a
    b *= way
    a += b
    return a


def soften(x: Floats, rows: NDArray[np.int64], share: float) -> None:
    """Take detail from these images in place: shrink them to that share of their size, and back."""
    size = x.shape[2:]
    small = [max(1, round(share * length)) for length in size]
    for part in chunks(len(rows), prod(x.shape[1:])):
        x[rows[part]] = resize(resize(x[rows[part]], small), size)
