"""Functions of each element alone, and softmax.

What has two slopes keeps one bit per element; what is a function of its own output keeps the output, which the next
product often keeps anyway; everything else keeps its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stages.operators.op import (
    Flow,
    Kept,
    Op,
    Operator,
    Pull,
    Reading,
    Shape,
    Tensors,
    keeps_bits,
    keeps_input,
    keeps_nothing,
    keeps_output,
    register,
    same_shape,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[[Op, "Tensor"], "Tensor"]

ELEMENTWISE = "an activation per element, not a multiply-accumulate by a weight"
COMPARED = "a comparison per element, no multiplication"


def _forward(function: Function) -> Callable[[Op, Sequence[Tensor], Tensors], Tensor]:
    return lambda op, inputs, tensors: function(op, inputs[0])


def _masked(op: Op, tensors: Tensors) -> Pull:
    """The gradient where it passes, 0 elsewhere."""

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        assert kept.passes is not None
        return [Flow(flow.gradient.mul_(kept.passes) if flow.fresh else flow.gradient * kept.passes, fresh=True)]

    return pull


def _onnx(name: str, *attributes: str) -> Callable[[Op, Any], None]:
    return lambda op, w: w.node(name, w.inputs(op), w.output(op), **{key: op[key] for key in attributes})


def _aten(kind: str, *arguments: tuple[str, Any]) -> Callable[..., Any]:
    """A call whose further arguments become attributes: (name, default) each, in ATen's order."""

    def translate(call: Any, x: Any, *values: Any, **named: Any) -> Any:
        given = dict(zip((name for name, _ in arguments), values, strict=False))
        found = {name: given.get(name, named.get(name, default)) for name, default in arguments}
        return call.emit(kind, [call.value(x)], **found)

    return translate


# --------------------------------------------------------------------------------------------------------- one bit


def _relu_into(op: Op, inputs: Sequence[Tensor], into: int) -> Tensor:
    return inputs[0].relu_()


def _relu6_into(op: Op, inputs: Sequence[Tensor], into: int) -> Tensor:
    return inputs[0].clamp_(0, 6)


def _relu6(op: Op, x: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.relu6(x)


def _pull_leaky(op: Op, tensors: Tensors) -> Pull:
    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        assert kept.passes is not None
        return [Flow(flow.gradient.where(kept.passes.bool(), flow.gradient * op["slope"]), fresh=True)]

    return pull


def _leaky(op: Op, x: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.leaky_relu(x, op["slope"])


def _slopes(op: Op, tensors: Tensors) -> Tensor:
    weight = tensors[f"{op.owner}.weight"]
    return weight.reshape(-1, *(1,) * (len(op.shape) - 1))


def _prelu_shape(op: Op) -> Shape:
    if not op.in_shape or op["slopes"] not in (1, op.in_shape[0]):
        raise ValueError(f"{op['slopes']} slopes for the channels of {op.in_shape}")
    return op.in_shape


def _prelu(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    x = inputs[0]
    return x.where(x > 0, x * _slopes(op, tensors))


def _pull_prelu(op: Op, tensors: Tensors) -> Pull:
    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        assert kept.passes is not None
        return [Flow(flow.gradient.where(kept.passes.bool(), flow.gradient * _slopes(op, tensors)), fresh=True)]

    return pull


def _prelu_onnx(op: Op, w: Any) -> None:
    weight = w.array(f"{op.owner}.weight").reshape(-1, *(1,) * (len(op.shape) - 1))
    w.node("PRelu", [*w.inputs(op), w.constant(op, "slope", weight)], w.output(op))


def _aten_prelu(call: Any, x: Any, weight: Any) -> Any:
    return call.emit("prelu", [call.grouped(x)], own={"weight": weight}, slopes=call.tensor_shape(weight)[0])


def _hardsigmoid(op: Op, x: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.hardsigmoid(x)


def _pull_hardsigmoid(op: Op, tensors: Tensors) -> Pull:
    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        assert kept.passes is not None
        return [Flow(flow.gradient * kept.passes * (1 / 6), fresh=True)]

    return pull


def _hardsigmoid_onnx(op: Op, w: Any) -> None:
    w.node("HardSigmoid", w.inputs(op), w.output(op), alpha=1 / 6, beta=0.5)


def _clip_onnx(op: Op, w: Any) -> None:
    w.node("Clip", [*w.inputs(op), w.number(0.0), w.number(6.0)], w.output(op))


def _clamp_onnx(op: Op, w: Any) -> None:
    w.node("Clip", [*w.inputs(op), w.number(op["low"]), w.number(op["high"])], w.output(op))


def _aten_clamp(call: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    if any(call.is_value(bound) for bound in (low, high) if bound is not None):
        call.refuse("a clamp between activations", "a clamp between numbers")
    bounds = tuple(limit if given is None else float(given) for given, limit in ((low, -MOST), (high, MOST)))
    if bounds == (0.0, 6.0):
        return call.emit("relu6", [call.value(x)])
    if bounds == (0.0, MOST):
        return call.emit("relu", [call.value(x)])
    return call.emit("clamp", [call.value(x)], low=bounds[0], high=bounds[1])


MOST = 3.0e38
"""Stands for a bound that is not there."""


def _aten_hardtanh(call: Any, x: Any, low: float = -1.0, high: float = 1.0) -> Any:
    return _aten_clamp(call, x, low, high)


# ----------------------------------------------------------------------------------------------------- of the output


def _from_output(rule: Callable[[Op, Tensor, Tensor], Tensor]) -> Callable[[Op, Tensors], Pull]:
    """The gradient by a rule of (operator, output, output's gradient)."""

    def prepare(op: Op, tensors: Tensors) -> Pull:
        def pull(kept: Kept, flow: Flow) -> list[Flow]:
            assert kept.output is not None
            return [Flow(rule(op, kept.output, flow.gradient), fresh=True)]

        return pull

    return prepare


def _softmax_gradient(op: Op, y: Tensor, g: Tensor) -> Tensor:
    product = y * g
    return product - y * product.sum(_axis(op), keepdim=True)


def _axis(op: Op) -> int:
    return int(op["axis"]) + 1


def _softmax_shape(op: Op) -> Shape:
    if not 0 <= op["axis"] < len(op.in_shape):
        raise ValueError(f"softmax along axis {op['axis']} of {op.in_shape}")
    return op.in_shape


def _softmax_onnx(op: Op, w: Any) -> None:
    w.node("Softmax", w.inputs(op), w.output(op), axis=_axis(op))


def _aten_softmax(call: Any, x: Any, dim: int, *_: Any, **__: Any) -> Any:
    return call.emit("softmax", [call.value(x)], axis=call.axis(x, dim))


def _elu_shape(op: Op) -> Shape:
    if min(op["alpha"], op["scale"]) < 0:  # the gradient is read from the output's sign
        raise ValueError(f"alpha {op['alpha']}, scale {op['scale']}, numbers of at least 0 are needed")
    return op.in_shape


def _elu(op: Op, x: Tensor) -> Tensor:
    from torch.nn import functional as F

    y: Tensor = F.elu(x, op["alpha"])
    return y if op["scale"] == 1 else y * float(op["scale"])


def _elu_gradient(op: Op, y: Tensor, g: Tensor) -> Tensor:
    found: Tensor = (g * op["scale"]).where(y > 0, g * (y + op["alpha"] * op["scale"]))
    return found


def _elu_onnx(op: Op, w: Any) -> None:
    plain = w.output(op) if op["scale"] == 1 else w.inner(op, "plain")
    w.node("Elu", w.inputs(op), plain, alpha=op["alpha"])
    if op["scale"] != 1:
        w.node("Mul", [plain, w.number(op["scale"])], w.output(op))


def _aten_elu(call: Any, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    if input_scale != 1:
        call.refuse("an ELU of a scaled input", "ELU", "use nn.ELU")
    return call.emit("elu", [call.value(x)], alpha=float(alpha), scale=float(scale))


def _aten_selu(call: Any, x: Any) -> Any:
    """Klambauer et al., arXiv:1706.02515, to float32's precision."""
    return _aten_elu(call, x, 1.6732632423543772, 1.0507009873554805)


def _log_softmax_gradient(op: Op, y: Tensor, g: Tensor) -> Tensor:
    return g - y.exp() * g.sum(_axis(op), keepdim=True)


def _log_softmax_onnx(op: Op, w: Any) -> None:
    w.node("LogSoftmax", w.inputs(op), w.output(op), axis=_axis(op))


def _aten_log_softmax(call: Any, x: Any, dim: int, *_: Any, **__: Any) -> Any:
    return call.emit("log_softmax", [call.value(x)], axis=call.axis(x, dim))


def _aten_glu(call: Any, x: Any, dim: int = -1) -> Any:
    """Half of the channels gated by the other half."""
    value, gate = call.apply_list("chunk.default", x, 2, dim)
    return call.apply("mul.Tensor", value, call.apply("sigmoid.default", gate))


def _pull_nothing(op: Op, tensors: Tensors) -> Pull:
    return lambda kept, flow: [Flow(flow.gradient.new_zeros(flow.gradient.shape), fresh=True)]


# ------------------------------------------------------------------------------------------------------ of the input


def _of_torch(name: str) -> Function:
    """A function of `torch.nn.functional`."""

    def function(op: Op, x: Tensor) -> Tensor:
        from torch.nn import functional as F

        result: Tensor = getattr(F, name)(x)
        return result

    return function


def _gelu_shape(op: Op) -> Shape:
    if op["approximate"] not in ("none", "tanh"):
        raise ValueError(f"approximate {op['approximate']!r}, none or tanh is needed")
    return op.in_shape


def _gelu(op: Op, x: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.gelu(x, approximate=op["approximate"])


def _gelu_onnx(op: Op, w: Any) -> None:
    """Opset 17 has no Gelu: x * (0.5 + 0.5 * erf(x / sqrt 2)), or by tanh."""
    (x,) = w.inputs(op)
    if op["approximate"] == "tanh":
        w.node("Pow", [x, w.number(3.0)], w.inner(op, "cube"))
        w.node("Mul", [w.inner(op, "cube"), w.number(0.044715)], w.inner(op, "small"))
        w.node("Add", [x, w.inner(op, "small")], w.inner(op, "sum"))
        w.node("Mul", [w.inner(op, "sum"), w.number(0.7978845608028654)], w.inner(op, "scaled"))
        w.node("Tanh", [w.inner(op, "scaled")], w.inner(op, "bent"))
    else:
        w.node("Mul", [x, w.number(0.7071067811865476)], w.inner(op, "scaled"))
        w.node("Erf", [w.inner(op, "scaled")], w.inner(op, "bent"))
    w.node("Add", [w.inner(op, "bent"), w.number(1.0)], w.inner(op, "shifted"))
    w.node("Mul", [w.inner(op, "shifted"), w.number(0.5)], w.inner(op, "gate"))
    w.node("Mul", [x, w.inner(op, "gate")], w.output(op))


def _silu_onnx(op: Op, w: Any) -> None:
    w.node("Sigmoid", w.inputs(op), w.inner(op, "gate"))
    w.node("Mul", [*w.inputs(op), w.inner(op, "gate")], w.output(op))


def _softplus_shape(op: Op) -> Shape:
    if not op["beta"] > 0:
        raise ValueError(f"softplus with beta {op['beta']}")
    return op.in_shape


def _softplus(op: Op, x: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.softplus(x, op["beta"])


def _softplus_onnx(op: Op, w: Any) -> None:
    w.node("Mul", [*w.inputs(op), w.number(op["beta"])], w.inner(op, "scaled"))
    w.node("Softplus", [w.inner(op, "scaled")], w.inner(op, "soft"))
    w.node("Mul", [w.inner(op, "soft"), w.number(1 / op["beta"])], w.output(op))


def _aten_softplus(call: Any, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    if threshold < 16:  # above 16 the line and the function are the same float32 number
        call.refuse(f"a softplus that is a line from {threshold}", "a threshold of at least 16", "use the default, 20")
    return call.emit("softplus", [call.value(x)], beta=float(beta))


def _mish_onnx(op: Op, w: Any) -> None:
    w.node("Softplus", w.inputs(op), w.inner(op, "soft"))
    w.node("Tanh", [w.inner(op, "soft")], w.inner(op, "gate"))
    w.node("Mul", [*w.inputs(op), w.inner(op, "gate")], w.output(op))


def _power_onnx(op: Op, w: Any) -> None:
    w.node("Pow", [*w.inputs(op), w.number(op["exponent"])], w.output(op))


def _aten_power(call: Any, x: Any, exponent: Any) -> Any:
    if not isinstance(exponent, int | float):
        call.refuse("a power of two activations", "a fixed exponent")
    return call.emit("power", [call.value(x)], exponent=float(exponent))


def _aten_fixed_power(exponent: float) -> Callable[..., Any]:
    return lambda call, x: call.emit("power", [call.value(x)], exponent=exponent)


# ------------------------------------------------------------------------------------------------------ ONNX, reading


def _read(name: str) -> Reading:
    """A function of `torch` or `torch.nn.functional`."""

    def rule(node: Any, x: Any) -> Any:
        import torch
        from torch.nn import functional as F

        return getattr(F if hasattr(F, name) else torch, name)(x)

    return Reading(rule)


def _read_with(function: Callable[[Any, Any, Any], Any]) -> Reading:
    """A function of (torch.nn.functional, node, x)."""

    def rule(node: Any, x: Any) -> Any:
        from torch.nn import functional as F

        return function(F, node, x)

    return Reading(rule)


def _read_clip(node: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    low = node.get("min") if low is None else node.number(low)
    high = node.get("max") if high is None else node.number(high)
    return x if low is None and high is None else x.clamp(low, high)


def _read_prelu(node: Any, x: Any, slope: Any) -> Any:
    """One slope per channel, or one for all."""
    from torch.nn import functional as F

    if slope.numel() not in (1, x.shape[1]) or slope.numel() != max(slope.shape, default=1):
        node.refuse(f"slopes {tuple(slope.shape)} for {tuple(x.shape[1:])}", "one per channel")
    return F.prelu(x, slope.flatten())


def _read_hardsigmoid(node: Any, x: Any) -> Any:
    from torch.nn import functional as F

    slope, shift = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(slope - 1 / 6) < 1e-6 and shift == 0.5:
        return F.hardsigmoid(x)
    return (x * slope + shift).clamp(0, 1)


def _read_softmax(name: str) -> Reading:
    def rule(node: Any, x: Any) -> Any:
        """Before opset 13 over all axes from `axis` on, as one."""
        axis = node.get("axis", 1 if node.opset < 13 else -1) % x.ndim
        if node.opset >= 13 or axis == x.ndim - 1:
            return getattr(x, name)(axis)
        return getattr(x.flatten(axis), name)(-1).reshape(x.shape)

    return Reading(rule)


def _read_selu(node: Any, x: Any) -> Any:
    from torch.nn import functional as F

    alpha, gamma = node.get("alpha"), node.get("gamma")
    return F.selu(x) if alpha is None and gamma is None else F.elu(x, alpha or 1.67326) * (gamma or 1.0507)


def _read_pow(node: Any, x: Any, exponent: Any) -> Any:
    return x.pow(node.number(exponent))


def _read_softplus(node: Any, x: Any) -> Any:
    from torch.nn import functional as F

    return F.softplus(x)


def _unary(kind: str, doc: str, function: Function, onnx: Any, aten: Any, **more: Any) -> Operator:
    return Operator(
        kind=kind, doc=doc, shape=more.pop("shape", same_shape), macs=more.pop("macs", ELEMENTWISE),
        keeps=more.pop("keeps", keeps_input), forward=_forward(function), onnx=onnx, aten=aten, **more,
    )  # fmt: skip


register(
    _unary(
        "relu", "max(x, 0)", lambda op, x: x.relu(), _onnx("Relu"), {"relu.default": _aten("relu")}, macs=COMPARED,
        keeps=keeps_bits, passes=lambda op, inputs, y: y > 0, pull=_masked, overwrite=_relu_into, fused="relu",
        from_onnx={"Relu": _read("relu")},
    ),
    _unary(
        "relu6", "min(max(x, 0), 6)", _relu6, _clip_onnx, {"relu6.default": _aten("relu6")},
        macs="two comparisons per element, no multiplication", keeps=keeps_bits,
        passes=lambda op, inputs, y: (y > 0) & (y < 6), pull=_masked, overwrite=_relu6_into, fused="hardtanh",
        fused_scalars=(0.0, 6.0),
    ),
    _unary(
        "clamp", "x between two numbers", lambda op, x: x.clamp(op["low"], op["high"]), _clamp_onnx,
        {"clamp.default": _aten_clamp, "clip.default": _aten_clamp,
         "clamp_min.default": _aten_clamp, "clamp_max.default": lambda call, x, high: _aten_clamp(call, x, None, high),
         "hardtanh.default": _aten_hardtanh},
        args={"low": float, "high": float}, macs="two comparisons per element, no multiplication", keeps=keeps_bits,
        passes=lambda op, inputs, y: (inputs[0] >= op["low"]) & (inputs[0] <= op["high"]), pull=_masked,
        from_onnx={"Clip": Reading(_read_clip)},
    ),
    _unary(
        "leaky_relu", "x, below 0 slope * x", _leaky,
        lambda op, w: w.node("LeakyRelu", w.inputs(op), w.output(op), alpha=op["slope"]),
        {"leaky_relu.default": _aten("leaky_relu", ("slope", 0.01))}, args={"slope": float}, keeps=keeps_bits,
        passes=lambda op, inputs, y: inputs[0] > 0, pull=_pull_leaky,
        from_onnx={"LeakyRelu": _read_with(lambda F, node, x: F.leaky_relu(x, node.get("alpha", 0.01)))},
    ),
    Operator(
        kind="prelu", doc="x, below 0 a frozen slope per channel times x", args={"slopes": int},
        tensors=lambda op: {"weight": (op["slopes"],)}, shape=_prelu_shape, macs=ELEMENTWISE, keeps=keeps_bits,
        forward=_prelu, passes=lambda op, inputs, y: inputs[0] > 0, pull=_pull_prelu, onnx=_prelu_onnx,
        aten={"prelu.default": _aten_prelu, "_prelu_kernel.default": _aten_prelu},
        from_onnx={"PRelu": Reading(_read_prelu, ("-", "weight"))},
    ),
    _unary(
        "hardsigmoid", "min(max(x + 3, 0), 6) / 6", _hardsigmoid, _hardsigmoid_onnx,
        {"hardsigmoid.default": _aten("hardsigmoid")}, keeps=keeps_bits,
        passes=lambda op, inputs, y: (inputs[0] > -3) & (inputs[0] < 3), pull=_pull_hardsigmoid,
        from_onnx={"HardSigmoid": Reading(_read_hardsigmoid)},
    ),
    _unary(
        "sigmoid", "1 / (1 + exp(-x)); half of a GLU", lambda op, x: x.sigmoid(), _onnx("Sigmoid"),
        {"sigmoid.default": _aten("sigmoid"), "glu.default": _aten_glu}, keeps=keeps_output,
        pull=_from_output(lambda op, y, g: g * y * (1 - y)), from_onnx={"Sigmoid": _read("sigmoid")},
    ),
    _unary(
        "tanh", "hyperbolic tangent", lambda op, x: x.tanh(), _onnx("Tanh"), {"tanh.default": _aten("tanh")},
        keeps=keeps_output, pull=_from_output(lambda op, y, g: g * (1 - y * y)), from_onnx={"Tanh": _read("tanh")},
    ),
    _unary(
        "elu", "scale * x, below 0 scale * alpha * (exp(x) - 1); SELU too", _elu, _elu_onnx,
        {"elu.default": _aten_elu, "selu.default": _aten_selu},
        args={"alpha": float, "scale": float}, shape=_elu_shape,
        keeps=keeps_output, pull=_from_output(_elu_gradient),
        from_onnx={"Elu": _read_with(lambda F, node, x: F.elu(x, node.get("alpha", 1.0))), "Selu": Reading(_read_selu)},
    ),
    _unary(
        "exp", "e to the x", lambda op, x: x.exp(), _onnx("Exp"), {"exp.default": _aten("exp")}, keeps=keeps_output,
        pull=_from_output(lambda op, y, g: g * y), from_onnx={"Exp": _read("exp")},
    ),
    _unary(
        "softmax", "exp(x) over its sum along an axis", lambda op, x: x.softmax(_axis(op)), _softmax_onnx,
        {"softmax.int": _aten_softmax, "_softmax.default": _aten_softmax}, args={"axis": int}, shape=_softmax_shape,
        keeps=keeps_output, pull=_from_output(_softmax_gradient), probabilities=True,
        from_onnx={"Softmax": _read_softmax("softmax")},
    ),
    _unary(
        "log_softmax", "logarithm of the softmax along an axis", lambda op, x: x.log_softmax(_axis(op)),
        _log_softmax_onnx, {"log_softmax.int": _aten_log_softmax, "_log_softmax.default": _aten_log_softmax},
        args={"axis": int}, shape=_softmax_shape, keeps=keeps_output, pull=_from_output(_log_softmax_gradient),
        probabilities=True, from_onnx={"LogSoftmax": _read_softmax("log_softmax")},
    ),
    _unary(
        "sign", "-1, 0 or 1; no gradient passes", lambda op, x: x.sign(), _onnx("Sign"),
        {"sign.default": _aten("sign")}, keeps=keeps_nothing, pull=_pull_nothing, macs=COMPARED,
        from_onnx={"Sign": _read("sign")},
    ),
    _unary("hardswish", "x * min(max(x + 3, 0), 6) / 6", _of_torch("hardswish"), _onnx("HardSwish"),
           {"hardswish.default": _aten("hardswish")}, from_onnx={"HardSwish": _read("hardswish")}),
    _unary("silu", "x * sigmoid(x), also called swish", _of_torch("silu"), _silu_onnx,
           {"silu.default": _aten("silu")}, from_onnx={"Silu": _read("silu")}),
    _unary("softplus", "log(1 + exp(beta * x)) / beta", _softplus, _softplus_onnx, {"softplus.default": _aten_softplus},
           args={"beta": float}, shape=_softplus_shape, from_onnx={"Softplus": Reading(_read_softplus)}),
    _unary("mish", "x * tanh(log(1 + exp(x)))", _of_torch("mish"), _mish_onnx, {"mish.default": _aten("mish")},
           from_onnx={"Mish": _read("mish")}),
    _unary("gelu", "x * Phi(x), exact or by tanh", _gelu, _gelu_onnx,
           {"gelu.default": _aten("gelu", ("approximate", "none"))}, args={"approximate": str}, shape=_gelu_shape,
           from_onnx={"Gelu": _read_with(
               lambda F, node, x: F.gelu(x, approximate=node.get("approximate", "none")))}),
    _unary("abs", "|x|", lambda op, x: x.abs(), _onnx("Abs"), {"abs.default": _aten("abs")},
           from_onnx={"Abs": _read("abs")}),
    _unary("log", "natural logarithm", lambda op, x: x.log(), _onnx("Log"), {"log.default": _aten("log")},
           from_onnx={"Log": _read("log")}),
    _unary(
        "power", "x to a fixed exponent", lambda op, x: x.pow(op["exponent"]), _power_onnx,
        {"pow.Tensor_Scalar": _aten_power, "square.default": _aten_fixed_power(2.0),
         "sqrt.default": _aten_fixed_power(0.5), "rsqrt.default": _aten_fixed_power(-0.5),
         "reciprocal.default": _aten_fixed_power(-1.0)},
        args={"exponent": float},
        from_onnx={"Pow": Reading(_read_pow, ("-", "-")), "Sqrt": _read("sqrt"), "Reciprocal": _read("reciprocal")},
    ),
)  # fmt: skip
