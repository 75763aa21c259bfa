"""What a policy is told about the outputs of layers: their channels' values on a few samples.

A graph whose features are these values is made beside the backbone's, so that any engine runs it. What is frozen is run
once; a look then costs the forward pass of the layers behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from stages.artifacts.records import Array, LayerUpdate
from stages.engines.choice import make_net
from stages.engines.parameter import Floats
from stages.graphs.graph import Graph, needed
from stages.graphs.updates import whole_update
from stages.models.deploy import Backbone
from stages.operators import Op

VIEW = "observed"
"""What the added operators' names begin with."""


def observing(graph: Graph, layers: Sequence[str], *, full: bool = False) -> Graph:
    """The graph whose features are these layers' outputs, a channel behind the other: the mean of each over its
    positions, or with `full` all of it."""
    added: list[Op] = []
    parts: list[Op] = []
    for number, name in enumerate(layers):
        op = graph[name]
        axis = op.channel_axis % len(op.shape)
        if full or len(op.shape) == 1:
            last = op
            if axis:
                order = (axis, *(other for other in range(len(op.shape)) if other != axis))
                shape = tuple(op.shape[other] for other in order)
                last = Op(f"{VIEW}/{number}/order", "permute", (name,), shape, (op.shape,), args=(("order", order),))
                added.append(last)
            vector = Op(f"{VIEW}/{number}", "flatten", (last.name,), (prod(op.shape),), (last.shape,))
        elif axis == 0:
            vector = Op(f"{VIEW}/{number}", "global_pool", (name,), op.shape[:1], (op.shape,))
        else:
            others = tuple(other for other in range(len(op.shape)) if other != axis)
            args = (("axes", others), ("keepdim", False))
            vector = Op(f"{VIEW}/{number}", "mean", (name,), (op.shape[axis],), (op.shape,), args=args)
        added.append(vector)
        parts.append(vector)
    if len(parts) > 1:
        shapes = tuple(part.shape for part in parts)
        total = (sum(shape[0] for shape in shapes),)
        names = tuple(part.name for part in parts)
        added.append(Op(f"{VIEW}/all", "concat", names, total, shapes, args=(("axis", 0),)))
    ops = (*needed(graph.ops, layers), *added)
    return replace(graph, ops=ops)


class Observer:
    """Looks at layers' outputs on a probe while their weights change.

    Args:
        backbone: with the weights that training begins with.
        layers: whose outputs are told.
        changing: the layers that may train at some time; everything before them is run once.
        probe: model inputs (n, *input).
        full: whole outputs instead of channel means.
    """

    def __init__(
        self, backbone: Backbone, layers: Sequence[str], changing: Sequence[str], probe: Floats, *, full: bool = False
    ) -> None:
        graph = observing(backbone.graph, layers, full=full)
        tensors = {name: value for name, value in backbone.tensors.items() if name.rpartition(".")[0] in graph.by_name}
        updates: list[LayerUpdate] = [whole_update(graph[name]) for name in changing if name in graph.by_name]
        self._net = make_net(replace(backbone, graph=graph, tensors=tensors), updates)
        self._names = [(name, backbone.graph[name].out_channels) for name in layers]
        self._sizes = [prod(graph[name].shape) if full else count for name, count in self._names]
        self._boundary = self._net.prefix(probe)
        self._count = len(probe)

    def look(self, tensors: Mapping[str, Floats]) -> dict[str, Array]:
        """Layer -> the outputs of its channels with these weights, float32 (C, n) or, whole, (C, n * positions)."""
        self._net.load_whole(tensors)
        features, at = self._net.suffix(self._boundary), 0
        found: dict[str, Array] = {}
        for (name, channels), size in zip(self._names, self._sizes, strict=True):
            part = features[:, at : at + size].reshape(self._count, channels, -1)
            found[name] = part.transpose(1, 0, 2).reshape(channels, -1).copy()
            at += size
        return found
