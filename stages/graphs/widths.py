"""Hidden widths: channels that one layer makes and one other reads, so that some of them can be left out alone.

Between the two stand only operators that treat every channel by itself: activations, BatchNorm, pooling, depthwise
layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.graphs.graph import Graph
from stages.operators import Op

EACH_BY_ITSELF = frozenset({
    "relu", "relu6", "leaky_relu", "elu", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "clamp",
    "softplus", "mish", "abs", "batchnorm", "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool",
    "global_pool",
})  # fmt: skip
"""Kinds whose output channel c is a function of input channel c alone."""


@dataclass(frozen=True, slots=True)
class Width:
    """A hidden width."""

    maker: str
    """The layer whose output channels are counted."""
    through: tuple[str, ...]
    """The operators between, in execution order."""
    reader: str
    """The layer that reads them, alone."""
    channels: int


def hidden_widths(graph: Graph) -> tuple[Width, ...]:
    """All hidden widths, in execution order; those of layers that are called more than once are none."""
    return tuple(width for op in graph.layers if (width := _width(graph, op)) is not None)


def _width(graph: Graph, maker: Op) -> Width | None:
    if not _mixes(graph, maker):
        return None
    through: list[str] = []
    name = maker.name
    while True:
        readers = graph.consumers[name]
        if len(readers) != 1 or name == graph.output:
            return None
        op = graph[readers[0]]
        if _mixes(graph, op) and _keeps_axis(graph[name], op):
            return Width(maker.name, tuple(through), op.name, maker.out_channels)
        alone = op.is_depthwise and op.out_channels == maker.out_channels and len(graph.uses(op.owner)) == 1
        if not (alone or (op.kind in EACH_BY_ITSELF and len(op.inputs) == 1)):
            return None
        through.append(op.name)
        name = op.name


def _mixes(graph: Graph, op: Op) -> bool:
    """A layer of one group whose weight is (out, in, *kernel), called once."""
    dense = op.is_layer and op.kind in ("conv", "linear") and op.groups == 1 and not op.is_depthwise
    return dense and len(graph.uses(op.owner)) == 1


def _keeps_axis(before: Op, reader: Op) -> bool:
    """Whether the reader's input channels are the channels that are made."""
    axis = reader.channel_axis % len(reader.in_shape)
    return before.shape[axis] == reader.in_channels and before.shape == reader.in_shape
