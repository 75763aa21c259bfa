"""Building blocks of the registry's convolutional backbones.

A convolution's module path is its layer name (`blocks.07.expand`), so a BatchNorm lies beside its convolution as
`<name>_bn`, not around it. Every backbone ends in a feature vector (N, D).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Generator, Tensor, nn


@dataclass(frozen=True, slots=True)
class Inverted:
    """One inverted residual block (MobileNetV2, arXiv:1801.04381): 1x1 expand, depthwise, linear 1x1 project.

    The input is added when stride is 1 and the channels agree. `mid` equal to the input's channels with
    `expand=False` leaves the expansion out.
    """

    mid: int
    out: int
    kernel: int
    stride: int
    expand: bool = True


def make_divisible(value: float, divisor: int = 8) -> int:
    """Nearest multiple of `divisor`, at least `divisor` and never below 90 % of `value` (MobileNetV2's rounding).

    >>> [make_divisible(0.35 * c) for c in (32, 24, 96, 160, 320, 1280)]
    [16, 8, 32, 56, 112, 448]
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Square convolution without bias, padded to keep the size at stride 1 (odd kernels)."""
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)


def pooled(x: Tensor) -> Tensor:
    """Global average pooling, (N, C, H, W) -> (N, C)."""
    return x.mean((2, 3))


def numbered(blocks: Iterable[nn.Module]) -> nn.Sequential:
    """The blocks under the names 00, 01, ..."""
    sequence = nn.Sequential()
    for i, block in enumerate(blocks):
        sequence.add_module(f"{i:02d}", block)
    return sequence


class InvertedResidual(nn.Module):
    """(N, c_in, H, W) -> (N, block.out, H / stride, W / stride)."""

    def __init__(self, c_in: int, block: Inverted) -> None:
        super().__init__()
        self.residual = block.stride == 1 and c_in == block.out
        self.expands = block.expand
        if block.expand:
            self.expand = conv(c_in, block.mid, 1)
            self.expand_bn = nn.BatchNorm2d(block.mid)
        self.depthwise = conv(block.mid, block.mid, block.kernel, block.stride, groups=block.mid)
        self.depthwise_bn = nn.BatchNorm2d(block.mid)
        self.project = conv(block.mid, block.out, 1)
        self.project_bn = nn.BatchNorm2d(block.out)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = F.relu6(self.expand_bn(self.expand(x))) if self.expands else x
        h = F.relu6(self.depthwise_bn(self.depthwise(h)))
        h = self.project_bn(self.project(h))
        return x + h if self.residual else h


class InvertedResidualNet(nn.Module):
    """Stem, inverted residual blocks, optionally a 1x1 feature-mix convolution, global average pooling.

    (N, channels, H, W) -> (N, D), D being `mix` or the last block's output channels.
    """

    def __init__(self, channels: int, stem: int, blocks: Iterable[Inverted], mix: int | None) -> None:
        super().__init__()
        blocks = tuple(blocks)
        widths = [stem, *(block.out for block in blocks)]
        self.stem = conv(channels, stem, 3, stride=2)
        self.stem_bn = nn.BatchNorm2d(stem)
        self.blocks = numbered(InvertedResidual(c, b) for c, b in zip(widths, blocks, strict=False))
        self.mixes = mix is not None
        if mix is not None:
            self.mix = conv(widths[-1], mix, 1)
            self.mix_bn = nn.BatchNorm2d(mix)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.blocks(F.relu6(self.stem_bn(self.stem(x))))
        h = F.relu6(self.mix_bn(self.mix(h))) if self.mixes else h
        return pooled(h)


def he_init(module: nn.Module, generator: Generator) -> None:
    """He initialisation in place (arXiv:1502.01852): weights N(0, 2 / fan_in), biases 0, BatchNorm the identity.

    fan_in counts one group's inputs, so depthwise layers keep their variance too.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / fan_in), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
