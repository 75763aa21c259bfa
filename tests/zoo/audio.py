"""Networks on sound: maps of spectrograms [1, mels, frames], frames [mels, frames] and raw waveforms [1, T]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.specimen import Specimen


class DSCNN(nn.Module):
    """Keyword spotting's DS-CNN: a 10x4 kernel with explicit asymmetric padding, separable blocks, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ConstantPad2d((1, 1, 4, 5), 0.0)
        self.conv1 = nn.Conv2d(1, 32, kernel_size=(10, 4), stride=(2, 2), bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.drop1 = nn.Dropout(0.2)
        self.layers = nn.ModuleList(self._separable(32) for _ in range(3))
        self.drop2 = nn.Dropout(0.4)
        self.avg = nn.AvgPool2d((20, 10))
        self.out = nn.Linear(32, 5)

    @staticmethod
    def _separable(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=True),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=True),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(F.relu(self.bn1(self.conv1(self.pad(x)))))
        for layer in self.layers:
            x = layer(x)
        x = self.avg(self.drop2(x))
        return self.out(torch.flatten(x, 1))


class SubSpectralNorm(nn.Module):
    """BC-ResNet: BatchNorm over bands of frequencies, by two views."""

    def __init__(self, channels: int, bands: int = 5) -> None:
        super().__init__()
        self.spec_groups = bands
        self.bn = nn.BatchNorm2d(channels * bands)

    def forward(self, x: Tensor) -> Tensor:
        b, c, f, t = x.size()
        x = x.view(b, c * self.spec_groups, f // self.spec_groups, t)
        return self.bn(x).view(b, c, f, t)


class BCBlock(nn.Module):
    """BC-ResNet: a frequency branch on the map, its mean over frequencies through a time branch, broadcast back."""

    def __init__(self, inp: int, out: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.transition = inp != out
        layers: list[nn.Module] = []
        if self.transition:
            layers += [nn.Conv2d(inp, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(True)]
        layers += [
            nn.Conv2d(out, out, (3, 1), (stride, 1), (1, 0), groups=out, bias=False),
            SubSpectralNorm(out),
        ]
        self.f2 = nn.Sequential(*layers)
        self.avg_gpool = nn.AdaptiveAvgPool2d((1, None))
        self.f1 = nn.Sequential(
            nn.Conv2d(out, out, (1, 3), (1, 1), (0, dilation), (1, dilation), groups=out, bias=False),
            nn.BatchNorm2d(out),
            nn.SiLU(),
            nn.Conv2d(out, out, 1, bias=False),
            nn.Dropout2d(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.f2(x)
        aux_2d_res = x
        x = self.avg_gpool(x)
        x = self.f1(x)
        x = x + aux_2d_res
        if not self.transition:
            x = x + shortcut
        return F.relu(x, True)


class BCResNet(nn.Module):
    """The classifier is convolutions around a pool to one place, then `view(-1, classes)`."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn_head = nn.Sequential(nn.Conv2d(1, 16, 5, (2, 1), 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(True))
        self.stages = nn.ModuleList(
            [
                nn.ModuleList([BCBlock(16, 12), BCBlock(12, 12)]),
                nn.ModuleList([BCBlock(12, 16, 2, 2), BCBlock(16, 16, 1, 2)]),
            ]
        )
        self.classifier = nn.Sequential(
            nn.Conv2d(16, 16, (5, 5), padding=(0, 2), groups=16, bias=False),
            nn.Conv2d(16, 32, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(True),
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Conv2d(32, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.cnn_head(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        x = self.classifier(x)
        return x.view(-1, x.shape[1])


class TCResBlock(nn.Module):
    """TC-ResNet: convolutions of 9 along time, the mels are channels."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inp, out, 9, stride, 4, bias=False)
        self.bn1 = nn.BatchNorm1d(out)
        self.conv2 = nn.Conv1d(out, out, 9, 1, 4, bias=False)
        self.bn2 = nn.BatchNorm1d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or inp != out:
            self.shortcut = nn.Sequential(nn.Conv1d(inp, out, 1, stride, bias=False), nn.BatchNorm1d(out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + self.shortcut(x)
        return F.relu(out)


class TCResNet(nn.Module):
    """Takes a map [1, mels, frames] and squeezes its channel away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(20, 16, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(TCResBlock(16, 24, 2), TCResBlock(24, 24, 1), TCResBlock(24, 32, 2))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Conv1d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.conv(x.squeeze(1)))
        x = F.avg_pool1d(x, x.size(-1))
        return self.fc(self.dropout(x)).squeeze(2)


class TCSConv(nn.Module):
    """MatchboxNet's time-channel separable convolution."""

    def __init__(self, inp: int, out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv1d(inp, inp, kernel, padding="same", dilation=dilation, groups=inp, bias=False)
        self.pointwise_conv = nn.Conv1d(inp, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class MatchboxSubBlock(nn.Module):
    def __init__(self, inp: int, out: int, kernel: int) -> None:
        super().__init__()
        self.tcs_conv = TCSConv(inp, out, kernel)
        self.bnorm = nn.BatchNorm1d(out)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.bnorm(self.tcs_conv(x))
        if residual is not None:
            x = x + residual
        return self.dropout(F.relu(x))


class MatchboxBlock(nn.Module):
    """Sub-blocks in a loop; the last one takes the residual, which came through a 1x1 convolution and BatchNorm."""

    def __init__(self, inp: int, out: int, kernel: int, count: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(nn.Conv1d(inp, out, 1, bias=False), nn.BatchNorm1d(out))
        self.sub_blocks = nn.ModuleList(MatchboxSubBlock(inp if i == 0 else out, out, kernel) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.residual(x)
        for layer in self.sub_blocks[:-1]:
            x = layer(x)
        return self.sub_blocks[-1](x, residual)


class MatchboxNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prologue = nn.Sequential(TCSConv(20, 32, 11), nn.BatchNorm1d(32), nn.ReLU())
        self.blocks = nn.ModuleList([MatchboxBlock(32, 24, 13, 2), MatchboxBlock(24, 24, 15, 2)])
        self.epilogue = nn.Sequential(
            TCSConv(24, 48, 29, dilation=2),
            nn.BatchNorm1d(48),
            nn.ReLU(),
            nn.Conv1d(48, 48, 1, bias=False),
            nn.BatchNorm1d(48),
            nn.ReLU(),
            nn.Conv1d(48, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.prologue(x)
        for block in self.blocks:
            x = block(x)
        x = self.epilogue(x)
        x = F.adaptive_avg_pool1d(x, 1)
        return x.squeeze(-1)


class M5(nn.Module):
    """Raw audio: a kernel of 80 at stride 16, max pools of 4, `avg_pool1d` over what is left, permute; the original's
    log-softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        width = 16
        self.conv1 = nn.Conv1d(1, width, kernel_size=80, stride=16)
        self.bn1 = nn.BatchNorm1d(width)
        self.pool1 = nn.MaxPool1d(4)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3)
        self.bn2 = nn.BatchNorm1d(width)
        self.pool2 = nn.MaxPool1d(4)
        self.conv3 = nn.Conv1d(width, 2 * width, kernel_size=3)
        self.bn3 = nn.BatchNorm1d(2 * width)
        self.pool3 = nn.MaxPool1d(4)
        self.fc1 = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(F.relu(self.bn1(self.conv1(x))))
        x = self.pool2(F.relu(self.bn2(self.conv2(x))))
        x = self.pool3(F.relu(self.bn3(self.conv3(x))))
        x = F.avg_pool1d(x, x.shape[-1])
        x = x.permute(0, 2, 1)
        x = self.fc1(x)
        return F.log_softmax(x, dim=2).squeeze(1)


class SincFrontEnd(nn.Module):
    """SincNet's band-pass filters, made in each forward from two learned frequencies a filter: abs, clamp, sin, cat,
    flip, a window."""

    def __init__(self, filters: int = 12, kernel: int = 31, rate: int = 8000) -> None:
        super().__init__()
        self.kernel_size, self.rate, self.least = kernel, rate, 50.0
        low = torch.linspace(30, rate / 2 - 400, filters).view(-1, 1)
        self.low_hz_ = nn.Parameter(low)
        self.band_hz_ = nn.Parameter(torch.linspace(100, 250, filters).view(-1, 1))
        half = kernel // 2
        n = torch.arange(-half, 0).view(1, -1).float()
        self.register_buffer("window_", 0.54 - 0.46 * torch.cos(2 * torch.pi * torch.arange(half) / kernel))
        self.register_buffer("n_", 2 * torch.pi * n / rate)

    def filters(self) -> Tensor:
        low = self.least + torch.abs(self.low_hz_)
        high = torch.clamp(low + self.least + torch.abs(self.band_hz_), self.least, self.rate / 2)
        band = (high - low)[:, 0]
        f_times_t_low = torch.matmul(low, self.n_)
        f_times_t_high = torch.matmul(high, self.n_)
        left = ((torch.sin(f_times_t_high) - torch.sin(f_times_t_low)) / (self.n_ / 2)) * self.window_
        center = 2 * band.view(-1, 1)
        right = torch.flip(left, dims=[1])
        band_pass = torch.cat([left, center, right], dim=1) / (2 * band[:, None])
        return band_pass.view(-1, 1, self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.filters(), stride=1, padding=0, dilation=1, bias=None, groups=1)


class SincNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(512)
        self.sinc = SincFrontEnd()
        self.ln1 = nn.LayerNorm([12, 160])
        self.conv2 = nn.Conv1d(12, 16, 5)
        self.ln2 = nn.LayerNorm([16, 52])
        self.conv3 = nn.Conv1d(16, 16, 5)
        self.ln3 = nn.LayerNorm([16, 16])
        self.fc = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln0(x)
        x = F.leaky_relu(self.ln1(F.max_pool1d(torch.abs(self.sinc(x)), 3)), 0.2)
        x = F.leaky_relu(self.ln2(F.max_pool1d(self.conv2(x), 3)), 0.2)
        x = F.leaky_relu(self.ln3(F.max_pool1d(self.conv3(x), 3)), 0.2)
        return self.fc(x.view(x.shape[0], -1))


class ConformerConvolution(nn.Module):
    """Pointwise, GLU, depthwise, BatchNorm, SiLU, pointwise, between two transposes."""

    def __init__(self, dim: int, kernel: int = 7) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.sequential = nn.Sequential(
            nn.Conv1d(dim, 2 * dim, 1),
            nn.GLU(dim=1),
            nn.Conv1d(dim, dim, kernel, padding=(kernel - 1) // 2, groups=dim),
            nn.BatchNorm1d(dim),
            nn.SiLU(),
            nn.Conv1d(dim, dim, 1),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(x).transpose(1, 2)
        return self.sequential(x).transpose(1, 2)


class ConformerLayer(nn.Module):
    """torchaudio's layer: half-step feed-forward parts around attention and convolution; frames come first."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ffn1 = self._ffn(dim)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=0.1)
        self.conv_module = ConformerConvolution(dim)
        self.ffn2 = self._ffn(dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    @staticmethod
    def _ffn(dim: int) -> nn.Sequential:
        return nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.ffn1(x) * 0.5 + x
        residual = x
        x = self.self_attn_layer_norm(x)
        x, _ = self.self_attn(query=x, key=x, value=x, need_weights=False)
        x = x + residual
        x = x + self.conv_module(x.transpose(0, 1)).transpose(0, 1)
        x = self.ffn2(x) * 0.5 + x
        return self.final_layer_norm(x)


class Conformer(nn.Module):
    """A subsampling front end of strided convolutions, layers on [frames, batch, dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.subsampling = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.projection = nn.Linear(8 * 5, 32)
        self.conformer_layers = nn.ModuleList([ConformerLayer(32, 4), ConformerLayer(32, 4)])
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.subsampling(x)
        b, c, f, t = x.size()
        x = x.permute(0, 3, 1, 2).contiguous().view(b, t, c * f)
        x = self.projection(x).transpose(0, 1)
        for layer in self.conformer_layers:
            x = layer(x)
        return self.head(x.mean(0))


MAP = (1, 40, 20)

SPECIMENS = (
    Specimen("ds-cnn", DSCNN, MAP, ("rectangular kernel", "constant pad", "bias before BatchNorm")),
    Specimen("bc-resnet", BCResNet, MAP, ("mean over frequencies", "broadcast add", "BatchNorm by views")),
    Specimen("tc-resnet", TCResNet, (1, 20, 50), ("conv1d", "squeeze", "avg_pool1d")),
    Specimen("matchboxnet", MatchboxNet, (20, 64), ("conv1d separable", "dilated", "padding same", "slice of modules")),
    Specimen("m5", M5, (1, 4000), ("raw audio", "max_pool1d", "log_softmax", "permute")),
    Specimen("sincnet", SincNet, (1, 512), ("weights made in forward", "flip", "sin", "LayerNorm on [C, T]")),
    Specimen("conformer", Conformer, (1, 20, 40), ("glu", "MultiheadAttention, frames first", "x * 0.5 + y")),
)
