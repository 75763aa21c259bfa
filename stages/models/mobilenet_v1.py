"""MobileNetV1 at any width (arXiv:1704.04861, table 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import conv, make_divisible, numbered, pooled

STAGES = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""Output channels and stride of the depthwise-separable blocks."""


class _Separable(nn.Module):
    """Depthwise 3x3, then 1x1, BatchNorm and ReLU after each."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.depthwise = conv(c_in, c_in, 3, stride, groups=c_in)
        self.depthwise_bn = nn.BatchNorm2d(c_in)
        self.project = conv(c_in, c_out, 1)
        self.project_bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.depthwise_bn(self.depthwise(x)))
        return F.relu(self.project_bn(self.project(h)))


class MobileNetV1(nn.Module):
    """(N, channels, H, W) -> (N, 1024 * width)."""

    def __init__(self, *, width: float = 1.0, channels: int = 3) -> None:
        super().__init__()
        widths = [make_divisible(c * width) for c in (32, *(out for out, _ in STAGES))]
        self.stem = conv(channels, widths[0], 3, stride=2)
        self.stem_bn = nn.BatchNorm2d(widths[0])
        self.blocks = numbered(_Separable(widths[i], widths[i + 1], stride) for i, (_, stride) in enumerate(STAGES))

    def forward(self, x: Tensor) -> Tensor:
        return pooled(self.blocks(F.relu(self.stem_bn(self.stem(x)))))
