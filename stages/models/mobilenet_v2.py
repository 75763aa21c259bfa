"""MobileNetV2 at any width (arXiv:1801.04381, table 2).

At width 0.35 and 128x128 input these are TinyTrain's figures: 52 layers with the mix convolution, 288,864 conv weights
and 17,449,728 MACs (238,688 and 16,646,912 without it).
"""

from __future__ import annotations

from torch import nn

from stages.models.blocks import Inverted, InvertedResidualNet, make_divisible

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Rows of the paper's table: expansion, output channels, repeats, first stride."""


def mobilenet_v2(*, width: float = 1.0, channels: int = 3, mix: bool = False) -> nn.Module:
    """The backbone; `mix` adds the last 1x1 convolution (1280 channels at width 1). (N, channels, H, W) -> (N, D)."""
    stem = make_divisible(32 * width)
    blocks, c_in = [], stem
    for expansion, c_out, repeats, first_stride in STAGES:
        for i in range(repeats):
            out = make_divisible(c_out * width)
            blocks.append(Inverted(c_in * expansion, out, 3, first_stride if i == 0 else 1, expansion > 1))
            c_in = out
    return InvertedResidualNet(channels, stem, blocks, make_divisible(1280 * width) if mix else None)
