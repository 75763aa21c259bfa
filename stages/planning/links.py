"""The trained part of a graph as links of a chain: what a schedule of memory chooses for.

A link is what runs as one (`graphs.units`), or several such where more than two values cross from one to the next:
those are kept, or run again, together. On residual chains every unit is a link of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.artifacts.records import LayerUpdate, detached_layers
from stages.graphs.graph import Graph
from stages.graphs.keeping import Needs, holding, needs_of, slice_bytes, value_bytes
from stages.graphs.units import units_of
from stages.operators.op import ELEMENT_BYTES

CROSSING = 2
"""Most values that may cross from one link to the next: the running one and an addition's other source."""


@dataclass(frozen=True, slots=True)
class Link:
    """Operators that are kept, or run again, together."""

    name: str
    """Of its last operator."""
    ops: tuple[str, ...]
    """In execution order."""
    reads: tuple[str, ...]
    """Values made before it that its forward pass reads."""
    crossing: tuple[str, ...]
    """Values that later links read, once it has run."""
    items: tuple[str, ...]
    """What its backward pass needs of the forward pass: values by name, and `slice <operator>`."""
    makes: frozenset[str]
    """Values and slices that it makes."""
    own_bytes: int
    """Bits and indices, which are always kept."""
    forward_bytes: int
    """Its inputs and outputs."""
    gradient_bytes: int
    """Gradients of its inputs and of what crosses behind it, as far as they are needed."""
    pending_bytes: int
    """Of the latter alone: what waits while values are made again before its backward pass."""


@dataclass(frozen=True)
class Chain:
    """What a schedule is made for."""

    links: tuple[Link, ...]
    sizes: Mapping[str, int]
    """Bytes of every value and slice, as it would be kept for one sample."""
    whole: Mapping[str, int]
    """Bytes of the values while they are worked with: float32."""
    before: tuple[str, ...]
    """Values that enter the trained part."""
    floor_bytes: int
    """What running the frozen part takes: no schedule needs less."""


def chain_of(graph: Graph, updates: Sequence[LayerUpdate], keep_bits: int = 32) -> Chain:
    """The links of what trains when `updates` do, per sample; slices of inputs are kept in `keep_bits`."""
    updates = tuple(updates)
    live, ends = {update.layer for update in updates if update.trains}, detached_layers(updates)
    trained = graph.made_with(graph.downstream(graph.computed_by(live))) & graph.upstream([graph.output])
    flow, held = graph.gradient_flow(live, ends), holding(graph, updates)
    needs = needs_of(graph, updates)
    groups = _groups(graph, trained)
    links = tuple(_link(graph, group, trained, flow, needs, held.own) for group in groups)
    sizes: dict[str, int] = {}
    whole: dict[str, int] = {}
    for op in graph.ops:
        whole[op.name] = value_bytes(graph, op.name, 1)
        sizes[op.name] = whole[op.name]  # values that others may be made of again are kept as they are
    for name, channels in held.slices.items():
        sizes[f"slice {name}"] = slice_bytes(graph[name], channels, 1, keep_bits)
        whole[f"slice {name}"] = slice_bytes(graph[name], channels, 1)
    frozen = [op for op in graph.ops if op.name not in trained and op.inputs]
    floor = max((ELEMENT_BYTES * (sum(graph[s].elements for s in op.inputs) + op.elements) for op in frozen), default=0)
    before = graph.boundary(trained)
    return Chain(links, sizes, whole, before, floor)


def _groups(graph: Graph, trained: frozenset[str]) -> list[list[str]]:
    """The trained operators, divided wherever at most `CROSSING` values cross and no unit is cut."""
    order = [op.name for op in graph.ops if op.name in trained]
    place = {name: number for number, name in enumerate(order)}
    ends = set()
    for unit in units_of(graph, trained, [graph.output]):
        ends.add(place[unit.out])
    inside = set()  # places behind which a unit goes on
    for unit in units_of(graph, trained, [graph.output]):
        inside |= set(range(place[unit.op.name], place[unit.out]))
    groups: list[list[str]] = [[]]
    for number, name in enumerate(order):
        groups[-1].append(name)
        crossing = {
            graph.root(source)
            for later in order[number + 1 :]
            for source in graph[later].inputs
            if graph.root(source) not in graph.constants and place.get(source, -1) <= number
        }
        made_here = {value for value in crossing if value in place}
        if number not in inside and len(crossing) <= CROSSING and (made_here or not crossing):
            groups.append([])
    return [group for group in groups if group]


def _link(
    graph: Graph,
    group: Sequence[str],
    trained: frozenset[str],
    flow: frozenset[str],
    needs: Mapping[str, Needs],
    own: Mapping[str, object],
) -> Link:
    mine = set(group)
    last = graph.position[group[-1]]
    reads = dict.fromkeys(
        graph.root(source)
        for name in group
        for source in graph[name].inputs
        if source not in mine and graph.root(source) not in mine and graph.root(source) not in graph.constants
    )
    crossing = dict.fromkeys(
        graph.root(source)
        for op in graph.ops[last + 1 :]
        if op.name in trained
        for source in op.inputs
        if graph.position[graph.root(source)] <= last and graph.root(source) not in graph.constants
    )
    items: dict[str, None] = {}
    own_bytes = 0
    for name in group:
        need = needs.get(name)
        if need is not None:
            items |= dict.fromkeys(sorted(need.values))
            items |= {f"slice {name}": None} if need.channels else {}
        if name in own:
            own_bytes += own[name].own_bytes(graph[name], 1)  # type: ignore[attr-defined]
    makes = frozenset({*mine, *(item for item in items if item.startswith("slice "))})
    outs = [name for name in crossing if name in mine] or [group[-1]]
    touched = {*reads, *outs}
    gradients = {name for name in {*reads, *crossing, *outs} if name in flow or _in_flow(graph, name, flow)}
    return Link(
        group[-1], tuple(group), tuple(reads), tuple(crossing), tuple(items), makes,
        own_bytes,
        ELEMENT_BYTES * sum(graph[name].elements for name in touched),
        ELEMENT_BYTES * sum(graph[name].elements for name in gradients),
        ELEMENT_BYTES * sum(graph[name].elements for name in gradients & {*crossing, *outs}),
    )  # fmt: skip


def _in_flow(graph: Graph, name: str, flow: frozenset[str]) -> bool:
    """Whether a view of the value gets a gradient."""
    return any(reader in flow and graph[reader].operator.view for reader in graph.consumers[name])
