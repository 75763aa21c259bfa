"""ResNet-18 (arXiv:1512.03385, table 1), its downsampling paths as 1x1 convolutions (option B)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import conv, numbered, pooled

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
"""Channels and first stride; two blocks each."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the input, or beside a 1x1 convolution of it."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.first = conv(c_in, c_out, 3, stride)
        self.first_bn = nn.BatchNorm2d(c_out)
        self.second = conv(c_out, c_out, 3)
        self.second_bn = nn.BatchNorm2d(c_out)
        self.shortens = stride != 1 or c_in != c_out
        if self.shortens:
            self.shortcut = conv(c_in, c_out, 1, stride)
            self.shortcut_bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first_bn(self.first(x)))
        h = self.second_bn(self.second(h))
        return F.relu(h + (self.shortcut_bn(self.shortcut(x)) if self.shortens else x))


class ResNet18(nn.Module):
    """(N, channels, H, W) -> (N, 512)."""

    def __init__(self, *, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.stem_bn = nn.BatchNorm2d(64)
        blocks, c_in = [], 64
        for c_out, stride in STAGES:
            blocks += [BasicBlock(c_in, c_out, stride), BasicBlock(c_out, c_out, 1)]
            c_in = c_out
        self.blocks = numbered(blocks)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.stem_bn(self.stem(x))), 3, 2, 1)
        return pooled(self.blocks(h))
