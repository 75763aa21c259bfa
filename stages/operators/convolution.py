"""Convolutions over one or two spatial axes, grouped, depthwise, dilated and transposed."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from stages.operators.op import Flow, Kept, Op, Operator, Pull, Reading, Shape, Tensors, keeps_nothing, register
from stages.operators.reach import within_reach

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = ("kernel", "stride", "padding", "dilation")


def window(size: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False) -> int:
    """Output length of a convolution or pooling along one axis (PyTorch's rule, also with `ceil_mode`)."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (-(-span // stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (out - 1) * stride >= size + padding:  # a window must begin inside the map or the left padding
        out -= 1
    return out


def check_map(op: Op, *fields: str) -> int:
    """Number of spatial axes of a map's operator. Raises ValueError where the attributes do not fit the input."""
    axes = len(op.in_shape) - 1
    if axes not in (1, 2):
        raise ValueError(f"an input {op.in_shape}, a map (C, T) or (C, H, W) is needed")
    for name in fields:
        values = getattr(op, name)
        if len(values) != axes:
            raise ValueError(f"{name} {values} for {axes} spatial axes")
        if min(values) < (0 if name == "padding" else 1):
            raise ValueError(f"{name} {values}")
    return axes


def _sizes(op: Op) -> Shape:
    spatial = zip(op.in_shape[1:], op.kernel, op.stride, op.padding, op.dilation, strict=True)
    sizes = tuple(window(*axis) for axis in spatial)
    if min(sizes) < 1:
        raise ValueError(f"a kernel {op.kernel} that does not fit the map {op.in_shape[1:]}")
    return sizes


def _conv_shape(op: Op) -> Shape:
    check_map(op, *WINDOW)
    channels = op.shape[0]
    if op.groups < 1 or op.in_shape[0] % op.groups or channels % op.groups:
        raise ValueError(f"{op.groups} groups for {op.in_shape[0]} -> {channels} channels")
    return (channels, *_sizes(op))


def _conv_tensors(op: Op) -> dict[str, Shape]:
    weight = {"weight": (op.shape[0], op.in_shape[0] // op.groups, *op.kernel)}
    return weight | ({"bias": op.shape[:1]} if op.bias else {})


def _conv_macs(op: Op) -> int:
    """Every weight is used once per output position, padding included (as fvcore and TinyTrain count)."""
    return op.weights * prod(op.shape[1:])


def is_depthwise(op: Op) -> bool:
    """One input channel and one output channel per group."""
    return op.groups > 1 and op.groups == op.in_shape[0] == op.shape[0]


def _is_matrix(op: Op) -> bool:
    return op.groups == 1 and prod(op.kernel) == 1 and not any(op.padding)


def _conv(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    bias = tensors[f"{op.owner}.bias"] if op.bias else None
    op, weight = within_reach(op, tensors[f"{op.owner}.weight"])
    convolve = F.conv1d if len(op.kernel) == 1 else F.conv2d
    return convolve(inputs[0], weight, bias, op.stride, op.padding, op.dilation, op.groups)


def _pull_conv(op: Op, tensors: Tensors) -> Pull:
    """The transposed convolution of the output gradient; for 1x1 convolutions, one matrix product."""
    from torch.nn import functional as F

    if _is_matrix(op) and set(op.stride) == {1}:
        matrix = tensors[f"{op.owner}.weight"].flatten(1)
        return lambda kept, flow: [Flow((flow.gradient.movedim(1, -1) @ matrix).movedim(-1, 1), fresh=True)]
    op, weight = within_reach(op, tensors[f"{op.owner}.weight"])
    spatial = zip(op.in_shape[1:], op.shape[1:], op.kernel, op.stride, op.padding, op.dilation, strict=True)
    unread = [
        size - ((out - 1) * step - 2 * pad + apart * (taps - 1) + 1) for size, out, taps, step, pad, apart in spatial
    ]
    transposed = F.conv_transpose1d if len(op.kernel) == 1 else F.conv_transpose2d

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        spread = transposed(flow.gradient, weight, None, op.stride, op.padding, unread, op.groups, op.dilation)
        return [Flow(spread, fresh=True)]

    return pull


def _conv_onnx(op: Op, w: Any) -> None:
    w.node("Conv", [*w.inputs(op), *w.weights(op)], w.output(op), **window_attributes(op), group=op.groups)


def window_attributes(op: Op, *, dilated: bool = True) -> dict[str, Any]:
    """ONNX's attributes of a window."""
    found: dict[str, Any] = {"kernel_shape": op.kernel, "strides": op.stride, "pads": (*op.padding, *op.padding)}
    return found | ({"dilations": op.dilation} if dilated else {})


# ------------------------------------------------------------------------------------------------------ transposed


def _transposed_shape(op: Op) -> Shape:
    check_map(op, *WINDOW)
    channels, extra = op.shape[0], op["output_padding"]
    if op.groups < 1 or op.in_shape[0] % op.groups or channels % op.groups:
        raise ValueError(f"{op.groups} groups for {op.in_shape[0]} -> {channels} channels")
    spatial = zip(op.in_shape[1:], op.kernel, op.stride, op.padding, op.dilation, extra, strict=True)
    if any(not 0 <= e < s for e, s in zip(extra, op.stride, strict=True)):
        raise ValueError(f"output_padding {extra}, below the stride {op.stride} is needed")
    sizes = tuple((size - 1) * s - 2 * p + d * (k - 1) + e + 1 for size, k, s, p, d, e in spatial)
    if min(sizes) < 1:
        raise ValueError(f"a kernel {op.kernel} that does not fit the map {op.in_shape[1:]}")
    return (channels, *sizes)


def _transposed_tensors(op: Op) -> dict[str, Shape]:
    weight = {"weight": (op.in_shape[0], op.shape[0] // op.groups, *op.kernel)}
    return weight | ({"bias": op.shape[:1]} if op.bias else {})


def _transposed_macs(op: Op) -> int:
    """Every weight is used once per input position."""
    return op.weights * prod(op.in_shape[1:])


def _transposed(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    weight, bias = tensors[f"{op.owner}.weight"], tensors[f"{op.owner}.bias"] if op.bias else None
    convolve = F.conv_transpose1d if len(op.kernel) == 1 else F.conv_transpose2d
    extra = list(op["output_padding"])
    return convolve(inputs[0], weight, bias, op.stride, op.padding, extra, op.groups, op.dilation)


def _pull_transposed(op: Op, tensors: Tensors) -> Pull:
    """The plain convolution of the output gradient."""
    from torch.nn import functional as F

    weight = tensors[f"{op.owner}.weight"]
    convolve = F.conv1d if len(op.kernel) == 1 else F.conv2d

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        found = convolve(flow.gradient, weight, None, op.stride, op.padding, op.dilation, op.groups)
        return [Flow(found, fresh=True)]

    return pull


def _transposed_onnx(op: Op, w: Any) -> None:
    extra = {"output_padding": op["output_padding"], "group": op.groups}
    w.node("ConvTranspose", [*w.inputs(op), *w.weights(op)], w.output(op), **window_attributes(op), **extra)


# ------------------------------------------------------------------------------------------------------------ capture


def _aten_conv(
    call: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    kernel = call.tensor_shape(weight)[2:]
    axes = len(kernel)
    if axes > 2:
        call.refuse(f"a convolution over {axes} axes", "1 or 2 spatial axes")
    return call.emit(
        "conv", [call.map(x, axes)], own={"weight": weight, "bias": bias},
        out_channels=call.tensor_shape(weight)[0],
        kernel=kernel, stride=per_axis(stride, axes), padding=per_axis(padding, axes),
        dilation=per_axis(dilation, axes), groups=groups, bias=bias is not None,
    )  # fmt: skip


def _aten_same(
    call: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: str = "valid", dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    """`same` and `valid` as numbers; an odd total pads the end more, which only a padding of its own can do."""
    kernel = call.tensor_shape(weight)[2:]
    apart = per_axis(dilation, len(kernel))
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, apart, strict=True)]
    if any(amount % 2 for amount in total):
        x = call.emit(
            "pad", [call.map(x, len(kernel))], before=(0, *(0 for _ in total)), after=(0, *(t % 2 for t in total)),
            mode="constant", value=0.0,
        )  # fmt: skip
    return _aten_conv(call, x, weight, bias, stride, tuple(amount // 2 for amount in total), apart, groups)


def _aten_transposed(
    call: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    _, per_group, *kernel = call.tensor_shape(weight)
    axes = len(kernel)
    if axes > 2:
        call.refuse(f"a transposed convolution over {axes} axes", "1 or 2 spatial axes")
    return call.emit(
        "conv_transpose", [call.map(x, axes)], own={"weight": weight, "bias": bias}, out_channels=per_group * groups,
        kernel=tuple(kernel), stride=per_axis(stride, axes), padding=per_axis(padding, axes),
        dilation=per_axis(dilation, axes), groups=groups, bias=bias is not None,
        output_padding=per_axis(output_padding, axes),
    )  # fmt: skip


def _aten_convolution(
    call: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Any:  # fmt: skip
    if transposed:
        return _aten_transposed(call, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _aten_conv(call, x, weight, bias, stride, padding, dilation, groups)


# ------------------------------------------------------------------------------------------------------ ONNX, reading


def read_window(
    node: Any, x: Any, kernel: Sequence[int], value: float = 0.0
) -> tuple[Any, list[int], list[int], list[int]]:
    """The input of a window with what one end is padded more, the padding of both ends, stride and dilation."""
    axes = len(kernel)
    stride, dilation = node.get("strides") or [1] * axes, node.get("dilations") or [1] * axes
    before, after = read_pads(node, x.shape[2:], kernel, stride, dilation)
    x, padding = _padded(x, before, after, value)
    return x, padding, list(stride), list(dilation)


def read_pads(
    node: Any, sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis, `auto_pad` in numbers."""
    axes, how = len(kernel), node.get("auto_pad", "NOTSET")
    if how == "VALID":
        return [0] * axes, [0] * axes
    if how == "NOTSET":
        pads = node.get("pads") or [0] * (2 * axes)
        return list(pads[:axes]), list(pads[axes:])
    spans = zip(sizes, kernel, stride, dilation, strict=True)
    total = [max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0) for size, k, s, d in spans]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (small, large) if how == "SAME_UPPER" else (large, small)


def _padded(x: Any, before: Sequence[int], after: Sequence[int], value: float) -> tuple[Any, list[int]]:
    """The input with what one end has more than the other, and the padding that both have."""
    from torch.nn import functional as F

    both = [min(pair) for pair in zip(before, after, strict=True)]
    extra = [(b - c, a - c) for b, a, c in zip(before, after, both, strict=True)]
    if any(map(any, extra)):
        x = F.pad(x, [amount for pair in reversed(extra) for amount in pair], value=value)
    return x, both


def _read_conv(node: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    from torch.nn import functional as F

    kernel = list(weight.shape[2:])
    if len(kernel) not in (1, 2):
        node.refuse(f"a convolution over {len(kernel)} axes", "1 or 2 spatial axes")
    x, padding, stride, dilation = read_window(node, x, kernel)
    convolve = F.conv1d if len(kernel) == 1 else F.conv2d
    return convolve(x, weight, bias, stride, padding, dilation, node.get("group", 1))


def _read_transposed(node: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    from torch.nn import functional as F

    kernel, axes = list(weight.shape[2:]), weight.ndim - 2
    if axes not in (1, 2):
        node.refuse(f"a transposed convolution over {axes} axes", "1 or 2 spatial axes")
    stride, dilation = node.get("strides") or [1] * axes, node.get("dilations") or [1] * axes
    extra = node.get("output_padding") or [0] * axes
    whole = [
        (n - 1) * s + d * (k - 1) + 1 + e
        for n, k, s, d, e in zip(x.shape[2:], kernel, stride, dilation, extra, strict=True)
    ]
    how, wanted = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if wanted or how.startswith("SAME"):
        wanted = wanted or [n * s for n, s in zip(x.shape[2:], stride, strict=True)]
        total = [w - t for w, t in zip(whole, wanted, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        before, after = (small, large) if how == "SAME_UPPER" else (large, small)
    else:
        before, after = read_pads(node, x.shape[2:], kernel, stride, dilation)
    convolve = F.conv_transpose1d if axes == 1 else F.conv_transpose2d
    same, group = before == after and min(before) >= 0, node.get("group", 1)
    y = convolve(x, weight, bias, stride, before if same else 0, extra, group, dilation)
    cut = [-amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]
    return y if same else F.pad(y, cut)


def per_axis(value: Any, length: int) -> Shape:
    """One entry per spatial axis, as torch reads `3`, `(3,)` and `(3, 3)`."""
    if isinstance(value, int):
        return (value,) * length
    return tuple(value) * length if len(value) == 1 else tuple(value)


register(
    Operator(
        kind="conv",
        doc="convolution over 1 or 2 spatial axes: stride, zero padding, dilation, groups, depthwise",
        fields=(*WINDOW, "groups", "bias"),
        tensors=_conv_tensors,
        shape=_conv_shape,
        macs=_conv_macs,
        keeps=keeps_nothing,
        trains=True,
        depthwise=is_depthwise,
        matrix=_is_matrix,
        forward=_conv,
        pull=_pull_conv,
        onnx=_conv_onnx,
        aten={
            "conv1d.default": _aten_conv,
            "conv2d.default": _aten_conv,
            "conv1d.padding": _aten_same,
            "conv2d.padding": _aten_same,
            "convolution.default": _aten_convolution,
        },
        from_onnx={"Conv": Reading(_read_conv, ("-", "weight", "bias"))},
    ),
    Operator(
        kind="conv_transpose",
        doc="transposed convolution over 1 or 2 spatial axes",
        fields=(*WINDOW, "groups", "bias"),
        args={"output_padding": tuple},
        tensors=_transposed_tensors,
        shape=_transposed_shape,
        macs=_transposed_macs,
        keeps=keeps_nothing,
        trains=True,
        depthwise=is_depthwise,
        input_first=True,
        forward=_transposed,
        pull=_pull_transposed,
        onnx=_transposed_onnx,
        aten={"conv_transpose1d.default": _aten_transposed, "conv_transpose2d.input": _aten_transposed},
        from_onnx={"ConvTranspose": Reading(_read_transposed, ("-", "weight", "bias"))},
    ),
)
