"""EfficientNet-Lite0: EfficientNet-B0 (arXiv:1905.11946, table 1) without squeeze-and-excitation, with ReLU6."""

from __future__ import annotations

from torch import nn

from stages.models.blocks import Inverted, InvertedResidualNet

STAGES = (
    (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1), (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)  # fmt: skip
"""Rows of the paper's table: expansion, kernel, output channels, repeats, first stride."""


def efficientnet_lite0(*, channels: int = 3, mix: bool = False) -> nn.Module:
    """The backbone; `mix` adds the last 1x1 convolution (1280 channels). (N, channels, H, W) -> (N, D)."""
    blocks, c_in = [], 32
    for expansion, kernel, c_out, repeats, first_stride in STAGES:
        for i in range(repeats):
            blocks.append(Inverted(c_in * expansion, c_out, kernel, first_stride if i == 0 else 1, expansion > 1))
            c_in = c_out
    return InvertedResidualNet(channels, 32, blocks, 1280 if mix else None)
