"""Recurrent layers and embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.specimen import Specimen


class GRUKeywords(nn.Module):
    """Two GRU layers over frames; the last frame is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(20, 24, num_layers=2, batch_first=True, dropout=0.1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        out, _ = self.gru(x)
        return self.fc(out[:, -1])


class DeepConvLSTM(nn.Module):
    """Activity recognition: 1-d convolutions, two LSTM layers, the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(6, 16, 5), nn.ReLU(), nn.Conv1d(16, 16, 5), nn.ReLU())
        self.lstm = nn.LSTM(16, 24, num_layers=2)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(2, 0, 1)
        x = self.dropout(x)
        _, (hidden, _) = self.lstm(x)
        return self.fc(hidden[-1])


class CRNN(nn.Module):
    """Convolutions shrink frequencies, a bidirectional GRU reads the columns, attention pools them."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.MaxPool2d((2, 1)),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.MaxPool2d((4, 2)),
        )
        self.rnn = nn.GRU(80, 16, bidirectional=True, batch_first=True)
        self.attention = nn.Linear(32, 1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cnn(x)
        b, c, f, t = x.shape
        x = x.permute(0, 3, 1, 2).reshape(b, t, c * f)
        x, _ = self.rnn(x)
        weights = F.softmax(self.attention(x), dim=1)
        return self.fc((x * weights).sum(dim=1))


class TextCNN(nn.Module):
    """Kim's sentence classifier: an embedding, kernels of three widths on [1, words, dim], max over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16, padding_idx=0)
        self.convs1 = nn.ModuleList(nn.Conv2d(1, 12, (k, 16)) for k in (3, 4, 5))
        self.dropout = nn.Dropout(0.5)
        self.fc1 = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.long())
        x = x.unsqueeze(1)
        x = [F.relu(conv(x)).squeeze(3) for conv in self.convs1]
        x = [F.max_pool1d(i, i.size(2)).squeeze(2) for i in x]
        x = self.dropout(torch.cat(x, 1))
        return self.fc1(x)


SPECIMENS = (
    Specimen("gru", GRUKeywords, (20, 25), ("gru of two layers", "last frame")),
    Specimen("conv-lstm", DeepConvLSTM, (6, 32), ("lstm, frames first", "last hidden state")),
    Specimen("crnn", CRNN, (1, 40, 20), ("bidirectional gru", "attention pool")),
    Specimen("text-cnn", TextCNN, (20,), ("embedding", "max over time"), vocabulary=100),
)
