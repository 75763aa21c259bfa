"""Which channels of a layer belong to which head of an attention: found by following them through what moves values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from stages.graphs.graph import Graph
from stages.graphs.moves import MOVES, moved
from stages.operators import Op, Shape

Numbers = NDArray[np.int64]

PRODUCTS = ("attention", "matmul")
"""Operators whose values have heads along the third axis from behind: (..., heads, tokens, width)."""


def output_heads(graph: Graph, op: Op) -> Numbers | None:
    """The head that reads each output channel of a linear layer on tokens, as (out_channels,): 0, 1, ...

    Of a layer that makes queries, keys and values at once a head has its part of all three. None where the channels do
    not fall into two heads or more.
    """
    if not op.operator.matrix(op):
        return None
    found = np.full(op.out_channels, -1)
    for reader, channels in _spread(graph, op.name, _along(op.shape, op.channel_axis)):
        if reader.kind in PRODUCTS and len(reader.shape) > 2:
            _name(found, channels, _along(channels.shape, len(channels.shape) - 3))
    return _several(found)


def input_heads(graph: Graph, op: Op) -> Numbers | None:
    """The head that makes each input channel of a linear layer on tokens, as (in_channels,); None as above."""
    if not op.operator.matrix(op):
        return None
    found = np.full(op.in_channels, -1)
    for product in graph.ops:
        if product.kind in PRODUCTS and len(product.shape) > 2:
            heads = _along(product.shape, len(product.shape) - 3)
            for reader, values in _spread(graph, product.name, heads):
                if reader.name == op.name:
                    _name(found, _along(op.in_shape, op.channel_axis), values)
    return _several(found)


def _along(shape: Shape, axis: int) -> Numbers:
    """Of every value its place along one axis."""
    return np.asarray(np.indices(shape)[axis])


def _spread(graph: Graph, name: str, values: Numbers) -> Iterator[tuple[Op, Numbers]]:
    """Every operator that reads the value, or what is only moved or weighed of it, and what it reads."""
    for reader in (graph[each] for each in graph.consumers[name]):
        yield reader, values
        if reader.kind in MOVES:
            yield from _spread(graph, reader.name, moved(reader, values))
        elif _weighs(graph, reader):
            yield from _spread(graph, reader.name, values)


def _weighs(graph: Graph, op: Op) -> bool:
    """Whether each of its outputs is the input of the same place, scaled, shifted or normalised."""
    alone = all(source in graph.constants for source in op.inputs[1:])
    return op.shape == op.in_shape and alone and (op.kind in ("scale", "layernorm", "multiply", "add"))


def _name(found: Numbers, channels: Numbers, heads: Numbers) -> None:
    """Give each channel its head; -2 to one that several heads have."""
    count = int(heads.max()) + 1
    for pair in np.unique((channels * count + heads)[channels >= 0]):
        channel, head = divmod(int(pair), count)
        found[channel] = head if found[channel] in (-1, head) else -2


def _several(found: Numbers) -> Numbers | None:
    return found if found.min() >= 0 and found.max() > 0 else None
