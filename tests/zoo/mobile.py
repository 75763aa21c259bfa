"""Networks made for phones and microcontrollers: depthwise convolutions, inverted residuals, channel shuffles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.parts import DropPath, make_divisible
from tests.zoo.specimen import Specimen


class MobileNetV1(nn.Module):
    """Depthwise separable convolutions in one Sequential, average pool of a fixed size, `view(-1, C)`."""

    def __init__(self) -> None:
        super().__init__()

        def conv_bn(inp: int, out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
            )

        def conv_dw(inp: int, out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False),
                nn.BatchNorm2d(inp),
                nn.ReLU(inplace=True),
                nn.Conv2d(inp, out, 1, 1, 0, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            )

        self.model = nn.Sequential(
            conv_bn(3, 8, 2),
            conv_dw(8, 16, 1),
            conv_dw(16, 32, 2),
            conv_dw(32, 32, 1),
            conv_dw(32, 64, 2),
            conv_dw(64, 64, 1),
            nn.AvgPool2d(4),
        )
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x)
        x = x.view(-1, 64)
        return self.fc(x)


class Conv2dNormActivation(nn.Sequential):
    """torchvision's class of the same name."""

    def __init__(
        self,
        inp: int,
        out: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
    ) -> None:
        padding = (kernel_size - 1) // 2 * dilation
        conv = nn.Conv2d(inp, out, kernel_size, stride, padding, dilation, groups, bias=False)
        layers: list[nn.Module] = [conv, norm_layer(out)]
        if activation_layer is not None:
            layers.append(activation_layer(inplace=True))
        super().__init__(*layers)


class InvertedResidual(nn.Module):
    """torchvision's MobileNetV2 block: `conv` is one Sequential, the shortcut is added without an activation."""

    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden_dim = round(inp * expand_ratio)
        self.use_res_connect = stride == 1 and inp == oup
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(Conv2dNormActivation(inp, hidden_dim, 1, activation_layer=nn.ReLU6))
        layers.extend(
            [
                Conv2dNormActivation(
                    hidden_dim, hidden_dim, stride=stride, groups=hidden_dim, activation_layer=nn.ReLU6
                ),
                nn.Conv2d(hidden_dim, oup, 1, 1, 0, bias=False),
                nn.BatchNorm2d(oup),
            ]
        )
        self.conv = nn.Sequential(*layers)
        self.out_channels = oup

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(nn.Module):
    """torchvision's names: `features`, `classifier.1`."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [Conv2dNormActivation(3, 8, stride=2, activation_layer=nn.ReLU6)]
        inp = 8
        for t, c, n, s in [(1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 3, 2), (6, 24, 2, 1)]:
            for i in range(n):
                features.append(InvertedResidual(inp, c, s if i == 0 else 1, expand_ratio=t))
                inp = c
        features.append(Conv2dNormActivation(inp, 96, 1, activation_layer=nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(p=0.2), nn.Linear(96, 5))

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        return self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class SqueezeExcitation(nn.Module):
    """torchvision.ops.SqueezeExcitation."""

    def __init__(
        self,
        inp: int,
        squeeze: int,
        activation: Callable[..., nn.Module] = nn.ReLU,
        scale_activation: Callable[..., nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(inp, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, inp, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def _scale(self, x: Tensor) -> Tensor:
        scale = self.avgpool(x)
        scale = self.fc1(scale)
        scale = self.activation(scale)
        scale = self.fc2(scale)
        return self.scale_activation(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self._scale(x) * x


class InvertedResidualV3(nn.Module):
    """torchvision's MobileNetV3 block: hardswish or ReLU, squeeze-and-excitation with hardsigmoid."""

    def __init__(self, inp: int, kernel: int, exp: int, out: int, use_se: bool, activation: str, stride: int) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inp == out
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
        act = nn.Hardswish if activation == "HS" else nn.ReLU
        layers: list[nn.Module] = []
        if exp != inp:
            layers.append(Conv2dNormActivation(inp, exp, 1, norm_layer=norm, activation_layer=act))
        layers.append(Conv2dNormActivation(exp, exp, kernel, stride, groups=exp, norm_layer=norm, activation_layer=act))
        if use_se:
            squeeze = make_divisible(exp // 4, 8)
            layers.append(SqueezeExcitation(exp, squeeze, scale_activation=nn.Hardsigmoid))
        layers.append(Conv2dNormActivation(exp, out, 1, norm_layer=norm, activation_layer=None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


class MobileNetV3(nn.Module):
    """torchvision's MobileNetV3: `features`, `avgpool`, `classifier` with a hidden layer and hardswish."""

    def __init__(self, setting: list[tuple[int, int, int, int, bool, str, int]], hidden: int) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
        conv = partial(Conv2dNormActivation, norm_layer=norm, activation_layer=nn.Hardswish)
        layers: list[nn.Module] = [conv(3, setting[0][0], stride=2)]
        layers += [InvertedResidualV3(*row) for row in setting]
        last = setting[-1][3]
        layers.append(conv(last, 6 * last, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(6 * last, hidden),
            nn.Hardswish(inplace=True),
            nn.Dropout(p=0.2, inplace=True),
            nn.Linear(hidden, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def mobilenet_v3_small() -> nn.Module:
    return MobileNetV3(
        [
            (8, 3, 8, 8, True, "RE", 2),
            (8, 3, 24, 16, False, "RE", 2),
            (16, 3, 32, 16, False, "RE", 1),
            (16, 5, 48, 24, True, "HS", 2),
            (24, 5, 72, 24, True, "HS", 1),
            (24, 5, 72, 24, True, "HS", 1),
        ],
        64,
    )


def mobilenet_v3_large() -> nn.Module:
    return MobileNetV3(
        [
            (8, 3, 8, 8, False, "RE", 1),
            (8, 3, 32, 12, False, "RE", 2),
            (12, 3, 36, 12, False, "RE", 1),
            (12, 5, 36, 16, True, "RE", 2),
            (16, 5, 48, 16, True, "RE", 1),
            (16, 3, 64, 24, False, "HS", 2),
            (24, 3, 60, 24, False, "HS", 1),
            (24, 3, 96, 32, True, "HS", 1),
            (32, 5, 96, 32, True, "HS", 1),
        ],
        80,
    )


class UniversalInvertedBottleneck(nn.Module):
    """MobileNetV4's block: optional depthwise convolutions before and after the expansion, layer scale."""

    def __init__(self, inp: int, out: int, start: int, middle: int, stride: int, expand: int, scale: bool) -> None:
        super().__init__()
        hidden = make_divisible(inp * expand, 8)
        norm = nn.BatchNorm2d

        def conv(i: int, o: int, k: int, s: int, g: int, act: bool) -> nn.Module:
            return Conv2dNormActivation(i, o, k, s, g, norm_layer=norm, activation_layer=nn.ReLU if act else None)

        self.dw_start = conv(inp, inp, start, 1 if middle else stride, inp, False) if start else nn.Identity()
        self.pw_exp = conv(inp, hidden, 1, 1, 1, True)
        self.dw_mid = conv(hidden, hidden, middle, stride, hidden, True) if middle else nn.Identity()
        self.pw_proj = conv(hidden, out, 1, 1, 1, False)
        self.layer_scale = LayerScale2d(out) if scale else nn.Identity()
        self.drop_path = DropPath(0.1)
        self.has_skip = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.pw_proj(self.dw_mid(self.pw_exp(self.dw_start(x))))
        x = self.layer_scale(x)
        return self.drop_path(x) + shortcut if self.has_skip else x


class LayerScale2d(nn.Module):
    """timm's LayerScale2d: a gain per channel, viewed as [1, C, 1, 1]."""

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.view(1, -1, 1, 1)
        return x.mul_(gamma) if self.inplace else x * gamma


class MobileAttention(nn.Module):
    """MobileNetV4's multi-query attention: one key and value for all heads, both on a map that a depthwise shrinks."""

    def __init__(self, dim: int, heads: int, key_dim: int) -> None:
        super().__init__()
        self.heads, self.key_dim, self.scale = heads, key_dim, key_dim**-0.5
        self.norm = nn.BatchNorm2d(dim)
        self.query = nn.Conv2d(dim, heads * key_dim, 1, bias=False)
        self.key = self._shrunk(dim, key_dim)
        self.value = self._shrunk(dim, key_dim)
        self.output = nn.Conv2d(heads * key_dim, dim, 1, bias=False)
        self.layer_scale = LayerScale2d(dim)
        self.drop_path = DropPath(0.1)

    @staticmethod
    def _shrunk(dim: int, out: int) -> nn.Sequential:
        down = nn.Conv2d(dim, dim, 3, 2, 1, groups=dim, bias=False)
        return nn.Sequential(down, nn.BatchNorm2d(dim), nn.Conv2d(dim, out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm(x)
        b, _, h, w = x.shape
        q = self.query(x).reshape(b, self.heads, self.key_dim, -1).transpose(-1, -2)
        k = self.key(x).reshape(b, self.key_dim, -1).transpose(1, 2).unsqueeze(1)
        v = self.value(x).reshape(b, self.key_dim, -1).transpose(1, 2).unsqueeze(1)
        attention = (q * self.scale) @ k.transpose(-1, -2)
        o = attention.softmax(dim=-1) @ v
        o = o.transpose(1, 2).reshape(b, h, w, -1).permute(0, 3, 1, 2).contiguous()
        return shortcut + self.drop_path(self.layer_scale(self.output(o)))


class MobileNetV4(nn.Module):
    """timm's names: `conv_stem`, `bn1`, `blocks`, `conv_head`; the head's norm comes after the pool."""

    def __init__(self, hybrid: bool) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        uib = partial(UniversalInvertedBottleneck, scale=hybrid)
        self.blocks = nn.Sequential(
            nn.Sequential(Conv2dNormActivation(8, 8, 3, 2), Conv2dNormActivation(8, 16, 1)),
            nn.Sequential(uib(16, 24, 5, 5, 2, 3), uib(24, 24, 0, 3, 1, 2), uib(24, 24, 3, 0, 1, 4)),
            nn.Sequential(
                *([MobileAttention(24, 4, 8), uib(24, 24, 3, 3, 1, 4), MobileAttention(24, 4, 8)] if hybrid else []),
                uib(24, 32, 3, 5, 2, 4),
                uib(32, 32, 0, 0, 1, 4),
                uib(32, 32, 5, 3, 1, 4),
            ),
            nn.Sequential(Conv2dNormActivation(32, 64, 1)),
        )
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = nn.Conv2d(64, 96, 1, bias=False)
        self.norm_head = nn.BatchNorm2d(96)
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv_stem(x)))
        x = self.global_pool(self.blocks(x))
        x = F.relu(self.norm_head(self.conv_head(x)))
        return self.classifier(self.flatten(x))


class MNASNetResidual(nn.Module):
    """torchvision's MNASNet block: `layers` is one Sequential of eight."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        mid = inp * expand
        self.apply_residual = inp == out and stride == 1
        self.layers = nn.Sequential(
            nn.Conv2d(inp, mid, 1, bias=False),
            nn.BatchNorm2d(mid, momentum=0.0003),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, mid, kernel, padding=kernel // 2, stride=stride, groups=mid, bias=False),
            nn.BatchNorm2d(mid, momentum=0.0003),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, out, 1, bias=False),
            nn.BatchNorm2d(out, momentum=0.0003),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.apply_residual:
            return self.layers(x) + x
        return self.layers(x)


def _stack(inp: int, out: int, kernel: int, stride: int, expand: int, repeats: int) -> nn.Sequential:
    first = MNASNetResidual(inp, out, kernel, stride, expand)
    return nn.Sequential(first, *(MNASNetResidual(out, out, kernel, 1, expand) for _ in range(repeats - 1)))


class MNASNet(nn.Module):
    """torchvision's MNASNet: stem and stacks in one Sequential `layers`, the pool by `mean([2, 3])`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1, stride=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 1, padding=0, stride=1, bias=False),
            nn.BatchNorm2d(8),
            _stack(8, 12, 3, 2, 3, 3),
            _stack(12, 16, 5, 2, 3, 3),
            _stack(16, 24, 5, 1, 6, 2),
            nn.Conv2d(24, 96, 1, bias=False),
            nn.BatchNorm2d(96),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Sequential(nn.Dropout(p=0.2, inplace=True), nn.Linear(96, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        x = x.mean([2, 3])
        return self.classifier(x)


class MobileInvertedConv(nn.Module):
    """Mobile inverted convolution of the once-for-all family, as named parts; `inverted_bottleneck` may be missing."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        mid = inp * expand
        self.inverted_bottleneck = self._part(inp, mid, 1, 1, 1, True) if expand > 1 else None
        self.depth_conv = self._part(mid, mid, kernel, stride, mid, True)
        self.point_linear = self._part(mid, out, 1, 1, 1, False)

    @staticmethod
    def _part(inp: int, out: int, kernel: int, stride: int, groups: int, act: bool) -> nn.Sequential:
        part = nn.Sequential()
        part.add_module("conv", nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False))
        part.add_module("bn", nn.BatchNorm2d(out))
        if act:
            part.add_module("act", nn.ReLU6(inplace=True))
        return part

    def forward(self, x: Tensor) -> Tensor:
        if self.inverted_bottleneck:
            x = self.inverted_bottleneck(x)
        x = self.depth_conv(x)
        return self.point_linear(x)


class IdentityLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class MobileInvertedResidualBlock(nn.Module):
    """ProxylessNAS and MCUNet: a mobile inverted convolution beside an identity or nothing."""

    def __init__(self, mobile_inverted_conv: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.mobile_inverted_conv = mobile_inverted_conv
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            return self.mobile_inverted_conv(x)
        return self.mobile_inverted_conv(x) + self.shortcut(x)


class ProxylessNASNets(nn.Module):
    """A python loop over blocks, `x.view(x.size(0), -1)` after an adaptive pool; MCUNet has no feature mix layer."""

    def __init__(self, rows: list[tuple[int, int, int, int]], feature_mix: int) -> None:
        super().__init__()
        self.first_conv = MobileInvertedConv._part(3, 8, 3, 2, 1, True)
        blocks = [MobileInvertedResidualBlock(MobileInvertedConv(8, 8, 3, 1, 1), None)]
        inp = 8
        for out, kernel, stride, expand in rows:
            shortcut = IdentityLayer() if stride == 1 and inp == out else None
            blocks.append(MobileInvertedResidualBlock(MobileInvertedConv(inp, out, kernel, stride, expand), shortcut))
            inp = out
        self.blocks = nn.ModuleList(blocks)
        self.feature_mix_layer = MobileInvertedConv._part(inp, feature_mix, 1, 1, 1, True) if feature_mix else None
        self.global_avg_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(feature_mix or inp, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_conv(x)
        for block in self.blocks:
            x = block(x)
        if self.feature_mix_layer:
            x = self.feature_mix_layer(x)
        x = self.global_avg_pool(x)
        x = x.view(x.size(0), -1)
        return self.classifier(x)


def proxylessnas() -> nn.Module:
    rows = [(12, 5, 2, 3), (12, 3, 1, 3), (16, 7, 2, 3), (16, 3, 1, 3), (16, 5, 1, 6), (24, 7, 1, 6), (24, 7, 1, 3)]
    return ProxylessNASNets(rows, 96)


def mcunet() -> nn.Module:
    rows = [(8, 7, 2, 3), (8, 3, 1, 4), (16, 5, 2, 5), (16, 7, 1, 5), (16, 5, 1, 4), (24, 3, 2, 5), (24, 7, 1, 6)]
    return ProxylessNASNets(rows, 0)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """torchvision's channel shuffle: view, transpose, contiguous, view."""
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class FBNetBlock(nn.Module):
    """FBNet: grouped pointwise convolutions with a channel shuffle between, and the shortcut."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int, expand: int, groups: int) -> None:
        super().__init__()
        mid = inp * expand
        self.groups = groups
        self.pw = Conv2dNormActivation(inp, mid, 1, groups=groups)
        self.dw = Conv2dNormActivation(mid, mid, kernel, stride, groups=mid)
        self.pwl = Conv2dNormActivation(mid, out, 1, groups=groups, activation_layer=None)
        self.res_connect = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw(x)
        if self.groups > 1:
            y = channel_shuffle(y, self.groups)
        y = self.pwl(self.dw(y))
        if self.res_connect:
            y += x
        return y


class FBNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, 8, 3, 2)
        self.stages = nn.Sequential(
            FBNetBlock(8, 8, 3, 1, 1, 1),
            FBNetBlock(8, 16, 3, 2, 6, 1),
            FBNetBlock(16, 16, 5, 1, 1, 2),
            FBNetBlock(16, 16, 3, 1, 1, 2),
            FBNetBlock(16, 24, 5, 2, 6, 1),
            FBNetBlock(24, 24, 5, 1, 3, 2),
        )
        self.last = Conv2dNormActivation(24, 64, 1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.stages(self.stem(x)))
        x = F.avg_pool2d(x, x.shape[2:]).squeeze(3).squeeze(2)
        return self.fc(self.dropout(x))


class ShuffleUnitV1(nn.Module):
    """ShuffleNetV1's unit: grouped convolutions, a shuffle, a sum (stride 1) or a pool concatenated (stride 2)."""

    def __init__(self, inp: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        branch = out - inp if stride == 2 else out
        mid = out // 4
        first_groups = 1 if inp == 12 else groups
        self.compress = Conv2dNormActivation(inp, mid, 1, groups=first_groups)
        self.depthwise = Conv2dNormActivation(mid, mid, 3, stride, groups=mid, activation_layer=None)
        self.expand = Conv2dNormActivation(mid, branch, 1, groups=groups, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        y = channel_shuffle(self.compress(x), self.groups)
        y = self.expand(self.depthwise(y))
        if self.stride == 2:
            return F.relu(torch.cat((F.avg_pool2d(x, kernel_size=3, stride=2, padding=1), y), 1))
        return F.relu(x + y)


class ShuffleNetV1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage2 = nn.Sequential(
            ShuffleUnitV1(12, 48, 2, 3), ShuffleUnitV1(48, 48, 1, 3), ShuffleUnitV1(48, 48, 1, 3)
        )
        self.stage3 = nn.Sequential(ShuffleUnitV1(48, 96, 2, 3), ShuffleUnitV1(96, 96, 1, 3))
        self.fc = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.stage3(self.stage2(x))
        x = F.avg_pool2d(x, x.data.size()[-2:])
        x = x.view(x.size(0), -1)
        return self.fc(x)


class ShuffleUnitV2(nn.Module):
    """torchvision's ShuffleNetV2 unit: chunk, a branch, concatenation, shuffle."""

    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = oup // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                self.depthwise_conv(inp, inp, 3, stride, 1),
                nn.BatchNorm2d(inp),
                nn.Conv2d(inp, half, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(inp if stride > 1 else half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            self.depthwise_conv(half, half, 3, stride, 1),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    @staticmethod
    def depthwise_conv(i: int, o: int, kernel_size: int, stride: int, padding: int) -> nn.Conv2d:
        return nn.Conv2d(i, o, kernel_size, stride, padding, bias=False, groups=i)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stage2 = nn.Sequential(ShuffleUnitV2(12, 24, 2), ShuffleUnitV2(24, 24, 1), ShuffleUnitV2(24, 24, 1))
        self.stage3 = nn.Sequential(ShuffleUnitV2(24, 48, 2), ShuffleUnitV2(48, 48, 1), ShuffleUnitV2(48, 48, 1))
        self.conv5 = nn.Sequential(nn.Conv2d(48, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU(inplace=True))
        self.fc = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage3(self.stage2(x)))
        x = x.mean([2, 3])
        return self.fc(x)


class GhostModule(nn.Module):
    """GhostNet: half of the channels by a cheap depthwise operation, cut to size by a slice."""

    def __init__(self, inp: int, oup: int, relu: bool = True, ratio: int = 2, dw_size: int = 3) -> None:
        super().__init__()
        self.oup = oup
        init = -(-oup // ratio)
        new = init * (ratio - 1)
        act = nn.ReLU(inplace=True) if relu else nn.Sequential()
        self.primary_conv = nn.Sequential(nn.Conv2d(inp, init, 1, bias=False), nn.BatchNorm2d(init), act)
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(init, new, dw_size, 1, dw_size // 2, groups=init, bias=False), nn.BatchNorm2d(new), act
        )

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        out = torch.cat([x1, x2], dim=1)
        return out[:, : self.oup, :, :]


class GhostSE(nn.Module):
    def __init__(self, chs: int) -> None:
        super().__init__()
        reduced = make_divisible(chs * 0.25, 4)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_reduce = nn.Conv2d(chs, reduced, 1, bias=True)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(reduced, chs, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x_se = self.avg_pool(x)
        x_se = self.conv_reduce(x_se)
        x_se = self.act1(x_se)
        x_se = self.conv_expand(x_se)
        return x * (F.relu6(x_se + 3.0) / 6.0)


class GhostBottleneck(nn.Module):
    def __init__(self, inp: int, mid: int, out: int, kernel: int, stride: int, se: bool) -> None:
        super().__init__()
        self.stride = stride
        self.ghost1 = GhostModule(inp, mid, relu=True)
        if stride > 1:
            self.conv_dw = nn.Conv2d(mid, mid, kernel, stride, (kernel - 1) // 2, groups=mid, bias=False)
            self.bn_dw = nn.BatchNorm2d(mid)
        self.se = GhostSE(mid) if se else None
        self.ghost2 = GhostModule(mid, out, relu=False)
        if inp == out and stride == 1:
            self.shortcut = nn.Sequential()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inp, inp, kernel, stride, (kernel - 1) // 2, groups=inp, bias=False),
                nn.BatchNorm2d(inp),
                nn.Conv2d(inp, out, 1, bias=False),
                nn.BatchNorm2d(out),
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.ghost1(x)
        if self.stride > 1:
            x = self.bn_dw(self.conv_dw(x))
        if self.se is not None:
            x = self.se(x)
        x = self.ghost2(x)
        x += self.shortcut(residual)
        return x


class GhostNet(nn.Module):
    """Widths that are no multiple of two make the slice cut something (15 of 16 channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(
            nn.Sequential(GhostBottleneck(8, 8, 8, 3, 1, False)),
            nn.Sequential(GhostBottleneck(8, 24, 12, 3, 2, False), GhostBottleneck(12, 35, 12, 3, 1, False)),
            nn.Sequential(GhostBottleneck(12, 36, 15, 5, 2, True), GhostBottleneck(15, 60, 15, 5, 1, True)),
            nn.Sequential(nn.Conv2d(15, 60, 1, bias=False), nn.BatchNorm2d(60), nn.ReLU(inplace=True)),
        )
        self.global_pool = nn.AdaptiveAvgPool2d((1, 1))
        self.conv_head = nn.Conv2d(60, 80, 1, 1, 0, bias=True)
        self.act2 = nn.ReLU(inplace=True)
        self.classifier = nn.Linear(80, 5)
        self.dropout = 0.2

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = self.act2(self.conv_head(self.global_pool(x)))
        x = x.view(x.size(0), -1)
        if self.dropout > 0.0:
            x = F.dropout(x, p=self.dropout, training=self.training)
        return self.classifier(x)


class Fire(nn.Module):
    """torchvision's SqueezeNet module."""

    def __init__(self, inplanes: int, squeeze: int, expand1x1: int, expand3x3: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inplanes, squeeze, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze, expand1x1, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeeze, expand3x3, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


class SqueezeNet(nn.Module):
    """The classifier is a convolution, then ReLU and the pool: no linear layer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, kernel_size=3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(16, 8, 16, 16),
            Fire(32, 8, 16, 16),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(32, 12, 24, 24),
            Fire(48, 12, 24, 24),
        )
        final_conv = nn.Conv2d(48, 5, kernel_size=1)
        self.classifier = nn.Sequential(
            nn.Dropout(p=0.5), final_conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.classifier(x)
        return torch.flatten(x, 1)


IMAGE = (3, 32, 32)

SPECIMENS = (
    Specimen("mobilenet-v1", MobileNetV1, IMAGE, ("depthwise", "view(-1, C)")),
    Specimen("mobilenet-v2", MobileNetV2, IMAGE, ("relu6", "inverted residual", "torchvision names")),
    Specimen("mobilenet-v3-small", mobilenet_v3_small, IMAGE, ("hardswish", "SE hardsigmoid", "in-place add")),
    Specimen("mobilenet-v3-large", mobilenet_v3_large, IMAGE, ("hardswish", "SE hardsigmoid", "in-place add")),
    Specimen("mobilenet-v4-conv", partial(MobileNetV4, False), IMAGE, ("UIB", "norm after the pool")),
    Specimen("mobilenet-v4-hybrid", partial(MobileNetV4, True), IMAGE, ("multi-query attention", "layer scale")),
    Specimen("mnasnet", MNASNet, IMAGE, ("mean([2, 3])",)),
    Specimen("proxylessnas", proxylessnas, IMAGE, ("7x7 depthwise", "python loop", "view(size(0), -1)")),
    Specimen("mcunet", mcunet, IMAGE, ("mixed kernels", "python loop")),
    Specimen("fbnet", FBNet, IMAGE, ("grouped pointwise", "channel shuffle", "avg_pool2d of shape")),
    Specimen("shufflenet-v1", ShuffleNetV1, IMAGE, ("grouped pointwise", "channel shuffle", "concatenated pool")),
    Specimen("shufflenet-v2", ShuffleNetV2, IMAGE, ("chunk", "channel shuffle")),
    Specimen("ghostnet", GhostNet, IMAGE, ("slice", "relu6(x + 3) / 6", "in-place add", "functional dropout")),
    Specimen("squeezenet", SqueezeNet, IMAGE, ("ceil pool", "convolution as classifier")),
)
