"""The one search for a plan: what `score-layers` runs and what `evaluate --methods tinytrain` measures.

TinyTrain's online stage (arXiv:2307.09988, Algorithm 1, steps 1-4): one Fisher pass over the support set, a criterion,
a selector, under the budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.artifacts.records import Block, Head, LayerUpdate, Profile, Scores
from stages.cost.latency import Durations, durations
from stages.cost.model import full_backward_macs
from stages.cost.training import check_memory_model, with_head
from stages.engines.choice import make_inspector
from stages.graphs.graph import Graph
from stages.graphs.updates import whole_update
from stages.importance.fisher import Fisher, fisher_pass
from stages.importance.tasks import build_task
from stages.methods.layer_scores import Search, candidates, detached, scores_of
from stages.models.deploy import Backbone
from stages.planning.budget import Budget
from stages.planning.layers import select_layers
from stages.planning.problem import Channels, Choice, Evidence, Problem, pose


@dataclass(frozen=True, slots=True)
class Wish:
    """What a search is asked for."""

    how: Search
    channels: Channels
    budget: Callable[[int], Budget]
    """MACs of a whole backward pass -> the limits in numbers."""
    blocks: int
    """Only the last so many blocks, and what follows them, are inspected."""
    micro_batch: Callable[[Graph, Sequence[str]], int]
    """Graph and inspected layers -> samples of the Fisher pass looked at together."""


@dataclass(frozen=True)
class FisherPass:
    """One pass over a task's samples."""

    fisher: Fisher
    head: Head
    """Whose loss counted."""
    window: tuple[str, ...]
    """The inspected layers."""
    micro_batch: int


@dataclass(frozen=True)
class Found:
    """What a search found."""

    scores: Scores
    problem: Problem
    choice: Choice
    inspected: FisherPass

    @property
    def updates(self) -> tuple[LayerUpdate, ...]:
        """The plan's updates, with the layers that end the gradient."""
        return self.problem.complete(self.choice.updates)


def search(
    backbone: Backbone,
    support: Block,
    wish: Wish,
    rng: np.random.Generator,
    *,
    kind: str = "prototypes",
    head: Head | None = None,
    profile: Profile | None = None,
    on_step: Callable[[int], None] = lambda done: None,
) -> Found:
    """The plan for a task, from its support.

    Args:
        kind: `prototypes` or `linear`: whose loss counts; a linear head always trains, so every plan pays for it.
        head: the record's head, where there is one.
        profile: measured durations, for budgets in seconds.
        on_step: gets the number of samples done.

    Raises `DataError` for a support that says nothing (empty, one class, not finite), `UsageError` for a graph that the
    memory model cannot be read for, `BudgetError` when nothing fits.
    """
    graph = backbone.graph
    check_memory_model(wish.budget(full_backward_macs(graph)).memory_model, graph)  # before the long pass
    window = candidates(graph, wish.blocks, wish.how.layers)
    seen = inspect_task(backbone, support, window, wish, rng, kind=kind, head=head, on_step=on_step)
    scores = scores_of(wish.how.criterion, backbone, seen.fisher, window, rng)
    costs = costs_of(graph, wish, seen.head if kind == "linear" else None, profile)
    # spawned, so that random channels leave the draws that follow (a support's views) as they are
    evidence = Evidence(backbone.tensors, rng.spawn(1)[0])
    problem = pose(
        costs.graph, scores, costs.budget, wish.channels, evidence,
        fixed=costs.fixed, measured=costs.measured, detached=costs.detached,
    )  # fmt: skip
    return Found(scores, problem, select_layers(problem, wish.how.select), seen)


def inspect_task(
    backbone: Backbone,
    support: Block,
    window: Sequence[str],
    wish: Wish,
    rng: np.random.Generator,
    *,
    kind: str,
    head: Head | None,
    on_step: Callable[[int], None] = lambda done: None,
) -> FisherPass:
    """The Fisher pass over a support for these layers. Arguments and errors as of `search`."""
    size = wish.micro_batch(backbone.graph, window)
    task = build_task(kind, backbone, support, head, rng)
    fisher = fisher_pass(make_inspector(backbone, window), task.batches(size), task.loss, on_step=on_step)
    return FisherPass(fisher, task.head, tuple(window), size)


def costs_of(graph: Graph, wish: Wish, head: Head | None, profile: Profile | None) -> Problem:
    """What plans are checked against, without candidates; a linear `head` always trains, so every plan pays for it."""
    fixed: tuple[LayerUpdate, ...] = ()
    if head is not None:
        graph = with_head(graph, len(head.labels))
        fixed = (whole_update(graph.ops[-1]),)
    budget = wish.budget(full_backward_macs(graph))
    measured = _with_free_head(durations(profile), graph.output) if budget.latency_s is not None else None
    return Problem(graph, (), budget, fixed, measured, detached(graph, wish.how.gradient))


def _with_free_head(measured: Durations, head: str) -> Durations:
    """The profile measures the backbone; a linear head's time is too small to matter beside it."""
    return replace(
        measured,
        input_gradient_ns={**measured.input_gradient_ns, head: 0},
        weight_gradient_ns={**measured.weight_gradient_ns, head: 0},
    )
