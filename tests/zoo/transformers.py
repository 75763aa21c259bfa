"""Transformers and perceptron mixers over patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.parts import DropPath, Mlp, StochasticDepth
from tests.zoo.specimen import Specimen


class PatchEmbed(nn.Module):
    """timm's: a strided convolution, flatten, transpose; the picture's size is asserted."""

    def __init__(self, size: int, patch: int, dim: int) -> None:
        super().__init__()
        self.img_size, self.num_patches = size, (size // patch) ** 2
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.shape
        assert h == self.img_size, f"Input height ({h}) doesn't match model ({self.img_size})."
        assert w == self.img_size, f"Input width ({w}) doesn't match model ({self.img_size})."
        x = self.proj(x).flatten(2).transpose(1, 2)
        return self.norm(x)


class Attention(nn.Module):
    """timm's attention: qkv in one layer, reshape to five axes, permute, unbind; fused or written out."""

    def __init__(self, dim: int, heads: int, fused: bool, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.scale, self.fused_attn = self.head_dim**-0.5, fused
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            q = q * self.scale
            attn = q @ k.transpose(-2, -1)
            attn = attn.softmax(dim=-1)
            x = self.attn_drop(attn) @ v
        x = x.transpose(1, 2).reshape(b, n, c)
        return self.proj_drop(self.proj(x))


class LayerScale(nn.Module):
    """timm's LayerScale on tokens."""

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class Block(nn.Module):
    """timm's ViT block."""

    def __init__(self, dim: int, heads: int, fused: bool, scale: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, fused, qk_norm)
        self.ls1 = LayerScale(dim) if scale else nn.Identity()
        self.drop_path1 = DropPath(0.1)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 3 * dim)
        self.ls2 = LayerScale(dim, inplace=True) if scale else nn.Identity()
        self.drop_path2 = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    """timm's ViT: a class token by expand and cat, a position table, the class token at the end."""

    def __init__(self, fused: bool = False, scale: bool = False) -> None:
        super().__init__()
        dim = 32
        self.patch_embed = PatchEmbed(32, 8, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, dim))
        self.pos_drop = nn.Dropout(p=0.0)
        self.norm_pre = nn.Identity()
        self.blocks = nn.Sequential(*(Block(dim, 4, fused, scale, qk_norm=scale) for _ in range(3)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.Identity()
        self.head = nn.Linear(dim, 5)

    def _pos_embed(self, x: Tensor) -> Tensor:
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.pos_drop(x + self.pos_embed)

    def forward(self, x: Tensor) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        x = self.norm(self.blocks(self.norm_pre(x)))
        return self.head(self.fc_norm(x[:, 0]))


class DeiT(nn.Module):
    """Class and distillation tokens, two heads: averaged in evaluation, a pair in training."""

    def __init__(self) -> None:
        super().__init__()
        dim = 24
        self.patch_embed = PatchEmbed(32, 8, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 2, dim))
        self.blocks = nn.ModuleList([Block(dim, 3, True) for _ in range(3)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)
        self.head_dist = nn.Linear(dim, 5)

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch = x.shape[0]
        x = self.patch_embed(x)
        cls_tokens = self.cls_token.expand(batch, -1, -1)
        dist_token = self.dist_token.expand(batch, -1, -1)
        x = torch.cat((cls_tokens, dist_token, x), dim=1)
        x = x + self.pos_embed
        for blk in self.blocks:
            x = blk(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x, x_dist = self.forward_features(x)
        x = self.head(x)
        x_dist = self.head_dist(x_dist)
        if self.training:
            return x, x_dist
        return (x + x_dist) / 2


class TalkingHeadAttention(nn.Module):
    """CaiT: linear layers over the heads before and after the softmax."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.proj_l = nn.Linear(heads, heads)
        self.proj_w = nn.Linear(heads, heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        attn = q @ k.transpose(-2, -1)
        attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        attn = attn.softmax(dim=-1)
        attn = self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = (attn @ v).transpose(1, 2).reshape(b, n, c)
        return self.proj(x)


class ClassAttention(nn.Module):
    """CaiT: the class token asks, all tokens answer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q = self.q(x[:, 0]).unsqueeze(1).reshape(b, 1, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        k = self.k(x).reshape(b, n, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        v = self.v(x).reshape(b, n, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, 1, c))


class CaiTBlock(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)
        self.gamma_1 = nn.Parameter(1e-4 * torch.ones(dim))
        self.gamma_2 = nn.Parameter(1e-4 * torch.ones(dim))
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor, x_cls: Tensor | None = None) -> Tensor:
        if x_cls is None:
            x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
            return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))
        u = torch.cat((x_cls, x), dim=1)
        x_cls = x_cls + self.drop_path(self.gamma_1 * self.attn(self.norm1(u)))
        return x_cls + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x_cls)))


class CaiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        dim = 24
        self.patch_embed = PatchEmbed(32, 8, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, dim))
        self.blocks = nn.Sequential(*(CaiTBlock(dim, TalkingHeadAttention(dim, 4)) for _ in range(2)))
        self.blocks_token_only = nn.ModuleList(CaiTBlock(dim, ClassAttention(dim, 4)) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = self.blocks(x + self.pos_embed)
        cls_tokens = self.cls_token.expand(x.shape[0], -1, -1)
        for blk in self.blocks_token_only:
            cls_tokens = blk(x, cls_tokens)
        x = self.norm(torch.cat((cls_tokens, x), dim=1))
        return self.head(x[:, 0])


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """[B, H, W, C] -> [B * windows, window_size, window_size, C]."""
    b, h, w, c = x.shape
    x = x.view(b, h // window_size, window_size, w // window_size, window_size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window_size, window_size, c)


def window_reverse(windows: Tensor, window_size: int, h: int, w: int) -> Tensor:
    """The inverse of `window_partition`; the batch is computed from the number of windows, as Swin does."""
    b = int(windows.shape[0] / (h * w / window_size / window_size))
    x = windows.view(b, h // window_size, w // window_size, window_size, window_size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


class WindowAttention(nn.Module):
    """Swin's attention in windows: a table of relative position biases, a mask for shifted windows."""

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.window_size, self.num_heads = (window, window), heads
        self.scale = (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) * (2 * window - 1), heads))
        coords = torch.stack(torch.meshgrid([torch.arange(window), torch.arange(window)], indexing="ij"))
        flat = torch.flatten(coords, 1)
        relative = (flat[:, :, None] - flat[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += window - 1
        relative[:, :, 1] += window - 1
        relative[:, :, 0] *= 2 * window - 1
        self.register_buffer("relative_position_index", relative.sum(-1))
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.proj = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b_, n, c = x.shape
        qkv = self.qkv(x).reshape(b_, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(n, n, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            n_w = mask.shape[0]
            attn = attn.view(b_ // n_w, n_w, self.num_heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, n, n)
        attn = self.softmax(attn)
        x = (attn @ v).transpose(1, 2).reshape(b_, n, c)
        return self.proj(x)


class SwinBlock(nn.Module):
    """Cyclic shift by `torch.roll`, partition, attention, reverse, roll back."""

    def __init__(self, dim: int, resolution: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.input_resolution, self.window_size, self.shift_size = (resolution, resolution), window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.drop_path = DropPath(0.1)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)
        self.register_buffer("attn_mask", self._mask(resolution, window, shift) if shift else None)

    @staticmethod
    def _mask(resolution: int, window: int, shift: int) -> Tensor:
        img_mask = torch.zeros((1, resolution, resolution, 1))
        slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for count, (h, w) in enumerate((h, w) for h in slices for w in slices):
            img_mask[:, h, w, :] = count
        windows = window_partition(img_mask, window).view(-1, window * window)
        mask = windows.unsqueeze(1) - windows.unsqueeze(2)
        return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.input_resolution
        b, length, c = x.shape
        assert length == h * w, "input feature has wrong size"
        shortcut = x
        x = self.norm1(x).view(b, h, w, c)
        if self.shift_size > 0:
            x = torch.roll(x, shifts=(-self.shift_size, -self.shift_size), dims=(1, 2))
        windows = window_partition(x, self.window_size).view(-1, self.window_size * self.window_size, c)
        windows = self.attn(windows, mask=self.attn_mask)
        windows = windows.view(-1, self.window_size, self.window_size, c)
        x = window_reverse(windows, self.window_size, h, w)
        if self.shift_size > 0:
            x = torch.roll(x, shifts=(self.shift_size, self.shift_size), dims=(1, 2))
        x = shortcut + self.drop_path(x.view(b, h * w, c))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Swin: four slices of every second row and column, concatenated, normalised, reduced."""

    def __init__(self, resolution: int, dim: int) -> None:
        super().__init__()
        self.input_resolution = (resolution, resolution)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.input_resolution
        b, _, c = x.shape
        x = x.view(b, h, w, c)
        x0 = x[:, 0::2, 0::2, :]
        x1 = x[:, 1::2, 0::2, :]
        x2 = x[:, 0::2, 1::2, :]
        x3 = x[:, 1::2, 1::2, :]
        x = torch.cat([x0, x1, x2, x3], -1)
        x = x.view(b, -1, 4 * c)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(32, 4, 16)
        self.patch_norm = nn.LayerNorm(16)
        self.layers = nn.ModuleList(
            [
                nn.Sequential(SwinBlock(16, 8, 2, 4, 0), SwinBlock(16, 8, 2, 4, 2), PatchMerging(8, 16)),
                nn.Sequential(SwinBlock(32, 4, 4, 2, 0), SwinBlock(32, 4, 4, 2, 1)),
            ]
        )
        self.norm = nn.LayerNorm(32)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_norm(self.patch_embed(x))
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        x = self.avgpool(x.transpose(1, 2))
        x = torch.flatten(x, 1)
        return self.head(x)


class MixerBlock(nn.Module):
    """MLP-Mixer: a perceptron over tokens between two transposes, one over channels."""

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_tokens = Mlp(tokens, 2 * tokens)
        self.drop_path = DropPath(0.1)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_channels = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class Affine(nn.Module):
    """ResMLP's affine transformation by `torch.addcmul`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones((1, 1, dim)))
        self.beta = nn.Parameter(torch.zeros((1, 1, dim)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class ResMLPBlock(nn.Module):
    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.norm1 = Affine(dim)
        self.linear_tokens = nn.Linear(tokens, tokens)
        self.drop_path = DropPath(0.1)
        self.norm2 = Affine(dim)
        self.mlp_channels = Mlp(dim, 4 * dim)
        self.ls1 = nn.Parameter(1e-4 * torch.ones(dim))
        self.ls2 = nn.Parameter(1e-4 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1 * self.linear_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path(self.ls2 * self.mlp_channels(self.norm2(x)))


class SpatialGatingUnit(nn.Module):
    """gMLP: chunk of channels, a linear layer over tokens whose bias starts at one, a product."""

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim // 2)
        self.proj = nn.Linear(tokens, tokens)
        nn.init.ones_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        v = self.norm(v)
        v = self.proj(v.transpose(-1, -2))
        return u * v.transpose(-1, -2)


class GMLPBlock(nn.Module):
    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU(approximate="tanh")
        self.gate = SpatialGatingUnit(4 * dim, tokens)
        self.fc2 = nn.Linear(2 * dim, dim)
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fc2(self.gate(self.act(self.fc1(self.norm(x))))))


class PatchMixer(nn.Module):
    """timm's MlpMixer frame: stem, blocks, norm, mean over tokens, head."""

    def __init__(self, block: Callable[[int, int], nn.Module], norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.stem = PatchEmbed(32, 8, 32)
        self.blocks = nn.Sequential(block(32, 16), block(32, 16))
        self.norm = norm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.stem(x)))
        return self.head(x.mean(dim=1))


class LinearBN(nn.Module):
    """LeViT's linear layer with vector BatchNorm over flattened tokens."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inp, out, bias=False)
        self.bn = nn.BatchNorm1d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class LeViTAttention(nn.Module):
    def __init__(self, dim: int, key_dim: int, heads: int, resolution: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim = heads, key_dim, 2 * key_dim
        self.scale = key_dim**-0.5
        self.qkv = LinearBN(dim, heads * 4 * key_dim)
        self.proj = nn.Sequential(nn.Hardswish(), LinearBN(heads * 2 * key_dim, dim))
        grid = torch.meshgrid(torch.arange(resolution), torch.arange(resolution), indexing="ij")
        pos = torch.stack(grid).flatten(1)
        rel = (pos[..., :, None] - pos[..., None, :]).abs()
        self.attention_biases = nn.Parameter(torch.zeros(heads, resolution * resolution))
        self.register_buffer("attention_bias_idxs", rel[0] * resolution + rel[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, self.num_heads, -1).split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        q = q.permute(0, 2, 1, 3)
        k = k.permute(0, 2, 3, 1)
        v = v.permute(0, 2, 1, 3)
        attn = q @ k * self.scale + self.attention_biases[:, self.attention_bias_idxs]
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(b, n, -1)
        return self.proj(x)


class LeViTDownsample(nn.Module):
    """LeViT's shrinking: tokens are viewed as a map, every second row and column is taken."""

    def __init__(self, inp: int, out: int, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution
        self.linear = LinearBN(inp, out)

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        x = x.view(b, self.resolution, self.resolution, c)[:, ::2, ::2]
        return self.linear(x.reshape(b, -1, c))


class LeViTBlock(nn.Module):
    def __init__(self, dim: int, resolution: int) -> None:
        super().__init__()
        self.attn = LeViTAttention(dim, 8, 3, resolution)
        self.mlp = nn.Sequential(LinearBN(dim, 2 * dim), nn.Hardswish(), LinearBN(2 * dim, dim))
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


class NormLinear(nn.Module):
    """LeViT's head: vector BatchNorm, dropout, linear."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(inp)
        self.drop = nn.Dropout(0.0)
        self.linear = nn.Linear(inp, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(self.bn(x)))


class LeViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.Hardswish(),
            nn.Conv2d(12, 24, 3, 2, 1, bias=False),
            nn.BatchNorm2d(24),
        )
        self.stages = nn.Sequential(
            nn.Sequential(LeViTBlock(24, 8), LeViTBlock(24, 8)), LeViTDownsample(24, 32, 8), LeViTBlock(32, 4)
        )
        self.head = NormLinear(32, 5)
        self.head_dist = NormLinear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x.flatten(2).transpose(1, 2)
        x = self.stages(x).mean(dim=1)
        return (self.head(x) + self.head_dist(x)) / 2


class CCT(nn.Module):
    """Compact convolutional transformer: convolutional tokens, sequence pooling by a softmax over tokens and matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            nn.Sequential(nn.Conv2d(16, 32, 3, 1, 1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        )
        self.flattener = nn.Flatten(2, 3)
        self.positional_emb = nn.Parameter(torch.zeros(1, 64, 32))
        self.blocks = nn.ModuleList([CCTEncoderLayer(32, 4), CCTEncoderLayer(32, 4)])
        self.norm = nn.LayerNorm(32)
        self.attention_pool = nn.Linear(32, 1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flattener(self.tokenizer(x)).transpose(-2, -1)
        x += self.positional_emb
        for blk in self.blocks:
            x = blk(x)
        x = self.norm(x)
        x = torch.matmul(F.softmax(self.attention_pool(x), dim=1).transpose(-1, -2), x).squeeze(-2)
        return self.fc(x)


class CCTEncoderLayer(nn.Module):
    """Normalises after the first sum and adds to what is normalised, as CCT's authors do."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads, fused=False)
        self.linear1 = nn.Linear(dim, 2 * dim)
        self.dropout1 = nn.Dropout(0.1)
        self.norm1 = nn.LayerNorm(dim)
        self.linear2 = nn.Linear(2 * dim, dim)
        self.dropout2 = nn.Dropout(0.1)
        self.drop_path = DropPath(0.1)

    def forward(self, src: Tensor) -> Tensor:
        src = src + self.drop_path(self.self_attn(self.pre_norm(src)))
        src = self.norm1(src)
        src2 = self.linear2(self.dropout1(F.gelu(self.linear1(src))))
        return src + self.drop_path(self.dropout2(src2))


class EncoderClassifier(nn.Module):
    """`nn.TransformerEncoder` of `nn.TransformerEncoderLayer` over patches cut by unfold; `repeat` of a class token."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.patch = 8
        self.embed = nn.Linear(3 * 64, 32)
        self.cls = nn.Parameter(torch.zeros(1, 1, 32))
        self.register_buffer("position", torch.randn(17, 32), persistent=False)
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, dropout=0.1, activation="gelu" if norm_first else "relu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        p = self.patch
        x = x.unfold(2, p, p).unfold(3, p, p)
        x = x.permute(0, 2, 3, 1, 4, 5).reshape(b, h // p * (w // p), c * p * p)
        x = torch.cat([self.cls.repeat(b, 1, 1), self.embed(x)], dim=1) + self.position
        return self.head(self.encoder(x)[:, 0])


class TorchvisionEncoderBlock(nn.Module):
    """torchvision's ViT block: `nn.MultiheadAttention` with its weights asked for nothing, an `MLPBlock` by index."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout=0.0, batch_first=True)
        self.dropout = nn.Dropout(0.0)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.0), nn.Linear(2 * dim, dim), nn.Dropout(0.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {x.shape}")
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        y = self.dropout(y)
        y = y + x
        z = self.mlp(self.ln_2(y))
        return y + z


class TorchvisionViT(nn.Module):
    """torchvision's names: `conv_proj`, `class_token`, `encoder.pos_embedding`, `heads.head`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_dim, self.patch_size = 32, 8
        self.conv_proj = nn.Conv2d(3, 32, kernel_size=8, stride=8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, 17, 32))
        self.encoder.layers = nn.Sequential(TorchvisionEncoderBlock(32, 4), TorchvisionEncoderBlock(32, 4))
        self.encoder.ln = nn.LayerNorm(32, eps=1e-6)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(32, 5))

    def _process_input(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        p = self.patch_size
        torch._assert(h == 32, f"Wrong image height! Expected 32 but got {h}!")
        x = self.conv_proj(x)
        x = x.reshape(n, self.hidden_dim, (h // p) * (w // p))
        return x.permute(0, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self._process_input(x)
        batch_class_token = self.class_token.expand(x.shape[0], -1, -1)
        x = torch.cat([batch_class_token, x], dim=1)
        x = self.encoder.ln(self.encoder.layers(x + self.encoder.pos_embedding))
        x = x[:, 0]
        return self.heads(x)


@dataclass
class BaseModelOutput:
    """What the encoder of an HF-style model hands to its classifier."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class ImageClassifierOutput:
    """What an HF-style classifier returns: attributes, or a tuple by `to_tuple()`."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple[object, ...]:
        return tuple(value for value in (self.logits, self.hidden_states) if value is not None)


class HFSelfAttention(nn.Module):
    """query, key and value of their own, `transpose_for_scores` by view and permute; returns a tuple."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, dim // heads
        self.all_head_size = dim
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.0)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        new_x_shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(new_x_shape).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        key_layer = self.transpose_for_scores(self.key(hidden_states))
        value_layer = self.transpose_for_scores(self.value(hidden_states))
        query_layer = self.transpose_for_scores(self.query(hidden_states))
        scores = torch.matmul(query_layer, key_layer.transpose(-1, -2))
        scores = scores / self.attention_head_size**0.5
        probs = self.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(query_layer.dtype))
        context_layer = torch.matmul(probs, value_layer).permute(0, 2, 1, 3).contiguous()
        context_layer = context_layer.view((*context_layer.size()[:-2], self.all_head_size))
        return (context_layer, probs) if output_attentions else (context_layer,)


class HFLayer(nn.Module):
    """ViTLayer with its parts `attention.attention`, `attention.output.dense`, `intermediate.dense`, `output.dense`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"attention": HFSelfAttention(dim, heads), "output": nn.ModuleDict({"dense": nn.Linear(dim, dim)})}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, 2 * dim)})
        self.output = nn.ModuleDict({"dense": nn.Linear(2 * dim, dim)})
        self.layernorm_before = nn.LayerNorm(dim, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        self_outputs = self.attention["attention"](self.layernorm_before(hidden_states), output_attentions)
        attention_output = self.attention["output"]["dense"](self_outputs[0])
        outputs = self_outputs[1:]
        hidden_states = attention_output + hidden_states
        layer_output = F.gelu(self.intermediate["dense"](self.layernorm_after(hidden_states)))
        layer_output = self.output["dense"](layer_output) + hidden_states
        return (layer_output, *outputs)


class HFViTModel(nn.Module):
    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "patch_embeddings": nn.ModuleDict({"projection": nn.Conv2d(3, dim, kernel_size=8, stride=8)}),
                "dropout": nn.Dropout(0.0),
            }
        )
        self.embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 17, dim))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(HFLayer(dim, 4) for _ in range(layers))})
        self.layernorm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        patches = self.embeddings["patch_embeddings"]["projection"](pixel_values).flatten(2).transpose(1, 2)
        cls_tokens = self.embeddings.cls_token.expand(patches.shape[0], -1, -1)
        hidden = torch.cat((cls_tokens, patches), dim=1) + self.embeddings.position_embeddings
        hidden = self.embeddings["dropout"](hidden)
        states: tuple[Tensor, ...] = ()
        for layer_module in self.encoder["layer"]:
            states = (*states, hidden)
            hidden = layer_module(hidden)[0]
        sequence_output = self.layernorm(hidden)
        return BaseModelOutput(sequence_output, states if output_hidden_states else None)


class HFViTForImageClassification(nn.Module):
    """Attributes of dataclasses inside; logits or the tuple (logits, hidden states) at the end."""

    def __init__(self, return_dict: bool) -> None:
        super().__init__()
        self.return_dict = return_dict
        self.vit = HFViTModel(32, 2)
        self.classifier = nn.Linear(32, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> object:
        outputs = self.vit(pixel_values, output_hidden_states=not self.return_dict)
        sequence_output = outputs.last_hidden_state
        logits = self.classifier(sequence_output[:, 0, :])
        if not self.return_dict:
            return (logits, outputs.hidden_states)
        return ImageClassifierOutput(logits=logits).logits


class TorchvisionSwinV2Block(nn.Module):
    """Swin V2's post-norm block with cosine attention: `F.normalize`, a clamped logit scale and its exponential, a
    continuous position bias by a small perceptron on fixed coordinates, `16 * sigmoid`."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones((heads, 1, 1))))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 16, bias=True), nn.ReLU(inplace=True), nn.Linear(16, heads, bias=False)
        )
        axis = torch.arange(-(window - 1), window, dtype=torch.float32)
        table = torch.stack(torch.meshgrid([axis, axis], indexing="ij")).permute(1, 2, 0).contiguous()
        table = table / (window - 1) * 8
        table = torch.sign(table) * torch.log2(torch.abs(table) + 1.0) / 3.0
        self.register_buffer("relative_coords_table", table.view(-1, 2))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offset = place[:, :, None] - place[:, None, :] + window - 1
        self.register_buffer("relative_position_index", (offset[0] * (2 * window - 1) + offset[1]).flatten())
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, 2 * dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.stochastic_depth = StochasticDepth(0.1, "row")

    def get_bias(self) -> Tensor:
        n = self.window * self.window
        bias = self.cpb_mlp(self.relative_coords_table)[self.relative_position_index]
        return 16 * torch.sigmoid(bias.view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0))

    def attend(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        size = self.window
        x = x.view(b, h // size, size, w // size, size, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        q, k, v = qkv.reshape(-1, size * size, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=4.6052).exp() + self.get_bias()
        x = F.softmax(attn, dim=-1).matmul(v).transpose(1, 2).reshape(-1, size * size, c)
        x = F.dropout(F.linear(x, self.proj.weight, self.proj.bias), p=0.1, training=self.training)
        x = x.view(b, h // size, w // size, size, size, c).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h, w, c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.stochastic_depth(self.norm1(self.attend(x)))
        return x + self.stochastic_depth(self.norm2(self.mlp(x)))


class SwinV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, kernel_size=4, stride=4),
            ToLast(),
            nn.LayerNorm(24),
            TorchvisionSwinV2Block(24, 3, 4),
            TorchvisionSwinV2Block(24, 3, 4),
        )
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.features(x))
        return self.head(x.movedim(-1, 1).mean((2, 3)))


class ToLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


IMAGE = (3, 32, 32)

SPECIMENS = (
    Specimen("vit", ViT, IMAGE, ("class token", "position table", "attention written out", "unbind")),
    Specimen("vit-fused", partial(ViT, True, True), IMAGE, ("fused attention", "layer scale in place", "query norm")),
    Specimen("vit-torchvision", TorchvisionViT, IMAGE, ("MultiheadAttention", "torch._assert", "torchvision names")),
    Specimen("vit-hf", partial(HFViTForImageClassification, True), IMAGE, ("dataclass inside", "softmax of a dtype")),
    Specimen("vit-hf-tuple", partial(HFViTForImageClassification, False), IMAGE, ("several outputs",)),
    Specimen("deit", DeiT, IMAGE, ("two tokens", "two heads averaged", "fused attention")),
    Specimen("cait", CaiT, IMAGE, ("linear over heads", "class attention", "layer scale")),
    Specimen("swin", Swin, IMAGE, ("windows", "roll", "mask", "bias table by index", "strided slices")),
    Specimen("swin-v2", SwinV2, IMAGE, ("normalize", "clamp and exp of a parameter", "perceptron on constants")),
    Specimen("mlp-mixer", partial(PatchMixer, MixerBlock), IMAGE, ("linear over tokens", "transpose")),
    Specimen("resmlp", partial(PatchMixer, ResMLPBlock, Affine), IMAGE, ("addcmul", "layer scale")),
    Specimen("gmlp", partial(PatchMixer, GMLPBlock), IMAGE, ("chunk of channels", "gelu tanh", "linear over tokens")),
    Specimen("levit", LeViT, IMAGE, ("vector BatchNorm on tokens", "bias table by index", "hardswish")),
    Specimen("cct", CCT, IMAGE, ("in-place add of a parameter", "sequence pool")),
    Specimen("encoder-pre-norm", partial(EncoderClassifier, True), IMAGE, ("TransformerEncoder", "unfold", "repeat")),
    Specimen("encoder-post-norm", partial(EncoderClassifier, False), IMAGE, ("TransformerEncoder", "fast path")),
)
