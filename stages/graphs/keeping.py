"""What training a plan keeps between the forward and the backward pass: the one rule that engines and costs follow.

Kept, and nothing else:

* what each operator's own rule asks for where gradients flow through it (`Operator.keeps`): bits, an index, or whole
  values, the latter once however many operators ask for the same one;
* a live layer's input: whole where output channels are live, the live channels where input channels are live or the
  layer is depthwise;
* never a constant, and never a view: the value it is a view of;
* never what a cheap opaque function makes of values that are kept (`Operator.made_again`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from stages.artifacts.records import LayerUpdate, detached_layers
from stages.graphs.graph import Graph
from stages.operators import Op
from stages.operators.op import ELEMENT_BYTES, Keep


@dataclass(frozen=True, slots=True)
class Holding:
    """What is kept, by name."""

    values: frozenset[str]
    """Operators whose outputs are kept whole."""
    own: Mapping[str, Keep]
    """Operators that keep bits or an index of their own."""
    slices: Mapping[str, int]
    """Operators of live layers of whose input some channels are kept, and how many."""
    narrow: frozenset[str] = frozenset()
    """Of the values those that only weight gradients need: they and the slices may be kept in fewer bits."""


def holding(graph: Graph, updates: Sequence[LayerUpdate]) -> Holding:
    """What training these updates keeps."""
    live, ends = {update.layer for update in updates if update.trains}, detached_layers(updates)
    flow = graph.gradient_flow(live, ends)
    values, own = flow_holds(graph, flow, ends)
    slices: dict[str, int] = {}
    for update in updates:
        for op in graph.uses(update.layer):
            whole, channels = layer_holds(graph, op, update)
            values |= whole
            slices |= {op.name: channels} if channels else {}
    passing = flow_holds(graph, flow, ends)[0]
    kept = without_remade(graph, values)
    return Holding(kept, own, slices, frozenset(kept - passing))


class Needs(NamedTuple):
    """What one operator's backward pass reads of the forward pass, bits and indices of its own aside."""

    values: frozenset[str]
    """Whole values, by the name of what they are views of."""
    channels: int
    """Of its first input so many channels alone; 0 for none."""


def needs_of(graph: Graph, updates: Sequence[LayerUpdate]) -> dict[str, Needs]:
    """What each operator's backward pass reads when these updates train; none that read nothing."""
    live, ends = {update.layer: update for update in updates if update.trains}, detached_layers(updates)
    flow, found = graph.gradient_flow(set(live), ends), {}
    for op in graph.ops:
        wanted = graph.wanted(op, flow, ends)
        values = kept_values(graph, op, op.operator.keeps(op, wanted)) if wanted else set()
        channels = 0
        if op.name in flow and op.owner in live:
            whole, channels = layer_holds(graph, op, live[op.owner])
            values = values | whole
        if values or channels:
            found[op.name] = Needs(frozenset(values), channels)
    return found


def without_remade(graph: Graph, values: Set[str]) -> frozenset[str]:
    """Whole values without those that a cheap operator makes again from others that are kept."""
    at_hand = values | graph.constants

    def again(name: str) -> bool:
        op = graph[name]
        return op.operator.made_again(op) and all(graph.root(source) in at_hand for source in op.inputs)

    return frozenset(name for name in values if not again(name))


def flow_holds(graph: Graph, flow: Set[str], detached: Set[str]) -> tuple[set[str], dict[str, Keep]]:
    """What the operators that gradients flow through keep: whole values, and what is an operator's own."""
    values: set[str] = set()
    own: dict[str, Keep] = {}
    for op in graph.ops:
        wanted = graph.wanted(op, flow, detached)
        if not wanted:
            continue
        keep = op.operator.keeps(op, wanted)
        values |= kept_values(graph, op, keep)
        if keep.bits or keep.index_bytes:
            own[op.name] = keep
    return values, own


def kept_values(graph: Graph, op: Op, keep: Keep) -> set[str]:
    """The whole values that an operator keeps, by the name of what they are views of."""
    named = {op.inputs[i] for i in keep.inputs} | ({op.name} if keep.output else set())
    return {graph.root(name) for name in named} - graph.constants


def layer_holds(graph: Graph, op: Op, update: LayerUpdate) -> tuple[set[str], int]:
    """What one use of a live layer keeps of its input: the whole value, or so many of its channels; biases nothing."""
    if not update.channels:
        return set(), 0
    if (op.is_depthwise or update.axis == "input") and len(update.channels) < update.axis_channels:
        return set(), len(update.channels)
    return {graph.root(op.inputs[0])} - graph.constants, 0


KEEP_BITS = (32, 16, 8)
"""Widths in which inputs of live layers may be kept: as they are, or as steps between their least and largest value."""
RANGE_BYTES = 8
"""What a sample's values in fewer bits need beside them: the least value and the step."""


def stored_bytes(elements: int, batch: int, bits: int = 32) -> int:
    """Bytes of so many elements of each sample."""
    if bits == 32:
        return ELEMENT_BYTES * batch * elements
    return batch * (-(-elements * bits // 8) + RANGE_BYTES)


def value_bytes(graph: Graph, name: str, batch: int, bits: int = 32) -> int:
    """Bytes of a whole value of a batch."""
    return stored_bytes(graph[name].elements, batch, bits)


def slice_bytes(op: Op, channels: int, batch: int, bits: int = 32) -> int:
    """Bytes of some channels of a layer's input."""
    return stored_bytes(channels * (prod(op.in_shape) // op.in_channels), batch, bits)


def held_bytes(graph: Graph, held: Holding, batch: int, bits: int = 32) -> int:
    """Bytes of all that is kept of a batch, inputs of live layers in so many bits."""
    values = sum(value_bytes(graph, name, batch, bits if name in held.narrow else 32) for name in held.values)
    own = sum(keep.own_bytes(graph[name], batch) for name, keep in held.own.items())
    return values + own + sum(slice_bytes(graph[name], count, batch, bits) for name, count in held.slices.items())
