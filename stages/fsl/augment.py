"""Augmentation of model-input tensors: P>M>F's pseudo-query (DiffAugment), and distortions for meta-training.

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

All random numbers come from an explicit CPU `torch.Generator`, so the result does not depend on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor
from torch.nn import functional

from stages.artifacts.records import InputSpec
from stages.errors import require


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


def augment(x: Tensor, spec: InputSpec, rng: torch.Generator, how: Augmentation = PSEUDO_QUERY) -> Tensor:
    """An augmented copy of model inputs: float32 (N, *spec.shape) -> the same shape, on x's device.

    `x` is left alone. The same generator state gives the same draws on every device.
    """
    size = len(x)
    chosen = _toss(size, how.probability, how.coin, rng).to(x.device)
    changed = _BY_KIND[spec.kind](x, rng, how)
    return torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), changed, x)


def _image(x: Tensor, rng: torch.Generator, how: Augmentation) -> Tensor:
    if how.flip:
        mirrored = _toss(len(x), 0.5, how.coin, rng).to(x.device)
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    if how.color:
        x = _color(x, rng)
    if how.translation:
        x = _shift(x, how.translation, rng, how.fill, axes=(2, 3))
    if how.distorts:
        x = _distort(x, rng, how)
    return _soften(x, rng, how.soften) if how.soften else x


def _sound(x: Tensor, rng: torch.Generator, how: Augmentation) -> Tensor:
    if how.color:
        x = x + _uniform(len(x), -0.5, 0.5, rng, x)
    return _shift(x, how.translation, rng, how.fill, axes=(2,)) if how.translation else x


def _signal(x: Tensor, rng: torch.Generator, how: Augmentation) -> Tensor:
    if how.color:
        x = _jittered(x, how.jitter, rng, over=(0, 2))
    return _shift(x, how.translation, rng, how.fill, axes=(2,)) if how.translation else x


def _features(x: Tensor, rng: torch.Generator, how: Augmentation) -> Tensor:
    return _jittered(x, how.jitter, rng, over=(0,)) if how.color else x


def _jittered(x: Tensor, share: float, rng: torch.Generator, over: tuple[int, ...]) -> Tensor:
    noise = torch.randn(x.shape, generator=rng).to(x)
    return x + share * x.std(dim=over, correction=0, keepdim=True) * noise


_BY_KIND = {"image": _image, "sound": _sound, "signal": _signal, "features": _features}


def _toss(size: int, probability: float, coin: str, rng: torch.Generator) -> Tensor:
    tosses = torch.rand(1 if coin == "batch" else size, generator=rng) < probability
    return tosses.expand(size)


def _uniform(size: int, low: float, high: float, rng: torch.Generator, like: Tensor) -> Tensor:
    return (torch.rand(size, 1, 1, 1, generator=rng) * (high - low) + low).to(like)


def _color(x: Tensor, rng: torch.Generator) -> Tensor:
    """DiffAugment's rand_brightness, rand_saturation and rand_contrast, in its order."""
    x = x + _uniform(len(x), -0.5, 0.5, rng, x)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * _uniform(len(x), 0.0, 2.0, rng, x) + grey
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * _uniform(len(x), 0.5, 1.5, rng, x) + mean


def _shift(x: Tensor, share: float, rng: torch.Generator, fill: str, axes: tuple[int, ...]) -> Tensor:
    """Move every sample by whole steps drawn from -r..r, r = round-half-up(share * size), along each axis."""
    for axis in axes:
        size = x.shape[axis]
        reach = int(share * size + 0.5)
        steps = torch.randint(-reach, reach + 1, (len(x), 1), generator=rng)
        source = torch.arange(size) - steps
        index = source.clamp(0, size - 1).to(x.device)
        view = [len(x), *[size if a == axis else 1 for a in range(1, x.ndim)]]
        x = x.gather(axis, index.view(view).expand(x.shape))
        if fill == "zero":
            inside = ((source >= 0) & (source < size)).to(x.device)
            x = x * inside.view(view)
    return x


def _distort(x: Tensor, rng: torch.Generator, how: Augmentation) -> Tensor:
    """Rotation, zoom, shear and a smooth displacement in one bilinear resampling."""
    size = len(x)
    grid = functional.affine_grid(_affine(size, rng, how), [size, 1, *x.shape[2:]], align_corners=False)
    if how.elastic:
        # Independent offsets on a coarse 4 x 4 lattice, interpolated: neighbouring pixels move together.
        coarse = torch.randn(size, 2, 4, 4, generator=rng) * (2 * how.elastic)
        smooth = functional.interpolate(coarse, size=x.shape[2:], mode="bicubic", align_corners=True)
        grid = grid + smooth.permute(0, 2, 3, 1)
    mode = "border" if how.fill == "edge" else "zeros"
    return functional.grid_sample(x, grid.to(x), mode="bilinear", padding_mode=mode, align_corners=False)


def _soften(x: Tensor, rng: torch.Generator, probability: float) -> Tensor:
    """One level of detail for the batch, a coin for each sample."""
    chosen = _toss(len(x), probability, "sample", rng).to(x.device)
    share = 0.25 + 0.25 * float(torch.rand(1, generator=rng))
    small = [max(1, round(size * share)) for size in x.shape[2:]]
    shrunk = functional.interpolate(x, small, mode="bilinear", antialias=True)
    softened = functional.interpolate(shrunk, x.shape[2:], mode="bilinear")
    return torch.where(chosen.view(-1, 1, 1, 1), softened, x)


def _affine(size: int, rng: torch.Generator, how: Augmentation) -> Tensor:
    """Random maps from output to input coordinates: (N, 2, 3)."""
    draw = torch.rand(size, 4, generator=rng) * 2 - 1
    angle = draw[:, 0] * (how.rotation_deg * pi / 180)
    scale = (1 + how.zoom) ** draw[:, 1]
    stretch = (1 + how.zoom) ** (draw[:, 2] / 3)
    shear = draw[:, 3] * how.shear
    cos, sin = torch.cos(angle), torch.sin(angle)
    zero = torch.zeros(size)
    turned = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    sheared = torch.stack([torch.stack([stretch, shear], 1), torch.stack([zero, 1 / stretch], 1)], 1)
    linear = scale.view(-1, 1, 1) * (turned @ sheared)
    return torch.cat([linear, torch.zeros(size, 2, 1)], dim=2)
