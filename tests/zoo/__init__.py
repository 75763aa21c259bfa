"""A zoo of small faithful copies of the architectures that people put on devices, in plain torch.

Each keeps every operator and habit of its original (block structure, activations, gates, in-place operators,
functional calls, views by computed sizes, python loops, names of parameters) with few blocks and narrow widths: a
forward pass takes milliseconds, and what an import, a plan or an export cannot do with the original it cannot do here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tests.zoo import (
    audio,
    backbones,
    efficient,
    metaformers,
    mobile,
    plain,
    recurrent,
    residual,
    signals,
    transformers,
)
from tests.zoo.specimen import Specimen, result

__all__ = ["FAST", "ZOO", "Specimen", "result"]

FAMILIES = (mobile, efficient, residual, plain, backbones, metaformers, transformers, audio, signals, recurrent)

ZOO: Mapping[str, Specimen] = MappingProxyType(
    {specimen.name: specimen for family in FAMILIES for specimen in family.SPECIMENS}
)
"""Name -> specimen, by family."""

FAST = (
    "mobilenet-v3-small",
    "efficientnet-b0",
    "shufflenet-v2",
    "googlenet",
    "bit-resnet",
    "unet",
    "mobilevit",
    "swin",
    "bc-resnet",
    "har-cnn",
)
"""Ten that together hold most operators: what `make test` runs."""
