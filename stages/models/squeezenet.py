"""SqueezeNet 1.1 without its classifier (arXiv:1602.07360 and the authors' 1.1 release)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import numbered, pooled

FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
"""Squeeze channels and channels of each expand branch."""
POOL_BEFORE = frozenset({0, 2, 4})


class Fire(nn.Module):
    """1x1 squeeze, then 1x1 and 3x3 expansion side by side: (N, c_in, H, W) -> (N, 2 * expand, H, W)."""

    def __init__(self, c_in: int, squeeze: int, expand: int, pool: bool) -> None:
        super().__init__()
        self.pool = pool
        self.squeeze = nn.Conv2d(c_in, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 3, 2, ceil_mode=True) if self.pool else x
        h = F.relu(self.squeeze(x))
        return torch.cat((F.relu(self.expand1(h)), F.relu(self.expand3(h))), 1)


class SqueezeNet(nn.Module):
    """(N, channels, H, W) -> (N, 512)."""

    def __init__(self, *, channels: int = 3) -> None:
        super().__init__()
        inputs = (64, *(2 * expand for _, expand in FIRES))
        self.stem = nn.Conv2d(channels, 64, 3, stride=2)
        self.blocks = numbered(
            Fire(c_in, squeeze, expand, i in POOL_BEFORE)
            for i, (c_in, (squeeze, expand)) in enumerate(zip(inputs, FIRES, strict=False))
        )

    def forward(self, x: Tensor) -> Tensor:
        return pooled(self.blocks(F.relu(self.stem(x))))
