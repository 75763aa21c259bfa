"""Small user models for the tests of capturing, folding, importing and exporting."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.graphs.capture import capture
from stages.graphs.folding import fold
from stages.graphs.graph import Graph


def folded(
    module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> tuple[Graph, dict[str, Tensor]]:
    """A module's graph and tensors in deploy form, folded in this precision, or the module's own."""
    captured = capture(module, shape)
    arrays = {name: value.detach().to(dtype or value.dtype).numpy() for name, value in captured.tensors.items()}
    graph, arrays = fold(captured.graph, arrays)
    return graph, {name: torch.from_numpy(array) for name, array in arrays.items()}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and BatchNorm statistics, so that no part of a BatchNorm is the identity."""
    rng = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.3, generator=rng)
            part.running_var.uniform_(0.5, 2.0, generator=rng)
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5, generator=rng)
                nn.init.normal_(part.bias, 0, 0.3, generator=rng)
    return module.eval()


class PreActivation(nn.Module):
    """A pre-activation residual block: BatchNorm before each convolution, none of which can be folded backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.conv1(F.relu(self.bn1(x)))
        h = self.conv2(F.relu(self.bn2(h)))
        return (x + h).mean((2, 3))


class Classifier(nn.Module):
    """A classifier as users write them: in-place ReLUs shared by calls, view, dropout, a final linear layer."""

    def __init__(self, classes: int = 5, width: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.MaxPool2d(2),
        )
        self.act = nn.ReLU()
        self.point = nn.Conv2d(width, 2 * width, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(2 * width, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.features(x))
        x = self.act(self.point(x))
        x = self.drop(self.pool(x)).view(x.size(0), -1)
        return self.fc(x)


class Functional(nn.Module):
    """Everything as functions on parameters, one path pooled and one flattened, then joined."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 1, 5))
        self.w2 = nn.Parameter(torch.randn(4, 4, 3))
        self.b2 = nn.Parameter(torch.randn(4))
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x, self.w1, stride=2, padding=2).clamp(min=0)
        y = torch.clamp(F.conv1d(x, self.w2, self.b2, padding=1), 0, 6)
        x = torch.add(x, y)
        x = F.avg_pool1d(F.max_pool1d(x, 3, stride=2, padding=1, ceil_mode=True), 2, ceil_mode=True)
        short = F.adaptive_avg_pool1d(x, 1).squeeze(-1)
        both = torch.cat([short, torch.flatten(F.adaptive_avg_pool1d(x, 1), 1)], dim=-1)
        return F.linear(both, self.weight).relu()


class Pools(nn.Module):
    """Pooling in all its ways, concatenation, addition, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.fc = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.conv(x))
        top = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
        mean = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        x = torch.cat((top, mean), 1)
        x = F.relu(self.wide(x)) + x
        x = F.avg_pool2d(x, (2, 2), ceil_mode=True)
        return F.relu(self.fc(x.flatten(1)))


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, convolution, twice; its output is joined to its input, so the first one cannot be folded."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        return torch.cat((x, self.conv2(F.relu(self.norm2(new)))), 1)


def dense_net(growth: int = 6, depth: int = 5) -> nn.Module:
    """A DenseNet (arXiv:1608.06993) of three dense blocks with so many layers each."""
    channels = 2 * growth
    parts: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for block in range(3):
        parts += [DenseLayer(channels + i * growth, growth) for i in range(depth)]
        channels += depth * growth
        parts += [nn.BatchNorm2d(channels), nn.ReLU()]
        if block < 2:
            parts += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def normed_net() -> nn.Module:
    """A convolution and a GroupNorm, whose scale is a layer of its own."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def write_module(folder: Path, name: str = "user_models") -> None:
    """A file that defines factories of user models, importable once `folder` is on the path."""
    source = """
        from torch import nn

        def classifier(classes=5, width=8, bias=True):
            from tests.models.nets import Classifier
            return Classifier(classes, width, bias)

        def not_a_module():
            return 3

        value = 7
    """
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
