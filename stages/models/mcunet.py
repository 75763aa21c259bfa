"""MCUNet's 5 FPS ImageNet backbone (arXiv:2007.10319; the network that TinyTrain calls MCUNet).

At 128x128: 42 layers in 14 blocks, 463,216 conv weights, 22,453,504 MACs.
"""

from __future__ import annotations

from torch import nn

from stages.models.blocks import Inverted, InvertedResidualNet

BLOCKS = (
    Inverted(16, 8, 3, 1, expand=False),
    Inverted(32, 16, 3, 2),
    Inverted(48, 16, 3, 1),
    Inverted(48, 24, 7, 2),
    Inverted(120, 24, 3, 1),
    Inverted(120, 40, 3, 2),
    Inverted(160, 40, 7, 1),
    Inverted(160, 48, 5, 1),
    Inverted(144, 48, 3, 1),
    Inverted(192, 48, 3, 1),
    Inverted(240, 96, 7, 2),
    Inverted(384, 96, 5, 1),
    Inverted(384, 96, 5, 1),
    Inverted(576, 160, 3, 1),
)


def mcunet_5fps(*, channels: int = 3, mix: bool = False) -> nn.Module:
    """The backbone; `mix` adds a 1x1 convolution to 640 channels, four times the last block as in MobileNetV2."""
    return InvertedResidualNet(channels, 16, BLOCKS, 640 if mix else None)
