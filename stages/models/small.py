"""Small networks: Conv-4 for characters, the same over time for sensors, an MLP for features, DS-CNN for sound."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import conv, numbered, pooled


class _PooledBlock(nn.Module):
    """3x3 convolution, BatchNorm, ReLU, 2x2 max pooling."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = conv(c_in, c_out, 3)
        self.conv_bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.conv_bn(self.conv(x))), 2)


class Cnn4(nn.Module):
    """Conv-4 of Prototypical Networks (arXiv:1703.05175): four pooled blocks, then flatten.

    (N, channels, H, W) -> (N, width * (H // 16) * (W // 16)); 28x28 gives (N, width).
    """

    def __init__(self, *, width: int = 64, channels: int = 1) -> None:
        super().__init__()
        self.blocks = numbered(_PooledBlock(width if i else channels, width) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.blocks(x)
        return h.flatten(1)


class _TimeBlock(nn.Module):
    """Convolution over 5 steps, BatchNorm, ReLU, max pooling over 2."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, 5, padding=2, bias=False)
        self.conv_bn = nn.BatchNorm1d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool1d(F.relu(self.conv_bn(self.conv(x))), 2)


class Cnn1d(nn.Module):
    """Conv-4's four blocks over time, then the mean over time: windows of sensor values, or a short waveform.

    (N, channels, T) -> (N, width); T at least 16.
    """

    def __init__(self, *, width: int = 64, channels: int = 9) -> None:
        super().__init__()
        self.blocks = numbered(_TimeBlock(width if i else channels, width) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.blocks(x)
        return h.mean(2)


class _DenseBlock(nn.Module):
    """Linear layer and ReLU."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x))


class Mlp(nn.Module):
    """Fully connected layers; with its linear head the default is Titan's 900-100-C network for activities (HARBOX).

    (N, dim) -> (N, width).
    """

    def __init__(self, *, dim: int = 900, width: int = 100, depth: int = 1) -> None:
        super().__init__()
        self.blocks = numbered(_DenseBlock(width if i else dim, width) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.blocks(x)
        return h


class _SeparableBlock(nn.Module):
    """Depthwise 3x3 and 1x1 convolution, BatchNorm and ReLU after each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = conv(width, width, 3, groups=width)
        self.depthwise_bn = nn.BatchNorm2d(width)
        self.project = conv(width, width, 1)
        self.project_bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.depthwise_bn(self.depthwise(x)))
        return F.relu(self.project_bn(self.project(h)))


class DsCnn(nn.Module):
    """Depthwise-separable CNN for keyword spotting (Hello Edge, arXiv:1711.07128; DS-CNN S at the defaults).

    (N, 1, frames, mel bands) -> (N, width). Changed: log-mel bands instead of MFCCs.
    """

    def __init__(self, *, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, (10, 4), stride=2, padding=(4, 1), bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.blocks = numbered(_SeparableBlock(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        return pooled(self.blocks(F.relu(self.stem_bn(self.stem(x)))))
