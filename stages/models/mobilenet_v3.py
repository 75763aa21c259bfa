"""MobileNetV3 small and large (arXiv:1905.02244, tables 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import conv, make_divisible, numbered, pooled


@dataclass(frozen=True, slots=True)
class Bneck:
    """A row of the paper's tables: kernel, expansion, output channels, squeeze-and-excitation, hardswish, stride."""

    kernel: int
    mid: int
    out: int
    excites: bool
    hard: bool
    stride: int


SMALL = (
    Bneck(3, 16, 16, True, False, 2), Bneck(3, 72, 24, False, False, 2), Bneck(3, 88, 24, False, False, 1),
    Bneck(5, 96, 40, True, True, 2), Bneck(5, 240, 40, True, True, 1), Bneck(5, 240, 40, True, True, 1),
    Bneck(5, 120, 48, True, True, 1), Bneck(5, 144, 48, True, True, 1), Bneck(5, 288, 96, True, True, 2),
    Bneck(5, 576, 96, True, True, 1), Bneck(5, 576, 96, True, True, 1),
)  # fmt: skip
LARGE = (
    Bneck(3, 16, 16, False, False, 1), Bneck(3, 64, 24, False, False, 2), Bneck(3, 72, 24, False, False, 1),
    Bneck(5, 72, 40, True, False, 2), Bneck(5, 120, 40, True, False, 1), Bneck(5, 120, 40, True, False, 1),
    Bneck(3, 240, 80, False, True, 2), Bneck(3, 200, 80, False, True, 1), Bneck(3, 184, 80, False, True, 1),
    Bneck(3, 184, 80, False, True, 1), Bneck(3, 480, 112, True, True, 1), Bneck(3, 672, 112, True, True, 1),
    Bneck(5, 672, 160, True, True, 2), Bneck(5, 960, 160, True, True, 1), Bneck(5, 960, 160, True, True, 1),
)  # fmt: skip


class Excitation(nn.Module):
    """Squeeze-and-excitation: every channel times a gate between 0 and 1 that the channels' means decide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = make_divisible(channels / 4)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * F.hardsigmoid(gate)


class _Block(nn.Module):
    """(N, c_in, H, W) -> (N, row.out, H / stride, W / stride)."""

    def __init__(self, c_in: int, row: Bneck, eps: float) -> None:
        super().__init__()
        self.residual = row.stride == 1 and c_in == row.out
        self.activate = F.hardswish if row.hard else F.relu
        self.expands = row.mid != c_in
        if self.expands:
            self.expand = conv(c_in, row.mid, 1)
            self.expand_bn = nn.BatchNorm2d(row.mid, eps)
        self.depthwise = conv(row.mid, row.mid, row.kernel, row.stride, groups=row.mid)
        self.depthwise_bn = nn.BatchNorm2d(row.mid, eps)
        self.excite = Excitation(row.mid) if row.excites else nn.Identity()
        self.project = conv(row.mid, row.out, 1)
        self.project_bn = nn.BatchNorm2d(row.out, eps)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activate(self.expand_bn(self.expand(x))) if self.expands else x
        h = self.excite(self.activate(self.depthwise_bn(self.depthwise(h))))
        h = self.project_bn(self.project(h))
        y: Tensor = x + h if self.residual else h
        return y


class MobileNetV3(nn.Module):
    """Stem, blocks, and with `mix` the last convolution and the hidden layer; (N, channels, H, W) -> (N, D)."""

    def __init__(self, rows: tuple[Bneck, ...], mixed: tuple[int, int], channels: int, mix: bool, eps: float) -> None:
        super().__init__()
        widths = [16, *(row.out for row in rows)]
        self.stem = conv(channels, 16, 3, stride=2)
        self.stem_bn = nn.BatchNorm2d(16, eps)
        self.blocks = numbered(_Block(c, row, eps) for c, row in zip(widths, rows, strict=False))
        self.mixes = mix
        if mix:
            self.mix = conv(widths[-1], mixed[0], 1)
            self.mix_bn = nn.BatchNorm2d(mixed[0], eps)
            self.hidden = nn.Linear(*mixed)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.blocks(F.hardswish(self.stem_bn(self.stem(x))))
        if not self.mixes:
            return pooled(h)
        return F.hardswish(self.hidden(pooled(F.hardswish(self.mix_bn(self.mix(h))))))


def mobilenet_v3_small(*, channels: int = 3, mix: bool = False, eps: float = 1e-3) -> nn.Module:
    """`mix` adds the last convolution (576 channels) and the hidden layer (1024); BatchNorm's eps is torchvision's."""
    return MobileNetV3(SMALL, (576, 1024), channels, mix, eps)


def mobilenet_v3_large(*, channels: int = 3, mix: bool = False, eps: float = 1e-3) -> nn.Module:
    """`mix` adds the last convolution (960 channels) and the hidden layer (1280); BatchNorm's eps is torchvision's."""
    return MobileNetV3(LARGE, (960, 1280), channels, mix, eps)
