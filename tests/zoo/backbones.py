"""Backbones of detectors, encoder-decoders and networks of several resolutions, each with a classifier at its end."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.mobile import Conv2dNormActivation
from tests.zoo.specimen import Specimen


class DarkNetConv(nn.Sequential):
    def __init__(self, inp: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inp, out, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(out, momentum=0.9, eps=1e-5),
            nn.LeakyReLU(0.1),
        )


class DarkResidual(nn.Module):
    """DarkNet-53's unit: the addition has no activation after it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer1 = DarkNetConv(channels, channels // 2, 1)
        self.layer2 = DarkNetConv(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.layer2(self.layer1(x))
        out += residual
        return out


class DarkNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = DarkNetConv(3, 8, 3)
        self.conv2 = DarkNetConv(8, 16, 3, 2)
        self.residual_block1 = nn.Sequential(DarkResidual(16))
        self.conv3 = DarkNetConv(16, 32, 3, 2)
        self.residual_block2 = nn.Sequential(DarkResidual(32), DarkResidual(32))
        self.conv4 = DarkNetConv(32, 48, 3, 2)
        self.residual_block3 = nn.Sequential(DarkResidual(48), DarkResidual(48))
        self.global_avg_pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual_block1(self.conv2(self.conv1(x)))
        out = self.residual_block2(self.conv3(out))
        out = self.residual_block3(self.conv4(out))
        out = self.global_avg_pool(out)
        out = out.view(-1, 48)
        return self.fc(out)


class Conv(nn.Module):
    """YOLO's convolution with the class-wide default activation."""

    default_act = nn.SiLU()

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = self.default_act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class YoloBottleneck(nn.Module):
    def __init__(self, c1: int, c2: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c2, 3, 1)
        self.cv2 = Conv(c2, c2, 3, 1)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """YOLOv8's block: chunk, a chain whose every link is kept (`extend` of a generator), concatenation."""

    def __init__(self, c1: int, c2: int, n: int) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1 = Conv(c1, 2 * self.c, 1, 1)
        self.cv2 = Conv((2 + n) * self.c, c2, 1)
        self.m = nn.ModuleList(YoloBottleneck(self.c, self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """Fast spatial pyramid pooling: the same max pool of 5 three times."""

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        c_ = c1 // 2
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = Conv(c_ * 4, c2, 1, 1)
        self.m = nn.MaxPool2d(kernel_size=k, stride=1, padding=k // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class YoloClassifier(nn.Module):
    """YOLOv8-cls with the SPPF of its detector: one ModuleList of layers, `cat` of a list at the head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList(
            [
                Conv(3, 8, 3, 2),
                Conv(8, 16, 3, 2),
                C2f(16, 16, 1),
                Conv(16, 32, 3, 2),
                C2f(32, 32, 2),
                SPPF(32, 32),
            ]
        )
        self.conv = Conv(32, 64)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(p=0.0, inplace=True)
        self.linear = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        for m in self.model:
            x = m(x)
        return self.linear(self.drop(self.pool(self.conv(x)).flatten(1)))


class Mish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(F.softplus(x))


class CSPStage(nn.Module):
    """CSPDarkNet (YOLOv4): two 1x1 splits of the same map, residual blocks on one of them, concatenation; Mish."""

    def __init__(self, inp: int, out: int, blocks: int) -> None:
        super().__init__()
        half = out // 2
        norm = partial(Conv2dNormActivation, activation_layer=lambda inplace: Mish())
        self.downsample_conv = norm(inp, out, 3, 2)
        self.split_conv0 = norm(out, half, 1)
        self.split_conv1 = norm(out, half, 1)
        self.blocks_conv = nn.ModuleList(nn.Sequential(norm(half, half, 1), norm(half, half, 3)) for _ in range(blocks))
        self.concat_conv = norm(2 * half, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample_conv(x)
        x0 = self.split_conv0(x)
        x1 = self.split_conv1(x)
        for block in self.blocks_conv:
            x1 = x1 + block(x1)
        return self.concat_conv(torch.cat([x1, x0], dim=1))


class CSPDarkNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, 8, 3, activation_layer=nn.Mish)
        self.stages = nn.Sequential(CSPStage(8, 16, 1), CSPStage(16, 32, 2), CSPStage(32, 48, 2))
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean(dim=(-2, -1)))


class HRModule(nn.Module):
    """HRNet's exchange between two resolutions: nearest upsampling one way, strided convolutions the other."""

    def __init__(self, high: int, low: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(Conv2dNormActivation(c, c), Conv2dNormActivation(c, c)) for c in (high, low)
        )
        up = nn.Sequential(
            nn.Conv2d(low, high, 1, bias=False), nn.BatchNorm2d(high), nn.Upsample(scale_factor=2, mode="nearest")
        )
        down = Conv2dNormActivation(high, low, 3, 2, activation_layer=None)
        self.fuse_layers = nn.ModuleList([nn.ModuleList([None, up]), nn.ModuleList([down, None])])
        self.relu = nn.ReLU(False)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        x = [branch(part) for branch, part in zip(self.branches, x, strict=True)]
        fused = []
        for i, row in enumerate(self.fuse_layers):
            y = x[0] if i == 0 else row[0](x[0])
            y = y + (x[1] if i == 1 else row[1](x[1]))
            fused.append(self.relu(y))
        return fused


class HRNet(nn.Module):
    """Ends as HRNet's segmentation does: the low resolution interpolated to the size of the high one, bilinear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv2dNormActivation(3, 16, 3, 2), Conv2dNormActivation(16, 16, 3, 2))
        self.transition1 = nn.ModuleList([Conv2dNormActivation(16, 16), Conv2dNormActivation(16, 24, 3, 2)])
        self.stage2 = nn.ModuleList([HRModule(16, 24), HRModule(16, 24)])
        self.last_layer = Conv2dNormActivation(40, 64, 1)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        parts = [layer(x) for layer in self.transition1]
        for module in self.stage2:
            parts = module(parts)
        h, w = parts[0].size(2), parts[0].size(3)
        low = F.interpolate(parts[1], size=(h, w), mode="bilinear", align_corners=False)
        x = self.last_layer(torch.cat([parts[0], low], 1))
        return self.fc(x.mean((2, 3)))


class DoubleConv(nn.Sequential):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__(
            nn.Conv2d(inp, out, 3, padding=1),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )


class Up(nn.Module):
    """Transposed convolution, the difference of sizes padded, concatenation with the encoder's map."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inp, inp // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(inp, out)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        diff_y = x2.size()[2] - x1.size()[2]
        diff_x = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    """The input's size is odd, so that maps are padded; the map of logits is averaged to one answer per picture."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 8)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 16))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(16, 32))
        self.up1 = Up(32, 16)
        self.up2 = Up(16, 8)
        self.outc = nn.Conv2d(8, 5, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        return self.outc(x).mean(dim=(2, 3))


class DownSampler(nn.Module):
    """ESPNet's C: a strided convolution."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, out, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ESPBlock(nn.Module):
    """ESPNet's pyramid of dilated convolutions, summed hierarchically; BatchNorm and PReLU after the concatenation."""

    def __init__(self, inp: int, out: int, add: bool = True) -> None:
        super().__init__()
        n = out // 5
        n1 = out - 4 * n
        self.c1 = nn.Conv2d(inp, n, 1, bias=False)
        self.d1 = nn.Conv2d(n, n1, 3, padding=1, bias=False)
        for rate in (2, 4, 8, 16):
            self.add_module(f"d{rate}", nn.Conv2d(n, n, 3, padding=rate, dilation=rate, bias=False))
        self.bn = nn.BatchNorm2d(out, eps=1e-03)
        self.act = nn.PReLU(out)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        output1 = self.c1(x)
        add1 = self.d2(output1)
        add2 = add1 + self.d4(output1)
        add3 = add2 + self.d8(output1)
        add4 = add3 + self.d16(output1)
        combine = torch.cat([self.d1(output1), add1, add2, add3, add4], 1)
        if self.add:
            combine = x + combine
        return self.act(self.bn(combine))


class ESPNet(nn.Module):
    """The picture itself, shrunk by average pools, is concatenated at each resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.level1 = nn.Sequential(nn.Conv2d(3, 13, 3, 2, 1, bias=False), nn.BatchNorm2d(13, eps=1e-03), nn.PReLU(13))
        self.sample1 = nn.AvgPool2d(3, stride=2, padding=1)
        self.b1 = nn.Sequential(nn.BatchNorm2d(16, eps=1e-03), nn.PReLU(16))
        self.level2_0 = DownSampler(16, 32)
        self.level2 = nn.ModuleList([ESPBlock(32, 32), ESPBlock(32, 32)])
        self.b2 = nn.Sequential(nn.BatchNorm2d(64, eps=1e-03), nn.PReLU(64))
        self.classifier = nn.Conv2d(64, 5, 1, bias=False)
        self.up = nn.ConvTranspose2d(5, 5, 2, stride=2, padding=0, output_padding=0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output0 = self.b1(torch.cat([self.level1(x), self.sample1(x)], 1))
        output1_0 = self.level2_0(output0)
        for i, layer in enumerate(self.level2):
            if i == 0:
                output1 = layer(output1_0)
            else:
                output1 = layer(output1)
        output = self.classifier(self.b2(torch.cat([output1_0, output1], 1)))
        return self.up(output).flatten(2).mean(-1)


class FeaturePyramid(nn.Module):
    """An FPN: lateral convolutions, nearest upsampling to the size of the finer map, sums; levels are pooled and joined
    by `sum`."""

    def __init__(self, widths: tuple[int, ...], out: int) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Conv2d(c, out, 1) for c in widths)
        self.layer_blocks = nn.ModuleList(nn.Conv2d(out, out, 3, padding=1) for _ in widths)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        names, x = list(maps), list(maps.values())
        last_inner = self.inner_blocks[-1](x[-1])
        results = [self.layer_blocks[-1](last_inner)]
        for idx in range(len(x) - 2, -1, -1):
            inner_lateral = self.inner_blocks[idx](x[idx])
            inner_top_down = F.interpolate(last_inner, size=inner_lateral.shape[-2:], mode="nearest")
            last_inner = inner_lateral + inner_top_down
            results.insert(0, self.layer_blocks[idx](last_inner))
        return dict(zip(names, results, strict=True))


class FPNClassifier(nn.Module):
    """Maps go by name in a dict between the parts; sizes are odd, so upsampling is by no whole factor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "layer1": Conv2dNormActivation(3, 12, 3, 2),
                "layer2": Conv2dNormActivation(12, 24, 3, 2),
                "layer3": Conv2dNormActivation(24, 32, 3, 2),
            }
        )
        self.fpn = FeaturePyramid((12, 24, 32), 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = {}
        for name, layer in self.body.items():
            x = layer(x)
            maps[name] = x
        levels = self.fpn(maps)
        pooled = torch.stack([F.relu(level).amax((2, 3)) for level in levels.values()], dim=1)
        return self.head(pooled.sum(1))


class PixelShuffleNet(nn.Module):
    """A super-resolution net (ESPCN) as the trunk of a classifier: tanh, pixel shuffle, pixel unshuffle, SELU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 3 * 4, 3, padding=1)
        self.pixel_shuffle = nn.PixelShuffle(2)
        self.back = nn.PixelUnshuffle(4)
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(x))
        x = F.selu(self.conv2(x))
        x = torch.sigmoid(self.pixel_shuffle(self.conv3(x)))
        return self.fc(self.back(x).mean((2, 3)))


IMAGE = (3, 32, 32)

SPECIMENS = (
    Specimen("darknet", DarkNet, IMAGE, ("leaky relu", "view(-1, C)", "in-place add")),
    Specimen("yolov8-cls", YoloClassifier, IMAGE, ("silu shared by all", "chunk", "SPPF", "extend of a generator")),
    Specimen("cspdarknet", CSPDarkNet, IMAGE, ("mish", "x * tanh(softplus(x))")),
    Specimen("hrnet", HRNet, (3, 64, 64), ("upsample nearest", "interpolate bilinear", "two resolutions")),
    Specimen("unet", UNet, (3, 30, 30), ("transposed convolution", "pad", "concatenation")),
    Specimen("espnet", ESPNet, (3, 64, 64), ("dilated", "prelu", "transposed convolution without bias")),
    Specimen("fpn", FPNClassifier, (3, 36, 36), ("interpolate nearest", "dict of maps", "amax", "stack")),
    Specimen("espcn", PixelShuffleNet, (3, 16, 16), ("pixel shuffle", "pixel unshuffle", "selu", "tanh")),
)
