"""Graph and plan -> program: which steps, in which buffers, with what kept between forward and backward.

The frozen prefix runs in chains of rows. The trained part runs on whole maps: forward, with one bit per ReLU, one byte
per maximum and the inputs of live layers kept; backward in reverse, into live slices only. A gradient is a value like
any other: whoever adds to it makes a new one, in the place of the old where nothing else reads that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from math import prod
from types import MappingProxyType

from stages.artifacts.records import LayerUpdate, detached_layers
from stages.engines.native import arena
from stages.engines.native.builder import Builder, map_of, mark_of
from stages.engines.native.chains import Chain, Cuts, ring_rows
from stages.engines.native.channels import Channels
from stages.engines.native.packing import Packing
from stages.engines.native.program import Buffer, Lowering, Step
from stages.engines.native.returning import KEEP, PAGE, RECOMPUTE, Returning
from stages.engines.native.rules import Node, apply_bits, keep_bits, layer_of, lowered, plus, refused, rule_of
from stages.errors import UsageError
from stages.graphs.checking import check_updates
from stages.graphs.graph import Graph
from stages.graphs.keeping import holding, needs_of
from stages.graphs.units import BITS, Unit, units_of


class NotCovered(UsageError):
    """The native engine has no kernel for an operator."""


def uncovered(graph: Graph) -> str:
    """Why the native engine cannot run a graph: the first operator that it lacks, in words; empty where it can."""
    for op in graph.ops:
        rule = rule_of(op)
        if rule is None:
            return f"operator {op.name}: kind {op.kind!r}"
        reason = "tensors shared with another operator" if op.shares else refused(rule, op)
        if reason:
            return f"operator {op.name}: {op.kind} with {reason}"
    if len(graph[graph.output].shape) != 1:
        return f"operator {graph.output}: features of {len(graph[graph.output].shape)} axes"
    return ""


Turns = Sequence[Sequence[LayerUpdate]]
"""What of a plan trains in turn: plans of their own, which share no channel."""


def lower(
    graph: Graph,
    updates: Sequence[LayerUpdate],
    turns: Turns = (),
    *,
    keep_bits: int = 32,
    nearest: bool = False,
    how: Mapping[str, str] | None = None,
    separate: bool = False,
    chains: bool = True,
) -> Lowering:
    """The program that runs `graph` and trains what `updates` name, all of it always, or in `turns`.

    Inputs of live layers are kept in `keep_bits`, rounded by chance or to the `nearest`; `how` says what of all that
    the backward pass needs is paged or made again instead (`returning`).
    `separate` gives every buffer a place of its own and `chains=False` runs whole maps, so that tests can tell whether
    sharing memory changes anything.

    Raises:
        NotCovered: an operator has no kernel; it is named.
        DataError: the updates are not a plan for this graph.
    """
    check_covered(graph)
    if updates:
        check_updates(updates, graph)
    lowerer = Lowerer(graph, updates, turns=turns, keep_bits=keep_bits, nearest=nearest, how=how or {}, chains=chains)
    return lowerer.run(separate=separate)


def check_covered(graph: Graph) -> None:
    """Raise `NotCovered` where the native engine cannot run a graph."""
    if reason := uncovered(graph):
        where, _, what = reason.partition(": ")
        raise NotCovered(where, what, "what the native engine has", "use --engine torch")


class Lowerer:
    """Builds one program: the trained part and its backward pass first, because the prefix must fit beside them."""

    residuals = True
    """Whether layers compute the additions behind them on their way out."""

    def __init__(
        self,
        graph: Graph,
        updates: Sequence[LayerUpdate],
        *,
        turns: Turns = (),
        keep_bits: int = 32,
        nearest: bool = False,
        how: Mapping[str, str] = MappingProxyType({}),
        start: Set[str] = frozenset(),
        chains: bool = True,
    ) -> None:
        """`start`: further layers from which on the graph counts as trained, though no weight of theirs is."""
        self.graph, self.chains = graph, chains
        self.live = {update.layer: update for update in updates if update.trains}
        self.detached = detached_layers(updates)
        start = start | set(self.live)
        together = [update for turn in turns for update in turn] or self.live.values()
        channels = Channels(graph, together, lambda op: lowered(op).channels(op))
        self.builder = Builder(graph, channels, turns)
        self.trained = graph.downstream(start) & graph.upstream([graph.output])
        self.flow = graph.gradient_flow(start, self.detached)
        self.output = graph.output
        read = {source for name in self.trained for source in graph[name].inputs} - self.trained
        self.boundary = [op.name for op in graph.ops if op.name in read] if self.trained else [self.output]
        self.values: dict[str, Buffer] = {}
        self.returning = Returning(self.builder, graph, how, needs_of(graph, tuple(updates)) if how else {})
        self.packing = Packing(self.builder, keep_bits, nearest=nearest)
        # values that others are made of again are kept as they are
        held = holding(graph, tuple(updates)) if keep_bits < 32 and not how else None
        self.narrow = held.narrow if held is not None else frozenset[str]()

    def run(self, *, separate: bool = False) -> Lowering:
        """The program with its arena planned."""
        program = self.builder.program
        for name in self.boundary:
            shape = map_of(self.graph[name].shape)
            self.values[name] = self._value(name)
            program.boundary.append(self.values[name])
            program.boundary_shapes.append((shape.height, shape.width, shape.channels))
        nodes = self._trained_part()
        self._backward(nodes)
        self.builder.set_times()
        self.builder.grant()
        floor = arena.place([buffer for buffer in program.buffers if buffer.first >= 0])
        self._prefix(floor)
        program.parameters.sort(key=lambda parameter: self.graph.position[parameter.name.rpartition(".")[0]])
        program.plan_mark = mark_of(self.graph, program.parameters, program.spans)
        return self.builder.finish(separate=separate)

    def _value(self, name: str, *, over: Buffer | None = None, chained: bool = False) -> Buffer:
        return self.builder.buffer(name, prod(self.graph[name].shape), over=over, chained=chained)

    # -------------------------------------------------------------------------------------------------- trained part

    def _trained_part(self) -> list[Node]:
        program, builder = self.builder.program, self.builder
        nodes = []
        for unit in units_of(self.graph, self.trained, [self.output], residuals=self.residuals):
            node = self._node(unit, program.suffix)
            nodes.append(node)
        order = builder.channels.position[self.output]
        size = len(order)
        builder.owner = self.output
        builder.emit(
            program.suffix, "features", x=self.values[self.output][0], m=builder.indices(order), n=size, ci=size,
            co=size, ldx=size, ldy=size, hi=1, wi=1, ho=1, wo=1,
        )  # fmt: skip
        return nodes

    def _node(self, unit: Unit, into: list[Step]) -> Node:
        op, rule = unit.op, lowered(unit.op)
        self.builder.owner = op.name
        inputs = [self.values[name] for name in op.inputs]
        layer = layer_of(self.builder, op, self.live.get(op.name)) if op.is_layer else None
        residual = self.values.get(unit.residual)
        y = self._value(unit.out, over=inputs[0] if lowered(op).in_place(op) else residual)
        node = Node(unit, inputs, y, layer, residual)
        node.pulls = unit.out in self.flow and op.name not in self.detached and not self.flow.isdisjoint(op.inputs)
        rule.forward(self.builder, node, into)
        self.values[unit.out] = y
        return node

    def _backward(self, nodes: Sequence[Node]) -> None:
        if not self.flow:
            return
        program, builder = self.builder.program, self.builder
        bits: dict[str, Buffer] = {}
        slices: dict[str, tuple[Buffer, int]] = {}
        self._saves(nodes, bits, slices)
        size = prod(self.graph[self.output].shape)
        gradient = builder.buffer(f"gradient {self.output}", size)
        order = builder.channels.position[self.output]
        builder.owner = self.output
        builder.emit(
            program.backward, "gradient", y=gradient[0], m=builder.indices(order), n=size, ci=size, co=size, ldx=size,
            ldy=size, hi=1, wi=1, ho=1, wo=1,
        )  # fmt: skip
        pending = {self.output: gradient}
        for node in reversed(nodes):
            g = pending.pop(node.unit.out, None)
            if g is not None:
                builder.owner = node.op.name
                node = self.returning.node(node, nodes, program.backward)
                self.pull(node, g, pending, bits, slices)

    def _saves(self, nodes: Sequence[Node], bits: dict[str, Buffer], slices: dict[str, tuple[Buffer, int]]) -> None:
        """Insert the steps that keep what the backward pass needs, each right behind the step that makes it."""
        program = self.builder.program
        forward, program.suffix = program.suffix, []
        ends = {id(node.y): node for node in nodes}
        last_write: dict[int, int] = {}
        for number, step in enumerate(forward):
            target = step.words.get("y")
            if target is not None and not isinstance(target, int) and target.buffer is not None:
                last_write[id(target.buffer)] = number
        for name, entering in zip(self.boundary, program.boundary, strict=True):
            if self.returning.way(name) == PAGE:
                self.returning.page_out(name, entering, program.suffix)
        for number, step in enumerate(forward):
            program.suffix.append(step)
            target = step.words.get("y")
            buffer = None if target is None or isinstance(target, int) else target.buffer
            if buffer is None or id(buffer) not in ends or last_write[id(buffer)] != number:
                continue
            node = ends[id(buffer)]
            if self.returning.way(node.unit.out) == PAGE:
                self.returning.page_out(node.unit.out, node.y, program.suffix)
            if node.unit.out not in self.flow:
                continue
            self.builder.owner = node.op.name
            self._save_input(node, slices, program.suffix)
            if activation := self.bits_of(node.unit):
                bits[node.unit.out] = keep_bits(self.builder, activation, node.unit.out, node.y, program.suffix)

    def _save_input(self, node: Node, slices: dict[str, tuple[Buffer, int]], into: list[Step]) -> None:
        """Keep what the layer's weight gradient needs of its input, where it is not made again."""
        name, update = node.op.name, None if node.layer is None else node.layer.update
        sliced = f"slice {name}"
        if node.layer is None or update is None or self.returning.way(sliced) == RECOMPUTE:
            return
        value = self.graph.root(node.op.inputs[0])
        if (kept := node.layer.saves(node.inputs[0], into)) is None:
            return
        slices[name] = kept
        if kept[0].name == sliced:  # some of the channels, copied
            value = sliced
        if self.returning.way(value) == PAGE and value == sliced:
            self.returning.page_out(sliced, kept[0], into)
        elif self.returning.way(value) == KEEP and (value == sliced or value in self.narrow):
            self.packing.pack(kept[0], into)

    def _input_of(
        self, node: Node, slices: dict[str, tuple[Buffer, int]], into: list[Step]
    ) -> tuple[Buffer, int] | None:
        """What the layer's weight gradient reads of its input, come back from where it was kept."""
        assert node.layer is not None
        name, value = f"slice {node.op.name}", self.graph.root(node.op.inputs[0])
        kept = slices.get(node.op.name)
        sliced = kept is not None and kept[0].name == name
        returned = kept is not None and not sliced and self.returning.way(value) != KEEP
        if self.returning.way(name) == RECOMPUTE or returned:
            node.layer.read_again(node.inputs[0], into)
            return node.layer.saves(node.inputs[0], into)
        if kept is None:
            return None
        if self.returning.way(name) == PAGE:
            return self.returning.page_in(name, into), kept[1]
        return self.packing.unpacked(kept[0], into), kept[1]

    def bits_of(self, unit: Unit) -> str:
        """The activation whose bits a unit keeps for the backward pass, or none."""
        return activation_of(unit)

    def pull(
        self,
        node: Node,
        g: Buffer,
        pending: dict[str, Buffer],
        bits: dict[str, Buffer],
        slices: dict[str, tuple[Buffer, int]],
    ) -> None:
        """Backward through one unit."""
        into, unit, op = self.builder.program.backward, node.unit, node.op
        if unit.out in bits:
            g = apply_bits(self.builder, activation_of(unit), unit.out, bits[unit.out], g, into)
        if unit.residual in self.flow:
            shape = self.graph[unit.residual].shape
            pending[unit.residual] = plus(self.builder, unit.residual, shape, g, pending.get(unit.residual), into)
        if node.pulls:
            for which, name in enumerate(op.inputs):
                if name in self.flow:
                    rule = lowered(op)
                    pending[name] = rule.backward(self.builder, node, which, g, pending.get(name), into)
        if node.layer is not None and node.layer.update is not None:
            node.layer.live_gradients(self._input_of(node, slices, into), g, into)

    # -------------------------------------------------------------------------------------------------------- prefix

    def _prefix(self, floor: int) -> None:
        units = units_of(self.graph, self.graph.upstream(self.boundary), self.boundary)
        cuts = Cuts(self.graph, units, self.boundary, floor)
        plan = cuts.best() if self.chains else [Chain(i, i, over=False) for i in range(len(units))]
        for chain in plan:
            self._chain(units[chain.first : chain.last + 1], over=chain.over)

    def _chain(self, units: Sequence[Unit], *, over: bool) -> None:
        into, builder = self.builder.program.prefix, self.builder
        builder.owner = units[-1].op.name
        if len(units) > 1:
            builder.emit(into, "chain", n=len(units), ci=1, ldx=1, ldy=1, hi=1, wi=1, ho=1, wo=1)
        source = self.values[units[0].op.inputs[0]] if units[0].op.inputs else None
        rows = 0
        for number, unit in enumerate(units):
            last = number + 1 == len(units)
            inputs = [self.values[name] for name in unit.op.inputs]
            builder.owner = unit.op.name
            if last and len(units) > 1:
                y = self._made(unit.out, over=source if over else None, chained=True)
            elif last:
                y = self._made(unit.out, over=inputs[0] if lowered(unit.op).in_place(unit.op) else None)
            else:
                held = ring_rows(unit, units[number + 1])
                shape = map_of(self.graph[unit.out].shape)
                y = builder.buffer(f"ring {unit.out}", held * shape.width * shape.channels)
            layer = layer_of(builder, unit.op, None) if unit.op.is_layer else None
            lowered(unit.op).forward(builder, Node(unit, inputs, y, layer, self.values.get(unit.residual)), into)
            if rows:
                into[-1].words["xr"] = rows
            rows = 0 if last else ring_rows(unit, units[number + 1])
            if rows:
                into[-1].words["yr"] = rows
            self.values[unit.out] = y

    def _made(self, name: str, *, over: Buffer | None, chained: bool = False) -> Buffer:
        """The buffer of a prefix value: the boundary's are there already."""
        if name not in self.boundary:
            return self._value(name, over=over, chained=chained)
        buffer = self.values[name]
        if over is not None:
            self.builder.wish(buffer, over, chained=chained)
        return buffer


def activation_of(unit: Unit) -> str:
    """The activation whose bits the unit keeps, or none: that behind the addition where there is one."""
    if unit.residual:
        return unit.act2
    return unit.act or (unit.op.kind if unit.op.kind in BITS else "")
