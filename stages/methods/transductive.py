"""Transductive fine-tuning (Dhillon et al., arXiv:1909.02729): the unlabelled query takes part in training.

Full network, cross-entropy of the support plus the Shannon entropy of the predictions on the query, Adam at a fixed
small rate. Changed: the classifier is cosine prototypes, recomputed at each step, as for every method here, where the
paper trains a linear one that starts from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from stages.artifacts.records import LayerUpdate
from stages.engines.choice import TrainedNet, make_net
from stages.errors import require
from stages.fsl.protonet import cosine_logits, prototypes, transductive_loss
from stages.methods.task import Answer, Task
from stages.models.deploy import Backbone
from stages.planning.baselines import named_plan
from stages.training.adaptation import Adapting
from stages.training.optimizers import checked_step, learning_rate, make_optimizer
from stages.training.updates import features_of, gradient_update


@dataclass(frozen=True, kw_only=True, slots=True)
class Transductive:
    """The published settings: Adam at 5e-5, 25 passes."""

    rate: float = 5e-5
    passes: int = 25

    def __post_init__(self) -> None:
        require(self.rate > 0, "transductive", f"rate {self.rate}", "more than 0")
        require(self.passes >= 1, "transductive", f"{self.passes} passes", "at least 1")

    def __call__(self, backbone: Backbone, task: Task, how: Adapting, rng: np.random.Generator) -> Answer:
        """Train on support and query together, then answer. Nothing is drawn at random."""
        updates = named_plan("full", backbone.graph)
        net = self.train(backbone, updates, task, how)
        features = features_of(net, [task.support_x, task.query_x], micro_batch=how.micro_batch)
        count = len(task.support_y)
        means = prototypes(features[:count], task.support_y, task.ways)
        predicted = cosine_logits(features[count:], means, how.scale).argmax(1)
        return Answer(predicted, updates, self.rate)

    def train(self, backbone: Backbone, updates: Sequence[LayerUpdate], task: Task, how: Adapting) -> TrainedNet:
        """A net whose live channels have had all passes."""
        net = make_net(backbone, updates)
        settings = replace(how.optimizing, learning_rate=self.rate)
        optimizer = make_optimizer(net.parameters(), settings)

        loss = partial(transductive_loss, labels=task.support_y, ways=task.ways, scale=how.scale)
        for number in range(self.passes):
            value = gradient_update(net, [task.support_x, task.query_x], loss, micro_batch=how.micro_batch)
            rate = learning_rate(number, settings)
            checked_step(optimizer, value, rate=rate, clip_norm=settings.clip_norm, where=f"pass {number}")
        return net
