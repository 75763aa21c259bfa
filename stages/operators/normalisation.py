"""Normalisation: BatchNorm by stored statistics, Layer-, Group- and InstanceNorm by the sample's own; scale and shift.

LayerNorm, GroupNorm and InstanceNorm with affine parameters are two operators: one that normalises and has no
parameters, and a `scale` behind it, a layer of the module's name. A BatchNorm that cannot be folded becomes a `scale`
in deploy form too, and so does a layer scale.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    keeps_input,
    keeps_nothing,
    register,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor


# ---------------------------------------------------------------------------------------------------------- BatchNorm


def _check_eps(op: Op) -> None:
    if op["eps"] < 0:
        raise ValueError(f"eps {op['eps']}")


def _batchnorm_shape(op: Op) -> Shape:
    _check_eps(op)
    if not 0 <= op["axis"] < len(op.in_shape):
        raise ValueError(f"axis {op['axis']} of {op.in_shape}")
    return op.in_shape


def _batchnorm_tensors(op: Op) -> dict[str, Shape]:
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (op.in_shape[op["axis"]],))


def _batchnorm(op: Op, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
    from torch.nn import functional as F

    mean, var, weight, bias = (tensors[f"{op.owner}.{w}"] for w in ("running_mean", "running_var", "weight", "bias"))
    x = inputs[0].movedim(op["axis"] + 1, 1)
    return F.batch_norm(x, mean, var, weight, bias, training=training, eps=op["eps"]).movedim(1, op["axis"] + 1)


def _batchnorm_training(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return _batchnorm(op, inputs, tensors, training=True)


def _aten_batchnorm(
    call: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float,
    *_: Any,
) -> Any:  # fmt: skip
    if training or mean is None:
        call.refuse("batch_norm with the batch's own statistics", "running statistics", "track_running_stats=True")
    own = {
        "weight": call.filled_like(mean, 1.0) if weight is None else weight,
        "bias": call.filled_like(mean, 0.0) if bias is None else bias,
        "running_mean": mean,
        "running_var": var,
    }
    x = call.channels_first(x)
    return call.emit("batchnorm", [x], own=own, axis=call.axis(x, 1), eps=float(eps))


def _aten_native_batchnorm(
    call: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> list[Any]:
    return [_aten_batchnorm(call, x, weight, bias, mean, var, False, momentum, eps)]


# -------------------------------------------------------------------------------------------------- by its own values


def _layernorm_shape(op: Op) -> Shape:
    _check_eps(op)
    if not 1 <= op["axes"] <= len(op.in_shape):
        raise ValueError(f"the last {op['axes']} axes of {op.in_shape}")
    return op.in_shape


def _layernorm(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    return F.layer_norm(inputs[0], list(op.shape[-op["axes"] :]), eps=op["eps"])


def _layernorm_onnx(op: Op, w: Any) -> None:
    import numpy as np

    ones = w.constant(op, "ones", np.ones(op.shape[-op["axes"] :], np.float32))
    w.node("LayerNormalization", [*w.inputs(op), ones], w.output(op), axis=-op["axes"], epsilon=op["eps"])


def _aten_layernorm(
    call: Any, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    normalised = call.emit("layernorm", [call.last_axis_free(x)], axes=len(shape), eps=float(eps), plain=weight is None)
    return call.scaled(normalised, weight, bias, axes=len(shape))


def _aten_native_layernorm(call: Any, *arguments: Any) -> list[Any]:
    return [_aten_layernorm(call, *arguments)]


def _groupnorm_shape(op: Op) -> Shape:
    _check_eps(op)
    if len(op.in_shape) < 1 or op["groups"] < 1 or op.in_shape[0] % op["groups"]:
        raise ValueError(f"{op['groups']} groups of the channels of {op.in_shape}")
    return op.in_shape


def _groupnorm(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    import torch

    return torch.group_norm(inputs[0], op["groups"], eps=op["eps"])  # torch.nn's asks for more than one value


def _groupnorm_onnx(op: Op, w: Any) -> None:
    """As an instance normalisation of groups, laid out as vectors: opset 17 has no GroupNormalization."""
    import numpy as np

    groups = op["groups"]
    w.node("Reshape", [*w.inputs(op), w.integers([0, groups, -1])], w.inner(op, "grouped"))
    ones, zeros = (w.constant(op, name, np.full(groups, v, np.float32)) for name, v in (("ones", 1), ("zeros", 0)))
    w.node("InstanceNormalization", [w.inner(op, "grouped"), ones, zeros], w.inner(op, "normalised"), epsilon=op["eps"])
    w.node("Reshape", [w.inner(op, "normalised"), w.integers([-1, *op.shape])], w.output(op))


def _aten_groupnorm(
    call: Any, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    x = call.grouped(x)
    normalised = call.emit("groupnorm", [x], groups=int(groups), eps=float(eps), plain=weight is None)
    return call.scaled(normalised, weight, bias, channel_axis=0)


def _aten_instancenorm(
    call: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, own_statistics: bool, momentum: float, eps: float,
    *_: Any,
) -> Any:  # fmt: skip
    if not own_statistics:
        return _aten_batchnorm(call, x, weight, bias, mean, var, False, momentum, eps)
    x = call.grouped(x)
    normalised = call.emit("groupnorm", [x], groups=x.shape[0], eps=float(eps), plain=weight is None)
    return call.scaled(normalised, weight, bias, channel_axis=0)


# ------------------------------------------------------------------------------------------------------ ONNX, reading


def _read_batchnorm(node: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
    from torch.nn import functional as F

    if node.get("training_mode", 0):
        node.refuse("statistics of the batch (training_mode)", "stored ones", "export the model in evaluation mode")
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, node.get("epsilon", 1e-5))


def _read_layernorm(node: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    from torch.nn import functional as F

    axis = node.get("axis", -1) % x.ndim
    if node.results > 1:
        node.refuse("mean and deviation as results", "the normalised value alone")
    return F.layer_norm(x, list(x.shape[axis:]), weight, bias, node.get("epsilon", 1e-5))


def _read_instancenorm(node: Any, x: Any, weight: Any, bias: Any) -> Any:
    from torch.nn import functional as F

    return F.group_norm(x, x.shape[1], weight, bias, node.get("epsilon", 1e-5))


def _read_groupnorm(node: Any, x: Any, weight: Any, bias: Any) -> Any:
    """Before opset 21 one weight and bias per group."""
    from torch.nn import functional as F

    groups, channels = node.get("num_groups"), x.shape[1]
    if len(weight) != channels:
        weight, bias = (part.repeat_interleave(channels // groups) for part in (weight, bias))
    return F.group_norm(x, groups, weight, bias, node.get("epsilon", 1e-5))


def _read_lrn(node: Any, x: Any) -> Any:
    from torch.nn import functional as F

    size = node.get("size")
    if size % 2 == 0:
        node.refuse(f"a window of {size} channels", "an odd number")
    return F.local_response_norm(x, size, node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0))


def _read_standardised(node: Any, x: Any) -> Any:
    """MeanVarianceNormalization over axes."""
    axes = node.get("axes") or [0, 2, 3]
    if 0 in axes:
        node.refuse("statistics over the batch", "each sample by itself")
    centred = x - x.mean(axes, keepdim=True)
    return centred / ((centred * centred).mean(axes, keepdim=True).sqrt() + 1e-9)


# -------------------------------------------------------------------------------------------------------------- scale


def _scale_axis(op: Op) -> int:
    return int(op["axis"])


def _scale_shape(op: Op) -> Shape:
    if not -1 <= op["axis"] < len(op.in_shape) or not op.in_shape:
        raise ValueError(f"axis {op['axis']} of {op.in_shape}")
    return op.in_shape


def _scale_tensors(op: Op) -> dict[str, Shape]:
    channels = (op.in_shape[op["axis"]],)
    return {"weight": channels} | ({"bias": channels} if op.bias else {})


def _scale_macs(op: Op) -> int:
    """One per element."""
    return op.elements


def _along(op: Op, tensor: Tensor) -> Tensor:
    """(C,) -> to be multiplied with (N, ...)."""
    behind = len(op.shape) - 1 - op["axis"] % len(op.shape)
    return tensor.reshape(-1, *(1,) * behind)


def _scale(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    scaled = inputs[0] * _along(op, tensors[f"{op.owner}.weight"])
    return scaled + _along(op, tensors[f"{op.owner}.bias"]) if op.bias else scaled


def _pull_scale(op: Op, tensors: Tensors) -> Pull:
    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        return [Flow(flow.gradient * _along(op, tensors[f"{op.owner}.weight"]), fresh=True)]

    return pull


def _scale_onnx(op: Op, w: Any) -> None:
    behind = len(op.shape) - 1 - op["axis"] % len(op.shape)
    product = w.inner(op, "scaled") if op.bias else w.output(op)
    arrays = {what: w.array(f"{op.owner}.{what}").reshape(-1, *(1,) * behind) for what in _scale_tensors(op)}
    w.node("Mul", [*w.inputs(op), w.constant(op, "scale", arrays["weight"])], product)
    if op.bias:
        w.node("Add", [product, w.constant(op, "shift", arrays["bias"])], w.output(op))


register(
    Operator(
        kind="batchnorm",
        doc="(x - mean) / sqrt(var + eps) * weight + bias by stored statistics; folded in deploy form",
        args={"axis": int, "eps": float},
        tensors=_batchnorm_tensors,
        shape=_batchnorm_shape,
        macs=_scale_macs,
        keeps=keeps_input,
        forward=_batchnorm,
        forward_training=_batchnorm_training,
        statistics=("running_mean", "running_var"),
        onnx=None,
        aten={
            "batch_norm.default": _aten_batchnorm,
            "_native_batch_norm_legit_no_training.default": _aten_native_batchnorm,
        },
        from_onnx={
            "BatchNormalization": Reading(_read_batchnorm, ("-", "weight", "bias", "running_mean", "running_var"))
        },
    ),
    Operator(
        kind="layernorm",
        doc="each token by its own mean and variance, over the last axes",
        args={"axes": int, "eps": float},
        shape=_layernorm_shape,
        macs="a mean, a variance and a division; not a multiply-accumulate by a weight",
        keeps=keeps_input,
        forward=_layernorm,
        onnx=_layernorm_onnx,
        aten={"layer_norm.default": _aten_layernorm, "native_layer_norm.default": _aten_native_layernorm},
        from_onnx={"LayerNormalization": Reading(_read_layernorm, ("-", "weight", "bias"))},
    ),
    Operator(
        kind="groupnorm",
        doc="groups of channels by their own mean and variance; as many groups as channels: InstanceNorm",
        args={"groups": int, "eps": float},
        shape=_groupnorm_shape,
        macs="a mean, a variance and a division; not a multiply-accumulate by a weight",
        keeps=keeps_input,
        forward=_groupnorm,
        onnx=_groupnorm_onnx,
        aten={"group_norm.default": _aten_groupnorm, "instance_norm.default": _aten_instancenorm},
        from_onnx={
            "InstanceNormalization": Reading(_read_instancenorm, ("-", "weight", "bias")),
            "GroupNormalization": Reading(_read_groupnorm, ("-", "weight", "bias")),
            "LRN": Reading(_read_lrn),
            "MeanVarianceNormalization": Reading(_read_standardised),
        },
    ),
    Operator(
        kind="scale",
        doc="x * weight + bias per channel: what is left of a norm, or a layer scale",
        fields=("bias",),
        args={"axis": int},
        tensors=_scale_tensors,
        shape=_scale_shape,
        macs=_scale_macs,
        keeps=keeps_nothing,
        trains=True,
        candidate=False,
        channel_axis=_scale_axis,
        depthwise=lambda op: True,
        forward=_scale,
        pull=_pull_scale,
        onnx=_scale_onnx,
        aten={},
    ),
)
