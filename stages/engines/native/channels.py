"""The order of channels inside the arena: such that what trains lies side by side wherever it can.

Values that share their channels one to one (through activations, additions, depthwise layers, pooling) form a space;
one order holds for all of them. Where an operator needs the graph's own order (concatenation, groups, flattening) its
spaces keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from stages.artifacts.records import LayerUpdate
from stages.engines.native.program import Integers
from stages.graphs.graph import Graph
from stages.operators import Op

Run = tuple[int, int, bool]
"""First channel, end, whether they are live."""


class Channels:
    """The order of every value's channels; `of[name][i]` is the graph's number of the i-th."""

    def __init__(self, graph: Graph, updates: Iterable[LayerUpdate], flow_of: Callable[[Op], str]) -> None:
        """`flow_of`: how an operator treats channels: `same`, its `own`, or `fixed` to the graph's order."""
        self._parent = {op.name: op.name for op in graph.ops}
        fixed = {graph.ops[0].name}
        for op in graph.ops[1:]:
            flow = flow_of(op)
            if flow == "same":
                for source in op.inputs:
                    self._join(op.name, source)
            elif flow == "fixed":
                fixed |= {op.name, *op.inputs}
        self._fixed = {self._root(name) for name in fixed}
        sets: dict[str, list[frozenset[int]]] = {}
        for update in updates:
            if update.channels:
                op = graph[update.layer]
                value = op.inputs[0] if update.axis == "input" else op.name
                sets.setdefault(self._root(value), []).append(frozenset(update.channels))
        self.of = {op.name: self._order(op, sets) for op in graph.ops}
        self.position = {name: np.argsort(order) for name, order in self.of.items()}

    def _root(self, name: str) -> str:
        while self._parent[name] != name:
            self._parent[name] = name = self._parent[self._parent[name]]
        return name

    def _join(self, first: str, second: str) -> None:
        self._parent[self._root(first)] = self._root(second)

    def _order(self, op: Op, sets: Mapping[str, Sequence[frozenset[int]]]) -> Integers:
        root = self._root(op.name)
        count = op.shape[0]
        if root in self._fixed or root not in sets:
            return np.arange(count)
        return np.array(sorted(range(count), key=lambda channel: (_rank(channel, sets[root]), channel)), np.int64)

    def runs(self, value: str, live: Sequence[int]) -> list[Run]:
        """The channels of a value as runs of live and of frozen ones."""
        mark = np.zeros(len(self.of[value]) + 2, bool)
        mark[self.position[value][list(live)] + 1] = True
        inside = mark[1:-1]
        edges = [0, *(np.flatnonzero(inside[1:] != inside[:-1]) + 1).tolist(), len(inside)]
        return [(low, high, bool(inside[low])) for low, high in pairwise(edges)]


def _rank(channel: int, sets: Sequence[frozenset[int]]) -> int:
    """Where channels that belong to the same sets come: neighbours differ in one set (a Gray code), none last.

    >>> [_rank(c, [frozenset({0, 1}), frozenset({1, 2})]) for c in (0, 1, 2, 3)]
    [0, 1, 2, 3]
    """
    code = value = 0
    for number in sets:
        value = (value & 1) ^ (channel in number)
        code = code << 1 | value
    return (1 << len(sets)) - 1 - code
