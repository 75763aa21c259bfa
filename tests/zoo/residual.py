"""Residual networks and what was added to them: groups, gates, attention over channels and places, other norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.specimen import Specimen

Gate = Callable[[int], nn.Module]


def conv3x3(inp: int, out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inp, out, 3, stride, 1, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """torchvision's BasicBlock, with an optional gate before the sum."""

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None, gate: Gate | None
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.gate = gate(planes) if gate else None
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.gate is not None:
            out = self.gate(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """torchvision's Bottleneck (stride in the 3x3 convolution), with groups and an optional gate."""

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        gate: Gate | None,
        groups: int = 1,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.gate = gate(planes * self.expansion) if gate else None
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.gate is not None:
            out = self.gate(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """torchvision's ResNet and names: `conv1`, `bn1`, `layer1.0.conv1`, `fc`."""

    def __init__(self, block: Callable[..., nn.Module], expansion: int, gate: Gate | None = None) -> None:
        super().__init__()
        self.inplanes = 16
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        base = 16 if expansion == 1 else 8
        self.layer1 = self._make_layer(block, expansion, base, 2, 1, gate)
        self.layer2 = self._make_layer(block, expansion, 2 * base, 2, 2, gate)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * base * expansion, 5)

    def _make_layer(
        self, block: Callable[..., nn.Module], expansion: int, planes: int, blocks: int, stride: int, gate: Gate | None
    ) -> nn.Sequential:
        downsample, out = None, planes * expansion
        if stride != 1 or self.inplanes != out:
            downsample = nn.Sequential(nn.Conv2d(self.inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        layers = [block(self.inplanes, planes, stride, downsample, gate)]
        self.inplanes = out
        layers += [block(out, planes, 1, None, gate) for _ in range(blocks - 1)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class SELayer(nn.Module):
    """SENet's gate: pool, view, two linear layers without bias, view, `expand_as`."""

    def __init__(self, channel: int, reduction: int = 4) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class ECALayer(nn.Module):
    """ECA-Net: a 1-d convolution over the pooled channels."""

    def __init__(self, channel: int, k_size: int = 3) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, kernel_size=k_size, padding=(k_size - 1) // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.avg_pool(x)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        y = self.sigmoid(y)
        return x * y.expand_as(x)


class ChannelGate(nn.Module):
    """CBAM's channel attention: average and maximum pools through one shared perceptron, called twice."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, channels // reduction),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        total = None
        for pool in (F.avg_pool2d, F.max_pool2d):
            raw = self.mlp(pool(x, (x.size(2), x.size(3)), stride=(x.size(2), x.size(3))))
            total = raw if total is None else total + raw
        scale = torch.sigmoid(total).unsqueeze(2).unsqueeze(3).expand_as(x)
        return x * scale


class SpatialGate(nn.Module):
    """CBAM's spatial attention: maximum and mean over the channels, a 7x7 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        compressed = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.bn(self.conv(compressed)))


class CBAM(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ChannelGate = ChannelGate(channels)
        self.SpatialGate = SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        return self.SpatialGate(self.ChannelGate(x))


class ContextBlock(nn.Module):
    """GCNet's context block: a softmax over places, matmul, LayerNorm on [C, 1, 1], broadcast add."""

    def __init__(self, inplanes: int) -> None:
        super().__init__()
        planes = inplanes // 4
        self.conv_mask = nn.Conv2d(inplanes, 1, kernel_size=1)
        self.softmax = nn.Softmax(dim=2)
        self.channel_add_conv = nn.Sequential(
            nn.Conv2d(inplanes, planes, kernel_size=1),
            nn.LayerNorm([planes, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, inplanes, kernel_size=1),
        )

    def spatial_pool(self, x: Tensor) -> Tensor:
        batch, channel, height, width = x.size()
        input_x = x.view(batch, channel, height * width).unsqueeze(1)
        mask = self.conv_mask(x).view(batch, 1, height * width)
        mask = self.softmax(mask).unsqueeze(-1)
        return torch.matmul(input_x, mask).view(batch, channel, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.channel_add_conv(self.spatial_pool(x))


class NonLocal(nn.Module):
    """The embedded Gaussian non-local block with a pooled key and value, the last norm starting at zero."""

    def __init__(self, inp: int) -> None:
        super().__init__()
        self.inter = inp // 2
        self.g = nn.Sequential(nn.Conv2d(inp, self.inter, 1), nn.MaxPool2d(2))
        self.theta = nn.Conv2d(inp, self.inter, 1)
        self.phi = nn.Sequential(nn.Conv2d(inp, self.inter, 1), nn.MaxPool2d(2))
        self.W = nn.Sequential(nn.Conv2d(self.inter, inp, 1), nn.BatchNorm2d(inp))
        nn.init.constant_(self.W[1].weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        g_x = self.g(x).view(batch, self.inter, -1).permute(0, 2, 1)
        theta_x = self.theta(x).view(batch, self.inter, -1).permute(0, 2, 1)
        phi_x = self.phi(x).view(batch, self.inter, -1)
        attention = F.softmax(torch.matmul(theta_x, phi_x), dim=-1)
        y = torch.matmul(attention, g_x).permute(0, 2, 1).contiguous()
        y = y.view(batch, self.inter, *x.size()[2:])
        return self.W(y) + x


class SKConv(nn.Module):
    """Selective kernels: branches of several dilations, stacked by unsqueeze and cat, weighed by a softmax."""

    def __init__(self, features: int, branches: int = 2, groups: int = 4, d: int = 8) -> None:
        super().__init__()
        self.features = features
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(features, features, 3, padding=1 + i, dilation=1 + i, groups=groups, bias=False),
                nn.BatchNorm2d(features),
                nn.ReLU(inplace=True),
            )
            for i in range(branches)
        )
        self.fc = nn.Linear(features, d)
        self.fcs = nn.ModuleList(nn.Linear(d, features) for _ in range(branches))
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            fea = conv(x).unsqueeze(dim=1)
            if i == 0:
                feas = fea
            else:
                feas = torch.cat([feas, fea], dim=1)
        fea_u = torch.sum(feas, dim=1)
        fea_s = fea_u.mean(-1).mean(-1)
        fea_z = self.fc(fea_s)
        for i, fc in enumerate(self.fcs):
            vector = fc(fea_z).unsqueeze_(dim=1)
            if i == 0:
                vectors = vector
            else:
                vectors = torch.cat([vectors, vector], dim=1)
        vectors = self.softmax(vectors).unsqueeze(-1).unsqueeze(-1)
        return (feas * vectors).sum(dim=1)


class PreActBlock(nn.Module):
    """Wide ResNet's block: norm and ReLU before each convolution, the shortcut taken after the first activation."""

    def __init__(self, inp: int, out: int, stride: int, drop: float = 0.3) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inp)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(inp, out, stride)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out, out)
        self.droprate = drop
        self.equalInOut = inp == out
        self.convShortcut = None if self.equalInOut else nn.Conv2d(inp, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.equalInOut:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equalInOut else x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.equalInOut else self.convShortcut(x), out)


class WideResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nChannels = 40
        self.conv1 = conv3x3(3, 16)
        self.block1 = nn.Sequential(PreActBlock(16, 24, 1), PreActBlock(24, 24, 1))
        self.block2 = nn.Sequential(PreActBlock(24, 32, 2), PreActBlock(32, 32, 1))
        self.block3 = nn.Sequential(PreActBlock(32, 40, 2), PreActBlock(40, 40, 1))
        self.bn1 = nn.BatchNorm2d(40)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.block3(self.block2(self.block1(out)))
        out = self.relu(self.bn1(out))
        out = F.avg_pool2d(out, 8)
        out = out.view(-1, self.nChannels)
        return self.fc(out)


class StdConv2d(nn.Conv2d):
    """BiT's convolution with standardised weights, made in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        v, m = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
        w = (w - m) / torch.sqrt(v + 1e-10)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PreActBottleneck(nn.Module):
    """BiT's unit: GroupNorm, weight standardisation, pre-activation."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        cmid = cout // 4
        self.gn1 = nn.GroupNorm(4, cin)
        self.conv1 = StdConv2d(cin, cmid, 1, bias=False)
        self.gn2 = nn.GroupNorm(4, cmid)
        self.conv2 = StdConv2d(cmid, cmid, 3, stride, 1, bias=False)
        self.gn3 = nn.GroupNorm(4, cmid)
        self.conv3 = StdConv2d(cmid, cout, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        if stride != 1 or cin != cout:
            self.downsample = StdConv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.gn1(x))
        residual = x
        if hasattr(self, "downsample"):
            residual = self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.gn2(out)))
        out = self.conv3(self.relu(self.gn3(out)))
        return out + residual


class BiT(nn.Module):
    """Padding by a constant before the pool; the head is a convolution and `x[..., 0, 0]`."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Sequential(StdConv2d(3, 16, 7, 2, 3, bias=False), nn.ConstantPad2d(1, 0), nn.MaxPool2d(3, 2, 0))
        self.body = nn.Sequential(
            nn.Sequential(PreActBottleneck(16, 32, 1), PreActBottleneck(32, 32, 1)),
            nn.Sequential(PreActBottleneck(32, 64, 2), PreActBottleneck(64, 64, 1)),
        )
        self.head = nn.Sequential(
            nn.GroupNorm(4, 64), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 5, 1, bias=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.body(self.root(x)))
        assert x.shape[-2:] == (1, 1)
        return x[..., 0, 0]


class IBNa(nn.Module):
    """IBN-Net: half of the channels through InstanceNorm, the rest through BatchNorm, by split and concatenation."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.half = planes // 2
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(planes - self.half)

    def forward(self, x: Tensor) -> Tensor:
        split = torch.split(x, self.half, 1)
        return torch.cat((self.IN(split[0].contiguous()), self.BN(split[1].contiguous())), 1)


class IBNBlock(BasicBlock):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.bn1 = IBNa(self.conv1.out_channels)


class ResNetD(nn.Module):
    """The bag of tricks: a deep stem, an average pool before the projection, a fixed blur with reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv3x3(3, 8, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv3x3(8, 16), nn.BatchNorm2d(16)
        )
        self.down = nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(16, 32, 1, bias=False),
            nn.BatchNorm2d(32),
        )
        taps = torch.tensor([1.0, 2.0, 1.0])
        kernel = torch.outer(taps, taps) / 16
        self.register_buffer("filt", kernel[None, None].repeat(32, 1, 1, 1), persistent=False)
        self.block1 = BasicBlock(16, 32, 1, self.down_free(), None)
        self.block2 = BasicBlock(32, 32, 1, None, None)
        self.fc = nn.Linear(64, 5)

    @staticmethod
    def down_free() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))

    def blur(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filt, stride=2, groups=x.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))
        y = self.down(x)
        x = self.blur(self.block2(self.block1(x))) + y
        pooled = torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], dim=1)
        return self.fc(pooled.flatten(1))


class SimAM(nn.Module):
    """A gate without parameters: squared deviations from the mean over places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.size()
        n = w * h - 1
        square = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        y = square / (4 * (square.sum(dim=[2, 3], keepdim=True) / n + 1e-4)) + 0.5
        return x * self.act(y)


class CoordinateAttention(nn.Module):
    """Pools along each axis, concatenated, squeezed with hardswish written as `x * relu6(x + 3) / 6`, split again."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.pool_h = nn.AdaptiveAvgPool2d((None, 1))
        self.pool_w = nn.AdaptiveAvgPool2d((1, None))
        mip = max(8, channels // reduction)
        self.conv1 = nn.Conv2d(channels, mip, 1)
        self.bn1 = nn.BatchNorm2d(mip)
        self.relu = nn.ReLU6(inplace=True)
        self.conv_h = nn.Conv2d(mip, channels, 1)
        self.conv_w = nn.Conv2d(mip, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.size()
        x_h = self.pool_h(x)
        x_w = self.pool_w(x).permute(0, 1, 3, 2)
        y = self.bn1(self.conv1(torch.cat([x_h, x_w], dim=2)))
        y = y * (self.relu(y + 3) / 6)
        x_h, x_w = torch.split(y, [h, w], dim=2)
        x_w = x_w.permute(0, 1, 3, 2)
        return x * self.conv_w(x_w).sigmoid() * self.conv_h(x_h).sigmoid()


IMAGE = (3, 32, 32)


def basic(gate: Gate | None = None) -> Callable[[], nn.Module]:
    return partial(ResNet, BasicBlock, 1, gate)


def bottleneck(gate: Gate | None = None, groups: int = 1, base_width: int = 64) -> Callable[[], nn.Module]:
    return partial(ResNet, partial(Bottleneck, groups=groups, base_width=base_width), 4, gate)


SPECIMENS = (
    Specimen("resnet18", basic(), IMAGE, ("in-place add", "ReLU after the sum", "torchvision names")),
    Specimen("resnet50", bottleneck(), IMAGE, ("bottleneck", "in-place add")),
    Specimen("resnext", bottleneck(None, 4, 16), IMAGE, ("grouped", "bottleneck")),
    Specimen("wide-resnet", WideResNet, IMAGE, ("pre-activation", "BatchNorm that cannot be folded", "view(-1, N)")),
    Specimen("se-resnet", basic(SELayer), IMAGE, ("SE by linear and view", "expand_as")),
    Specimen("bit-resnet", BiT, IMAGE, ("GroupNorm", "weight standardisation", "constant pad", "x[..., 0, 0]")),
    Specimen("ibn-resnet", partial(ResNet, IBNBlock, 1), IMAGE, ("InstanceNorm", "split")),
    Specimen("resnet-d", ResNetD, IMAGE, ("blur pool", "reflection pad", "adaptive max pool", "average pool ceil")),
    Specimen("eca-resnet", basic(ECALayer), IMAGE, ("1-d convolution over channels", "transpose")),
    Specimen("cbam-resnet", basic(CBAM), IMAGE, ("layer called twice", "max over channels")),
    Specimen("gc-resnet", bottleneck(ContextBlock), IMAGE, ("softmax over places", "matmul", "LayerNorm on [C, 1, 1]")),
    Specimen("nonlocal-resnet", basic(NonLocal), IMAGE, ("matmul", "softmax", "zero-initialised norm")),
    Specimen("sk-resnet", basic(SKConv), IMAGE, ("dilated", "unsqueeze_", "softmax over branches", "sum")),
    Specimen("simam-resnet", basic(SimAM), IMAGE, ("pow", "divide", "subtract a mean")),
    Specimen("coord-resnet", basic(CoordinateAttention), IMAGE, ("pool of one axis", "split of two sizes")),
)
