"""What an adaptation method gets and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stages.artifacts.records import Block, LayerUpdate
from stages.fsl.episodes import Episode
from stages.models.deploy import Backbone
from stages.models.inputs import adapt
from stages.sparse.adaptation import Adapting


@dataclass(frozen=True)
class Task:
    """One few-shot task as model inputs. The query's labels are not here: no method can look at them."""

    support: Block
    """Its labels are the classes of the task, 0..C-1."""
    support_x: Tensor
    """float32 (S, *input)."""
    support_y: Tensor
    """int64 (S,): 0..C-1."""
    query_x: Tensor
    """float32 (Q, *input)."""
    ways: int


@dataclass(frozen=True)
class Answer:
    """What a method makes of a task."""

    predicted: Tensor
    """int64 (Q,): 0..C-1."""
    updates: tuple[LayerUpdate, ...] = ()
    """What trained in the backbone."""
    learning_rate: float = 0.0
    extra_values: int = 0
    """Trained values outside the backbone: adapters."""
    extra_macs: int | None = None
    """Backward MACs per sample where they are not those of `updates`."""


Method = Callable[[Backbone, Task, Adapting, np.random.Generator], Answer]
"""(backbone, task, how to adapt, randomness) -> answer. The backbone is left alone."""


def make_task(block: Block, episode: Episode, backbone: Backbone) -> Task:
    """The task of an episode over a block's samples. Raises `DataError` for samples that the model cannot read."""
    given, asked = block.take(episode.support), block.take(episode.query)
    support = replace(given, y=episode.support_labels, labels=None, names=None)
    return Task(
        support=support,
        support_x=adapt(np.asarray(given.x), block.layout, backbone.input),
        support_y=torch.from_numpy(episode.support_labels),
        query_x=adapt(np.asarray(asked.x), block.layout, backbone.input),
        ways=episode.ways,
    )
