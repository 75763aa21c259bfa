"""Small networks whose Fisher potentials the tests know, or compute another way."""

import numpy as np
import torch
from torch import nn

from stages.artifacts.records import InputSpec
from stages.models.deploy import Backbone
from tests.models.nets import folded


class Bottleneck(nn.Module):
    """An inverted residual block: 1x1 up, depthwise, 1x1 down."""

    def __init__(self, width: int, mid: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, mid, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(mid)
        self.depthwise = nn.Conv2d(mid, mid, 3, padding=1, groups=mid, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(mid)
        self.project = nn.Conv2d(mid, width, 1)
        self.expand_act, self.depthwise_act = nn.ReLU6(), nn.ReLU6()

    def forward(self, x):
        y = self.expand_act(self.expand_norm(self.expand(x)))
        y = self.depthwise_act(self.depthwise_norm(self.depthwise(y)))
        return x + self.project(y)


class Mixed(nn.Module):
    """One of everything: residuals, depthwise and grouped convolutions, both activations, pooling, concat, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.stem_act = nn.ReLU()
        self.blocks = nn.ModuleList([Bottleneck(6, 9), Bottleneck(6, 12)])
        self.pool = nn.MaxPool2d(2)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.left_act, self.right_act = nn.ReLU(), nn.ReLU()
        self.mean = nn.AvgPool2d(2)
        self.head = nn.Linear(12, 5)
        self.head_act = nn.ReLU()

    def forward(self, x):
        x = self.stem_act(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.pool(x)
        x = torch.cat([self.left_act(self.left(x)), self.right_act(self.right(x))], 1)
        return self.head_act(self.head(torch.flatten(self.mean(x), 1)))


LAYERS = {  # layer -> where its output lies in the module once BatchNorm is folded
    "stem": "stem",
    "blocks.0.expand": "blocks.0.expand_norm",
    "blocks.0.depthwise": "blocks.0.depthwise_norm",
    "blocks.0.project": "blocks.0.project",
    "blocks.1.expand": "blocks.1.expand_norm",
    "blocks.1.depthwise": "blocks.1.depthwise_norm",
    "blocks.1.project": "blocks.1.project",
    "left": "left",
    "right": "right",
    "head": "head",
}

INPUT = InputSpec("image", (2, 8, 8))


def mixed(seed: int = 0) -> Mixed:
    """A `Mixed` with random weights and BatchNorm statistics, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Mixed()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.weight.data.normal_(1.0, 0.5)
                module.bias.data.normal_(1.0)
        return net.eval().requires_grad_(False)


def deployed(net: nn.Module, dtype: torch.dtype = torch.float32) -> Backbone:
    """The deploy form of a module, folded in this precision."""
    graph, tensors = folded(net, INPUT.shape, dtype)
    return Backbone(graph, {name: np.asarray(value) for name, value in tensors.items()}, INPUT)
