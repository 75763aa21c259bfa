"""What learns from a stream: a backbone's live slices and a linear head that grows, under one optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.artifacts.records import Array, Head, LayerUpdate
from stages.engines.choice import make_net
from stages.engines.native.heads import linear_loss
from stages.engines.parameter import Floats, Parameter
from stages.errors import DataError
from stages.losses import cross_entropy
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
from stages.training.revising import Follower
from stages.training.updates import Loss, Source, features_of, gradient_update


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
        follower: Follower | None = None,
    ) -> None:
        """`follower`: who revises the plan; its plan is then the one that trains."""
        self.net = make_net(backbone, updates) if follower is None else follower.begin()
        self.follower = follower
        self._same_bits = backbone.engine.same_bits
        self.how, self.micro_batch, self.done = how, micro_batch, done
        self._head = linear_head(head, backbone.graph.feature_dim)
        self._weight = Parameter(np.array(self._head.weight, np.float32))
        self._bias = Parameter(np.array(self._head.bias, np.float32))
        self.optimizer = make_optimizer([*self.net.parameters(), self._weight, self._bias], how)
        if follower is not None:
            follower.hold(self.optimizer)

    def head(self) -> Head:
        """The linear head as it is now."""
        return replace(self._head, weight=self._weight.value.copy(), bias=self._bias.value.copy())

    def logits(self, x: Floats) -> Array:
        """Class scores float64 (N, C) of model inputs."""
        return heads.logits(self.head(), features_of(self.net, x, micro_batch=self.micro_batch))

    def update(self, batch: Batch) -> Figures:
        """One update. Classes that the head does not know get their rows from this batch first.

        Raises:
            DataError: classes in conflict with the head's, or a loss, gradient or weight that is not finite; all
                weights are then as they were before.
        """
        rate = learning_rate(self.done, self.how)
        loss = 0.0
        if len(batch.y) and self.rests:
            rate, loss = 0.0, self._watched(batch)
        elif len(batch.y):
            self._meet(batch)
            self.net.draw(self.done)
            loss = gradient_update(self.net, batch.x, self._loss(batch), micro_batch=self.micro_batch)
            if self.follower is not None:
                self.follower.about_to_step()
            where = f"update {self.done}"
            checked_step(self.optimizer, loss, rate=rate, clip_norm=self.how.clip_norm, where=where)
        if self.follower is not None and len(batch.y):
            self.net = self.follower.after(self.optimizer, loss)
        self.done += 1
        return Figures(loss, rate, len(batch.y), float(np.sum(batch.weights, dtype=np.float64)))

    @property
    def rests(self) -> bool:
        """Whether nothing trains, the head neither: all has settled."""
        return self.follower is not None and not self.follower.updates

    def _watched(self, batch: Batch) -> float:
        """The loss, of which nothing is learnt but the rows of classes that are new."""
        self._meet(batch)
        loss, _ = self._loss(batch)(features_of(self.net, batch.x, micro_batch=self.micro_batch))
        self.optimizer.clear()
        return loss

    def _loss(self, batch: Batch) -> Loss:
        """sum_i w_i * l_i, the loss of a block (the weights are Titan's, arXiv:2505.16563, appendix A.2); the head's
        gradients are added on the way.

        In double precision; by the C library where every machine must give the same bits.
        With w_i = 1 / (|S| |B_y| P_y(i)) its gradient is an unbiased estimate of the window's mean gradient.
        """
        rows = heads.rows(self._head, batch.y, batch.names)
        if self._same_bits and self._head.known.all():
            return linear_loss(self._weight, self._bias, rows, np.asarray(batch.weights, np.float32))
        weights = np.asarray(batch.weights, np.float64)
        weight, bias = self._weight, self._bias

        def loss(features: Floats) -> tuple[float, Floats]:
            x = features.astype(np.float64)
            losses, residuals = cross_entropy(x @ weight.value.T + bias.value, rows, self._head.known)
            pulled = weights[:, None] * residuals
            weight.gradient += pulled.T @ x
            bias.gradient += pulled.sum(0)
            return float(weights @ losses), (pulled @ weight.value).astype(np.float32)

        return loss

    def _meet(self, batch: Batch) -> None:
        """Give every class of the batch a row, imprinted where the class has none."""
        head = heads.extend(self.head(), batch.y, batch.names)
        rows = heads.rows(head, batch.y, batch.names)
        if head.known[rows].all():
            return
        features = features_of(self.net, batch.x, micro_batch=self.micro_batch)
        if not np.isfinite(features).all():
            raise NotFinite(f"update {self.done}", "a feature is NaN or infinite", "finite numbers", "lower --lr")
        head = heads.imprint(head, features, rows, batch.weights)
        where = np.searchsorted(head.labels, self._head.labels)
        self._weight = self._grown(self._weight, head.weight, where)
        self._bias = self._grown(self._bias, head.bias, where)
        self._head = head

    def _grown(self, old: Parameter, values: Floats, rows: Array) -> Parameter:
        new = Parameter(np.array(values, np.float32))
        replace_parameter(self.optimizer, old, new, rows)
        return new


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
