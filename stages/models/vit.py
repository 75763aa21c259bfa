"""The tiny vision transformer (DeiT-Ti, arXiv:2012.12877): 16 x 16 patches, 12 blocks of 192 channels, 3 heads; and
smaller ones by arguments.

Its tensors have timm's names, so that state dicts of `vit_tiny_patch16_*` load by name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.errors import UsageError

PATCH, WIDTH, DEPTH, HEADS = 16, 192, 12, 3


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return y


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class _Patches(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return y


class VitTiny(nn.Module):
    """(N, channels, size, size) -> (N, width): the class token behind the last norm."""

    def __init__(
        self,
        *,
        channels: int = 3,
        size: int | list[int] = 224,
        patch: int = PATCH,
        width: int = WIDTH,
        heads: int = HEADS,
        depth: int = DEPTH,
    ) -> None:
        super().__init__()
        rows, columns = (size, size) if isinstance(size, int) else size
        if rows % patch or columns % patch:
            raise UsageError("vit-tiny", f"size {rows} x {columns}", f"multiples of {patch}, the side of a patch")
        if width % heads:
            raise UsageError("vit-tiny", f"width {width} in {heads} heads", "a multiple of the heads")
        tokens = (rows // patch) * (columns // patch) + 1
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.patch_embed = _Patches(channels, width, patch)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch_embed(x)
        h = torch.cat((self.cls_token.expand(len(h), -1, -1), h), 1) + self.pos_embed
        y: Tensor = self.norm(self.blocks(h))[:, 0]
        return y
