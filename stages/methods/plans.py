"""Methods that train a plan's live channels by the sparse engine: what they differ in is the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stages.artifacts.records import LayerUpdate
from stages.errors import UsageError, require
from stages.fsl.protonet import cosine_logits, prototypes
from stages.graphs.graph import Graph
from stages.importance.criteria import CRITERIA
from stages.methods.layer_scores import GRADIENTS, LAYERS, SEARCHES, Search
from stages.methods.search import Wish, search
from stages.methods.task import Answer, Method, Task
from stages.models.deploy import Backbone
from stages.planning.baselines import SCHEMES, named_plan
from stages.planning.budget import Budget, parse_macs, parse_memory
from stages.planning.layers import SELECTORS
from stages.planning.problem import Channels
from stages.training.adaptation import Adapting, adapt
from stages.training.updates import features_of

Updates = tuple[LayerUpdate, ...]
Planner = Callable[[Backbone, Task, Adapting, np.random.Generator], Updates]

SPARSE_UPDATE = ("mcunet-99kb", "mbv2-99kb", "proxyless-98kb")
"""Per backbone the published scheme nearest to 100 KB; the first is the one in TinyTrain's tables."""


def planned(planner: Planner) -> Method:
    """The method that adapts with the plan that `planner` makes for the task."""

    def method(backbone: Backbone, task: Task, how: Adapting, rng: np.random.Generator) -> Answer:
        updates = planner(backbone, task, how, rng)
        result = adapt(backbone, updates, task.support_x, task.support_y, how, rng)
        features = features_of(result.net, task.query_x, micro_batch=how.micro_batch)
        predicted = cosine_logits(features, result.prototypes, how.scale).argmax(1)
        return Answer(predicted, updates, result.learning_rate)

    return method


def nothing(backbone: Backbone, task: Task, how: Adapting, rng: np.random.Generator) -> Answer:
    """No adaptation: the nearest prototype of the backbone as it is. Nothing is drawn at random."""
    means = prototypes(backbone.features(task.support_x), task.support_y, task.ways)
    return Answer(cosine_logits(backbone.features(task.query_x), means, how.scale).argmax(1))


def named(name: str) -> Planner:
    """A plan that does not depend on the task."""
    return lambda backbone, task, how, rng: named_plan(name, backbone.graph, tensors_l2=backbone.tensors)


def sparse_update(backbone: Backbone, task: Task, how: Adapting, rng: np.random.Generator) -> Updates:
    """The published SparseUpdate scheme of about 100 KB for this backbone (Lin et al. 2022, arXiv:2206.15472)."""
    return named_plan(scheme_for(backbone.graph), backbone.graph, tensors_l2=backbone.tensors)


def scheme_for(graph: Graph) -> str:
    """The scheme's name, by the number of layers. Raises `UsageError` for a net without one."""
    count = sum(op.name != "mix" for op in graph.layers)
    for name in SPARSE_UPDATE:
        if SCHEMES[name].layers == count:
            return name
    raise UsageError(
        "sparse-update",
        f"a net of {count} layers",
        "mcunet-5fps, mobilenetv2-w0.35 or proxyless-w0.3: schemes were published for these alone",
        "leave the method out for other nets",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyTrain:
    """TinyTrain's plan for a task (arXiv:2307.09988, Algorithm 1), and its ablations."""

    criterion: str = SEARCHES["tinytrain"].criterion
    select: str = SEARCHES["tinytrain"].select
    rule: str = "fisher"
    axis: str = "output"
    ratios: tuple[float, ...] = SEARCHES["tinytrain"].ratios
    bias: bool = False
    unit: str = "channels"
    layers: str = SEARCHES["tinytrain"].layers
    gradient: str = SEARCHES["tinytrain"].gradient
    memory: str = "1MB"
    macs: str = "15%"
    memory_model: str = "paper"
    blocks: int = 6

    def __post_init__(self) -> None:
        where = "tinytrain"
        require(self.criterion in CRITERIA, where, f"criterion {self.criterion!r}", "one of " + ", ".join(CRITERIA))
        require(self.select in SELECTORS, where, f"select {self.select!r}", "one of " + ", ".join(SELECTORS))
        require(self.layers in LAYERS, where, f"layers {self.layers!r}", "one of " + ", ".join(LAYERS))
        require(self.gradient in GRADIENTS, where, f"gradient {self.gradient!r}", "one of " + ", ".join(GRADIENTS))
        require(self.blocks > 0, where, f"{self.blocks} blocks", "at least 1")
        self.channels()
        self.budget(full_macs=10**6)

    def channels(self) -> Channels:
        """How channels are chosen."""
        return Channels(ratios=self.ratios, axis=self.axis, rule=self.rule, bias=self.bias, unit=self.unit)

    def budget(self, full_macs: int) -> Budget:
        """The budgets in numbers."""
        return Budget(
            memory_bytes=parse_memory(self.memory),
            backward_macs=parse_macs(self.macs, full_macs),
            latency_s=None,
            memory_model=self.memory_model,
            batch=1,
            optimizer="adam",
        )

    def __call__(self, backbone: Backbone, task: Task, how: Adapting, rng: np.random.Generator) -> Updates:
        """The plan for this task: a Fisher pass over its support, then layers and channels under the budgets."""
        size = how.micro_batch or len(task.support)
        wish = Wish(self.how(), self.channels(), self.budget, self.blocks, lambda graph, window: size)
        return search(backbone, task.support, wish, rng).updates

    def how(self) -> Search:
        """How the plan is searched for."""
        return Search(
            criterion=self.criterion, select=self.select, ratios=self.ratios, layers=self.layers, gradient=self.gradient
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortcut(TinyTrain):
    """A plan under the same budgets that trains more accurately (docs/results/tinytrain_accuracy.md): entries of
    blocks, as many whole as the Fisher information they hold asks for, reached past residual branches."""

    criterion: str = SEARCHES["shortcut"].criterion
    select: str = SEARCHES["shortcut"].select
    ratios: tuple[float, ...] = SEARCHES["shortcut"].ratios
    layers: str = SEARCHES["shortcut"].layers
    gradient: str = SEARCHES["shortcut"].gradient
