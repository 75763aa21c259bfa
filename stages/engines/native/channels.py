"""The order of channels inside the arena: such that what trains lies side by side wherever it can.

Values that share their channels one to one (through activations, additions, depthwise layers, pooling) form a space;
one order holds for all of them; a concatenation has the orders of what it joins, one behind the other. Where an
operator needs the graph's own order (groups, flattening) its spaces keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np

from stages.artifacts.records import LayerUpdate
from stages.engines.native.program import Integers
from stages.graphs.graph import Graph
from stages.operators import Op, Shape


@dataclass(frozen=True, slots=True)
class Map:
    """A value as the engine holds it: pixels of channels."""

    height: int
    width: int
    channels: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def floats(self) -> int:
        return self.pixels * self.channels


def map_of(shape: Shape) -> Map:
    """(C, H, W), (C, T) or (D,) as a map; a line of time is a map of one row, a value of more axes or of none a vector.

    >>> map_of((3, 8, 9)), map_of((2, 5)), map_of((7,))
    (Map(height=8, width=9, channels=3), Map(height=1, width=5, channels=2), Map(height=1, width=1, channels=7))
    """
    if not 1 <= len(shape) <= 3:
        return Map(1, 1, prod(shape))
    sizes = (1, 1, *shape[1:])[-2:]
    return Map(sizes[0], sizes[1], shape[0])


def live_first(live: Sequence[int], count: int) -> Integers | None:
    """So many channels in an order that has the live ones first; None where that is their own.

    >>> live_first((1, 3), 4)
    array([1, 3, 0, 2])
    """
    order = np.concatenate([np.array(live, np.int64), np.setdiff1d(np.arange(count), live)])
    return None if (order == np.arange(count)).all() else order


Run = tuple[int, int, int]
"""First channel, end, and which lot of live ones they are; -1 for frozen ones."""


class Channels:
    """The order of every value's channels; `of[name][i]` is the graph's number of the i-th."""

    def __init__(self, graph: Graph, updates: Iterable[LayerUpdate], flow_of: Callable[[Op], str]) -> None:
        """`flow_of`: how an operator treats channels: `same`, its `own`, `joined` or `fixed` to the graph's order."""
        self._graph = graph
        self._parent = {op.name: op.name for op in graph.ops}
        flows = {op.name: flow_of(op) for op in graph.ops[1:]}
        fixed = {graph.ops[0].name}
        for op in graph.ops[1:]:
            if flows[op.name] == "same":
                for source in op.inputs:
                    self._join(op.name, source)
            elif flows[op.name] == "fixed":
                fixed |= {op.name, *op.inputs}
        self._fixed = {self._root(name) for name in fixed}
        self._joined = self._concatenations(flows)
        self._sets: dict[str, list[frozenset[int]]] = {}
        for update in updates:
            if update.channels:
                op = graph[update.layer]
                value = op.inputs[0] if update.axis == "input" else op.name
                self._sets.setdefault(self._root(value), []).append(frozenset(update.channels))
        orders: dict[str, Integers] = {}
        self.of = {op.name: self._order(op, orders) for op in graph.ops}
        self.position = {name: np.argsort(order) for name, order in self.of.items()}

    def _concatenations(self, flows: Mapping[str, str]) -> dict[str, Op]:
        """The spaces whose order is that of the values which one concatenation joins; other concatenations, and what
        they join, keep the graph's order."""
        makers: dict[str, list[Op]] = {}
        for op in self._graph.ops[1:]:
            if flows[op.name] in ("own", "joined"):
                makers.setdefault(self._root(op.name), []).append(op)
        joined = [(root, op) for root, ops in makers.items() for op in ops if flows[op.name] == "joined"]
        for root, op in joined:
            if len(makers[root]) > 1 or root in map(self._root, op.inputs):
                self._fixed.add(root)
        for root, op in sorted(joined, key=lambda each: -self._graph.position[each[1].name]):
            if root in self._fixed:
                self._fixed |= set(map(self._root, op.inputs))
        return {root: op for root, op in joined if root not in self._fixed}

    def _root(self, name: str) -> str:
        while self._parent[name] != name:
            self._parent[name] = name = self._parent[self._parent[name]]
        return name

    def _join(self, first: str, second: str) -> None:
        self._parent[self._root(first)] = self._root(second)

    def _order(self, op: Op, known: dict[str, Integers]) -> Integers:
        root = self._root(op.name)
        if root not in known:
            known[root] = self._order_of(root, map_of(op.shape).channels, known)
        return known[root]

    def _order_of(self, root: str, count: int, known: dict[str, Integers]) -> Integers:
        if root in self._fixed:
            return np.arange(count)
        if root in self._joined:
            parts = [self._graph[source] for source in self._joined[root].inputs]
            starts = np.cumsum([0, *(part.shape[0] for part in parts)])
            orders = [start + self._order(part, known) for start, part in zip(starts, parts, strict=False)]
            return np.concatenate(orders)
        sets = self._sets.get(root, [])
        return np.array(sorted(range(count), key=lambda channel: (_rank(channel, sets), channel)), np.int64)

    def runs(self, value: str, lots: Sequence[Sequence[int]]) -> list[Run]:
        """The channels of a value as runs of the same lot of live ones, and of frozen ones."""
        lot = np.full(len(self.of[value]), -1)
        for number, live in enumerate(lots):
            lot[self.position[value][list(live)]] = number
        edges = [0, *(np.flatnonzero(lot[1:] != lot[:-1]) + 1).tolist(), len(lot)]
        return [(low, high, int(lot[low])) for low, high in pairwise(edges)]


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
