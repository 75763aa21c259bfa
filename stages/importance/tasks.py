"""The samples and the loss that a task's Fisher potentials are computed from: one builder per kind of head.

`prototypes` (few-shot): the loss of the pseudo-query, which is the support set augmented, against class means of the
support set itself (TinyTrain section 2.1, after P>M>F). The means are detached: a gradient through them would tie the
samples together, and none would have a gradient of its own.
`linear` (streams): the cross-entropy of the linear head on the samples as they are, which is the loss that training
will reduce; classes that the head has not met are imprinted from these samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from stages.artifacts.records import Array, Block, Head
from stages.engines.parameter import Floats
from stages.errors import DataError, UsageError
from stages.fsl.augment import PSEUDO_QUERY, augment
from stages.importance.fisher import SampleLoss
from stages.models.deploy import Backbone
from stages.models.heads import (
    class_names,
    cosine_scale,
    cross_entropy,
    empty_head,
    extend,
    imprint,
    prototype_head,
    rows,
)
from stages.models.inputs import adapt_block


@dataclass(frozen=True)
class Task:
    """What a Fisher pass needs besides the backbone."""

    inputs: Floats
    """float32 (N, *input shape)."""
    targets: Array
    """int64 (N,): rows of the head."""
    head: Head

    @property
    def loss(self) -> SampleLoss:
        """Each sample's own cross-entropy under the head."""
        return partial(cross_entropy, self.head)

    def batches(self, size: int) -> Iterator[tuple[Floats, Array]]:
        """Micro-batches of at most `size` samples."""
        for start in range(0, len(self.inputs), size):
            yield self.inputs[start : start + size], self.targets[start : start + size]


TaskBuilder = Callable[[Backbone, Block, Head | None, np.random.Generator], Task]
"""Backbone, support, the run's head and randomness -> task. Raises `DataError` for a support without
samples, or where there is but one class: every answer is right then, and no layer matters."""


def pseudo_query(backbone: Backbone, support: Block, head: Head | None, rng: np.random.Generator) -> Task:
    """The augmented support against its own prototypes; a `prototypes` head in the run lends its cosine scale.

    One coin per sample decides whether it is augmented: with P>M>F's single coin per batch, one seed in ten would score
    the layers on the support set itself.
    """
    inputs = _inputs(backbone, support)
    features = backbone.features(inputs)
    means = prototype_head(features, support.y, class_names(support), scale=cosine_scale(head))
    views = augment(inputs, backbone.input, rng, replace(PSEUDO_QUERY, coin="sample"))
    return _task(views, support, means)


def stream_samples(backbone: Backbone, support: Block, head: Head | None, rng: np.random.Generator) -> Task:
    """The samples as they are under the run's linear head; classes it does not know are imprinted from them."""
    inputs, names = _inputs(backbone, support), class_names(support)
    if head is None or head.kind != "linear":
        head = empty_head(support.y, names, backbone.graph.feature_dim)
    head = extend(head, support.y, names)
    targets = rows(head, support.y, names)
    if not head.known[targets].all():
        features = backbone.features(inputs)
        head = imprint(head, features, targets, np.ones(len(targets)))
    return _task(inputs, support, head)


TASKS: Mapping[str, TaskBuilder] = {"prototypes": pseudo_query, "linear": stream_samples}


def build_task(kind: str, backbone: Backbone, support: Block, head: Head | None, rng: np.random.Generator) -> Task:
    """The task for that kind of head. Raises `UsageError` for another kind, and what a `TaskBuilder` raises."""
    if kind not in TASKS:
        raise UsageError("--head", repr(kind), "one of " + ", ".join(TASKS))
    return TASKS[kind](backbone, support, head, rng)


def _task(inputs: Floats, support: Block, head: Head) -> Task:
    if len(head.labels) < 2:
        raise DataError("support", f"a single class ({support.name_of(int(head.labels[0]))})", "at least two",
                        "with one class every answer is right, and no layer matters")  # fmt: skip
    return Task(inputs, rows(head, support.y, class_names(support)), head)


def _inputs(backbone: Backbone, support: Block) -> Floats:
    if not len(support):
        raise DataError("support", "no samples", "at least one of each of two classes")
    return adapt_block(support, backbone.input)
