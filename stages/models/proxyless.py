"""ProxylessNAS at width 0.3 (arXiv:1812.00332; mit-han-lab's `proxyless-w0.3`).

At 128x128: 61 layers with the mix convolution, 357,680 conv weights and 19,209,728 MACs (320,816 and 18,619,904
without it).
"""

from __future__ import annotations

from torch import nn

from stages.models.blocks import Inverted, InvertedResidualNet

BLOCKS = (
    Inverted(16, 8, 3, 1, expand=False),
    Inverted(24, 16, 5, 2),
    Inverted(48, 16, 3, 1),
    Inverted(48, 16, 7, 2),
    Inverted(48, 16, 3, 1),
    Inverted(48, 16, 5, 1),
    Inverted(48, 16, 5, 1),
    Inverted(96, 24, 7, 2),
    Inverted(72, 24, 5, 1),
    Inverted(72, 24, 5, 1),
    Inverted(72, 24, 5, 1),
    Inverted(144, 32, 5, 1),
    Inverted(96, 32, 5, 1),
    Inverted(96, 32, 5, 1),
    Inverted(96, 32, 5, 1),
    Inverted(192, 64, 7, 2),
    Inverted(384, 64, 7, 1),
    Inverted(192, 64, 7, 1),
    Inverted(192, 64, 7, 1),
    Inverted(384, 96, 7, 1),
)


def proxyless_w03(*, channels: int = 3, mix: bool = False) -> nn.Module:
    """The backbone; `mix` adds the 1x1 feature-mix convolution to 384 channels. (N, channels, H, W) -> (N, D)."""
    return InvertedResidualNet(channels, 16, BLOCKS, 384 if mix else None)
