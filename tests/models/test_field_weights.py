"""State dicts with torchvision's and timm's names, made by structure with random weights, load by `import`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from stages.errors import DataError, UsageError
from stages.importing import Importing, import_file
from stages.models.deploy import deploy
from stages.models.heads import logits
from tests.zoo.efficient import LiteBlock
from tests.zoo.mobile import Conv2dNormActivation, InvertedResidual, MobileNetV3
from tests.zoo.residual import BasicBlock

TORCHVISION_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
V3_SMALL = [
    (16, 3, 16, 16, True, "RE", 2), (16, 3, 72, 24, False, "RE", 2), (24, 3, 88, 24, False, "RE", 1),
    (24, 5, 96, 40, True, "HS", 2), (40, 5, 240, 40, True, "HS", 1), (40, 5, 240, 40, True, "HS", 1),
    (40, 5, 120, 48, True, "HS", 1), (48, 5, 144, 48, True, "HS", 1), (48, 5, 288, 96, True, "HS", 2),
    (96, 5, 576, 96, True, "HS", 1), (96, 5, 576, 96, True, "HS", 1),
]  # fmt: skip
V3_LARGE = [
    (16, 3, 16, 16, False, "RE", 1), (16, 3, 64, 24, False, "RE", 2), (24, 3, 72, 24, False, "RE", 1),
    (24, 5, 72, 40, True, "RE", 2), (40, 5, 120, 40, True, "RE", 1), (40, 5, 120, 40, True, "RE", 1),
    (40, 3, 240, 80, False, "HS", 2), (80, 3, 200, 80, False, "HS", 1), (80, 3, 184, 80, False, "HS", 1),
    (80, 3, 184, 80, False, "HS", 1), (80, 3, 480, 112, True, "HS", 1), (112, 3, 672, 112, True, "HS", 1),
    (112, 5, 672, 160, True, "HS", 2), (160, 5, 960, 160, True, "HS", 1), (160, 5, 960, 160, True, "HS", 1),
]  # fmt: skip


class MobileNetV2(nn.Module):
    """torchvision's, width 1."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [Conv2dNormActivation(3, 32, stride=2, activation_layer=nn.ReLU6)]
        width = 32
        for expansion, out, repeats, stride in TORCHVISION_V2:
            for i in range(repeats):
                features.append(InvertedResidual(width, out, stride if i == 0 else 1, expand_ratio=expansion))
                width = out
        features.append(Conv2dNormActivation(width, 1280, 1, activation_layer=nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class ResNet18(nn.Module):
    """torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, self.layer2 = self._layer(64, 64, 1), self._layer(64, 128, 2)
        self.layer3, self.layer4 = self._layer(128, 256, 2), self._layer(256, 512, 2)
        self.fc = nn.Linear(512, 7)

    def _layer(self, c_in: int, c_out: int, stride: int) -> nn.Sequential:
        shortens = stride != 1 or c_in != c_out
        short = (
            nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)) if shortens else None
        )
        return nn.Sequential(BasicBlock(c_in, c_out, stride, short, None), BasicBlock(c_out, c_out, 1, None, None))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


class Separable(nn.Module):
    """timm's DepthwiseSeparableConv with ReLU6."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(c_in, c_in, 3, 1, 1, groups=c_in, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv_pw = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv_pw(nn.functional.relu6(self.bn1(self.conv_dw(x)))))


class EfficientNetLite0(nn.Module):
    """timm's `efficientnet_lite0`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        stages: list[nn.Module] = [nn.Sequential(Separable(32, 16))]
        width = 16
        for expand, kernel, out, repeats, stride in (
            (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1), (6, 5, 192, 4, 2),
            (6, 3, 320, 1, 1),
        ):  # fmt: skip
            blocks = []
            for i in range(repeats):
                blocks.append(LiteBlock(width, out, kernel, stride if i == 0 else 1, expand))
                width = out
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.classifier = nn.Linear(1280, 7)

    def forward(self, x: Tensor) -> Tensor:
        relu6 = nn.functional.relu6
        x = self.blocks(relu6(self.bn1(self.conv_stem(x))))
        return self.classifier(relu6(self.bn2(self.conv_head(x))).mean((2, 3)))


class TimmV3(nn.Module):
    """timm's `mobilenetv3_small_100`: eps 1e-5, and a 1x1 convolution for the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        theirs = MobileNetV3(V3_SMALL, 1024)
        for part in theirs.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eps = 1e-5
        features = list(theirs.features)
        self.conv_stem, self.bn1 = features[0][0], features[0][1]
        self.blocks = nn.Sequential(*features[1:])
        self.conv_head = nn.Conv2d(576, 1024, 1)
        self.classifier = nn.Linear(1024, 7)

    def forward(self, x: Tensor) -> Tensor:
        swish = nn.functional.hardswish
        x = self.blocks(swish(self.bn1(self.conv_stem(x)))).mean((2, 3), keepdim=True)
        return self.classifier(swish(self.conv_head(x)).flatten(1))


class TimmVit(nn.Module):
    """timm's `vit_tiny_patch16`, attention written out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        tokens, width = (size // 16) ** 2 + 1, 192
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(width, eps=1e-6),
                "attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}),
                "norm2": nn.LayerNorm(width, eps=1e-6),
                "mlp": nn.ModuleDict({"fc1": nn.Linear(width, 768), "fc2": nn.Linear(768, width)}),
            })
            for _ in range(12)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.repeat(len(x), 1, 1), x], 1) + self.pos_embed
        for block in self.blocks:
            q, k, v = block["attn"]["qkv"](block["norm1"](x)).chunk(3, -1)
            parts = []
            for h in range(3):
                at = slice(64 * h, 64 * (h + 1))
                shares = (q[..., at] @ k[..., at].transpose(-1, -2) / 8).softmax(-1)
                parts.append(shares @ v[..., at])
            x = x + block["attn"]["proj"](torch.cat(parts, -1))
            x = x + block["mlp"]["fc2"](nn.functional.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return self.head(self.norm(x)[:, 0])


CASES: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "torchvision mobilenet_v2": ("mobilenetv2", MobileNetV2, 64),
    "torchvision mobilenet_v3_small": ("mobilenetv3-small", lambda: MobileNetV3(V3_SMALL, 1024), 64),
    "torchvision mobilenet_v3_large": ("mobilenetv3-large", lambda: MobileNetV3(V3_LARGE, 1280), 64),
    "torchvision resnet18": ("resnet18", ResNet18, 64),
    "timm mobilenetv3_small_100": ("mobilenetv3-small", TimmV3, 64),
    "timm efficientnet_lite0": ("efficientnet-lite0", EfficientNetLite0, 64),
    "timm vit_tiny_patch16": ("vit-tiny", lambda: TimmVit(64), 64),
}


def random_net(make: Callable[[], nn.Module]) -> nn.Module:
    """Weights, statistics and tokens of some size."""
    torch.manual_seed(0)
    net = make().eval()
    for name, value in net.state_dict().items():
        if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
            value.copy_(0.5 + torch.rand(value.shape))
        elif name.endswith(("running_mean", "bias", "token", "embed")):
            value.copy_(0.3 * torch.randn(value.shape))
    return net


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_loads_and_gives_its_own_outputs(case: str, suffix: str, tmp_path: Path) -> None:
    arch, make, size = CASES[case]
    net = random_net(make)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(net.state_dict(), path)
    else:  # which keeps no order
        safetensors.torch.save_file(net.state_dict(), path)
    settings = Importing(arch=arch, arch_args={"size": size}, classifier="keep", preset="torchvision")
    found = import_file(settings, path).run.model
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = net(x).numpy()
        exact = net.double()(x.double()).numpy()
    assert found.head is not None
    ours = logits(found.head, deploy(found).features(x.numpy()))
    error, scale = np.abs(expected - exact).max(), np.abs(exact).max()
    assert np.abs(ours - exact).max() <= 16 * error + 64 * np.finfo(np.float32).eps * scale


def test_arguments_of_the_user_stay_and_a_misfit_names_the_layer(tmp_path: Path) -> None:
    net = random_net(MobileNetV2)
    path = tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    with pytest.raises(DataError, match=r"105 layers where the architecture has 102"):
        import_file(Importing(arch="mobilenetv2", arch_args={"size": 64, "mix": False}), path)
    with pytest.raises(DataError, match=r"features\.0\.0\.weight has shape \(32, 3, 3, 3\) where stem\.weight has"):
        import_file(Importing(arch="mcunet-5fps", arch_args={"size": 64}), path)


def test_what_is_no_preset_for_a_model_is_refused() -> None:
    with pytest.raises(UsageError, match="--preset: 'imagenet', expected torchvision"):
        import_file(Importing(arch="resnet18", preset="imagenet"), None)
    with pytest.raises(UsageError, match="3 channels for a model of 1"):
        import_file(Importing(arch="cnn4", preset="torchvision"), None)
    with pytest.raises(UsageError, match="a preset for sound input"):
        import_file(Importing(arch="ds-cnn", preset="mcunet"), None)
