"""How published weights want their pictures: size of the resized picture, the cut, mean and deviation.

`torchvision` and `timm` are the evaluation transforms of those libraries' ImageNet weights, `mcunet` that of the MCUNet
and ProxylessNAS checkpoints, `edgetrain` what this project uses where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from stages.artifacts.records import InputSpec
from stages.errors import require

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training pictures, values from 0 to 1."""
HALF = (0.5,)


@dataclass(frozen=True)
class Preset:
    """How pictures are prepared: (pixel / 255 - mean) / std."""

    mean: tuple[float, ...]
    """One entry for all channels, or one each."""
    std: tuple[float, ...]
    crop: float = 0.0
    """Share of the resized shorter side that is cut out; 0: both sides are brought to the model's, nothing is cut."""
    interpolation: str = "bilinear"
    others: Mapping[str, Preset] = field(default_factory=dict)
    """Architectures whose weights want something else."""

    def of(self, arch: str) -> Preset:
        """What weights of this architecture want."""
        return self.others.get(arch, self)

    def applied(self, spec: InputSpec) -> InputSpec:
        """The input with this preparation. Raises `UsageError` for another kind of input or number of channels."""
        require(spec.kind == "image", "--preset", f"a preset for {spec.kind} input", "one for images")
        channels = spec.shape[0]
        fit = len(self.mean) in (1, channels)
        require(fit, "--preset", f"{len(self.mean)} channels for a model of {channels}", "--scale and --offset")
        scale = tuple(1 / (255 * deviation) for deviation in self.std)
        offset = tuple(-mean / deviation for mean, deviation in zip(self.mean, self.std, strict=True))
        return replace(spec, scale=scale, offset=offset, crop=self.crop, interpolation=self.interpolation)


PRESETS: Mapping[str, Preset] = {
    "torchvision": Preset(IMAGENET_MEAN, IMAGENET_STD, 0.875),
    "timm": Preset(IMAGENET_MEAN, IMAGENET_STD, 0.875, "bicubic", {"vit-tiny": Preset(HALF, HALF, 0.9, "bicubic")}),
    "mcunet": Preset(HALF, HALF, 0.875),
    "edgetrain": Preset(HALF, HALF),
}
