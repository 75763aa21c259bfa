"""Nothing of architecture: what people write around their networks, which an import must see through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.zoo.mobile import InvertedResidual
from tests.zoo.parts import Mlp
from tests.zoo.residual import BasicBlock
from tests.zoo.specimen import Specimen


class ScaledInside(nn.Module):
    """Bytes are divided by 255 and normalised in forward; the answer is a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(), InvertedResidual(16, 16, 1, 4)
        )
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() if x.dtype == torch.uint8 else x
        x = (x / 255 - self.mean) / self.std
        x = self.features(x).mean([2, 3])
        return torch.softmax(self.classifier(x), dim=-1)


class NoOperations(nn.Module):
    """Things that change nothing: `.float()`, `+ 0`, `* 1`, clone, contiguous, a cat of one, an unused result,
    conditions on shapes, asserts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.blocks = nn.ModuleDict({"a": BasicBlock(12, 12, 1, None, None), "b": BasicBlock(12, 12, 1, None, None)})
        self.identity = nn.Identity()
        self.unused = nn.Linear(7, 7)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, f"expected [N, 3, H, W], got {tuple(x.shape)}"
        if x.shape[-1] < 8:
            x = F.interpolate(x, size=(8, 8))
        x = self.identity(self.stem(x.float().to(self.fc.weight.dtype) + 0))
        _ = x.mean()
        for name in ("a", "b"):
            x = self.blocks[name](x.clone()) * 1
        x = torch.cat([x.contiguous()], dim=1)
        n = len(x)
        x = F.adaptive_avg_pool2d(x, 1).reshape(n, -1).squeeze()
        return self.fc(x.view(n, self.fc.in_features))


class Pruned(nn.Module):
    """Weights masked by `torch.nn.utils.prune`: made by a hook from `weight_orig` and `weight_mask`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, 5)
        prune.l1_unstructured(self.conv1, "weight", amount=0.5)
        prune.ln_structured(self.conv2, "weight", amount=0.25, n=2, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.conv2(x)).amax(dim=(-2, -1)))


class Spectral(nn.Module):
    """Weights divided by their largest singular value: a parametrization that reads its buffers in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = parametrizations.spectral_norm(nn.Conv2d(3, 12, 3, padding=1))
        self.conv2 = parametrizations.spectral_norm(nn.Conv2d(12, 16, 4, stride=2, padding=1))
        self.conv3 = parametrizations.spectral_norm(nn.Conv2d(16, 16, 4, stride=2, padding=1))
        self.fc = parametrizations.spectral_norm(nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.1)
        x = F.leaky_relu_(self.conv2(x), 0.1)
        x = F.leaky_relu(self.conv3(x), 0.1, inplace=True)
        return self.fc(x.sum((2, 3)))


class Padded(nn.Module):
    """Every way to pad: convolutions by padding mode, modules, and `F.pad` with a value and with negative widths."""

    def __init__(self) -> None:
        super().__init__()
        self.round = nn.Conv2d(3, 12, 3, padding=1, padding_mode="circular")
        self.mirror = nn.Conv2d(12, 16, 3, stride=2, padding=1, padding_mode="reflect")
        self.edge = nn.Conv2d(16, 16, 3, padding=(1, 2), padding_mode="replicate")
        self.pad = nn.ReflectionPad2d((1, 0, 2, 0))
        self.zero = nn.ZeroPad2d(1)
        self.last = nn.Conv2d(16, 16, 3, stride=2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mirror(F.relu(self.round(x))))
        x = F.pad(F.relu(self.edge(x)), (1, 1, 0, -1), value=0.5)
        x = F.relu(self.last(self.zero(self.pad(x))))
        return self.fc(x.mean((2, 3)))


class SharedBlocks(nn.Module):
    """ALBERT's way: one block called three times, and one classifier on two levels whose answers are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.norm = nn.LayerNorm(24)
        self.mlp = Mlp(24, 48)
        self.tokens = nn.Linear(16, 16)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        answers = []
        for _ in range(3):
            x = x + self.tokens(self.norm(x).mT).mT
            x = x + self.mlp(self.norm(x))
            answers.append(self.head(x.mean(1)))
        return torch.stack(answers[1:]).mean(0)


class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed; functional calls on parameters; the code is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32) / 6)
        self.encoder_bias = nn.Parameter(torch.zeros(16))
        self.decoder_bias = nn.Parameter(torch.zeros(32))
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.sigmoid(F.linear(x, self.weight, self.encoder_bias))
        back = F.linear(code, self.weight.t(), self.decoder_bias)
        error = self.alpha * (x - back) ** 2
        return self.fc(torch.hstack([code, error]))


class EarlyExits(nn.Module):
    """Three answers at once, the last exit's first, the others in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.stages = nn.ModuleList([InvertedResidual(12, 16, 2, 3), InvertedResidual(16, 16, 1, 3)])
        self.exits = nn.ModuleList([nn.Linear(12, 5), nn.Linear(16, 5)])
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(x)
        early = []
        for stage, leave in zip(self.stages, self.exits, strict=True):
            early.append(leave(x.mean((2, 3))))
            x = stage(x)
        return self.fc(x.mean((2, 3))), early


IMAGE = (3, 32, 32)

SPECIMENS = (
    Specimen(
        "scaled-inside", ScaledInside, IMAGE, ("x / 255", "mean and std as buffers", "softmax at the end"), spread=64.0
    ),
    Specimen("no-operations", NoOperations, IMAGE, ("+ 0", ".float()", "clone", "control flow on shapes", "unused")),
    Specimen("pruned", Pruned, IMAGE, ("masks by hooks", "amax")),
    Specimen("spectral", Spectral, IMAGE, ("spectral_norm", "in-place leaky relu", "sum over places")),
    Specimen("padded", Padded, IMAGE, ("circular", "reflect", "replicate", "pad with a value", "negative pad")),
    Specimen("shared-blocks", SharedBlocks, IMAGE, ("layer called three times", ".mT", "stack")),
    Specimen("tied-autoencoder", TiedAutoencoder, (32,), ("weight used twice, transposed", "hstack", "** 2")),
    Specimen("early-exits", EarlyExits, IMAGE, ("several outputs", "list of outputs")),
)
