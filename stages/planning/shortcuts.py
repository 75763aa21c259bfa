"""Shortcut back-propagation: in residual blocks the gradient takes the shortcut.

A block adds its input to what its layers make of it. The exact gradient of that input is the sum of two: the one that
comes straight through the addition, and the one through the layers, which costs the input gradient of each of them.
With the first layer of every residual branch *detached* only the former is left: a block in which nothing trains costs
nothing to pass, and a live layer costs no more than the way from it to the end of its own block. The same compute
budget then reaches blocks that exact back-propagation cannot afford.

The gradient is no longer that of the loss, but that of the loss with the detached layers' inputs held fixed; what it
costs in accuracy and what the depth gains was measured: docs/results/tinytrain_accuracy.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace

from stages.artifacts.records import LayerUpdate
from stages.graphs.graph import Graph


def residual_entries(graph: Graph) -> frozenset[str]:
    """The layers with which residual branches begin: additions whose one input feeds the other through layers.

    A normalisation without weights in front of them belongs to the branch: in a transformer it is the norm's scale.
    """
    found: set[str] = set()
    for op in graph.ops:
        if op.operator.joins == "sum":
            for short, long in (op.inputs, op.inputs[::-1]):
                found |= _branch_entries(graph, short, long)
    return frozenset(found)


def _branch_entries(graph: Graph, short: str, long: str) -> set[str]:
    """The first layers on every way from the value `short` to `long`; none where a way has no layer, or where the
    branch does not begin at `short` alone."""
    inside, entries, open_ends = {long}, set(), [long]
    while open_ends:
        op = graph[open_ends.pop()]
        if not op.inputs and op.name not in graph.constants:
            return set()
        for source in op.inputs:
            if source == short:
                entries.add(op.name)
            elif source not in inside:
                inside.add(source)
                open_ends.append(source)
    found: set[str] = set()
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if graph[name].is_layer:
            found.add(name)
        elif name == long:
            return set()
        else:
            waiting += [reader for reader in graph.consumers[name] if reader in inside]
    return found


def with_detached(graph: Graph, updates: Iterable[LayerUpdate], layers: Set[str]) -> tuple[LayerUpdate, ...]:
    """The updates, with those of `layers` detached that lie behind something live; in execution order."""
    rows = {update.layer: update for update in updates}
    behind = graph.downstream({name for name, update in rows.items() if update.trains})
    for name in layers:
        op = graph[name]
        if name in rows:
            rows[name] = replace(rows[name], detached=True)
        elif not behind.isdisjoint(op.inputs):
            rows[name] = LayerUpdate(name, "output", (), op.out_channels, detached=True)
    return tuple(sorted(rows.values(), key=lambda update: graph.position[update.layer]))
