"""The EfficientNet family and RegNets: SiLU, squeeze-and-excitation, stochastic depth, fused inverted residuals."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tests.zoo.mobile import Conv2dNormActivation, SqueezeExcitation
from tests.zoo.parts import DropPath, StochasticDepth
from tests.zoo.specimen import Specimen


class MBConv(nn.Module):
    """torchvision's MBConv: SE with SiLU inside, stochastic depth on the branch, in-place add of the input."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int, expand: int, sd: float, se: bool = True) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inp == out
        norm, act = partial(nn.BatchNorm2d, eps=1e-3), nn.SiLU
        layers: list[nn.Module] = []
        mid = inp * expand
        if mid != inp:
            layers.append(Conv2dNormActivation(inp, mid, 1, norm_layer=norm, activation_layer=act))
        layers.append(Conv2dNormActivation(mid, mid, kernel, stride, mid, norm_layer=norm, activation_layer=act))
        if se:
            layers.append(SqueezeExcitation(mid, max(1, inp // 4), activation=partial(nn.SiLU, inplace=True)))
        layers.append(Conv2dNormActivation(mid, out, 1, norm_layer=norm, activation_layer=None))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(sd, "row")

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result


class FusedMBConv(nn.Module):
    """torchvision's FusedMBConv of EfficientNetV2: the expansion is a full convolution."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int, expand: int, sd: float) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inp == out
        conv = partial(Conv2dNormActivation, norm_layer=partial(nn.BatchNorm2d, eps=1e-3))
        mid = inp * expand
        if mid != inp:
            layers = [
                conv(inp, mid, kernel, stride, activation_layer=nn.SiLU),
                conv(mid, out, 1, activation_layer=None),
            ]
        else:
            layers = [conv(inp, out, kernel, stride, activation_layer=nn.SiLU)]
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(sd, "row")

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result


class EfficientNet(nn.Module):
    """torchvision's EfficientNet: `features`, `avgpool`, `classifier`."""

    def __init__(self, stages: list[list[nn.Module]], stem: int, last: int, head: int) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=1e-3)
        conv = partial(Conv2dNormActivation, norm_layer=norm, activation_layer=nn.SiLU)
        self.features = nn.Sequential(
            conv(3, stem, 3, 2), *(nn.Sequential(*stage) for stage in stages), conv(last, head, 1)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(p=0.2, inplace=True), nn.Linear(head, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def efficientnet_b0() -> nn.Module:
    return EfficientNet(
        [
            [MBConv(8, 8, 3, 1, 1, 0.0)],
            [MBConv(8, 12, 3, 2, 6, 0.02), MBConv(12, 12, 3, 1, 6, 0.04)],
            [MBConv(12, 16, 5, 2, 6, 0.06), MBConv(16, 16, 5, 1, 6, 0.08)],
            [MBConv(16, 24, 3, 2, 6, 0.1), MBConv(24, 24, 3, 1, 6, 0.12), MBConv(24, 24, 3, 1, 6, 0.14)],
        ],
        8,
        24,
        96,
    )


def efficientnet_v2() -> nn.Module:
    return EfficientNet(
        [
            [FusedMBConv(8, 8, 3, 1, 1, 0.0), FusedMBConv(8, 8, 3, 1, 1, 0.02)],
            [FusedMBConv(8, 12, 3, 2, 4, 0.04), FusedMBConv(12, 12, 3, 1, 4, 0.06)],
            [MBConv(12, 24, 3, 2, 4, 0.08), MBConv(24, 24, 3, 1, 4, 0.1), MBConv(24, 24, 3, 1, 4, 0.12)],
        ],
        8,
        24,
        96,
    )


class LiteBlock(nn.Module):
    """EfficientNet-Lite's block with timm's names (`conv_pw`, `conv_dw`, `conv_pwl`): ReLU6, no gate."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        mid = inp * expand
        self.has_skip = inp == out and stride == 1
        self.conv_pw = nn.Conv2d(inp, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.act1 = nn.ReLU6(inplace=True)
        self.conv_dw = nn.Conv2d(mid, mid, kernel, stride, kernel // 2, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.act2 = nn.ReLU6(inplace=True)
        self.conv_pwl = nn.Conv2d(mid, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.act1(self.bn1(self.conv_pw(x)))
        x = self.act2(self.bn2(self.conv_dw(x)))
        x = self.bn3(self.conv_pwl(x))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class EfficientNetLite0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU6(inplace=True)
        self.blocks = nn.Sequential(
            nn.Sequential(LiteBlock(8, 8, 3, 1, 1)),
            nn.Sequential(LiteBlock(8, 12, 3, 2, 6), LiteBlock(12, 12, 3, 1, 6)),
            nn.Sequential(LiteBlock(12, 16, 5, 2, 6), LiteBlock(16, 16, 5, 1, 6), LiteBlock(16, 16, 5, 1, 6)),
        )
        self.conv_head = nn.Conv2d(16, 96, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(96)
        self.act2 = nn.ReLU6(inplace=True)
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.classifier = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = self.act2(self.bn2(self.conv_head(x)))
        return self.classifier(self.global_pool(x))


class BottleneckTransform(nn.Sequential):
    """torchvision's RegNet branch: `a`, `b`, optional `se`, `c`."""

    def __init__(self, inp: int, out: int, stride: int, group_width: int, se_ratio: float) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["a"] = Conv2dNormActivation(inp, out, 1)
        layers["b"] = Conv2dNormActivation(out, out, 3, stride, out // group_width)
        if se_ratio:
            layers["se"] = SqueezeExcitation(out, round(se_ratio * inp), activation=partial(nn.ReLU, inplace=True))
        layers["c"] = Conv2dNormActivation(out, out, 1, activation_layer=None)
        super().__init__(layers)


class ResBottleneckBlock(nn.Module):
    def __init__(self, inp: int, out: int, stride: int, group_width: int, se_ratio: float) -> None:
        super().__init__()
        self.proj = None
        if inp != out or stride != 1:
            self.proj = Conv2dNormActivation(inp, out, 1, stride, activation_layer=None)
        self.f = BottleneckTransform(inp, out, stride, group_width, se_ratio)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.proj is not None:
            x = self.proj(x) + self.f(x)
        else:
            x = x + self.f(x)
        return self.activation(x)


class RegNet(nn.Module):
    """torchvision's RegNet: `stem`, `trunk_output.block1.block1-0`, `avgpool`, `fc`."""

    def __init__(self, se_ratio: float) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, 16, 3, 2)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        inp = 16
        for i, (width, depth) in enumerate([(16, 1), (32, 2), (48, 3)], 1):
            stage = nn.Sequential()
            for j in range(depth):
                block = ResBottleneckBlock(inp, width, 2 if j == 0 else 1, 8, se_ratio)
                stage.add_module(f"block{i}-{j}", block)
                inp = width
            blocks[f"block{i}"] = stage
        self.trunk_output = nn.Sequential(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.trunk_output(x)
        x = self.avgpool(x)
        x = x.flatten(start_dim=1)
        return self.fc(x)


class EffectiveSE(nn.Module):
    """VoVNet's effective squeeze-and-excitation: one convolution, hardsigmoid, the mean with keepdim."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, kernel_size=1, padding=0)
        self.gate: Callable[[Tensor], Tensor] = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x_se = x.mean((2, 3), keepdim=True)
        x_se = self.fc(x_se)
        return x * self.gate(x_se)


class OneShotAggregation(nn.Module):
    """VoVNet: all intermediate maps are concatenated once, squeezed and gated, with an identity around."""

    def __init__(self, inp: int, mid: int, out: int, layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Conv2dNormActivation(inp if i == 0 else mid, mid) for i in range(layers))
        self.conv_concat = Conv2dNormActivation(inp + layers * mid, out, 1)
        self.attn = EffectiveSE(out)
        self.residual = inp == out

    def forward(self, x: Tensor) -> Tensor:
        output = [x]
        for conv in self.convs:
            output.append(conv(output[-1]))
        y = self.attn(self.conv_concat(torch.cat(output, dim=1)))
        return y + x if self.residual else y


class VoVNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, 16, 3, 2)
        self.stages = nn.Sequential(
            OneShotAggregation(16, 12, 32, 3),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            OneShotAggregation(32, 16, 48, 3),
            OneShotAggregation(48, 16, 48, 3),
        )
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((-2, -1)))


IMAGE = (3, 32, 32)

SPECIMENS = (
    Specimen("efficientnet-b0", efficientnet_b0, IMAGE, ("silu", "SE silu", "stochastic depth", "in-place add")),
    Specimen("efficientnet-lite0", EfficientNetLite0, IMAGE, ("relu6", "drop path", "timm names")),
    Specimen("efficientnet-v2", efficientnet_v2, IMAGE, ("fused MBConv", "silu", "stochastic depth")),
    Specimen("regnet-x", partial(RegNet, 0.0), IMAGE, ("grouped", "dash in names")),
    Specimen("regnet-y", partial(RegNet, 0.25), IMAGE, ("grouped", "SE sigmoid", "dash in names")),
    Specimen("vovnet", VoVNet, IMAGE, ("concatenation of all", "eSE hardsigmoid", "ceil pool", "mean keepdim")),
)
