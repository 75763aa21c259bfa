"""One operator of a graph as a plain value, and the record that says all that is known of its kind.

An `Op` is what one place of a network computes: its kind, its inputs and its shapes. An `Operator` is what a kind is:
its shape rule, its costs, what its backward pass keeps, how torch runs and differentiates it, its ONNX form, the ATen
calls that become it. `TABLE` holds one `Operator` per kind; engines, costs, the Fisher pass, planner and exporters
read it and name no kind themselves. Modules of this package need no torch until a rule of the torch column runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from stages.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
Value: TypeAlias = int | float | bool | str | tuple[int, ...] | tuple[float, ...]
"""What an attribute of an operator may be."""

ELEMENT_BYTES = 4
"""Weights, activations, gradients and optimiser state are float32."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operator. Shapes are per sample (no batch dimension); `kernel` and friends have an entry per spatial axis."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: Shape
    """Output shape: (C, H, W), (C, T), tokens (L, D), (D,), ..."""
    in_shapes: tuple[Shape, ...] = ()
    """Shape of every input."""
    kernel: Shape = ()
    stride: Shape = ()
    padding: Shape = ()
    dilation: Shape = ()
    groups: int = 1
    bias: bool = False
    ceil_mode: bool = False
    count_include_pad: bool = True
    args: tuple[tuple[str, Value], ...] = ()
    """Further attributes of the kind, by name, in the record's order."""
    shares: str = ""
    """The earlier operator whose tensors this one uses too: a layer that is called more than once."""
    frozen: bool = False
    """Its weights are no parameters of the user's model (a blur's kernel): no plan trains them."""
    block: int = -1
    """Index into `Graph.blocks`; -1 for operators outside every block (input, mix, pooling)."""

    def __getitem__(self, name: str) -> Any:
        """One of `args`. Raises `KeyError` for a name that is not there."""
        return dict(self.args)[name]

    @property
    def operator(self) -> Operator:
        """What is known of its kind. Raises `UsageError` for a kind that the table does not have."""
        if self.kind not in TABLE:
            raise UsageError(f"operator {self.name}", f"kind {self.kind!r}", "one of " + ", ".join(TABLE))
        return TABLE[self.kind]

    @property
    def owner(self) -> str:
        """The operator under whose name its tensors lie: `<owner>.weight`."""
        return self.shares or self.name

    @property
    def in_shape(self) -> Shape:
        """Shape of the first input."""
        return self.in_shapes[0] if self.in_shapes else ()

    @property
    def channel_axis(self) -> int:
        """Which axis of a sample's output (and input) counts channels: 0 of maps, the last of tokens."""
        return self.operator.channel_axis(self)

    @property
    def in_channels(self) -> int:
        return self.in_shape[self.channel_axis]

    @property
    def out_channels(self) -> int:
        return self.shape[self.channel_axis]

    @property
    def is_layer(self) -> bool:
        """Whether it has weights that a plan may train."""
        return self.operator.trains and not self.frozen

    @property
    def is_depthwise(self) -> bool:
        """A layer whose channel c reads and writes channel c alone."""
        return self.is_layer and self.operator.depthwise(self)

    @property
    def tensors(self) -> dict[str, Shape]:
        """Its own tensors in deploy form: what stands behind its name -> shape; none where it shares another's."""
        return {} if self.shares else self.operator.tensors(self)

    @property
    def weight_shape(self) -> Shape:
        """Shape of the weight tensor, torch's convention: (out, in / groups, *kernel) or (out, in)."""
        return self.operator.tensors(self)["weight"]

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


# ------------------------------------------------------------------------------------------------------- what is kept


class Keep(NamedTuple):
    """What an operator through which gradients flow keeps for its backward pass."""

    inputs: tuple[int, ...] = ()
    """Inputs kept whole, by number: float32, once however many operators keep the same value."""
    output: bool = False
    """The output is kept whole, under the same rule."""
    bits: bool = False
    """One bit per output element, packed over the batch."""
    index_bytes: int = 0
    """So many bytes per output element of its own."""

    def own_bytes(self, op: Op, batch: int) -> int:
        """Bytes that nobody shares."""
        return -(-batch * op.elements // 8) * self.bits + batch * op.elements * self.index_bytes


class Kept(NamedTuple):
    """What was kept of one operator, as tensors (N, ...); empty where `Keep` names nothing."""

    inputs: Mapping[int, Tensor]
    output: Tensor | None
    passes: Tensor | None
    """uint8 (N, *shape): 1 where `Operator.passes` said so."""
    place: Tensor | None
    """What `Operator.index` gave."""


class Flow(NamedTuple):
    """A gradient on its way back."""

    gradient: Tensor
    fresh: bool
    """Nobody else holds it, so it may be overwritten."""


Tensors: TypeAlias = Mapping[str, "Tensor"]
Forward: TypeAlias = Callable[[Op, Sequence["Tensor"], Tensors], "Tensor"]
Pull: TypeAlias = Callable[[Kept, Flow], Sequence[Flow]]
"""Gradients of an operator's inputs from what was kept and the gradient of its output."""


def keeps_nothing(op: Op, wanted: Set[int]) -> Keep:
    """Nothing: the gradient needs no value."""
    return Keep()


def keeps_input(op: Op, wanted: Set[int]) -> Keep:
    """The input, of which the gradient is a function."""
    return Keep(inputs=(0,))


def keeps_output(op: Op, wanted: Set[int]) -> Keep:
    """The output, of which the gradient is a function."""
    return Keep(output=True)


def keeps_bits(op: Op, wanted: Set[int]) -> Keep:
    """One bit per element: which of two factors the gradient takes."""
    return Keep(bits=True)


def keeps_others(op: Op, wanted: Set[int]) -> Keep:
    """Of each input whose gradient is needed the others, as a product has it."""
    needed = {i for i in range(len(op.inputs)) for w in wanted if i != w}
    return Keep(inputs=tuple(sorted(needed)))


# ------------------------------------------------------------------------------------------------------ ONNX, reading


class Reading(NamedTuple):
    """How an ONNX node is read: as the torch calls that `aten` translates."""

    rule: Callable[..., Any]
    """(node, *inputs) -> the result, or several. Inputs are activations and the node's tensors; what is known before
    (shapes, bounds) comes as numpy arrays, a missing one as None. `graphs.onnx_reader.Node` says what rules may ask."""
    tensors: tuple[str, ...] = ()
    """What its fixed inputs are called as tensors of a layer (`weight`, `bias`), by place; `-` for no tensor."""
    prepare: Callable[..., None] | None = None
    """(node, tensors): brings the file's tensors into torch's form."""


# --------------------------------------------------------------------------------------------------------- the record


def _no_tensors(op: Op) -> dict[str, Shape]:
    return {}


def _first_axis(op: Op) -> int:
    return 0


def _never(op: Op) -> bool:
    return False


def _no_entries(op: Op) -> int:
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """All that is known of one kind of operator."""

    kind: str
    doc: str
    """What it computes, in one line."""
    arity: tuple[int, int] = (1, 1)
    """Fewest and most inputs."""
    fields: tuple[str, ...] = ()
    """Fields of `Op` that mean something for the kind; the artifact stores these and `args`."""
    args: Mapping[str, type] = field(default_factory=dict)
    """What `Op.args` must have, in order: name -> `int`, `float`, `bool`, `str`, or `tuple` of whole numbers."""
    tensors: Callable[[Op], dict[str, Shape]] = _no_tensors
    """Name -> shape of its tensors in deploy form."""
    shape: Callable[[Op], Shape]
    """Output shape from input shapes and attributes; raises ValueError with a reason where they cannot be."""

    macs: Callable[[Op], int] | str
    """Multiply-accumulates of the forward pass per sample, or why they count as none. The gradient of an input costs
    as many (Xu et al. 2022, in TinyTrain's appendix A.4), and so does that of the weight."""
    keeps: Callable[[Op, Set[int]], Keep]
    """What the backward pass keeps where the gradients of the inputs `wanted` are needed."""

    trains: bool = False
    """Whether a plan may train its `weight` and `bias`: whether it is a *layer*."""
    candidate: bool = True
    """Whether searches for a plan consider such a layer unless told to."""
    channel_axis: Callable[[Op], int] = _first_axis
    depthwise: Callable[[Op], bool] = _never
    by_output: bool = False
    """Plans take output channels alone."""
    input_first: bool = False
    """The weight's first axis counts input channels (transposed convolutions)."""
    matrix: Callable[[Op], bool] = _never
    """The layer is one matrix applied at every position."""

    forward: Forward
    """Torch: output (N, *shape) of inputs (N, *in_shape) and the graph's tensors; differentiable."""
    forward_training: Forward | None = None
    """Torch: the rule while a backbone is meta-trained, where that is another one."""
    statistics: tuple[str, ...] = ()
    """Tensors that are collected, not trained."""
    pull: Callable[[Op, Tensors], Pull] | None = None
    """Torch: prepares the backward rule once per net. None: the forward rule is run again and differentiated."""
    weight_gradient: Callable[[Op, Tensors, Tensor, Tensor, Tensor], Tensor] | None = None
    """Torch: (op, tensors, input, output's gradient, live output channels) -> the gradient of their rows of the weight,
    where that is no product of input and gradient as convolutions and linear layers have it."""
    passes: Callable[[Op, Sequence[Tensor], Tensor], Tensor] | None = None
    """Torch, where bits are kept: where the gradient passes, as booleans (N, *shape)."""
    index: Callable[[Op, Sequence[Tensor], Tensor], Tensor] | None = None
    """Torch, where an index is kept."""
    view: bool = False
    """The output is the input's elements under another shape: it is made again rather than kept."""
    made_again: Callable[[Op], bool] = _never
    """The output costs so little that it is made again, rather than kept, where the inputs are kept anyway."""
    in_order: bool = False
    """A view whose elements lie in the input's order."""
    alias: bool = False
    """The output may share the input's memory."""
    overwrite: Callable[[Op, Sequence[Tensor], int], Tensor] | None = None
    """Torch: the forward rule into the memory of the input of that number, which nobody else needs."""
    entries: Callable[[Op], int] = _no_entries
    """How many entries of a table there are of which the input's whole numbers name one; 0 of other operators."""
    called: bool = False
    """A function of torch that is called by name: capture makes sure that it does not mix the samples of a batch."""
    given: bool = False
    """The sample itself: what a graph begins with, and holds once."""
    as_vector: Callable[[Op], Op | None] | None = None
    """The operator that gives a vector at once, for one whose readers only reshape it into one; None for none."""
    joins: str = ""
    """How branches of a block meet here, where they do: `sum` or `side` (by side)."""
    probabilities: bool = False
    """Turns scores into probabilities: at the end of a classifier it is left to the head."""
    fused: str = ""
    """oneDNN's name of it as an activation behind a convolution, where it has one."""
    fused_scalars: tuple[float, ...] = ()

    onnx: Callable[[Op, Any], None] | None
    """Writes its nodes (`graphs.onnx_writer`); None: it never stands in a deployed graph."""
    aten: Mapping[str, Callable[..., Any]]
    """ATen call (`conv2d.default`) -> translator (`graphs.capture`)."""
    from_onnx: Mapping[str, Reading] = field(default_factory=dict)
    """Type of an ONNX node -> how it is read."""

    def macs_of(self, op: Op) -> int:
        """Forward MACs per sample."""
        return 0 if isinstance(self.macs, str) else self.macs(op)


TABLE: dict[str, Operator] = {}
"""Kind -> what is known of it. Filled by the modules of this package."""


def register(*operators: Operator) -> None:
    """Put operators into the table. Raises `ValueError` for a kind that is there already."""
    for operator in operators:
        if operator.kind in TABLE:
            raise ValueError(f"{operator.kind} is registered twice")
        TABLE[operator.kind] = operator


# -------------------------------------------------------------------------------------------------------- shape rules


def same_shape(op: Op) -> Shape:
    """The first input's."""
    return op.in_shape
