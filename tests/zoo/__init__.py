"""A zoo of small faithful copies of the architectures that people put on devices, in plain torch.

Each keeps every operator and habit of its original (block structure, activations, gates, in-place operators,
functional calls, views by computed sizes, python loops, names of parameters) with few blocks and narrow widths: a
forward pass takes milliseconds, and what an import, a plan or an export cannot do with the original it cannot do here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import pytest

from tests.zoo import (
    audio,
    backbones,
    efficient,
    habits,
    metaformers,
    mobile,
    plain,
    recurrent,
    residual,
    signals,
    transformers,
)
from tests.zoo.specimen import Specimen, result

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

__all__ = ["FAST", "ZOO", "Specimen", "result", "selection"]

FAMILIES = (
    mobile,
    efficient,
    residual,
    plain,
    backbones,
    metaformers,
    transformers,
    audio,
    signals,
    habits,
    recurrent,
)

ZOO: Mapping[str, Specimen] = MappingProxyType(
    {specimen.name: specimen for family in FAMILIES for specimen in family.SPECIMENS}
)
"""Name -> specimen, by family."""

FAST = (
    "mobilenet-v3-small",
    "efficientnet-b0",
    "ghostnet",
    "googlenet",
    "bit-resnet",
    "mobilevit",
    "swin",
    "vit-fused",
    "conv-autoencoder",
    "har-cnn",
)
"""Ten that together hold most operators: what `make test` runs. `make test-all` runs the whole zoo."""


def selection(*, refused: bool = True) -> list[ParameterSet]:
    """Parameters for a test over the zoo: those in `FAST` always, the others where the marker `zoo` is selected.

    refused: with the specimens whose import is expected to be refused.
    """
    return [
        pytest.param(specimen, id=name, marks=() if name in FAST else pytest.mark.zoo)
        for name, specimen in ZOO.items()
        if refused or not specimen.refused
    ]
