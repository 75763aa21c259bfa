"""Whether updates are a plan for a graph."""

from __future__ import annotations

from collections.abc import Sequence

from stages.artifacts.records import LayerUpdate, detached_layers
from stages.errors import DataError
from stages.graphs.graph import Graph


def check_plan(graph: Graph, updates: Sequence[LayerUpdate]) -> None:
    """Raise `DataError` unless every update fits a layer of the graph, once, and a gradient reaches it."""
    seen: set[str] = set()
    for update in updates:
        _check(graph, update, seen)
        seen.add(update.layer)
    names = {update.layer for update in updates if update.trains}
    cut_off = (graph.gradient_flow(names) & names) - graph.gradient_flow(names, detached_layers(updates))
    if cut_off:
        where = f"plan, layer {min(cut_off, key=graph.position.__getitem__)}"
        raise DataError(where, "every way to the features is detached", "one that is not, for its gradient")


def _check(graph: Graph, update: LayerUpdate, seen: set[str]) -> None:
    where = f"plan, layer {update.layer}"
    fix = "make the plan for this model with `edgetrain score-layers`"
    if update.layer not in graph.by_name or not graph[update.layer].is_layer:
        raise DataError(where, "no such layer in the model", "a convolution or linear layer", fix)
    if update.layer in seen:
        raise DataError(where, "updated twice", "one update per layer", fix)
    op = graph[update.layer]
    channels = {"output": op.out_channels, "input": op.in_channels}
    if channels.get(update.axis) != update.axis_channels:
        raise DataError(where, f"{update.axis_channels} {update.axis} channels", f"{channels}", fix)
    if not update.trains and not update.detached:
        raise DataError(where, "nothing that trains", "channels or biases", fix)
    if update.bias and not op.bias:
        raise DataError(where, "biases", "none: the layer has no bias", fix)
    for what, live, size in (
        ("channels", update.channels, update.axis_channels),
        ("bias", update.bias, op.out_channels),
    ):
        if live and (min(live) < 0 or max(live) >= size or list(live) != sorted(set(live))):
            few = str(list(live[:5])) + ("..." if len(live) > 5 else "")
            raise DataError(where, f"{what} {few}", f"ascending numbers in 0..{size - 1}", fix)
