"""A backbone as plain values: operators in execution order, and every walk over them.

A `Graph` holds no tensors and needs no torch, so planning and cost rules are integer arithmetic over it. Tensors live
beside it, in a mapping keyed `<operator>.<what>`: `stem.weight`, `stem.bias`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from stages.errors import DataError
from stages.operators import Op, Shape


@dataclass(frozen=True)
class Graph:
    """A backbone as a list of operators in execution order; the last one's output is the feature vector (D,)."""

    ops: tuple[Op, ...]
    blocks: tuple[str, ...] = ()
    """Names of the model's blocks in order (`blocks.00`, ...); `Op.block` indexes it."""
    by_name: Mapping[str, Op] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {op.name: op for op in self.ops})

    def __getitem__(self, name: str) -> Op:
        return self.by_name[name]

    # -------------------------------------------------------------------------------------------------------- values

    @cached_property
    def layers(self) -> tuple[Op, ...]:
        """What a plan may train, in execution order; a layer that is called more than once stands here once."""
        return tuple(op for op in self.ops if op.is_layer and not op.shares)

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Execution position of each operator."""
        return {op.name: i for i, op in enumerate(self.ops)}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the operators that read each operator's output."""
        readers: dict[str, list[str]] = {op.name: [] for op in self.ops}
        for op in self.ops:
            for source in op.inputs:
                readers[source].append(op.name)
        return {name: tuple(names) for name, names in readers.items()}

    @cached_property
    def _uses(self) -> Mapping[str, tuple[Op, ...]]:
        found: dict[str, list[Op]] = {}
        for op in self.ops:
            found.setdefault(op.owner, []).append(op)
        return {name: tuple(ops) for name, ops in found.items()}

    def uses(self, layer: str) -> tuple[Op, ...]:
        """The operators that compute with a layer's tensors: itself, and those that share them."""
        return self._uses[layer]

    @cached_property
    def constants(self) -> frozenset[str]:
        """Values that depend on no input."""
        return frozenset(op.name for op in self.ops[1:] if not op.inputs)

    @property
    def input_shape(self) -> Shape:
        return self.ops[0].shape

    @property
    def output(self) -> str:
        """Name of the features."""
        return self.ops[-1].name

    @property
    def feature_dim(self) -> int:
        """Length of the feature vector."""
        return prod(self.ops[-1].shape)

    def check_input(self, shape: Sequence[int]) -> None:
        """Raise `DataError` unless a batch of this shape (N, *input_shape) fits."""
        if tuple(shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise DataError("model input", f"shape {tuple(shape)}", f"(N, {expected})")

    # --------------------------------------------------------------------------------------------------------- walks

    def downstream(self, names: Set[str]) -> frozenset[str]:
        """The named operators and everything computed from them: what must run with gradients when they train."""
        reached: set[str] = set()
        for op in self.ops:
            if op.name in names or not reached.isdisjoint(op.inputs):
                reached.add(op.name)
        return frozenset(reached)

    def upstream(self, names: Collection[str]) -> frozenset[str]:
        """The named operators and all that they are computed from."""
        found = set(names)
        for op in reversed(self.ops):
            if op.name in found:
                found.update(op.inputs)
        return frozenset(found)

    def upstream_until(self, names: Collection[str], known: Collection[str]) -> tuple[Op, ...]:
        """What must run to compute the named values from known ones, in execution order."""
        found: set[str] = set()
        waiting = [name for name in names if name not in known]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += [source for source in self.by_name[name].inputs if source not in known]
        return tuple(sorted((self.by_name[name] for name in found), key=lambda op: self.position[op.name]))

    def computed_by(self, layers: Collection[str]) -> frozenset[str]:
        """The operators that use these layers' tensors."""
        return frozenset(op.name for layer in layers for op in self._uses.get(layer, ()))

    def gradient_flow(self, live: Set[str], detached: Set[str] = frozenset()) -> frozenset[str]:
        """The operators at whose outputs a gradient is needed when the layers `live` train.

        They lie between a live layer and the output along paths that no layer in `detached` interrupts: those pass
        nothing on to their inputs.
        """
        starts = self.computed_by(live)
        needed: set[str] = set()
        for op in self.ops:
            if op.name in starts or (op.owner not in detached and not needed.isdisjoint(op.inputs)):
                needed.add(op.name)
        return frozenset(needed & self._heard(frozenset(detached)))

    def _heard(self, detached: frozenset[str]) -> set[str]:
        """Operators that a gradient of the output can come back to."""
        heard = {self.output}
        for op in reversed(self.ops):
            if op.name in heard and op.owner not in detached:
                heard.update(op.inputs)
        return heard

    def wanted(self, op: Op, flow: Set[str], detached: Set[str] = frozenset()) -> frozenset[int]:
        """Which of an operator's inputs get a gradient from it."""
        if op.name not in flow or op.owner in detached:
            return frozenset()
        return frozenset(i for i, source in enumerate(op.inputs) if source in flow)

    def root(self, name: str) -> str:
        """The value that a value is another view of; the value itself where it is none."""
        while self.by_name[name].operator.view:
            name = self.by_name[name].inputs[0]
        return name

    def made_with(self, names: Set[str]) -> frozenset[str]:
        """The named operators, with the constants and views that they read: those are made anew beside them.

        So what is kept or cached of the inputs is the value before a view, which others share, and no constant.
        """
        found = set(names)
        for op in reversed(self.ops):
            if (op.operator.view or op.name in self.constants) and not found.isdisjoint(self.consumers[op.name]):
                found.add(op.name)
        return frozenset(found)

    def boundary(self, names: Set[str]) -> tuple[str, ...]:
        """The values that enter the operators `names` from outside, in execution order."""
        sources = {source for name in names for source in self.by_name[name].inputs} - names
        return tuple(op.name for op in self.ops if op.name in sources)


def last_readers(ops: Iterable[Op], keep: Collection[str] = ()) -> tuple[tuple[str, ...], ...]:
    """For each operator the values that nothing reads after it, those in `keep` aside."""
    ops = tuple(ops)
    last = {source: i for i, op in enumerate(ops) for source in op.inputs}
    return tuple(
        tuple(source for source in dict.fromkeys(op.inputs) if last[source] == i and source not in keep)
        for i, op in enumerate(ops)
    )


def needed(ops: Sequence[Op], outputs: Collection[str]) -> tuple[Op, ...]:
    """The input and the operators that the outputs depend on, in order."""
    wanted = {*outputs, ops[0].name}
    for op in reversed(ops):
        if op.name in wanted:
            wanted.update(op.inputs)
    return tuple(op for op in ops if op.name in wanted)
