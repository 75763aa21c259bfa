"""Methods that train a plan's live channels by the sparse engine: what they differ in is the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from stages.artifacts.records import Array, LayerUpdate, Scores
from stages.cost.model import full_backward_macs, last_blocks
from stages.cost.ops import layer_macs
from stages.errors import UsageError, require
from stages.fsl.protonet import cosine_logits, prototypes
from stages.importance.criteria import CRITERIA
from stages.importance.criteria import Evidence as LayerEvidence
from stages.importance.fisher import fisher_pass
from stages.importance.tasks import build_task
from stages.methods.task import Answer, Method, Task
from stages.models.deploy import Backbone
from stages.models.graph import Graph
from stages.planning.baselines import SCHEMES, named_plan
from stages.planning.budget import Budget, parse_macs, parse_memory
from stages.planning.layers import SELECTORS, select_layers
from stages.planning.problem import RATIOS, Channels, Evidence, pose
from stages.sparse.adaptation import Adapting, adapt
from stages.sparse.engine import SparseNet
from stages.sparse.updates import features_of

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
        predicted = cosine_logits(features, result.prototypes, how.scale).argmax(dim=1)
        return Answer(predicted, updates, result.learning_rate)

    return method


def nothing(backbone: Backbone, task: Task, how: Adapting, rng: np.random.Generator) -> Answer:
    """No adaptation: the nearest prototype of the backbone as it is. Nothing is drawn at random."""
    features = features_of(SparseNet(backbone, ()), [task.support_x, task.query_x], micro_batch=how.micro_batch)
    count = len(task.support_y)
    means = prototypes(features[:count], task.support_y, task.ways)
    return Answer(cosine_logits(features[count:], means, how.scale).argmax(dim=1))


def named(name: str) -> Planner:
    """A plan that does not depend on the task."""
    return lambda backbone, task, how, rng: named_plan(name, backbone.graph, tensors_l2=arrays(backbone))


def sparse_update(backbone: Backbone, task: Task, how: Adapting, rng: np.random.Generator) -> Updates:
    """The published SparseUpdate scheme of about 100 KB for this backbone (Lin et al. 2022, arXiv:2206.15472)."""
    return named_plan(scheme_for(backbone.graph), backbone.graph, tensors_l2=arrays(backbone))


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

    criterion: str = "score"
    select: str = "greedy"
    rule: str = "fisher"
    axis: str = "output"
    ratios: tuple[float, ...] = RATIOS
    bias: bool = False
    memory: str = "1MB"
    macs: str = "15%"
    memory_model: str = "paper"
    blocks: int = 6

    def __post_init__(self) -> None:
        where = "tinytrain"
        require(self.criterion in CRITERIA, where, f"criterion {self.criterion!r}", "one of " + ", ".join(CRITERIA))
        require(self.select in SELECTORS, where, f"select {self.select!r}", "one of " + ", ".join(SELECTORS))
        require(self.blocks > 0, where, f"{self.blocks} blocks", "at least 1")
        self.channels()
        self.budget(full_macs=10**6)

    def channels(self) -> Channels:
        """How channels are chosen."""
        return Channels(ratios=self.ratios, axis=self.axis, rule=self.rule, bias=self.bias)

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
        pseudo_query = build_task("prototypes", backbone, task.support, None, size, rng)
        window = last_blocks(backbone.graph, self.blocks)
        found = fisher_pass(backbone, pseudo_query.batches(size), pseudo_query.loss, window)
        scores = self._scores(backbone, found.output, found.input, rng)
        budget = self.budget(full_backward_macs(backbone.graph))
        problem = pose(backbone.graph, scores, budget, self.channels(), Evidence(arrays(backbone), rng))
        return select_layers(problem, self.select).updates

    def _scores(
        self, backbone: Backbone, output: Mapping[str, Array], input: Mapping[str, Array], rng: np.random.Generator
    ) -> Scores:
        graph = backbone.graph
        ops = [graph[name] for name in output]
        fisher = np.array([output[op.name].sum() for op in ops])
        norms = [float(torch.linalg.vector_norm(backbone.tensors[f"{op.name}.weight"])) for op in ops]
        evidence = LayerEvidence(
            fisher=fisher,
            parameters=np.array([float(op.weights) for op in ops]),
            macs=np.array([float(layer_macs(op)) for op in ops]),
            most_parameters=max(op.weights for op in graph.layers),
            most_macs=max(layer_macs(op) for op in graph.layers),
            weight_l2=np.array(norms),
            rng=rng,
        )
        worth = CRITERIA[self.criterion](evidence)
        return Scores(self.criterion, tuple(output), worth, fisher, tuple(output.values()), tuple(input.values()))


def arrays(backbone: Backbone) -> dict[str, Array]:
    """Tensors by name as arrays."""
    return {name: tensor.numpy() for name, tensor in backbone.tensors.items()}
