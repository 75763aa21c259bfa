"""What runs as one: an operator with the activation and the addition that are fused behind it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from stages.graphs.graph import Graph
from stages.operators import Op
from stages.operators.recurrent import GATES

BITS = ("relu", "relu6")
"""Activations that a layer computes on its way out, and that keep one bit per value."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One operator, and what is fused behind it: `act`, then the addition of `residual`, then `act2`."""

    op: Op
    out: str
    """Name of the value it makes."""
    act: str = ""
    residual: str = ""
    act2: str = ""


def units_of(
    graph: Graph, names: Collection[str], keep: Collection[str], *, residuals: bool = True
) -> tuple[Unit, ...]:
    """The operators `names` in execution order, fused where nothing else reads what lies between.

    Values named in `keep` are made as they are; without `residuals` no addition is fused.
    """
    gone: set[str] = set()
    units = []
    for op in graph.ops:
        if op.name not in names or op.name in gone:
            continue
        fuses = op.is_layer and op.kind not in GATES
        unit = _fused(graph, op, names, keep, residuals) if fuses else Unit(op, op.name)
        gone |= _between(graph, unit)
        units.append(unit)
    return tuple(units)


def _fused(graph: Graph, op: Op, names: Collection[str], keep: Collection[str], residuals: bool) -> Unit:
    reader = _only_reader(graph, op.name, names, keep)
    if reader is None:
        return Unit(op, op.name)
    if reader.kind in BITS:
        return Unit(op, reader.name, act=reader.kind)
    if reader.kind != "add" or op.is_depthwise or not residuals:
        return Unit(op, op.name)
    (other,) = [name for name in reader.inputs if name != op.name]
    if graph.position[other] > graph.position[op.name] or graph[other].shape != op.shape:
        return Unit(op, op.name)
    last = _only_reader(graph, reader.name, names, keep)
    if last is not None and last.kind in BITS:
        return Unit(op, last.name, residual=other, act2=last.kind)
    return Unit(op, reader.name, residual=other)


def _only_reader(graph: Graph, name: str, names: Collection[str], keep: Collection[str]) -> Op | None:
    readers = graph.consumers[name]
    return graph[readers[0]] if len(readers) == 1 and readers[0] in names and name not in keep else None


def _between(graph: Graph, unit: Unit) -> set[str]:
    """The operators behind the unit's own that it computes too."""
    found: set[str] = set()
    name = unit.out
    while name != unit.op.name:
        found.add(name)
        op = graph[name]
        name = next(source for source in op.inputs if source != unit.residual)
    return found
