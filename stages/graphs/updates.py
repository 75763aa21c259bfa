"""Updates that train whole layers: a plan's parts where nothing is chosen."""

from __future__ import annotations

from stages.artifacts.records import LayerUpdate
from stages.graphs.graph import Graph
from stages.operators import Op


def whole_update(op: Op, *, bias: bool = True) -> LayerUpdate:
    """The update that trains all of a layer: every output channel, and every bias if it has them."""
    channels = tuple(range(op.out_channels))
    return LayerUpdate(op.name, "output", channels, op.out_channels, channels if bias and op.bias else ())


def every_layer(graph: Graph) -> tuple[LayerUpdate, ...]:
    """The updates that train all weights and biases of a graph, in execution order."""
    return tuple(whole_update(op) for op in graph.layers)
