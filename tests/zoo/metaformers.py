"""Reparameterised, large-kernel and hybrid networks: RepVGG to FastViT, ConvNeXt to EfficientFormer and MobileViT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.mobile import Conv2dNormActivation, LayerScale2d
from tests.zoo.parts import DropPath, LayerNorm2d, Mlp, StochasticDepth
from tests.zoo.residual import SELayer
from tests.zoo.specimen import Specimen


def conv_bn(inp: int, out: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1) -> nn.Sequential:
    result = nn.Sequential()
    result.add_module("conv", nn.Conv2d(inp, out, kernel, stride, padding, groups=groups, bias=False))
    result.add_module("bn", nn.BatchNorm2d(out))
    return result


class RepVGGBlock(nn.Module):
    """The training form: 3x3, 1x1 and, where shapes allow, a BatchNorm alone as the third branch."""

    def __init__(self, inp: int, out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.nonlinearity = nn.ReLU()
        self.se = nn.Identity()
        self.rbr_identity = nn.BatchNorm2d(inp) if out == inp and stride == 1 else None
        self.rbr_dense = conv_bn(inp, out, 3, stride, 1, groups)
        self.rbr_1x1 = conv_bn(inp, out, 1, stride, 0, groups)

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.se(self.rbr_reparam(inputs)))
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.nonlinearity(self.se(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out))


class RepVGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage0 = RepVGGBlock(3, 16, 2)
        self.stage1 = nn.ModuleList([RepVGGBlock(16, 24, 2), RepVGGBlock(24, 24)])
        self.stage2 = nn.ModuleList([RepVGGBlock(24, 32, 2), RepVGGBlock(32, 32, groups=2), RepVGGBlock(32, 32)])
        self.gap = nn.AdaptiveAvgPool2d(output_size=1)
        self.linear = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stage0(x)
        for stage in (self.stage1, self.stage2):
            for block in stage:
                out = block(out)
        out = self.gap(out)
        out = out.view(out.size(0), -1)
        return self.linear(out)


class MobileOneBlock(nn.Module):
    """MobileOne's training form: several over-parameterised branches, a scale and a skip branch, summed in a loop."""

    def __init__(
        self, inp: int, out: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1, branches: int = 2
    ) -> None:
        super().__init__()
        self.se = SELayer(out) if groups == 1 and stride == 1 and out == inp else nn.Identity()
        self.activation = nn.ReLU()
        self.rbr_skip = nn.BatchNorm2d(inp) if out == inp and stride == 1 else None
        self.rbr_conv = nn.ModuleList(conv_bn(inp, out, kernel, stride, padding, groups) for _ in range(branches))
        self.rbr_scale = conv_bn(inp, out, 1, stride, 0, groups) if kernel > 1 else None
        self.num_conv_branches = branches

    def forward(self, x: Tensor) -> Tensor:
        identity_out = 0
        if self.rbr_skip is not None:
            identity_out = self.rbr_skip(x)
        scale_out = 0
        if self.rbr_scale is not None:
            scale_out = self.rbr_scale(x)
        out = scale_out + identity_out
        for ix in range(self.num_conv_branches):
            out += self.rbr_conv[ix](x)
        return self.activation(self.se(out))


class MobileOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage0 = MobileOneBlock(3, 12, 3, 2, 1, branches=1)
        self.stage1 = self._stage(12, 24, 2)
        self.stage2 = self._stage(24, 40, 3)
        self.gap = nn.AdaptiveAvgPool2d(output_size=1)
        self.linear = nn.Linear(40, 5)

    @staticmethod
    def _stage(inp: int, out: int, count: int) -> nn.Sequential:
        blocks: list[nn.Module] = []
        for i in range(count):
            blocks.append(MobileOneBlock(inp, inp, 3, 2 if i == 0 else 1, 1, groups=inp))
            blocks.append(MobileOneBlock(inp, out, 1))
            inp = out
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stage0(x)))
        x = self.gap(x)
        x = x.view(x.size(0), -1)
        return self.linear(x)


class RepMixer(nn.Module):
    """FastViT's token mixer in training form: `x + layer_scale * (mixer(x) - norm(x))`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = MobileOneSkip(dim)
        self.mixer = DepthwiseBranches(dim)
        self.layer_scale = nn.Parameter(1e-5 * torch.ones((dim, 1, 1)), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


class MobileOneSkip(nn.Module):
    """A MobileOne block that has its skip branch alone."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.rbr_skip(x)


class DepthwiseBranches(nn.Module):
    """A depthwise MobileOne block without activation: convolution, scale and skip."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(dim)
        self.rbr_scale = conv_bn(dim, dim, 1, groups=dim)
        self.rbr_conv = nn.ModuleList([conv_bn(dim, dim, 3, 1, 1, dim)])

    def forward(self, x: Tensor) -> Tensor:
        out = self.rbr_skip(x) + self.rbr_scale(x)
        for conv in self.rbr_conv:
            out += conv(x)
        return out


class ConvFFN(nn.Module):
    """FastViT's feed-forward part: a depthwise 7x7, then two 1x1 convolutions with GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv = conv_bn(dim, dim, 7, 1, 3, dim)
        self.fc1 = nn.Conv2d(dim, hidden, kernel_size=1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, kernel_size=1)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class MHSA(nn.Module):
    """FastViT's attention on a map: flatten, transpose, qkv in one linear layer, unbind."""

    def __init__(self, dim: int, head_dim: int = 8) -> None:
        super().__init__()
        self.head_dim, self.num_heads, self.scale = head_dim, dim // head_dim, head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = torch.flatten(x, start_dim=2).transpose(-2, -1)
        qkv = self.qkv(x).reshape(b, h * w, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(b, h * w, c)
        return self.proj(x).transpose(-2, -1).reshape(b, c, h, w)


class RepMixerBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_mixer = RepMixer(dim)
        self.convffn = ConvFFN(dim, 3 * dim)
        self.layer_scale = nn.Parameter(1e-5 * torch.ones((dim, 1, 1)), requires_grad=True)
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.drop_path(self.layer_scale * self.convffn(x))


class AttentionBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.token_mixer = MHSA(dim)
        self.convffn = ConvFFN(dim, 3 * dim)
        self.layer_scale_1 = nn.Parameter(1e-5 * torch.ones((dim, 1, 1)), requires_grad=True)
        self.layer_scale_2 = nn.Parameter(1e-5 * torch.ones((dim, 1, 1)), requires_grad=True)
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1 * self.token_mixer(self.norm(x)))
        return x + self.drop_path(self.layer_scale_2 * self.convffn(x))


class RepCPE(nn.Module):
    """Conditional positional encoding: a depthwise convolution with bias, added."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pe = nn.Conv2d(dim, dim, 7, 1, 3, bias=True, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.pe(x) + x


class FastViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(
            MobileOneBlock(3, 16, 3, 2, 1, branches=1),
            MobileOneBlock(16, 16, 3, 2, 1, 16, branches=1),
            MobileOneBlock(16, 16, 1, branches=1),
        )
        self.network = nn.ModuleList(
            [
                nn.Sequential(RepMixerBlock(16), RepMixerBlock(16)),
                nn.Sequential(conv_bn(16, 32, 7, 2, 3, 16), MobileOneBlock(32, 32, 1, branches=1)),
                RepCPE(32),
                nn.Sequential(AttentionBlock(32), AttentionBlock(32)),
            ]
        )
        self.conv_exp = MobileOneBlock(32, 64, 3, 1, 1, 32, branches=1)
        self.gap = nn.AdaptiveAvgPool2d(output_size=1)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for block in self.network:
            x = block(x)
        x = self.gap(self.conv_exp(x))
        x = x.view(x.shape[0], -1)
        return self.head(x)


class Permute(nn.Module):
    """torchvision.ops.Permute."""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


class CNBlock(nn.Module):
    """torchvision's ConvNeXt block: linear layers on the last axis between two permutes, layer scale [C, 1, 1]."""

    def __init__(self, dim: int, sd: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim, bias=True),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(in_features=dim, out_features=4 * dim, bias=True),
            nn.GELU(),
            nn.Linear(in_features=4 * dim, out_features=dim, bias=True),
            Permute([0, 3, 1, 2]),
        )
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1) * 1e-6)
        self.stochastic_depth = StochasticDepth(sd, "row")

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer_scale * self.block(x)
        result = self.stochastic_depth(result)
        result += x
        return result


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 16, kernel_size=4, stride=4), LayerNorm2d(16, eps=1e-6)),
            nn.Sequential(CNBlock(16, 0.0), CNBlock(16, 0.05)),
            nn.Sequential(LayerNorm2d(16, eps=1e-6), nn.Conv2d(16, 32, kernel_size=2, stride=2)),
            nn.Sequential(CNBlock(32, 0.1), CNBlock(32, 0.15)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(LayerNorm2d(32, eps=1e-6), nn.Flatten(1), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        return self.classifier(x)


class GRN(nn.Module):
    """ConvNeXtV2's global response normalisation, channels last: an L2 norm over places."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * nx) + self.beta + x


class ConvNeXtV2Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        inp = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)
        x = self.norm(x)
        x = self.pwconv2(self.grn(self.act(self.pwconv1(x))))
        x = x.permute(0, 3, 1, 2)
        return inp + self.drop_path(x)


class ChannelsFirstNorm(nn.Module):
    """ConvNeXt's own LayerNorm over axis 1, written out: mean, square, sqrt."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 16, kernel_size=4, stride=4), ChannelsFirstNorm(16)),
                nn.Sequential(ChannelsFirstNorm(16), nn.Conv2d(16, 32, kernel_size=2, stride=2)),
            ]
        )
        self.stages = nn.ModuleList(nn.Sequential(ConvNeXtV2Block(dim), ConvNeXtV2Block(dim)) for dim in (16, 32))
        self.norm = nn.LayerNorm(32, eps=1e-6)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = self.downsample_layers[i](x)
            x = self.stages[i](x)
        return self.head(self.norm(x.mean([-2, -1])))


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def conv_mixer() -> nn.Module:
    """ConvMixer as published in one expression: `padding="same"` with an even sum of paddings, GELU before the norm."""
    dim, depth = 24, 3
    return nn.Sequential(
        nn.Conv2d(3, dim, kernel_size=4, stride=4),
        nn.GELU(),
        nn.BatchNorm2d(dim),
        *[
            nn.Sequential(
                Residual(
                    nn.Sequential(nn.Conv2d(dim, dim, 5, groups=dim, padding="same"), nn.GELU(), nn.BatchNorm2d(dim))
                ),
                nn.Conv2d(dim, dim, kernel_size=1),
                nn.GELU(),
                nn.BatchNorm2d(dim),
            )
            for _ in range(depth)
        ],
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(dim, 5),
    )


class Pooling(nn.Module):
    """PoolFormer's mixer: an average pool that does not count its padding, minus the input."""

    def __init__(self, pool_size: int = 3) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


class ConvMlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = act()
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class PoolFormerBlock(nn.Module):
    """GroupNorm with one group, and layer scales that are unsqueezed twice at every use."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, dim)
        self.token_mixer = Pooling()
        self.norm2 = nn.GroupNorm(1, dim)
        self.mlp = ConvMlp(dim, 4 * dim)
        self.drop_path = DropPath(0.1)
        self.layer_scale_1 = nn.Parameter(1e-5 * torch.ones(dim), requires_grad=True)
        self.layer_scale_2 = nn.Parameter(1e-5 * torch.ones(dim), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        scale_1 = self.layer_scale_1.unsqueeze(-1).unsqueeze(-1)
        x = x + self.drop_path(scale_1 * self.token_mixer(self.norm1(x)))
        scale_2 = self.layer_scale_2.unsqueeze(-1).unsqueeze(-1)
        return x + self.drop_path(scale_2 * self.mlp(self.norm2(x)))


class PoolFormer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, kernel_size=7, stride=4, padding=2)
        self.network = nn.ModuleList(
            [
                nn.Sequential(PoolFormerBlock(16), PoolFormerBlock(16)),
                nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
                nn.Sequential(PoolFormerBlock(32), PoolFormerBlock(32)),
            ]
        )
        self.norm = nn.GroupNorm(1, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for block in self.network:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean([-2, -1]))


class BiasedAttention(nn.Module):
    """EfficientFormer's attention (LeViT's too): a learned bias per head and offset, looked up by fixed indices."""

    def __init__(self, dim: int, key_dim: int, heads: int, attn_ratio: int, resolution: int) -> None:
        super().__init__()
        self.num_heads, self.scale, self.key_dim = heads, key_dim**-0.5, key_dim
        self.d = attn_ratio * key_dim
        self.dh = self.d * heads
        self.qkv = nn.Linear(dim, self.dh + 2 * key_dim * heads)
        self.proj = nn.Linear(self.dh, dim)
        points = [(i, j) for i in range(resolution) for j in range(resolution)]
        offsets: dict[tuple[int, int], int] = {}
        idxs = [offsets.setdefault((abs(p[0] - q[0]), abs(p[1] - q[1])), len(offsets)) for p in points for q in points]
        self.attention_biases = nn.Parameter(torch.zeros(heads, len(offsets)))
        self.register_buffer("attention_bias_idxs", torch.LongTensor(idxs).view(len(points), len(points)))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x)
        q, k, v = qkv.reshape(b, n, self.num_heads, -1).split([self.key_dim, self.key_dim, self.d], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        attn = (q @ k.transpose(-2, -1)) * self.scale + self.attention_biases[:, self.attention_bias_idxs]
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(b, n, self.dh)
        return self.proj(x)


class Meta4D(nn.Module):
    """EfficientFormer on maps: a pool mixer and a perceptron of 1x1 convolutions with BatchNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_mixer = Pooling()
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.norm1 = nn.BatchNorm2d(4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(0.1)
        self.ls1 = LayerScale2d(dim)
        self.ls2 = LayerScale2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.token_mixer(x)))
        y = self.norm2(self.fc2(self.act(self.norm1(self.fc1(x)))))
        return x + self.drop_path(self.ls2(y))


class Meta3D(nn.Module):
    """EfficientFormer on tokens, with layer scale as a vector on the last axis."""

    def __init__(self, dim: int, resolution: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.token_mixer = BiasedAttention(dim, 8, 2, 2, resolution)
        self.ls1 = nn.Parameter(1e-5 * torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)
        self.ls2 = nn.Parameter(1e-5 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mixer(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class EfficientFormer(nn.Module):
    """Ends with two heads, classifier and distillation, whose answers are averaged in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv2dNormActivation(3, 8, 3, 2), Conv2dNormActivation(8, 16, 3, 2))
        self.stage1 = nn.Sequential(Meta4D(16), Meta4D(16))
        self.down = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24))
        self.stage2 = nn.Sequential(Meta3D(24, 4), Meta3D(24, 4))
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)
        self.head_dist = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stage1(self.stem(x)))
        x = x.flatten(2).transpose(1, 2)
        x = self.norm(self.stage2(x)).mean(dim=1)
        x, x_dist = self.head(x), self.head_dist(x)
        return (x + x_dist) / 2


class Transformer(nn.Module):
    """A pre-norm block as MobileViT has it: `nn.MultiheadAttention` and SiLU."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Dropout(0.1), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.ffn(self.norm2(x))


class MobileViTBlock(nn.Module):
    """timm's MobileViT block: unfolding into patches by reshapes and transposes, interpolation where sizes need it."""

    def __init__(self, inp: int, dim: int, depth: int, patch: int = 2) -> None:
        super().__init__()
        self.conv_kxk = Conv2dNormActivation(inp, inp, activation_layer=nn.SiLU)
        self.conv_1x1 = nn.Conv2d(inp, dim, 1, bias=False)
        self.transformer = nn.Sequential(*(Transformer(dim, 4, 2 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.conv_proj = Conv2dNormActivation(dim, inp, 1, activation_layer=nn.SiLU)
        self.conv_fusion = Conv2dNormActivation(2 * inp, inp, activation_layer=nn.SiLU)
        self.patch_size = (patch, patch)
        self.patch_area = patch * patch

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv_1x1(self.conv_kxk(x))
        patch_h, patch_w = self.patch_size
        b, c, h, w = x.shape
        new_h, new_w = math.ceil(h / patch_h) * patch_h, math.ceil(w / patch_w) * patch_w
        num_patch_h, num_patch_w = new_h // patch_h, new_w // patch_w
        num_patches = num_patch_h * num_patch_w
        interpolate = new_h != h or new_w != w
        if interpolate:
            x = F.interpolate(x, size=(new_h, new_w), mode="bilinear", align_corners=False)
        x = x.reshape(b * c * num_patch_h, patch_h, num_patch_w, patch_w).transpose(1, 2)
        x = x.reshape(b, c, num_patches, self.patch_area).transpose(1, 3).reshape(b * self.patch_area, num_patches, -1)
        x = self.norm(self.transformer(x))
        x = x.contiguous().view(b, self.patch_area, num_patches, -1)
        x = x.transpose(1, 3).reshape(b * c * num_patch_h, num_patch_w, patch_h, patch_w)
        x = x.transpose(1, 2).reshape(b, c, num_patch_h * patch_h, num_patch_w * patch_w)
        if interpolate:
            x = F.interpolate(x, size=(h, w), mode="bilinear", align_corners=False)
        x = self.conv_proj(x)
        return self.conv_fusion(torch.cat((shortcut, x), dim=1))


class MobileViTResidual(nn.Module):
    """MobileNetV2's block with SiLU, as MobileViT uses it."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Conv2dNormActivation(inp, 4 * inp, 1, activation_layer=nn.SiLU),
            Conv2dNormActivation(4 * inp, 4 * inp, 3, stride, 4 * inp, activation_layer=nn.SiLU),
            Conv2dNormActivation(4 * inp, out, 1, activation_layer=None),
        )
        self.use_res_connect = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return torch.add(x, self.block(x))
        return self.block(x)


class MobileViT(nn.Module):
    """The blocks meet maps of 5 x 5 and 3 x 3: odd, so they interpolate to 6 x 6 and 4 x 4 and back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, 8, 3, 2, activation_layer=nn.SiLU)
        self.stages = nn.Sequential(
            MobileViTResidual(8, 12, 1),
            nn.Sequential(MobileViTResidual(12, 16, 2), MobileViTBlock(16, 24, 2)),
            nn.Sequential(MobileViTResidual(16, 24, 2), MobileViTBlock(24, 32, 2)),
        )
        self.final_conv = Conv2dNormActivation(24, 64, 1, activation_layer=nn.SiLU)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.final_conv(self.stages(self.stem(x)))
        return self.fc(x.mean((2, 3)))


class LinearSelfAttention(nn.Module):
    """MobileViTv2's separable attention: split of sizes [1, d, d], softmax over patches, sum, broadcast multiply."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed_dim = dim
        self.qkv_proj = nn.Conv2d(dim, 1 + 2 * dim, kernel_size=1)
        self.out_proj = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv_proj(x).split([1, self.embed_dim, self.embed_dim], dim=1)
        context_scores = F.softmax(query, dim=-1)
        context_vector = (key * context_scores).sum(dim=-1, keepdim=True)
        out = F.relu(value) * context_vector.expand_as(value)
        return self.out_proj(out)


class MobileViTV2Block(nn.Module):
    """Patches by `F.unfold` and back by `F.pixel_shuffle`, as timm writes it for export."""

    def __init__(self, inp: int, dim: int, depth: int) -> None:
        super().__init__()
        self.conv_kxk = Conv2dNormActivation(inp, inp, groups=inp, activation_layer=nn.SiLU)
        self.conv_1x1 = nn.Conv2d(inp, dim, 1, bias=False)
        self.norms1 = nn.ModuleList(nn.GroupNorm(1, dim) for _ in range(depth))
        self.attns = nn.ModuleList(LinearSelfAttention(dim) for _ in range(depth))
        self.norms2 = nn.ModuleList(nn.GroupNorm(1, dim) for _ in range(depth))
        self.mlps = nn.ModuleList(ConvMlp(dim, 2 * dim, nn.SiLU) for _ in range(depth))
        self.norm = nn.GroupNorm(1, dim)
        self.conv_proj = Conv2dNormActivation(dim, inp, 1, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_1x1(self.conv_kxk(x))
        b, c, h, w = x.shape
        patches = h // 2 * (w // 2)
        x = F.unfold(x, kernel_size=(2, 2), stride=(2, 2)).reshape(b, c, 4, patches)
        for norm1, attn, norm2, mlp in zip(self.norms1, self.attns, self.norms2, self.mlps, strict=True):
            x = x + attn(norm1(x))
            x = x + mlp(norm2(x))
        x = self.norm(x)
        x = x.reshape(b, c * 4, h // 2, w // 2)
        x = F.pixel_shuffle(x, upscale_factor=2)
        return self.conv_proj(x)


class MobileViTV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, 8, 3, 2, activation_layer=nn.SiLU)
        self.stages = nn.Sequential(
            MobileViTResidual(8, 16, 2),
            MobileViTV2Block(16, 24, 2),
            MobileViTResidual(16, 24, 2),
            MobileViTV2Block(24, 32, 2),
        )
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


class XCA(nn.Module):
    """EdgeNeXt's cross-covariance attention: over channels, with `F.normalize` and a temperature per head."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 4, 1)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = F.normalize(q, dim=-1)
        k = F.normalize(k, dim=-1)
        attn = (q @ k.transpose(-2, -1)) * self.temperature
        attn = attn.softmax(dim=-1)
        x = (attn @ v).permute(0, 3, 1, 2).reshape(b, n, c)
        return self.proj(x)


class SDTAEncoder(nn.Module):
    """EdgeNeXt's split depthwise transpose attention: a split of channels whose parts feed on each other, then XCA."""

    def __init__(self, dim: int, scales: int) -> None:
        super().__init__()
        width = max(math.ceil(dim / scales), math.floor(dim // scales))
        self.width, self.nums = width, max(1, scales - 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width) for _ in range(self.nums)
        )
        self.norm_xca = nn.LayerNorm(dim, eps=1e-6)
        self.gamma_xca = nn.Parameter(1e-6 * torch.ones(dim))
        self.xca = XCA(dim, 4)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 2 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        inp = x
        spx = torch.split(x, self.width, 1)
        for i in range(self.nums):
            if i == 0:
                sp = spx[i]
            else:
                sp = sp + spx[i]
            sp = self.convs[i](sp)
            if i == 0:
                out = sp
            else:
                out = torch.cat((out, sp), 1)
        x = torch.cat((out, spx[self.nums]), 1)
        b, c, h, w = x.shape
        x = x.reshape(b, c, h * w).permute(0, 2, 1)
        x = x + self.drop_path(self.gamma_xca * self.xca(self.norm_xca(x)))
        x = x.reshape(b, h, w, c)
        x = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        return inp + self.drop_path(x.permute(0, 3, 1, 2))


class EdgeNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), LayerNorm2d(16, eps=1e-6))
        self.stages = nn.Sequential(
            nn.Sequential(CNBlock(16, 0.0), SDTAEncoder(16, 2)),
            nn.Sequential(LayerNorm2d(16, eps=1e-6), nn.Conv2d(16, 24, 2, 2)),
            nn.Sequential(CNBlock(24, 0.0), SDTAEncoder(24, 3), SDTAEncoder(24, 3)),
        )
        self.norm = nn.LayerNorm(24, eps=1e-6)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        x = self.norm(x.mean([-2, -1]))
        return self.head(x)


IMAGE = (3, 32, 32)

SPECIMENS = (
    Specimen("repvgg", RepVGG, IMAGE, ("three branches", "BatchNorm as a branch", "+ 0")),
    Specimen("mobileone", MobileOne, IMAGE, ("branches summed in a loop", "in-place add", "0 + tensor")),
    Specimen("fastvit", FastViT, IMAGE, ("RepMixer", "subtract", "layer scale", "attention on a map", "unbind")),
    Specimen("convnext", ConvNeXt, IMAGE, ("channels-last LayerNorm", "layer scale", "gelu", "linear on maps")),
    Specimen("convnext-v2", ConvNeXtV2, IMAGE, ("GRN", "norm", "LayerNorm written out", "None index")),
    Specimen("convmixer", conv_mixer, IMAGE, ("padding same", "BatchNorm after gelu")),
    Specimen("poolformer", PoolFormer, IMAGE, ("pool minus input", "GroupNorm(1)", "layer scale")),
    Specimen(
        "efficientformer", EfficientFormer, IMAGE, ("bias table by index", "split of sizes", "two heads averaged")
    ),
    Specimen("mobilevit", MobileViT, (3, 20, 20), ("unfold by reshapes", "MultiheadAttention", "interpolate bilinear")),
    Specimen("mobilevit-v2", MobileViTV2, IMAGE, ("unfold", "pixel shuffle", "separable attention", "GroupNorm(1)")),
    Specimen("edgenext", EdgeNeXt, IMAGE, ("cross-covariance attention", "normalize", "split that feeds on itself")),
)
