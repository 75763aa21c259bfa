"""What learns from a stream: a backbone's live slices and a linear head that grows, under one optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.artifacts.records import Array, Head, LayerUpdate
from stages.engines.choice import make_net
from stages.errors import DataError
from stages.models import heads
from stages.models.deploy import Backbone
from stages.training.optimizers import (
    NotFinite,
    Optimizing,
    checked_step,
    learning_rate,
    make_optimizer,
    replace_parameter,
)
from stages.training.updates import Source, features_of, gradient_update


@dataclass(frozen=True)
class Batch:
    """Samples of one update."""

    x: Source
    """Model inputs (N, *input), float32; or what the frozen layers make of them."""
    y: Array
    """int64 (N,): class labels."""
    weights: Array
    """float32 (N,): the loss is the sum of weight * cross-entropy."""
    names: heads.Names | None = None

    def __post_init__(self) -> None:
        if len(self.weights) and not (np.isfinite(self.weights).all() and self.weights.min() >= 0):
            bad = int(np.flatnonzero(~(np.isfinite(self.weights) & (self.weights >= 0)))[0])
            raise DataError(f"weight[{bad}]", f"{self.weights[bad]}", "a finite importance weight, at least 0")


@dataclass(frozen=True)
class Figures:
    """What one update did."""

    loss: float
    """Before the update; 0 for an empty batch."""
    learning_rate: float
    samples: int
    weight_sum: float


class StreamLearner:
    """Takes one batch after another; every batch is one update, an empty one too."""

    def __init__(
        self,
        backbone: Backbone,
        updates: Sequence[LayerUpdate],
        head: Head | None,
        how: Optimizing,
        *,
        micro_batch: int = 0,
        done: int = 0,
        engine: str = "torch",
    ) -> None:
        self.net = make_net(backbone, updates, engine)
        self.how, self.micro_batch, self.done = how, micro_batch, done
        self._head = linear_head(head, backbone.graph.feature_dim)
        self._weight = nn.Parameter(torch.tensor(self._head.weight))
        self._bias = nn.Parameter(torch.tensor(self._head.bias))
        self.optimizer = make_optimizer([*self.net.parameters(), self._weight, self._bias], how)

    def head(self) -> Head:
        """The linear head as it is now."""
        weight, bias = (parameter.detach().numpy().copy() for parameter in (self._weight, self._bias))
        return replace(self._head, weight=weight, bias=bias)

    def logits(self, x: Tensor) -> Tensor:
        """Class scores (N, C) of model inputs, without gradients."""
        with torch.no_grad():
            return self._scores(features_of(self.net, x, micro_batch=self.micro_batch))

    def update(self, batch: Batch) -> Figures:
        """One update. Classes that the head does not know get their rows from this batch first.

        Raises:
            DataError: classes in conflict with the head's, or a loss, gradient or weight that is not finite; all
                weights are then as they were before.
        """
        rate = learning_rate(self.done, self.how)
        loss = 0.0
        if len(batch.y):
            self._meet(batch)
            rows = torch.from_numpy(heads.rows(self._head, batch.y, batch.names))
            weights = torch.from_numpy(np.asarray(batch.weights, np.float32))

            def loss_of_features(features: Tensor) -> Tensor:
                return weighted_cross_entropy(self._scores(features), rows, weights)

            loss = gradient_update(self.net, batch.x, loss_of_features, micro_batch=self.micro_batch)
            where = f"update {self.done}"
            checked_step(self.optimizer, loss, rate=rate, clip_norm=self.how.clip_norm, where=where)
        self.done += 1
        return Figures(loss, rate, len(batch.y), float(np.sum(batch.weights, dtype=np.float64)))

    def _scores(self, features: Tensor) -> Tensor:
        scores = functional.linear(features, self._weight, self._bias)
        return heads.even_unknown(scores, torch.from_numpy(np.asarray(self._head.known, bool)))

    def _meet(self, batch: Batch) -> None:
        """Give every class of the batch a row, imprinted where the class has none."""
        head = heads.extend(self.head(), batch.y, batch.names)
        rows = heads.rows(head, batch.y, batch.names)
        if head.known[rows].all():
            return
        features = features_of(self.net, batch.x, micro_batch=self.micro_batch)
        if not bool(torch.isfinite(features).all()):
            raise NotFinite(f"update {self.done}", "a feature is NaN or infinite", "finite numbers", "lower --lr")
        head = heads.imprint(head, features, rows, batch.weights)
        where = np.searchsorted(head.labels, self._head.labels)
        for name, values in (("_weight", head.weight), ("_bias", head.bias)):
            old, new = getattr(self, name), nn.Parameter(torch.tensor(values))
            replace_parameter(self.optimizer, old, new, where)
            setattr(self, name, new)
        self._head = head


def weighted_cross_entropy(scores: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i * l_i, the loss of a block (the weights are Titan's, arXiv:2505.16563, appendix A.2).

    With w_i = 1 / (|S| |B_y| P_y(i)) its gradient is an unbiased estimate of the window's mean gradient.
    """
    return torch.dot(weights, functional.cross_entropy(scores, rows, reduction="none"))


def linear_head(head: Head | None, dim: int) -> Head:
    """The linear head that training on a stream starts from: the record's own, or one made from what it has.

    No head: an empty one. Prototypes: row c = scale * m_c / (|m_c| * r) with r the mean length of the prototypes m, so
    that a feature of ordinary length scores as with prototypes, by about scale * cosine (as `heads.imprint`).
    Raises `DataError` for a head over features of another width.
    """
    if head is None:
        return heads.empty_head(np.zeros(0, np.int64), {}, dim)
    if head.weight.shape[1] != dim:
        raise DataError("/model/head", f"rows of {head.weight.shape[1]} features", f"{dim}, the backbone's")
    if head.kind == "linear":
        return head
    lengths = np.linalg.norm(head.weight, axis=1, keepdims=True)
    radius = lengths.mean() if len(lengths) else 1.0
    rows = np.divide(head.scale * head.weight, lengths * radius, out=np.zeros_like(head.weight), where=lengths > 0)
    return replace(head, kind="linear", weight=rows.astype(np.float32))
