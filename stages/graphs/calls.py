"""What translators of ATen calls work with: values of single samples, constants, and a graph under construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from stages.errors import UsageError
from stages.graphs.opaque import opaque_call
from stages.graphs.origins import Origin
from stages.operators import TABLE, Op, Shape
from stages.operators.opaque import PURE
from stages.operators.shapes import DROPPED

BATCH = 65521
"""Samples in the captured batch: a prime that no network has as a size."""
FORWARD = "the model's forward"
"""Where something stands that no module of its own holds."""


class Value(NamedTuple):
    """The output of an operator for one sample, and how the captured call sees it for the whole batch."""

    op: str
    shape: Shape
    """Per sample."""
    full: Shape
    """As captured, the batch somewhere in it."""
    dtype: str = "float32"
    """As captured; whole numbers and truth values are held as floats."""

    @property
    def batch_axis(self) -> int:
        """The axis of `full` that the batch is in."""
        return next(i for i, size in enumerate(self.full) if size % BATCH == 0 and size)

    @property
    def batch_alone(self) -> bool:
        """Whether that axis holds the batch and nothing else."""
        return self.full[self.batch_axis] == BATCH


@dataclass(frozen=True)
class Constant:
    """A tensor that no input changes."""

    tensor: Tensor
    origin: Origin | None = None
    """Its place in the state dict, where it is an entry or rows of one."""
    sources: frozenset[str] = frozenset()
    """The entries of the state dict that it was made from."""


class Missing(NamedTuple):
    """A result that a translated call does not have: the indices of a pooling."""

    call: str


class _MixesSamples(UsageError):
    """A call in which a sample depends on the others of its batch: no form of it is taken."""


@dataclass
class Construction:
    """A graph under construction."""

    program: Any
    ops: list[Op] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    computed: dict[str, frozenset[str]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    dtype: torch.dtype = torch.float32
    """The input's: what constants beside values are made of."""
    whole_numbers: bool = False
    """The module reads its input as whole numbers."""
    owners: dict[Any, str] = field(default_factory=dict)
    """Identity of a weight -> the operator that holds it."""
    joined: dict[Any, Constant] = field(default_factory=dict)
    """Identity of a recurrent layer's tensors -> the one weight that holds them."""
    columns: dict[tuple[str, int, int], Origin] = field(default_factory=dict)
    """Columns of a recurrent layer's weight (key, start, stop) -> the entry of the state dict that they are."""
    notes: list[str] = field(default_factory=list)
    """What is understood otherwise than it was written."""

    def placeholder(self, node: Any) -> Value | Constant:
        """The input, a parameter or a buffer."""
        signature = self.program.graph_signature
        name = node.name
        if name in signature.user_inputs:
            if self.ops:
                raise UsageError(FORWARD, f"a second input {name}", "one input tensor")
            shape, dtype = tuple(node.meta["val"].shape)[1:], node.meta["val"].dtype
            self.whole_numbers = not dtype.is_floating_point
            self.dtype = torch.float32 if self.whole_numbers else dtype
            self.add(Op(self.fresh("input"), "input", (), shape))
            return Value(self.ops[0].name, shape, (BATCH, *shape), "int64" if self.whole_numbers else "float32")
        place = signature.inputs_to_parameters.get(name) or signature.inputs_to_buffers.get(name)
        if place is None:
            lifted = signature.inputs_to_lifted_tensor_constants[name]
            return Constant(self.program.constants[lifted].detach())
        parameter = name in signature.inputs_to_parameters
        stored = self.program.state_dict.get(place)
        tensor = self.program.constants[place] if stored is None else stored
        if stored is None:  # a buffer that the state dict leaves out
            return Constant(tensor.detach())
        return Constant(tensor.detach(), Origin(place, trains=parameter), frozenset({place}))

    def add(self, op: Op) -> None:
        self.ops.append(op)
        self.taken.add(op.name)

    def fresh(self, base: str) -> str:
        """A free name: the base, numbered when taken. A slash would part names in a record."""
        base = base.replace("/", "_")
        if base not in self.taken:
            return base
        return next(name for i in range(1, len(self.taken) + 2) if (name := f"{base}_{i}") not in self.taken)

    def settled(self, found: Value, full: Shape | None) -> Value:
        """The value as the captured call sees it. Raises `UsageError` where the batch is lost."""
        if full is None or found.full == full:
            return found
        return found._replace(full=full)


class Call:
    """One ATen call on its way into the graph: what translators may ask and do."""

    def __init__(self, b: Construction, node: Any, name: str, path: str, full: Shape | None) -> None:
        self.b, self.node, self.name, self.path, self.full = b, node, name, path, full

    # ---------------------------------------------------------------------------------------------------- running

    def run(self, args: Sequence[Any], kwargs: Any) -> Any:
        """The call's result: a value, a constant, or several of them."""
        if not _values_in((args, kwargs)):
            return self._folded(args, kwargs)
        rule = DROPPED.get(self.name) or _translators().get(self.name)
        if rule is None:
            return self.opaque(args, kwargs)
        try:
            return self._settled(rule(self, *args, **kwargs))
        except _MixesSamples:
            raise
        except (TypeError, UsageError) as error:  # a form of the call that the kind does not have
            try:
                return self.opaque(args, kwargs)
            except UsageError as other:
                if isinstance(error, UsageError):
                    raise error from other
                self.refuse(f"{self.written()} is called in an unsupported way: {error}", "")

    def opaque(self, args: Sequence[Any], kwargs: Any) -> Any:
        """The call as it stands, kept by name and arguments. Refuses what is no pure function of each sample."""
        if self.name.partition(".")[0] not in PURE:
            self.refuse(f"operator {self.written()}", "one of docs/operators.md", _advice(self.name))
        return opaque_call(self, args, kwargs)

    @property
    def batch(self) -> int:
        """Samples in the captured batch."""
        return BATCH

    def written(self) -> str:
        """The call as its user wrote it."""
        return as_written(self.node, self.name)

    def like(self, args: Sequence[Any]) -> list[Any]:
        """Arguments as tensors without memory."""
        return [_like(arg) for arg in args]

    def marked(self, full: Shape) -> list[Any]:
        """A captured shape as JSON, the batch marked. Refuses one without it, or with it twice."""
        self.per_sample(full)
        return [{"batch": n // BATCH} if n and n % BATCH == 0 else n for n in full]

    def _settled(self, found: Any) -> Any:
        if isinstance(found, Value) and self.full is not None:
            if self.per_sample(self.full) != found.shape:
                self.refuse(f"{self.name} gives {self.per_sample(self.full)}", f"{found.shape}")
            return self.b.settled(found, self.full)
        return found

    def _folded(self, args: Sequence[Any], kwargs: Any) -> Any:
        """What depends on no input, computed for a batch of one."""
        constants = _constants_in((args, kwargs))
        plain = [_evaluable(arg) for arg in args]
        named = {key: _evaluable(value) for key, value in kwargs.items()}
        with torch.no_grad():
            found = self.node.target(*plain, **named)
        sources = frozenset().union(*(constant.sources for constant in constants))
        parts = [
            Constant(part, _origin(args, part), sources) if isinstance(part, Tensor) else part
            for part in (found if isinstance(found, list | tuple) else [found])
        ]
        return parts if isinstance(found, list | tuple) else parts[0]

    def apply(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The result of another ATen call that this one consists of."""
        base, _, overload = name.partition(".")
        target = getattr(getattr(torch.ops.aten, base), overload or "default")
        full = None
        if _values_in((args, kwargs)):
            like = [_like(arg) for arg in args]
            result = target(*like, **{key: _like(value) for key, value in kwargs.items()})
            result = result[0] if isinstance(result, tuple) else result
            full = tuple(result.shape) if isinstance(result, Tensor) else None
        node = _Node(target, self.node)
        return Call(self.b, node, name, self.path, full).run(args, kwargs)

    def apply_list(self, name: str, *args: Any) -> list[Any]:
        """The results of another ATen call that gives several."""
        found: list[Any] = self.apply(name, *args)
        return found

    # ---------------------------------------------------------------------------------------------------- emitting

    def emit(self, kind: str, values: Sequence[Value], *, own: Any = None, **more: Any) -> Value:
        """Append an operator; its shape follows from the kind's rule."""
        plain = more.pop("plain", True)
        operator = TABLE[kind]
        held = {what: self._constant(part) for what, part in (own or {}).items() if part is not None}
        name, shares = self._place(more.pop("called", kind), held, plain)
        channels, out_shape = more.pop("out_channels", None), more.pop("out_shape", ())
        fields = {key: more.pop(key) for key in operator.fields if key in more}
        args = tuple((key, more[key]) for key in operator.args)
        op = Op(
            name, kind, tuple(value.op for value in values), (), tuple(value.shape for value in values),
            args=args, shares=shares, frozen=operator.trains and not self._trains(held), **fields,
        )  # fmt: skip
        given = (channels,) if channels is not None else out_shape
        try:
            op = replace(op, shape=operator.shape(replace(op, shape=given or op.in_shape)))
        except ValueError as error:
            self.refuse(f"{as_written(self.node, self.name)}: {error}", "shapes that fit")
        self.b.add(op)
        if not shares:
            for what, part in held.items():
                self._hold(f"{name}.{what}", part)
        full = (BATCH, *op.shape) if self.full is None or self.per_sample(self.full) != op.shape else self.full
        return Value(name, op.shape, full, values[0].dtype if values and operator.alias else "float32")

    def _trains(self, held: dict[str, Constant]) -> bool:
        """Whether any of an operator's tensors comes from a parameter."""
        parameters = set(self.b.program.graph_signature.parameters)
        return any(not parameters.isdisjoint(part.sources) for part in held.values())

    def _place(self, kind: str, held: dict[str, Constant], plain: bool) -> tuple[str, str]:
        """The operator's name, and the operator whose tensors it shares."""
        weight = held.get("weight") or held.get("value") or held.get("running_mean")
        base = self._base(kind) if plain else f"{self.path}.{kind}".strip(".")
        if weight is None:
            return self.b.fresh(base), ""
        if weight.origin is not None:
            base = _owner(weight.origin, weight.tensor, self.path, kind)
        elif entry := _parametrized(weight.sources):
            base = _owner(Origin(entry), weight.tensor, self.path, kind)
        elif not plain or kind == "scale":
            base = self.path or base
        key = (weight.tensor.data_ptr(), tuple(weight.tensor.shape), weight.tensor.stride())
        if weight.tensor.numel() and weight.sources and key in self.b.owners:
            owner = self.b.owners[key]
            self._check_shared(owner, held)
            return self.b.fresh(owner), owner
        name = self.b.fresh(base)
        if weight.sources:
            self.b.owners[key] = name
        return name, ""

    def _check_shared(self, owner: str, held: dict[str, Constant]) -> None:
        for what, part in held.items():
            other = self.b.tensors.get(f"{owner}.{what}")
            if other is None or other.data_ptr() != part.tensor.data_ptr():
                self.refuse(
                    f"the weight of {owner} is used again with another {what}", "a layer's own tensors together"
                )

    def _base(self, kind: str) -> str:
        """A module that is a single operator gives it its name; elsewhere the kind stands behind the path."""
        if not self.path:
            return kind
        return self.path if _is_leaf(self.node) else f"{self.path}.{kind}"

    def _hold(self, key: str, part: Constant) -> None:
        self.b.tensors[key] = part.tensor
        if part.origin is not None:
            self.b.origins[key] = part.origin
        elif part.sources:
            self.b.computed[key] = part.sources

    # --------------------------------------------------------------------------------------------------- recurrent

    def recurrent(self, kind: str, x: Value, params: Sequence[Any], name: str, *, reverse: bool, biased: bool) -> Value:
        """One layer in one direction; its tensors (weight_ih, weight_hh, bias_ih, bias_hh) become one weight whose row
        c is all that hidden unit c has."""
        parts = [self._constant(part) for part in params]
        hidden = parts[1].tensor.shape[1]
        key = tuple(part.tensor.data_ptr() for part in parts)
        if key not in self.b.joined:
            rows = [part.tensor.reshape(-1, hidden, *part.tensor.shape[1:]) for part in parts]
            wide = [row if row.ndim == 3 else row.unsqueeze(2) for row in rows]
            whole = torch.cat(wide, 2).permute(1, 2, 0).contiguous()
            self.b.joined[key] = Constant(whole, None, frozenset().union(*(part.sources for part in parts)))
        inner = Call(self.b, self.node, self.name, f"{self.path}.{name}".strip("."), None)
        value = inner.emit(
            kind, [x], own={"weight": self.b.joined[key]}, plain=False, called="", hidden=hidden, reverse=reverse,
            biased=biased,
        )  # fmt: skip
        stop = 0
        for part in parts:
            start, stop = stop, stop + (part.tensor.shape[1] if part.tensor.ndim == 2 else 1)
            if part.origin is not None:
                self.b.columns[f"{value.op}.weight", start, stop] = part.origin
        axis = x.batch_axis
        full = [*value.shape[:axis], BATCH, *value.shape[axis:]]
        return value._replace(full=tuple(full))

    def refuse_state(self, states: Sequence[Any]) -> None:
        """Refuse a recurrent layer that starts from something else than zeros."""
        if not all(isinstance(state, Constant) and not state.tensor.any() for state in states):
            self.refuse(f"{self.written()} from a given state", "a layer that starts from zeros", "leave the state out")

    def side_by_side_features(self, values: Sequence[Value]) -> Value:
        """Both directions' hidden units side by side."""
        inner = Call(self.b, self.node, self.name, self.path, None)
        joined = inner.emit("concat", values, axis=1, plain=False)
        full = list(values[0].full)
        full[-1] = joined.shape[-1]
        return joined._replace(full=tuple(full))

    def final_states(self, ends: Sequence[tuple[Value, int]]) -> Value:
        """Each layer's and direction's last state: (layers * directions, N, H)."""
        inner = Call(self.b, self.node, self.name, self.path, None)
        last = [
            y if y.shape[0] == 1 else inner.emit("slice", [y], axis=0, start=at, stop=at + 1, step=1, plain=False)
            for y, at in ends
        ]
        found = last[0] if len(last) == 1 else inner.emit("concat", last, axis=0, plain=False)
        return found._replace(full=(found.shape[0], BATCH, found.shape[1]))

    def constant(self, part: Constant, tensor: Tensor) -> Value:
        """The tensor of a constant, shaped for single samples, as an operator without inputs."""
        part = replace(part, tensor=tensor.to(self.b.dtype))
        name = self.b.fresh(part.origin.name if part.origin is not None else f"{self.path}.constant".lstrip("."))
        self.b.add(Op(name, "constant", (), tuple(part.tensor.shape)))
        self._hold(f"{name}.value", part)
        return Value(name, tuple(part.tensor.shape), tuple(part.tensor.shape))

    def scaled(self, x: Value, weight: Any, bias: Any, *, axes: int = 1, channel_axis: int | None = None) -> Value:
        """What a norm's own parameters make of its normalised value: a layer of their name."""
        if weight is None:
            return x
        if axes > 1:
            product = self.emit("multiply", [x, self.constant(weight, weight.tensor)])
            return product if bias is None else self.emit("add", [product, self.constant(bias, bias.tensor)])
        axis = len(x.shape) - 1 if channel_axis is None else channel_axis
        own = {"weight": weight, "bias": bias}
        return self.emit("scale", [x], own=own, axis=axis, bias=bias is not None)

    def as_scale(self, a: Any, b: Any) -> Value | None:
        """A product with a parameter that has one number per channel, as a layer; None where it is something else."""
        value, part = (a, b) if isinstance(a, Value) else (b, a)
        if not isinstance(part, Constant) or part.origin is None or not part.origin.trains or part.tensor.numel() < 2:
            return None
        tensor = self._for_samples(part.tensor, value)
        long = [i for i, size in enumerate(tensor.shape) if size > 1]
        axis = len(value.shape) - tensor.ndim + long[0] if len(long) == 1 else -1
        if axis < 0 or value.shape[axis] != tensor.numel():
            return None
        return self.emit(
            "scale", [value], own={"weight": replace(part, tensor=part.tensor.flatten())}, axis=axis, bias=False
        )

    # ------------------------------------------------------------------------------------------------------ asking

    def refuse(self, found: str, expected: str, fix: str = "") -> NoReturn:
        """Raise `UsageError` that names the module the call stands in."""
        raise UsageError(self.path or FORWARD, found, expected, fix)

    def refuse_mixing(self, found: str, expected: str, fix: str = "") -> NoReturn:
        """Refuse a call in which a sample depends on others."""
        raise _MixesSamples(self.path or FORWARD, found, expected, fix)

    def note(self, text: str) -> None:
        """Say what is understood otherwise than it was written."""
        self.b.notes.append(f"{self.path or FORWARD}: {text}")

    def cast(self, x: Any) -> Any:
        """A value as the type of the call's result: floats lose their fraction, or become truth values."""
        result = self.node.meta.get("val")
        if not isinstance(x, Value) or not isinstance(result, Tensor) or result.is_floating_point():
            return x._replace(dtype="float32") if isinstance(x, Value) else x
        if result.dtype == torch.bool:
            return x if x.dtype == "bool" else self.apply("ne.Scalar", x, 0)
        found = x if x.dtype != "float32" else self.apply("trunc.default", x)
        return found._replace(dtype="int64")

    def per_sample(self, full: Shape) -> Shape:
        """A captured shape without the batch. Refuses one in which the batch is missing or twice."""
        axes = [i for i, size in enumerate(full) if size and size % BATCH == 0]
        if len(axes) != 1:
            self.refuse_mixing(
                f"{as_written(self.node, self.name)} mixes the samples of a batch: shape {shown(full)}",
                "each sample by itself",
                "keep the batch in an axis of its own",
            )
        axis = axes[0]
        inside = full[axis] // BATCH
        return (*full[:axis], *((inside,) if inside > 1 else ()), *full[axis + 1 :])

    def out_shape(self) -> Shape:
        """Shape per sample of the call's first result."""
        if self.full is None:
            self.refuse(f"{self.name} in another call", "a call of its own")
        return self.per_sample(self.full)

    def is_value(self, x: Any) -> bool:
        return isinstance(x, Value)

    def value(self, x: Any) -> Value:
        """`x` as a value. Refuses constants."""
        if not isinstance(x, Value):
            self.refuse(f"{as_written(self.node, self.name)} of {x!r:.60}", "an activation")
        return x

    def first_value(self, parts: Sequence[Any]) -> Value:
        return next(part for part in parts if isinstance(part, Value))

    def _constant(self, x: Any) -> Constant:
        if not isinstance(x, Constant):
            self.refuse(f"{as_written(self.node, self.name)} with a weight computed from activations", "a parameter")
        return x

    def tensor_shape(self, x: Any) -> Shape:
        return tuple(self._constant(x).tensor.shape)

    def tensor_rank(self, x: Any) -> int:
        return self._constant(x).tensor.ndim

    def numbers(self, x: Any) -> list[Any]:
        """The entries of a constant of whole numbers. Refuses what depends on the input."""
        if not isinstance(x, Constant) or x.tensor.is_floating_point():
            self.refuse(f"{as_written(self.node, self.name)} by computed numbers", "fixed numbers")
        found: list[Any] = x.tensor.flatten().tolist()
        return found

    def numbers_shape(self, x: Any) -> Shape:
        """Shape of a constant of whole numbers."""
        return tuple(x.tensor.shape) if isinstance(x, Constant) else ()

    def filled_like(self, x: Any, value: float) -> Constant:
        """A constant of another's shape and dtype."""
        return Constant(torch.full_like(self._constant(x).tensor, value))

    def is_finite(self, x: Any) -> bool:
        """Whether a constant has neither infinities nor NaN."""
        return bool(torch.isfinite(self._constant(x).tensor).all())

    def rank(self, x: Any) -> int:
        """Number of axes as captured."""
        return len(x.full) if isinstance(x, Value) else self._constant(x).tensor.ndim

    def full_size(self, x: Any, dim: int) -> int:
        size: int = x.full[dim] if isinstance(x, Value) else self._constant(x).tensor.shape[dim]
        return size

    def per_sample_axes(self, x: Value) -> list[int]:
        """The captured axes that single samples have, in order."""
        return [i for i in range(len(x.full)) if not (i == x.batch_axis and x.batch_alone)]

    def axis(self, x: Any, dim: int) -> int:
        """The axis of single samples that a captured dimension is. Refuses the batch."""
        x = self.value(x)
        axes = self.per_sample_axes(x)
        if dim % len(x.full) not in axes:
            self.refuse_mixing(f"{as_written(self.node, self.name)} over the batch", "each sample by itself")
        return axes.index(dim % len(x.full))

    # ----------------------------------------------------------------------------------------------------- shaping

    def map(self, x: Any, axes: int) -> Value:
        """`x` as a map: batch, channels and `axes` positions. Refuses anything else."""
        value = self.value(x)
        if len(value.full) != axes + 2 or value.batch_axis != 0 or not value.batch_alone:
            self.refuse(
                f"{as_written(self.node, self.name)} of {shown(value.full)}",
                "(N, C, T) or (N, C, H, W), N the batch alone",
                "keep the batch in the first axis",
            )
        return value

    def channels_first(self, x: Any) -> Value:
        """`x` with its channels behind the batch, as norms read it. Refuses a batch elsewhere."""
        value = self.value(x)
        if len(value.full) < 2 or value.batch_axis != 0:
            self.refuse(f"{as_written(self.node, self.name)} of {shown(value.full)}", "(N, C, ...)")
        return value

    def grouped(self, x: Any) -> Value:
        """`x` with its channels first in every sample. Refuses a batch that shares its axis."""
        value = self.channels_first(x)
        if not value.batch_alone:
            self.refuse(f"{as_written(self.node, self.name)} of {shown(value.full)}", "(N, C, ...), N the batch alone")
        return value

    def last_axis_free(self, x: Any) -> Value:
        """`x` with something else than the batch in its last axis."""
        value = self.value(x)
        if value.batch_axis == len(value.full) - 1:
            self.refuse_mixing(f"{as_written(self.node, self.name)} over the batch", "each sample by itself")
        return value

    def reshape(self, x: Any) -> Any:
        """`x` in the shape of the call's result."""
        x, shape = self.value(x), self.out_shape()
        if shape == x.shape:
            return x
        return self.emit("flatten", [x]) if shape == (prod(x.shape),) else self.emit("reshape", [x], to=shape)

    def permute(self, x: Any, order: Sequence[int]) -> Any:
        if isinstance(x, Constant):
            return self.apply("permute.default", x, list(order))
        axes = self.per_sample_axes(x)
        kept = tuple(axes.index(axis) for axis in order if axis in axes)
        return x if kept == tuple(range(len(kept))) else self.emit("permute", [x], order=kept)

    def expand(self, x: Any) -> Any:
        x, shape = self.value(x), self.out_shape()
        return x if shape == x.shape else self.emit("expand", [x], to=shape)

    def cut(self, x: Any, dim: int, start: int, stop: int, step: int) -> Any:
        """A range of one axis."""
        if isinstance(x, Constant):
            return self.apply("slice.Tensor", x, dim, start, stop, step)
        count = -(-(stop - start) // step)
        if count == x.full[dim]:
            return x
        axis = self.axis(x, dim)
        full = list(x.full)
        full[dim] = count
        inner = Call(self.b, self.node, self.name, self.path, tuple(full))
        if stop <= start or x.full[dim] % BATCH == 0:
            self.refuse(f"{as_written(self.node, self.name)} {start}:{stop} of {shown(x.full)}", "part of a sample")
        return inner.emit("slice", [x], axis=axis, start=start, stop=stop, step=step)

    def aligned(self, a: Any, b: Any) -> list[Value]:
        """Two operands that broadcast against each other as values of single samples."""
        if isinstance(a, Value) and isinstance(b, Value):
            behind = [len(x.full) - x.batch_axis for x in (a, b)]
            if behind[0] != behind[1]:
                self.refuse(
                    f"{as_written(self.node, self.name)} of {shown(a.full)} and {shown(b.full)}", "one batch axis"
                )
            return [a, b]
        value = a if isinstance(a, Value) else b
        return [x if isinstance(x, Value) else self._beside(x, value) for x in (a, b)]

    def _beside(self, x: Any, value: Value) -> Value:
        part = x if isinstance(x, Constant) else Constant(torch.tensor(float(x)))
        return self.constant(part, self._for_samples(part.tensor, value))

    def _for_samples(self, tensor: Tensor, value: Value) -> Tensor:
        """A constant that is broadcast against a value, without the axis that meets the batch."""
        at = tensor.ndim - (len(value.full) - value.batch_axis)
        if at < 0 or not value.batch_alone:
            return tensor
        if tensor.shape[at] != 1:
            self.refuse(f"a constant {tuple(tensor.shape)} beside {shown(value.full)}", "the same for every sample")
        return tensor.squeeze(at)

    def mask(self, mask: Any, query: Value) -> Value:
        """An attention mask: numbers to add, from booleans too."""
        if isinstance(mask, Constant) and mask.tensor.dtype == torch.bool:
            blank = torch.zeros(mask.tensor.shape).masked_fill(~mask.tensor, float("-inf"))
            mask = Constant(blank, None, mask.sources)
        return mask if isinstance(mask, Value) else self._beside(mask, query)

    def side_by_side(self, parts: Sequence[Any]) -> list[Value]:
        """Operands of a concatenation."""
        reference = self.first_value(parts)
        return [part if isinstance(part, Value) else self._beside(part, reference) for part in parts]

    def changes_nothing(self, kind: str, a: Any, b: Any) -> bool:
        """`x + 0`, `x * 1` and their like."""
        neutral = {"add": 0.0, "subtract": 0.0, "multiply": 1.0, "divide": 1.0}[kind]
        if not isinstance(a, Value) or isinstance(b, Value):
            return False
        if isinstance(b, Constant):
            return not b.sources and b.tensor.numel() == 1 and float(b.tensor) == neutral
        return float(b) == neutral


# ------------------------------------------------------------------------------------------------------------ helpers


class _Node(NamedTuple):
    """A call inside a call."""

    target: Any
    outer: Any

    @property
    def meta(self) -> Any:
        return self.outer.meta


def _translators() -> dict[str, Any]:
    if not _RULES:
        for record in TABLE.values():
            _RULES.update(record.aten)
    return _RULES


_RULES: dict[str, Any] = {}


def is_known(name: str) -> bool:
    """Whether the table has a rule for an ATen call, or it computes nothing from values."""
    return name in DROPPED or name in _translators() or name in FACTORIES


FACTORIES = frozenset(f"{name}.default" for name in ("arange", "zeros", "ones", "full", "scalar_tensor", "empty")) | {
    "arange.start",
    "arange.start_step",
}
"""Calls that make constants."""


def called(node: Any) -> str:
    """`conv2d.default` of an ATen call; an in-place call (`relu_`) has the name of its twin."""
    base, dot, overload = str(node.target).removeprefix("aten.").partition(".")
    return f"{base.removesuffix('_') if node.target._schema.is_mutable else base}{dot}{overload}"


def full_shape(node: Any) -> Shape | None:
    """The captured shape of a call's result, of the first of a tuple; None where it is a list."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple) and value else value
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


def module_path(node: Any) -> str:
    """Path of the module that a call belongs to."""
    stack = node.meta.get("nn_module_stack")
    return _clean(str(list(stack.values())[-1][0])) if stack else ""


def _clean(path: str) -> str:
    """A module's path without what torch adds for parametrisations and repeated calls (`conv@1`)."""
    return path.partition("@")[0].partition(".parametrizations.")[0]


def _is_leaf(node: Any) -> bool:
    """Whether the innermost module is one of torch's own layers, which is a single operator."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return False
    kind = list(stack.values())[-1][1]
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    if name == "stages.graphs.onnx_reader.Node":
        return True
    return name.startswith("torch.nn.modules.") and not name.endswith(("MultiheadAttention", "Layer", "Transformer"))


def _owner(origin: Origin, tensor: Tensor, path: str, kind: str) -> str:
    """The name of a layer by its weight's: `block.conv.weight` -> `block.conv`, rows of `in_proj_weight` numbered."""
    owner, _, attribute = origin.name.rpartition(".")
    if attribute in ("weight", "running_mean"):
        base = owner or path or kind
    else:
        base = f"{owner}.{attribute.removesuffix('_weight')}".lstrip(".")
    return base if origin.rows < 0 else f"{base}_{origin.start // max(origin.rows, 1)}"


def _origin(args: Sequence[Any], found: Tensor) -> Origin | None:
    """The place of what a folded call only hands on: an entry as it lies in memory, turned, or some of its rows."""
    first = args[0] if args else None
    if not isinstance(first, Constant) or first.origin is None:
        return None
    origin, whole = first.origin, first.tensor
    if found.numel() == 0 or found.dtype != whole.dtype or _memory(found) != _memory(whole):
        return None
    lies, lay = (found.shape, found.stride()), (whole.shape, whole.stride())
    start = found.storage_offset() - whole.storage_offset()
    if start == 0 and lies == lay:
        return origin
    if start == 0 and found.ndim == 2 and lies == (lay[0][::-1], lay[1][::-1]):
        return replace(origin, transposed=not origin.transposed)
    if origin.transposed or lies[1] != lay[1] or found.ndim == 0 or lies[0][1:] != lay[0][1:]:
        return None
    return replace(origin, start=origin.start + start // whole.stride(0), rows=len(found))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _parametrized(sources: frozenset[str]) -> str:
    """The entry of the state dict that torch's parametrisations stand for (`conv.weight`), if a weight is made so."""
    parts = (name.partition(".parametrizations.") for name in sorted(sources))
    return next((f"{owner}.{rest.partition('.')[0]}" for owner, _, rest in parts if rest), "")


def _values_in(tree: Any) -> bool:
    if isinstance(tree, Value):
        return True
    if isinstance(tree, dict):
        return any(_values_in(part) for part in tree.values())
    return isinstance(tree, list | tuple) and any(_values_in(part) for part in tree)


def _constants_in(tree: Any) -> list[Constant]:
    if isinstance(tree, Constant):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [found for part in tree for found in _constants_in(part)] if isinstance(tree, list | tuple) else []


def _evaluable(arg: Any) -> Any:
    """An argument for a batch of one."""
    if isinstance(arg, Constant):
        return arg.tensor
    if isinstance(arg, int) and not isinstance(arg, bool):
        return arg // BATCH if arg and arg % BATCH == 0 else arg
    if isinstance(arg, list | tuple):
        return [_evaluable(part) for part in arg]
    return arg


def _like(arg: Any) -> Any:
    """An argument as a tensor without memory."""
    if isinstance(arg, Value):
        return torch.empty(arg.full, dtype=getattr(torch, arg.dtype), device="meta")
    if isinstance(arg, Constant):
        return torch.empty_like(arg.tensor, device="meta")
    return [_like(part) for part in arg] if isinstance(arg, list | tuple) else arg


def shown(full: Shape) -> str:
    """A captured shape as users write it."""
    sizes = [
        ("N" if size == BATCH else f"N*{size // BATCH}") if size and size % BATCH == 0 else str(size) for size in full
    ]
    return f"({', '.join(sizes)})"


def as_written(node: Any, name: str) -> str:
    """The operator as its user wrote it: the last source line of the call where there is one, and ATen's name."""
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    line = next((text.strip() for text in reversed(trace) if text.strip() and not text.strip().startswith("File")), "")
    plain = name.partition(".")[0]
    return f"{plain} (in `{line[:80]}`)" if line and plain not in ("conv2d", "linear") else plain


def _advice(name: str) -> str:
    """What to do about a kind that is missing."""
    base = name.partition(".")[0]
    for part, advice in (
        ("argmax", "it has no gradient: return the scores themselves"),
        ("topk", "it has no gradient for its indices: use a softmax or a mask"),
        ("fft", "transform the samples before the model"),
    ):
        if part in base:
            return advice
    return "rewrite that part of the model with others"
