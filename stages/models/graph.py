"""The layer list that every stage shares: what a model computes, as plain values with stable names.

A `Graph` is the traced form of a backbone: operators in execution order, each with its per-sample shapes. It holds no
tensors and needs no torch, so planning and cost rules are integer arithmetic over it. Weights live beside it, in a
mapping keyed `<layer>.weight` and `<layer>.bias`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from stages.errors import DataError

Shape = tuple[int, ...]

KINDS = frozenset(
    {
        "input",
        "conv",
        "linear",
        "batchnorm",
        "relu",
        "relu6",
        "add",
        "concat",
        "flatten",
        "max_pool",
        "avg_pool",
        "global_pool",
    }
)
"""Every operator kind a graph may hold. `batchnorm` is folded away in deploy form."""

WEIGHTED = frozenset({"conv", "linear"})
"""The kinds that count as *layers*: they have weights, MACs and a stable name."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operator. Shapes are per sample (no batch dimension); `kernel` and friends have an entry per spatial axis."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: Shape
    """Output shape: (C, H, W), (C, T) or (D,)."""
    in_shape: Shape = ()
    """Shape of the first input."""
    kernel: Shape = ()
    stride: Shape = ()
    padding: Shape = ()
    dilation: Shape = ()
    groups: int = 1
    bias: bool = False
    ceil_mode: bool = False
    count_include_pad: bool = True
    block: int = -1
    """Index into `Graph.blocks`; -1 for operators outside every block (input, mix, pooling)."""

    @property
    def in_channels(self) -> int:
        return self.in_shape[0]

    @property
    def out_channels(self) -> int:
        return self.shape[0]

    @property
    def is_layer(self) -> bool:
        return self.kind in WEIGHTED

    @property
    def is_depthwise(self) -> bool:
        """One input channel and one output channel per group."""
        return self.kind == "conv" and self.groups > 1 and self.groups == self.in_channels == self.out_channels

    @property
    def weight_shape(self) -> Shape:
        """Shape of the weight tensor, torch's convention: (out, in / groups, *kernel) or (out, in)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def weights(self) -> int:
        """Number of weight parameters, the bias not counted."""
        return prod(self.weight_shape)

    @property
    def elements(self) -> int:
        """Output elements per sample."""
        return prod(self.shape)

    @property
    def in_elements(self) -> int:
        """Elements of the first input per sample."""
        return prod(self.in_shape)


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

    @cached_property
    def layers(self) -> tuple[Op, ...]:
        """Convolutions and linear layers in execution order."""
        return tuple(op for op in self.ops if op.is_layer)

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

    @property
    def input_shape(self) -> Shape:
        return self.ops[0].shape

    def check_input(self, shape: Sequence[int]) -> None:
        """Raise `DataError` unless a batch of this shape (N, *input_shape) fits."""
        if tuple(shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise DataError("model input", f"shape {tuple(shape)}", f"(N, {expected})")

    @property
    def feature_dim(self) -> int:
        """Length of the feature vector."""
        return prod(self.ops[-1].shape)

    def downstream(self, names: frozenset[str] | set[str]) -> frozenset[str]:
        """The named operators and everything computed from them: what must run with gradients when they train."""
        reached: set[str] = set()
        for op in self.ops:
            if op.name in names or not reached.isdisjoint(op.inputs):
                reached.add(op.name)
        return frozenset(reached)

    def gradient_flow(self, live: Set[str], detached: Set[str] = frozenset()) -> frozenset[str]:
        """The operators at whose outputs a gradient is needed when the layers `live` train.

        They lie between a live layer and the output along paths that no operator in `detached` interrupts: those pass
        nothing on to their inputs.
        """
        needed: set[str] = set()
        for op in self.ops:
            if op.name in live or (op.name not in detached and not needed.isdisjoint(op.inputs)):
                needed.add(op.name)
        return frozenset(needed & self._heard(frozenset(detached)))

    def _heard(self, detached: frozenset[str]) -> set[str]:
        """Operators that a gradient of the output can come back to."""
        heard = {self.ops[-1].name}
        for op in reversed(self.ops):
            if op.name in heard and op.name not in detached:
                heard.update(op.inputs)
        return heard
