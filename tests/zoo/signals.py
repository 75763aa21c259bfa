"""Networks on windows of sensor values [C, T] and on vectors [D]."""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.specimen import Specimen


class Chomp1d(nn.Module):
    """Cuts what a causal convolution's padding added at the end."""

    def __init__(self, chomp_size: int) -> None:
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.chomp_size].contiguous()


def hooked_weight_norm(module: nn.Module) -> nn.Module:
    """The older weight_norm, a hook before forward, which most published TCNs use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


class TemporalBlock(nn.Module):
    """TCN's block: weight-normalised dilated causal convolutions with chomps, and a residual."""

    def __init__(self, inp: int, out: int, kernel: int, dilation: int, hooks: bool) -> None:
        super().__init__()
        norm = hooked_weight_norm if hooks else parametrizations.weight_norm
        padding = (kernel - 1) * dilation
        self.conv1 = norm(nn.Conv1d(inp, out, kernel, stride=1, padding=padding, dilation=dilation))
        self.chomp1 = Chomp1d(padding)
        self.relu1 = nn.ReLU()
        self.dropout1 = nn.Dropout(0.2)
        self.conv2 = norm(nn.Conv1d(out, out, kernel, stride=1, padding=padding, dilation=dilation))
        self.chomp2 = Chomp1d(padding)
        self.relu2 = nn.ReLU()
        self.dropout2 = nn.Dropout(0.2)
        self.net = nn.Sequential(
            self.conv1,
            self.chomp1,
            self.relu1,
            self.dropout1,
            self.conv2,
            self.chomp2,
            self.relu2,
            self.dropout2,
        )
        self.downsample = nn.Conv1d(inp, out, 1) if inp != out else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


class TCN(nn.Module):
    """The last time step is the answer; each convolution is registered twice, by name and in `net`."""

    def __init__(self, hooks: bool) -> None:
        super().__init__()
        layers = [TemporalBlock(6 if i == 0 else 16, 16, 3, 2**i, hooks) for i in range(3)]
        self.tcn = nn.Sequential(*layers)
        self.linear = nn.Linear(16, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        y1 = self.tcn(inputs)
        return self.linear(y1[:, :, -1])


class InceptionTimeModule(nn.Module):
    """A bottleneck, three wide kernels and a pooled branch, concatenated."""

    def __init__(self, inp: int, filters: int) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(inp, filters, 1, bias=False) if inp > 1 else nn.Identity()
        self.convs = nn.ModuleList(nn.Conv1d(filters, filters, k, padding=k // 2, bias=False) for k in (39, 19, 9))
        self.maxconvpool = nn.Sequential(nn.MaxPool1d(3, stride=1, padding=1), nn.Conv1d(inp, filters, 1, bias=False))
        self.bn = nn.BatchNorm1d(filters * 4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        input_tensor = x
        x = self.bottleneck(x)
        x = torch.cat([conv(x) for conv in self.convs] + [self.maxconvpool(input_tensor)], dim=1)
        return self.act(self.bn(x))


class InceptionTime(nn.Module):
    """A residual around every third module, with BatchNorm alone where the widths agree."""

    def __init__(self) -> None:
        super().__init__()
        self.inception = nn.ModuleList(InceptionTimeModule(3 if d == 0 else 32, 8) for d in range(6))
        self.shortcut = nn.ModuleList(
            [nn.Sequential(nn.Conv1d(3, 32, 1, bias=False), nn.BatchNorm1d(32)), nn.BatchNorm1d(32)]
        )
        self.act = nn.ReLU()
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        res = x
        for d in range(6):
            x = self.inception[d](x)
            if d % 3 == 2:
                res = x = self.act(x + self.shortcut[d // 3](res))
        return self.fc(x.mean(-1))


class HARCNN(nn.Module):
    """Activity recognition: 1-d convolutions with max, average, Lp and adaptive maximum pools."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(6, 16, 5),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.MaxPool1d(2, padding=1),
            nn.Conv1d(16, 24, 5, padding=2),
            nn.LeakyReLU(0.01),
            nn.AvgPool1d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
            nn.Conv1d(24, 24, 3, padding=1),
            nn.ELU(alpha=0.5),
            nn.LPPool1d(2, 2),
        )
        self.top = nn.AdaptiveMaxPool1d(1)
        self.mean = nn.AdaptiveAvgPool1d(3)
        self.classifier = nn.Sequential(nn.Dropout(0.3), nn.Linear(96, 32), nn.Hardtanh(-2, 2), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = torch.cat([self.top(x), self.mean(x)], -1)
        return self.classifier(torch.flatten(x, 1))


class ResNet1dBlock(nn.Module):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.ConstantPad1d((3, 4), 0.0),
            nn.Conv1d(inp, out, 8, bias=False),
            nn.BatchNorm1d(out),
            nn.ReLU(),
            nn.Conv1d(out, out, 5, padding="same", bias=False),
            nn.BatchNorm1d(out),
            nn.ReLU(),
            nn.Conv1d(out, out, 3, padding="same", bias=False),
            nn.BatchNorm1d(out),
        )
        self.shortcut = (
            nn.Sequential(nn.Conv1d(inp, out, 1, bias=False), nn.BatchNorm1d(out))
            if inp != out
            else nn.BatchNorm1d(out)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convs(x) + self.shortcut(x))


class ResNet1d(nn.Module):
    """The time series baseline of Wang et al.: kernels of 8 need more padding on the right."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(ResNet1dBlock(3, 16), ResNet1dBlock(16, 24), ResNet1dBlock(24, 24))
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean(dim=-1))


class TransformerHAR(nn.Module):
    """Patches of a signal in an encoder of post-norm blocks, sinusoidal positions made in forward, learned pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(6, 24, 8, stride=8)
        self.attn = nn.ModuleList(nn.MultiheadAttention(24, 3, batch_first=True) for _ in range(2))
        self.norm1 = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
        self.linear = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
        self.norm2 = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
        self.query = nn.Parameter(torch.zeros(1, 1, 24))
        self.fc = nn.Linear(24, 5)

    def positions(self, x: Tensor) -> Tensor:
        place = torch.arange(x.size(1), device=x.device, dtype=x.dtype).unsqueeze(1)
        rate = torch.exp(torch.arange(0, 24, 2, device=x.device, dtype=x.dtype) * (-4.0 / 24))
        return torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=-1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        x = x + self.positions(x)
        for attn, norm1, linear, norm2 in zip(self.attn, self.norm1, self.linear, self.norm2, strict=True):
            y, _ = attn(x, x, x)
            x = norm1(x + y)
            x = norm2(x + F.relu(linear(x)))
        weights = torch.softmax(torch.einsum("bqd,btd->bqt", self.query.expand(x.size(0), -1, -1), x), dim=-1)
        return self.fc(torch.einsum("bqt,btd->bqd", weights, x).squeeze(1))


class MLP(nn.Module):
    """Vectors: vector BatchNorm, dropout, a bias-free layer, softplus, a residual by `torch.add(alpha=...)`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(24, 64)
        self.bn1 = nn.BatchNorm1d(64)
        self.fc2 = nn.Linear(64, 64, bias=False)
        self.bn2 = nn.BatchNorm1d(64, affine=False)
        self.drop = nn.AlphaDropout(0.1)
        self.fc3 = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.fc1(x)), inplace=True)
        x = torch.add(x, F.softplus(self.bn2(self.fc2(x))), alpha=0.5)
        return self.fc3(self.drop(x))


class Autoencoder(nn.Module):
    """The anomaly detector of MLPerf Tiny: dense layers with BatchNorm around a bottleneck of 8; gives back its input's
    size, so it has no classifier."""

    def __init__(self) -> None:
        super().__init__()
        widths = [64, 48, 48, 8, 48, 48]
        layers: list[nn.Module] = []
        for inp, out in itertools.pairwise(widths):
            layers += [nn.Linear(inp, out), nn.BatchNorm1d(out, momentum=0.01, eps=1e-03), nn.ReLU()]
        self.encoder = nn.Sequential(*layers[:9])
        self.decoder = nn.Sequential(*layers[9:], nn.Linear(48, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class ConvAutoencoder(nn.Module):
    """1-d encoder and decoder: transposed convolutions with output padding, linear upsampling, instance norms, tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(2, 8, 5, stride=2, padding=2),
            nn.InstanceNorm1d(8),
            nn.PReLU(),
            nn.Conv1d(8, 16, 5, stride=2, padding=2),
            nn.InstanceNorm1d(16, affine=True),
            nn.PReLU(),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose1d(16, 8, 5, stride=2, padding=2, output_padding=1),
            nn.GroupNorm(2, 8),
            nn.PReLU(8),
            nn.Upsample(scale_factor=2, mode="linear", align_corners=True),
            nn.Conv1d(8, 2, 3, padding=1),
            nn.Tanh(),
        )
        self.classifier = nn.Linear(2 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.decoder(self.encoder(x))
        error = (y - x).abs()
        return self.classifier(F.adaptive_avg_pool1d(error, 8).flatten(1))


class EEGNet(nn.Module):
    """EEG: temporal kernels, a depthwise convolution across electrodes, separable convolution, ELU, average pools."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((15, 16, 0, 0))
        self.conv1 = nn.Conv2d(1, 8, (1, 32), bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, (6, 1), groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Sequential(
            nn.Conv2d(16, 16, (1, 16), padding=(0, 8), groups=16, bias=False), nn.Conv2d(16, 16, 1, bias=False)
        )
        self.bn3 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        x = self.bn1(self.conv1(self.pad(x)))
        x = F.dropout(F.avg_pool2d(F.elu(self.bn2(self.conv2(x))), (1, 4)), 0.25, self.training)
        x = F.dropout(F.avg_pool2d(F.elu(self.bn3(self.conv3(x))), (1, 8)), 0.25, self.training)
        return self.fc(x.reshape(x.size(0), -1))


SIGNAL = (6, 64)

SPECIMENS = (
    Specimen("tcn", partial(TCN, True), SIGNAL, ("weight_norm by hooks", "causal chomp", "dilated", "shared names")),
    Specimen("tcn-parametrized", partial(TCN, False), SIGNAL, ("weight_norm by parametrization", "causal chomp")),
    Specimen("inceptiontime", InceptionTime, (3, 64), ("wide kernels", "max_pool1d stride 1", "BatchNorm as shortcut")),
    Specimen("har-cnn", HARCNN, SIGNAL, ("pools of many kinds", "hardtanh", "elu", "leaky relu")),
    Specimen("resnet1d", ResNet1d, (3, 64), ("asymmetric pad", "BatchNorm as shortcut")),
    Specimen("har-transformer", TransformerHAR, SIGNAL, ("MultiheadAttention with weights", "einsum", "sinusoids")),
    Specimen("mlp", MLP, (24,), ("vector BatchNorm", "softplus", "add with alpha", "BatchNorm without affine")),
    Specimen("autoencoder", Autoencoder, (64,), ("vector BatchNorm", "no classifier")),
    Specimen("conv-autoencoder", ConvAutoencoder, (2, 64), ("transposed conv1d", "InstanceNorm", "linear upsampling")),
    Specimen("eegnet", EEGNet, (6, 128), ("kernel across electrodes", "zero pad", "elu", "unsqueeze")),
)
