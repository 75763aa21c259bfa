"""What comes back for the backward pass: values that are kept as they are, made again, or paged in.

A value that is made again is so when the first backward pass that needs it is about to run: with it whatever lies
between it and what is stored, so that each is made once. The steps are those of the forward pass, with the weights as
they were: the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from stages.engines.native.builder import Builder
from stages.engines.native.program import Buffer, Ref, Step
from stages.engines.native.rules import Node, lowered
from stages.graphs.graph import Graph
from stages.graphs.keeping import Needs

KEEP, PAGE, RECOMPUTE = "keep", "page", "recompute"


class Returning:
    """Brings values back by a schedule: value, or `slice <operator>` -> keep, page or recompute."""

    def __init__(self, builder: Builder, graph: Graph, how: Mapping[str, str], needs: Mapping[str, Needs]) -> None:
        self._builder, self._graph, self._how, self._needs = builder, graph, how, needs
        items = {value for need in needs.values() for value in need.values}
        self._stored = {name for name in {*items, *how} if how.get(name, KEEP) != RECOMPUTE}
        self._nodes: dict[str, Node] = {}
        """By the value that it makes, as it was made last."""
        self._buffers: dict[str, Buffer] = {}
        """Values that have come back."""
        self._pages: dict[str, tuple[Buffer, int]] = {}
        """What was paged out: the buffer, and its place."""

    def way(self, name: str) -> str:
        """What becomes of a value or slice."""
        return self._how.get(name, KEEP)

    def page_out(self, name: str, value: Buffer, into: list[Step]) -> None:
        """Put a value where the caller holds it."""
        at = self._builder.program.page_floats
        self._builder.program.page_floats += value.floats
        self._pages[name] = value, at
        self._builder.emit(into, "page_out", **_ones(), x=value[0], n=value.floats, a0=at, flags=1)

    def page_in(self, name: str, into: list[Step]) -> Buffer:
        """A paged value, in memory again."""
        value, at = self._pages[name]
        made = self._builder.buffer(f"{value.name} from its page", value.floats)
        self._builder.emit(into, "page_in", **_ones(), y=made[0], n=value.floats, a0=at)
        return made

    def node(self, node: Node, nodes: Sequence[Node], into: list[Step]) -> Node:
        """A unit as its backward pass may read it: what it needs has come back."""
        if not self._how:
            return node
        self._known(nodes)
        node = self._nodes[node.unit.out]
        need = self._needs.get(node.op.name)
        if need is None:
            return node
        again = self._how.get(f"slice {node.op.name}") == RECOMPUTE
        names = [name for name in (*node.op.inputs, node.unit.out) if self._graph.root(name) in need.values]
        if again:
            names.append(node.op.inputs[0])
        for name in dict.fromkeys(names):
            self._bring(name, nodes, into)
        node = self._nodes[node.unit.out]  # it may have run again itself
        inputs = [self._buffers.get(name, x) for name, x in zip(node.op.inputs, node.inputs, strict=True)]
        y = self._buffers.get(node.unit.out, node.y) if node.unit.out in names else node.y
        return replace(node, inputs=inputs, y=y)

    def _known(self, nodes: Sequence[Node]) -> None:
        if not self._nodes:
            self._nodes = {node.unit.out: node for node in nodes}

    def _bring(self, name: str, nodes: Sequence[Node], into: list[Step]) -> None:
        """Make sure that a value is at hand."""
        way, root = self.way(self._graph.root(name)), self._graph.root(name)
        if name in self._buffers or way == KEEP:
            return
        if way == PAGE and name == root:
            self._buffers[name] = self.page_in(name, into)
            return
        missing = {op.name for op in self._graph.upstream_until([name], self._stored | set(self._buffers))}
        for node in nodes:
            unit = node.unit
            if unit.out not in missing and unit.op.name not in missing:
                continue
            for source in (*unit.op.inputs, *([unit.residual] if unit.residual else [])):
                if self.way(source) == PAGE and source not in self._buffers:
                    self._buffers[source] = self.page_in(source, into)
            self._run_again(node, into)

    def _run_again(self, node: Node, into: list[Step]) -> None:
        unit, builder = node.unit, self._builder
        if unit.out in self._buffers:
            return
        owner, builder.owner = builder.owner, unit.op.name
        inputs = [self._buffers.get(name, x) for name, x in zip(unit.op.inputs, node.inputs, strict=True)]
        residual = self._buffers.get(unit.residual, node.residual) if unit.residual else None
        y = builder.buffer(f"{unit.out} again", node.y.floats)
        made = Node(unit, inputs, y, node.layer, residual, node.pulls)
        lowered(unit.op).forward(builder, made, into)
        builder.owner = owner
        self._nodes[unit.out], self._buffers[unit.out] = made, y


def _ones() -> dict[str, int | Ref]:
    return dict.fromkeys(("ci", "co", "ldx", "ldy", "hi", "wi", "ho", "wo"), 1)
