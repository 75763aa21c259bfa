"""What an adaptation method gets and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import Block, LayerUpdate
from stages.cost.training import live_values, memory_bytes, plan_backward_macs
from stages.engines.parameter import Floats
from stages.fsl.episodes import Episode
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.models.inputs import adapt_block
from stages.training.adaptation import Adapting


@dataclass(frozen=True)
class Task:
    """One few-shot task as model inputs. The query's labels are not here: no method can look at them."""

    support: Block
    """Its labels are the classes of the task, 0..C-1."""
    support_x: Floats
    """float32 (S, *input)."""
    support_y: NDArray[np.int64]
    """int64 (S,): 0..C-1."""
    query_x: Floats
    """float32 (Q, *input)."""
    ways: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method's training costs, for batches of one sample with Adam."""

    layers: int
    """That train."""
    live_values: int
    backward_macs: int
    """Per sample."""
    memory_bytes: int
    """By the `paper` model."""
    saved_bytes: int
    """By the `saved` model."""


def plan_cost(graph: Graph, updates: Sequence[LayerUpdate]) -> Cost:
    """The cost of training these updates in the sparse engine; of nothing, where there are none."""
    if not updates:
        return Cost(layers=0, live_values=0, backward_macs=0, memory_bytes=0, saved_bytes=0)
    return Cost(
        layers=sum(update.trains for update in updates),
        live_values=live_values(graph, updates),
        backward_macs=plan_backward_macs(graph, updates),
        memory_bytes=memory_bytes(graph, updates, model="paper"),
        saved_bytes=memory_bytes(graph, updates, model="saved"),
    )


@dataclass(frozen=True)
class Answer:
    """What a method makes of a task."""

    predicted: NDArray[np.int64]
    """int64 (Q,): 0..C-1."""
    updates: tuple[LayerUpdate, ...] = ()
    """What trained in the backbone."""
    learning_rate: float = 0.0
    cost: Cost | None = None
    """Where it is not that of `updates`: of methods that train values outside the backbone."""


Method = Callable[[Backbone, Task, Adapting, np.random.Generator], Answer]
"""(backbone, task, how to adapt, randomness) -> answer. The backbone is left alone."""


def make_task(block: Block, episode: Episode, backbone: Backbone) -> Task:
    """The task of an episode over a block's samples. Raises `DataError` for samples that the model cannot read."""
    given, asked = block.take(episode.support), block.take(episode.query)
    support = replace(given, y=episode.support_labels, labels=None, names=None)
    return Task(
        support=support,
        support_x=adapt_block(given, backbone.input),
        support_y=episode.support_labels,
        query_x=adapt_block(asked, backbone.input),
        ways=episode.ways,
    )
