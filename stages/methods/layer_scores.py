"""Which layers a search looks at, what each is worth, and which end the gradient: for the stage and for tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.artifacts.records import Scores
from stages.cost.model import block_entries, filters, last_blocks
from stages.cost.ops import macs
from stages.errors import require
from stages.graphs.graph import Graph
from stages.importance.criteria import Evidence, criterion_named
from stages.importance.fisher import Fisher
from stages.models.deploy import Backbone
from stages.planning.problem import RATIOS
from stages.planning.shortcuts import residual_entries

LAYERS = ("filters", "all", "entries")
"""Candidates: the window's convolutions and linear layers (`filters`); with them the layers that only scale channels,
a BatchNorm that could not be folded; or the first of each block that mixes channels (`block_entries`)."""

GRADIENTS = ("exact", "shortcut")
"""Through every layer behind the earliest live one, or past residual branches (`planning.shortcuts`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What distinguishes one way to search for a plan from another."""

    criterion: str
    select: str
    ratios: tuple[float, ...]
    layers: str
    gradient: str


SEARCHES = {
    "tinytrain": Search(criterion="score", select="greedy", ratios=RATIOS, layers="filters", gradient="exact"),
    "shortcut": Search(criterion="fisher", select="knapsack", ratios=(1.0, 0.5), layers="entries", gradient="shortcut"),
}
"""`tinytrain`: as published (arXiv:2307.09988, section 2.2). `shortcut`: ours, see `planning.shortcuts`."""


def candidates(graph: Graph, blocks: int, layers: str) -> tuple[str, ...]:
    """The layers that a search may choose from: of the last `blocks` blocks those that `layers` names.

    Raises:
        UsageError: fewer than one block, or blocks in which there is no such layer.
    """
    window = last_blocks(graph, blocks)
    if layers == "all":
        return window
    found = filters(graph, block_entries(graph, window) if layers == "entries" else window)
    require(
        bool(found),
        f"--layers {layers}",
        f"none in the last {blocks} of the model's {len(graph.blocks)} blocks",
        "layers to choose from",
        "look at more --blocks, or at --layers all",
    )
    return found


def detached(graph: Graph, gradient: str) -> frozenset[str]:
    """The layers that pass no gradient on."""
    return residual_entries(graph) if gradient == "shortcut" else frozenset()


def scores_of(
    criterion: str, backbone: Backbone, fisher: Fisher, layers: Sequence[str], rng: np.random.Generator
) -> Scores:
    """The scores record: the worth of these layers by the criterion, and their channels' Fisher information."""
    graph = backbone.graph
    ops = [graph[name] for name in layers]
    norms = [float(np.linalg.norm(backbone.tensors[f"{op.name}.weight"].astype(np.float64))) for op in ops]
    evidence = Evidence(
        fisher=np.array([fisher.output[op.name].sum() for op in ops]),
        parameters=np.array([float(op.weights) for op in ops]),
        macs=np.array([float(macs(op)) for op in ops]),
        most_parameters=max(op.weights for op in graph.layers),
        most_macs=max(macs(op) for op in graph.layers),
        weight_l2=np.array(norms),
        rng=rng,
    )
    return Scores(
        criterion,
        tuple(layers),
        criterion_named(criterion)(evidence),
        evidence.fisher,
        tuple(fisher.output[op.name].astype(np.float32) for op in ops),
        tuple(fisher.input[op.name].astype(np.float32) for op in ops),
    )
