"""Sums, differences, products and quotients of values of equal or broadcast shapes, and of values and constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Any

from stages.operators.op import (
    Flow,
    Keep,
    Kept,
    Op,
    Operator,
    Pull,
    Reading,
    Shape,
    Tensors,
    keeps_nothing,
    keeps_others,
    register,
)  # fmt: skip
from stages.operators.shapes import broadcast, reduced

if TYPE_CHECKING:
    from torch import Tensor


def _broadcast_shape(op: Op) -> Shape:
    return broadcast(*op.in_shapes)


def _of_equal_rank(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Values with as many axes as the result: what is missing stands behind the batch."""
    found = []
    for x, shape in zip(inputs, op.in_shapes, strict=True):
        missing = len(op.shape) - len(shape)
        found.append(x.reshape(x.shape[0], *(1,) * missing, *shape) if missing else x)
    return found


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Op, Sequence[Tensor], Tensors], Tensor]:
    def forward(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
        result: Tensor = function(*_of_equal_rank(op, inputs))
        return result

    return forward


def _add_into(op: Op, inputs: Sequence[Tensor], into: int) -> Tensor:
    first, second = _of_equal_rank(op, inputs)
    return (first, second)[into].add_((first, second)[1 - into])


def _given_back(op: Op, flow: Flow, i: int) -> Flow:
    """The gradient as that of input i."""
    part = reduced(flow.gradient, op.in_shapes[i])
    return Flow(part, fresh=part is not flow.gradient)


def _pull_add(op: Op, tensors: Tensors) -> Pull:
    return lambda kept, flow: [_given_back(op, Flow(flow.gradient, fresh=False), i) for i in (0, 1)]


def _pull_subtract(op: Op, tensors: Tensors) -> Pull:
    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        return [_given_back(op, flow, 0), Flow(-reduced(flow.gradient, op.in_shapes[1]), fresh=True)]

    return pull


def _pull_multiply(op: Op, tensors: Tensors) -> Pull:
    def factor(kept: Kept, i: int, like: Tensor) -> Tensor:
        shape = op.in_shapes[i]
        x = kept.inputs[i]
        return x.reshape(x.shape[0], *(1,) * (like.ndim - 1 - len(shape)), *shape)

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        g = flow.gradient
        return [
            Flow(reduced(g * factor(kept, 1 - i, g), op.in_shapes[i]), fresh=True)
            if 1 - i in kept.inputs else Flow(g, fresh=False)
            for i in (0, 1)
        ]  # fmt: skip

    return pull


def _keeps_quotient(op: Op, wanted: Set[int]) -> Keep:
    """a / b: the numerator's gradient needs the denominator, the denominator's both."""
    return Keep(inputs=(0, 1) if 1 in wanted else (1,))


def _pull_divide(op: Op, tensors: Tensors) -> Pull:
    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        g, shapes = flow.gradient, op.in_shapes
        below = kept.inputs[1].reshape(-1, *(1,) * (g.ndim - 1 - len(shapes[1])), *shapes[1])
        first = g / below
        second = Flow(g, fresh=False)
        if 0 in kept.inputs:
            above = kept.inputs[0].reshape(-1, *(1,) * (g.ndim - 1 - len(shapes[0])), *shapes[0])
            second = Flow(reduced(-first * above / below, shapes[1]), fresh=True)
        return [Flow(reduced(first, shapes[0]), fresh=True), second]

    return pull


def _onnx(name: str) -> Callable[[Op, Any], None]:
    return lambda op, w: w.node(name, w.ranked_inputs(op), w.output(op))


def _emit(kind: str) -> Callable[..., Any]:
    def translate(call: Any, a: Any, b: Any, *_: Any, alpha: float = 1, rounding_mode: str | None = None) -> Any:
        if rounding_mode is not None:
            call.refuse(f"division rounded by {rounding_mode!r}", "division")
        if call.changes_nothing(kind, a, b) and alpha == 1:
            return a
        if alpha != 1:
            b = call.apply("mul.Tensor", b, alpha)
        scaled = kind == "multiply" and call.as_scale(a, b)
        return scaled or call.emit(kind, call.aligned(a, b))

    return translate


def _aten_reversed(call: Any, a: Any, b: Any, alpha: float = 1) -> Any:
    return call.apply("sub.Tensor", b, a, alpha=alpha)


def _aten_negated(call: Any, x: Any) -> Any:
    return call.apply("mul.Tensor", x, -1.0)


def _aten_addcmul(call: Any, x: Any, a: Any, b: Any, *, value: float = 1) -> Any:
    return call.apply("add.Tensor", x, call.apply("mul.Tensor", a, b), alpha=value)


def _aten_where(call: Any, mask: Any, chosen: Any, other: Any) -> Any:
    """A choice by a fixed mask: `other * ~mask + chosen * mask`."""
    if call.is_value(mask):
        call.refuse("a choice by a mask that depends on the input", "a fixed mask", "use a product with a gate")
    if not call.is_value(other):
        return _aten_where(call, call.apply("logical_not.default", mask), other, chosen)
    kept = call.apply("mul.Tensor", other, call.apply("logical_not.default", mask))
    if call.is_value(chosen):
        return call.apply("add.Tensor", kept, call.apply("mul.Tensor", chosen, mask))
    blank = call.apply(f"where.{'Scalar' if isinstance(chosen, int | float) else 'ScalarOther'}", mask, chosen, 0.0)
    return call.apply("add.Tensor", kept if call.is_finite(blank) else other, blank)  # 0 times an infinity is none


def _aten_masked_fill(call: Any, x: Any, mask: Any, value: Any) -> Any:
    return _aten_where(call, mask, value, x)


# ------------------------------------------------------------------------------------------------------ ONNX, reading


def _read(function: Callable[[Any, Any], Any]) -> Reading:
    """Two operands, or as many as there are from the left."""

    def rule(node: Any, *operands: Any) -> Any:
        like = next(x for x in operands if hasattr(x, "is_floating_point"))
        found, *rest = (node.tensor(x, like) for x in operands)
        for other in rest:
            found = function(found, other)
        return found

    return Reading(rule)


def _read_mean(node: Any, *operands: Any) -> Any:
    return _read(lambda a, b: a + b).rule(node, *operands) / len(operands)


def _read_where(node: Any, mask: Any, chosen: Any, other: Any) -> Any:
    import torch

    like = next(x for x in (chosen, other, mask) if isinstance(x, torch.Tensor))
    mask = mask if isinstance(mask, torch.Tensor) else torch.from_numpy(mask.astype(bool))
    return torch.where(mask, node.tensor(chosen, like), node.tensor(other, like))


_BOTH = ("Tensor", "Scalar")

register(
    Operator(
        kind="add", doc="the sum of two values, the smaller one repeated", arity=(2, 2), shape=_broadcast_shape,
        macs="an addition per element, no multiplication", keeps=keeps_nothing, forward=_binary(lambda a, b: a + b),
        pull=_pull_add, overwrite=_add_into, joins="sum", onnx=_onnx("Add"),
        aten={**{f"add.{form}": _emit("add") for form in _BOTH}, "addcmul.default": _aten_addcmul,
              **{f"masked_fill.{form}": _aten_masked_fill for form in _BOTH},
              **{f"where.{form}": _aten_where for form in ("self", "ScalarSelf", "ScalarOther", "Scalar")}},
        from_onnx={"Add": _read(lambda a, b: a + b), "Sum": _read(lambda a, b: a + b), "Mean": Reading(_read_mean),
                   "Where": Reading(_read_where)},
    ),
    Operator(
        kind="subtract", doc="the difference of two values, the smaller one repeated", arity=(2, 2),
        shape=_broadcast_shape, macs="a subtraction per element, no multiplication", keeps=keeps_nothing,
        forward=_binary(lambda a, b: a - b), pull=_pull_subtract, onnx=_onnx("Sub"),
        aten={
            **{f"sub.{form}": _emit("subtract") for form in _BOTH},
            **{f"rsub.{form}": _aten_reversed for form in _BOTH},
            "neg.default": _aten_negated,
        },
        from_onnx={"Sub": _read(lambda a, b: a - b), "Neg": Reading(lambda node, x: -x)},
    ),
    Operator(
        kind="multiply", doc="the product of two values, the smaller one repeated (gates, squeeze-and-excitation)",
        arity=(2, 2), shape=_broadcast_shape, macs="a multiplication per element, nothing to accumulate",
        keeps=keeps_others, forward=_binary(lambda a, b: a * b), pull=_pull_multiply, onnx=_onnx("Mul"),
        aten={f"mul.{form}": _emit("multiply") for form in _BOTH}, from_onnx={"Mul": _read(lambda a, b: a * b)},
    ),
    Operator(
        kind="divide", doc="the quotient of two values, the smaller one repeated", arity=(2, 2),
        shape=_broadcast_shape, macs="a division per element, nothing to accumulate", keeps=_keeps_quotient,
        forward=_binary(lambda a, b: a / b), pull=_pull_divide, onnx=_onnx("Div"),
        aten={f"div.{form}": _emit("divide") for form in (*_BOTH, "Tensor_mode")},
        from_onnx={"Div": _read(lambda a, b: a / b)},
    ),
)  # fmt: skip
