"""Chains, dense concatenations and inception blocks."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.specimen import Specimen


class LeNet5(nn.Module):
    """The network of 1998 as it is written today: tanh, average pools, three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.tanh(self.conv1(x)))
        x = self.pool(torch.tanh(self.conv2(x)))
        x = x.view(-1, self.num_flat_features(x))
        x = torch.tanh(self.fc1(x))
        x = torch.tanh(self.fc2(x))
        return self.fc3(x)

    def num_flat_features(self, x: Tensor) -> int:
        count = 1
        for size in x.size()[1:]:
            count *= size
        return count


class AlexNet(nn.Module):
    """torchvision's AlexNet; the pool to 6 x 6 is one to 3 x 3 here: from 7 x 7, so its windows overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, kernel_size=11, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(16, 24, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(24, 32, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(
            nn.Dropout(p=0.5),
            nn.Linear(32 * 3 * 3, 64),
            nn.ReLU(inplace=True),
            nn.Dropout(p=0.5),
            nn.Linear(64, 64),
            nn.ReLU(inplace=True),
            nn.Linear(64, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


class VGGBN(nn.Module):
    """torchvision's VGG with BatchNorm, biases in the convolutions as there; the pool enlarges 2 x 2 to 3 x 3."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inp = 3
        for v in [8, 8, "M", 16, 16, "M", 24, 24, "M", 32, "M"]:
            if v == "M":
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            else:
                layers += [nn.Conv2d(inp, v, kernel_size=3, padding=1), nn.BatchNorm2d(v), nn.ReLU(inplace=True)]
                inp = v
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(
            nn.Linear(32 * 3 * 3, 64),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(64, 64),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(64, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


class DenseLayer(nn.Module):
    """torchvision's dense layer: takes the list of all maps before it."""

    def __init__(self, inp: int, growth: int, bn_size: int = 2, drop: float = 0.1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inp)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inp, bn_size * growth, kernel_size=1, stride=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth, growth, kernel_size=3, stride=1, padding=1, bias=False)
        self.drop_rate = drop

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        concated_features = torch.cat(inputs, 1)
        return self.conv1(self.relu1(self.norm1(concated_features)))

    def forward(self, x: list[Tensor]) -> Tensor:
        new_features = self.conv2(self.relu2(self.norm2(self.bn_function(x))))
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class DenseBlock(nn.ModuleDict):
    def __init__(self, count: int, inp: int, growth: int) -> None:
        super().__init__()
        for i in range(count):
            self.add_module(f"denselayer{i + 1}", DenseLayer(inp + i * growth, growth))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """torchvision's names: `features.denseblock1.denselayer1.conv1`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3, bias=False),
                norm0=nn.BatchNorm2d(16),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            )
        )
        width = 16
        for i in range(3):
            self.features.add_module(f"denseblock{i + 1}", DenseBlock(3, width, 8))
            width += 24
            if i < 2:
                transition = nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(width),
                        relu=nn.ReLU(inplace=True),
                        conv=nn.Conv2d(width, width // 2, kernel_size=1, stride=1, bias=False),
                        pool=nn.AvgPool2d(kernel_size=2, stride=2),
                    )
                )
                self.features.add_module(f"transition{i + 1}", transition)
                width //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        out = torch.flatten(out, 1)
        return self.classifier(out)


class CondenseLayer(nn.Module):
    """CondenseNet after condensing: an index of channels, grouped 1x1 and 3x3 convolutions, shuffle, concatenation."""

    def __init__(self, inp: int, growth: int, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.norm1 = nn.BatchNorm2d(inp)
        self.conv1 = nn.Conv2d(inp, 4 * growth, 1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, groups=groups, bias=False)
        self.register_buffer("index", torch.randperm(inp))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.index_select(x, 1, self.index)
        y = self.conv1(F.relu(self.norm1(y)))
        y = F.relu(self.norm2(y))
        b, c, h, w = y.size()
        y = y.view(b, c // self.groups, self.groups, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        return torch.cat([x, self.conv2(y)], 1)


class CondenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.init_conv = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.block1 = nn.Sequential(CondenseLayer(16, 8), CondenseLayer(24, 8), CondenseLayer(32, 8))
        self.transition = nn.AvgPool2d(kernel_size=2, stride=2)
        self.block2 = nn.Sequential(CondenseLayer(40, 16), CondenseLayer(56, 16))
        self.norm_last = nn.BatchNorm2d(72)
        self.relu_last = nn.ReLU(inplace=True)
        self.pool_last = nn.AvgPool2d(8)
        self.classifier = nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.transition(self.block1(self.init_conv(x))))
        x = self.pool_last(self.relu_last(self.norm_last(x)))
        out = x.view(x.size(0), -1)
        return self.classifier(out)


class BasicConv2d(nn.Module):
    """torchvision's convolution of GoogLeNet and Inception: eps 0.001, functional in-place ReLU."""

    def __init__(self, inp: int, out: int, **kwargs: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, out, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class Inception(nn.Module):
    """GoogLeNet's block of four branches."""

    def __init__(self, inp: int, c1: int, c3r: int, c3: int, c5r: int, c5: int, pool: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(inp, c1, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(inp, c3r, kernel_size=1), BasicConv2d(c3r, c3, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(inp, c5r, kernel_size=1), BasicConv2d(c5r, c5, kernel_size=3, padding=1)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True), BasicConv2d(inp, pool, kernel_size=1)
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._forward(x)
        return torch.cat(outputs, 1)


class GoogLeNet(nn.Module):
    """torchvision's GoogLeNet: `transform_input` rescales each channel, pools in ceil mode, an auxiliary classifier
    that is used in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.transform_input = True
        self.conv1 = BasicConv2d(3, 16, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(16, 16, kernel_size=1)
        self.conv3 = BasicConv2d(16, 24, kernel_size=3, padding=1)
        self.inception3a = Inception(24, 8, 12, 16, 4, 8, 8)
        self.inception3b = Inception(40, 16, 16, 24, 4, 8, 8)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = Inception(56, 24, 16, 32, 8, 12, 12)
        self.aux1 = nn.Linear(80, 5)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=0.2)
        self.fc = nn.Linear(80, 5)

    def _transform_input(self, x: Tensor) -> Tensor:
        if self.transform_input:
            x_ch0 = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
            x_ch1 = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
            x_ch2 = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
            x = torch.cat((x_ch0, x_ch1, x_ch2), 1)
        return x

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self._transform_input(x)
        x = self.maxpool1(self.conv1(x))
        x = self.conv3(self.conv2(x))
        x = self.inception3b(self.inception3a(x))
        x = self.inception4a(self.maxpool3(x))
        x = torch.flatten(self.avgpool(x), 1)
        y = self.fc(self.dropout(x))
        return (y, self.aux1(x)) if self.training else y


class InceptionA(nn.Module):
    """Inception-v3: 5x5 and double 3x3 branches, an average pool branch that counts its padding."""

    def __init__(self, inp: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(inp, 16, kernel_size=1)
        self.branch5x5_1 = BasicConv2d(inp, 8, kernel_size=1)
        self.branch5x5_2 = BasicConv2d(8, 16, kernel_size=5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(inp, 12, kernel_size=1)
        self.branch3x3dbl_2 = BasicConv2d(12, 16, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(16, 16, kernel_size=3, padding=1)
        self.branch_pool = BasicConv2d(inp, pool_features, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branch_pool = self.branch_pool(branch_pool)
        return torch.cat([branch1x1, branch5x5, branch3x3dbl, branch_pool], 1)


class InceptionC(nn.Module):
    """Inception-v3: 1x7 and 7x1 kernels."""

    def __init__(self, inp: int, c7: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(inp, 16, kernel_size=1)
        self.branch7x7_1 = BasicConv2d(inp, c7, kernel_size=1)
        self.branch7x7_2 = BasicConv2d(c7, c7, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7_3 = BasicConv2d(c7, 16, kernel_size=(7, 1), padding=(3, 0))
        self.branch_pool = BasicConv2d(inp, 16, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch_pool = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([branch1x1, branch7x7, branch_pool], 1)


class InceptionE(nn.Module):
    """Inception-v3: branches that split into 1x3 and 3x1 kernels and are concatenated twice."""

    def __init__(self, inp: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(inp, 24, kernel_size=1)
        self.branch3x3_1 = BasicConv2d(inp, 16, kernel_size=1)
        self.branch3x3_2a = BasicConv2d(16, 16, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(16, 16, kernel_size=(3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(inp, 8, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = torch.cat([self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)], 1)
        branch_pool = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([branch1x1, branch3x3, branch_pool], 1)


class InceptionB(nn.Module):
    """Inception-v3's reduction: a strided convolution, a strided double branch and a max pool, concatenated."""

    def __init__(self, inp: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(inp, 24, kernel_size=3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(inp, 8, kernel_size=1)
        self.branch3x3dbl_2 = BasicConv2d(8, 12, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(12, 12, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3(x)
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = F.max_pool2d(x, kernel_size=3, stride=2)
        return torch.cat([branch3x3, branch3x3dbl, branch_pool], 1)


class Inception3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 8, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(8, 8, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(8, 16, kernel_size=3, padding=1)
        self.Mixed_5b = InceptionA(16, 8)
        self.Mixed_5c = InceptionA(56, 16)
        self.Mixed_6a = InceptionB(64)
        self.Mixed_6b = InceptionC(100, 12)
        self.Mixed_6c = InceptionC(48, 12)
        self.Mixed_7b = InceptionE(48)
        self.Mixed_7c = InceptionE(64)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=0.5)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Mixed_6a(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.dropout(self.avgpool(x))
        x = torch.flatten(x, 1)
        return self.fc(x)


class SeparableConv2d(nn.Module):
    def __init__(self, inp: int, out: int, kernel_size: int = 3, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, inp, kernel_size, stride, padding, groups=inp, bias=False)
        self.pointwise = nn.Conv2d(inp, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.conv1(x))


class XceptionBlock(nn.Module):
    """ReLU first, and not in place where the block's input is its shortcut too."""

    def __init__(self, inp: int, out: int, reps: int, strides: int, start_with_relu: bool = True) -> None:
        super().__init__()
        self.skip = None
        if out != inp or strides != 1:
            self.skip = nn.Conv2d(inp, out, 1, stride=strides, bias=False)
            self.skipbn = nn.BatchNorm2d(out)
        rep: list[nn.Module] = []
        for i in range(reps):
            rep += [nn.ReLU(inplace=True), SeparableConv2d(inp if i == 0 else out, out), nn.BatchNorm2d(out)]
        rep = rep if start_with_relu else rep[1:]
        if start_with_relu:
            rep[0] = nn.ReLU(inplace=False)
        if strides != 1:
            rep.append(nn.MaxPool2d(3, strides, 1))
        self.rep = nn.Sequential(*rep)

    def forward(self, inp: Tensor) -> Tensor:
        x = self.rep(inp)
        skip = self.skipbn(self.skip(inp)) if self.skip is not None else inp
        x += skip
        return x


class Xception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 0, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU(inplace=True)
        self.block1 = XceptionBlock(16, 32, 2, 2, start_with_relu=False)
        self.block2 = XceptionBlock(32, 48, 2, 2)
        self.block3 = XceptionBlock(48, 48, 3, 1)
        self.block4 = XceptionBlock(48, 48, 3, 1)
        self.conv4 = SeparableConv2d(48, 64)
        self.bn4 = nn.BatchNorm2d(64)
        self.act4 = nn.ReLU(inplace=True)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.block4(self.block3(self.block2(self.block1(x))))
        x = self.act4(self.bn4(self.conv4(x)))
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = x.view(x.size(0), -1)
        return self.fc(x)


class NetworkInNetwork(nn.Module):
    """Perceptrons of 1x1 convolutions, pools of both kinds in ceil mode, local response normalisation, ELU."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Conv2d(3, 24, 5, padding=2),
            nn.ELU(inplace=True),
            nn.Conv2d(24, 16, 1),
            nn.ELU(inplace=True),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.LocalResponseNorm(5, alpha=0.01),
            nn.Dropout2d(0.5),
            nn.Conv2d(16, 24, 5, padding=2),
            nn.ELU(inplace=True),
            nn.Conv2d(24, 24, 1),
            nn.ELU(inplace=True),
            nn.AvgPool2d(3, 2, ceil_mode=True),
            nn.Dropout2d(0.5),
            nn.Conv2d(24, 5, 1),
            nn.AvgPool2d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.classifier(x)
        return x.view(x.size(0), 5)


IMAGE = (3, 32, 32)

SPECIMENS = (
    Specimen("lenet5", LeNet5, (1, 28, 28), ("tanh", "average pool", "view(-1, computed)")),
    Specimen("alexnet", AlexNet, (3, 64, 64), ("adaptive pool to 3", "dropout", "large kernel")),
    Specimen("vgg-bn", VGGBN, IMAGE, ("adaptive pool that enlarges", "bias before BatchNorm")),
    Specimen("densenet", DenseNet, IMAGE, ("BatchNorm that cannot be folded", "list of maps", "in-place relu")),
    Specimen("condensenet", CondenseNet, IMAGE, ("index_select", "grouped", "channel shuffle")),
    Specimen("googlenet", GoogLeNet, (3, 48, 48), ("ceil pool", "input transform", "unused in evaluation")),
    Specimen("inception-v3", Inception3, IMAGE, ("asymmetric kernels", "average pool stride 1")),
    Specimen("xception", Xception, IMAGE, ("separable", "ReLU first", "in-place add")),
    Specimen("nin", NetworkInNetwork, IMAGE, ("elu", "local response norm", "average pool ceil", "dropout2d")),
)
