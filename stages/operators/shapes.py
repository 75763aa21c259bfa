"""Operators that move values and compute none: reshaping, reordering, joining, cutting, padding, enlarging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from stages.operators.op import Flow, Kept, Op, Operator, Pull, Reading, Shape, Tensors, keeps_nothing, register

if TYPE_CHECKING:
    from torch import Tensor


def broadcast(a: Shape, b: Shape) -> Shape:
    """numpy's rule for two shapes. Raises ValueError where they do not fit.

    >>> broadcast((8, 1, 1), (8, 4, 4)), broadcast((), (3,))
    ((8, 4, 4), (3,))
    """
    size = max(len(a), len(b))
    a, b = (1,) * (size - len(a)) + a, (1,) * (size - len(b)) + b
    if any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
        raise ValueError(f"{a} beside {b}")
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def reduced(gradient: Tensor, shape: Shape) -> Tensor:
    """The gradient (N, ...) of a value (N, *shape) that was broadcast: summed over the axes it was repeated along."""
    extra = gradient.ndim - 1 - len(shape)
    if extra:
        gradient = gradient.sum(tuple(range(1, 1 + extra)))
    repeated = [i + 1 for i, size in enumerate(shape) if size == 1 and gradient.shape[i + 1] != 1]
    return gradient.sum(repeated, keepdim=True) if repeated else gradient


# ---------------------------------------------------------------------------------------------------- input, constant


def _given(op: Op) -> Shape:
    return op.shape


def _input(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return inputs[0]


def _constant_tensors(op: Op) -> dict[str, Shape]:
    return {"value": op.shape}


def _constant(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return tensors[f"{op.owner}.value"].unsqueeze(0)


def _constant_onnx(op: Op, w: Any) -> None:
    w.rename(op, w.constant(op, "batched", w.array(f"{op.owner}.value")[None]))


# -------------------------------------------------------------------------------------------------- reshape, permute


def _flatten_shape(op: Op) -> Shape:
    if not op.in_shape:
        raise ValueError("a number per sample, at least a vector is needed")
    return (prod(op.in_shape),)


def _flatten(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return inputs[0].flatten(1)


def _reshape_shape(op: Op) -> Shape:
    shape: Shape = tuple(op["to"])
    if prod(shape) != prod(op.in_shape):
        raise ValueError(f"{op.in_shape} as {shape}")
    return shape


def _reshape(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return inputs[0].reshape(-1, *op.shape)


def _pull_reshape(op: Op, tensors: Tensors) -> Pull:
    return lambda kept, flow: [Flow(flow.gradient.reshape(-1, *op.in_shape), fresh=False)]


def _permute_shape(op: Op) -> Shape:
    if sorted(op["order"]) != list(range(len(op.in_shape))):
        raise ValueError(f"order {op['order']} of the axes of {op.in_shape}")
    return tuple(op.in_shape[axis] for axis in op["order"])


def _permute(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return inputs[0].permute(0, *(axis + 1 for axis in op["order"]))


def _pull_permute(op: Op, tensors: Tensors) -> Pull:
    back = [0, *(op["order"].index(axis) + 1 for axis in range(len(op.shape)))]
    return lambda kept, flow: [Flow(flow.gradient.permute(back), fresh=False)]


def _expand_shape(op: Op) -> Shape:
    shape: Shape = tuple(op["to"])
    if broadcast(op.in_shape, shape) != shape:
        raise ValueError(f"{op.in_shape} repeated to {shape}")
    return shape


def _expand(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    x = inputs[0]
    return x.reshape(x.shape[0], *(1,) * (len(op.shape) - len(op.in_shape)), *op.in_shape).expand(-1, *op.shape)


def _pull_expand(op: Op, tensors: Tensors) -> Pull:
    return lambda kept, flow: [Flow(reduced(flow.gradient, op.in_shape), fresh=op.shape != op.in_shape)]


# ------------------------------------------------------------------------------------------------------ concat, slice


def _concat_shape(op: Op) -> Shape:
    axis, first = op["axis"], op.in_shape
    if not 0 <= axis < len(first):
        raise ValueError(f"axis {axis} of {first}")
    for other in op.in_shapes:
        if len(other) != len(first) or other[:axis] + other[axis + 1 :] != first[:axis] + first[axis + 1 :]:
            raise ValueError(f"{first} beside {other} along axis {axis}")
    return (*first[:axis], sum(shape[axis] for shape in op.in_shapes), *first[axis + 1 :])


def _concat(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    import torch

    batch = max(x.shape[0] for x in inputs)
    return torch.cat([x.expand(batch, *x.shape[1:]) for x in inputs], op["axis"] + 1)


def _pull_concat(op: Op, tensors: Tensors) -> Pull:
    sizes = [shape[op["axis"]] for shape in op.in_shapes]
    return lambda kept, flow: [Flow(part, False) for part in flow.gradient.split_with_sizes(sizes, op["axis"] + 1)]


def _slice_shape(op: Op) -> Shape:
    axis, start, stop, step = op["axis"], op["start"], op["stop"], op["step"]
    if not 0 <= axis < len(op.in_shape) or step < 1 or not 0 <= start < stop <= op.in_shape[axis]:
        raise ValueError(f"{start}:{stop}:{step} of axis {axis} of {op.in_shape}")
    count = -(-(stop - start) // step)
    if count == op.in_shape[axis]:
        raise ValueError(f"a slice that takes all of axis {axis} of {op.in_shape}")
    return (*op.in_shape[:axis], count, *op.in_shape[axis + 1 :])


def _cut(op: Op) -> tuple[slice, ...]:
    return (*(slice(None) for _ in range(op["axis"] + 1)), slice(op["start"], op["stop"], op["step"]))


def _slice(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return inputs[0][_cut(op)]


def _pull_slice(op: Op, tensors: Tensors) -> Pull:
    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        whole = flow.gradient.new_zeros(len(flow.gradient), *op.in_shape)
        whole[_cut(op)] = flow.gradient
        return [Flow(whole, fresh=True)]

    return pull


def _take_shape(op: Op) -> Shape:
    axis, index = op["axis"], op["index"]
    if not 0 <= axis < len(op.in_shape) or not index or not all(0 <= i < op.in_shape[axis] for i in index):
        raise ValueError(f"entries {str(index)[:40]} of axis {axis} of {op.in_shape}")
    return (*op.in_shape[:axis], len(index), *op.in_shape[axis + 1 :])


def _take(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    import torch

    index = torch.tensor(op["index"], device=inputs[0].device)
    return inputs[0].index_select(op["axis"] + 1, index)


def _take_onnx(op: Op, w: Any) -> None:
    w.node(
        "Gather", [*w.inputs(op), w.constant_of_integers(op, "index", op["index"])], w.output(op), axis=op["axis"] + 1
    )


# ---------------------------------------------------------------------------------------------------- pad, roll, grow

MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": ""}
"""Torch's names of padding modes -> ONNX's, where it has one."""


def _pad_shape(op: Op) -> Shape:
    if op["mode"] not in MODES or not len(op["before"]) == len(op["after"]) == len(op.in_shape):
        raise ValueError(f"padding {op['before']}, {op['after']}, {op['mode']!r} of {op.in_shape}")
    if op["mode"] != "constant":
        _check_copies(op)
    shape = tuple(b + size + a for b, size, a in zip(op["before"], op.in_shape, op["after"], strict=True))
    if min(shape) < 1:
        raise ValueError(f"padding {op['before']}, {op['after']} of {op.in_shape}")
    return shape


def _check_copies(op: Op) -> None:
    """Borders are copied along the last two axes at most, from what is there."""
    most = {"reflect": -1, "circular": 0}.get(op["mode"])
    for axis, (size, *amounts) in enumerate(zip(op.in_shape, op["before"], op["after"], strict=True)):
        beyond = most is not None and max(amounts) > size + most
        if min(amounts) < 0 or beyond or (any(amounts) and axis < len(op.in_shape) - 2) or len(op.in_shape) > 3:
            raise ValueError(f"padding {op['before']}, {op['after']} of {op.in_shape} by copies ({op['mode']})")


def _pad(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    pairs = list(zip(op["before"], op["after"], strict=True))
    if op["mode"] != "constant":
        pairs = pairs[-2:]  # torch wants the axes that can be padded, and all of them
    amounts = [amount for pair in reversed(pairs) for amount in pair]
    if op["mode"] == "constant":
        return F.pad(inputs[0], amounts, value=op["value"])
    return F.pad(inputs[0], amounts, mode=op["mode"])


def _pull_pad(op: Op, tensors: Tensors) -> Pull:
    """Zeros and constants give nothing back; copied borders are added to what they were copied from."""
    if op["mode"] == "constant":
        cut = [slice(max(b, 0), max(b, 0) + size) for b, size in zip(op["before"], op.in_shape, strict=True)]
        if min(*op["before"], *op["after"]) >= 0:
            return lambda kept, flow: [Flow(flow.gradient[(slice(None), *cut)], fresh=False)]
    return linear_pull(op, tensors)


def linear_pull(op: Op, tensors: Tensors) -> Pull:
    """The transpose of an operator that is linear in its input, from torch: no value is needed for it."""
    import torch

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        with torch.enable_grad():
            zero = flow.gradient.new_zeros(len(flow.gradient), *op.in_shape).requires_grad_()
            (found,) = torch.autograd.grad(op.operator.forward(op, [zero], tensors), zero, flow.gradient)
        return [Flow(found, fresh=True)]

    return pull


def _pad_onnx(op: Op, w: Any) -> None:
    if op["mode"] == "circular":
        _wrapped_onnx(op, w)
        return
    amounts = w.integers([0, *op["before"], 0, *op["after"]])
    value = op["value"]
    if value == 0 and w.read_by(op, "max_pool"):
        value = SMALLEST
    inputs = [*w.inputs(op), amounts] + ([w.number(value)] if op["mode"] == "constant" else [])
    w.node("Pad", inputs, w.output(op), mode=MODES[op["mode"]])


SMALLEST = 1.1754943508222875e-38
"""Stands for 0 where maxima follow: onnxruntime merges a border of zeros into their windows, which then have none."""


def _wrapped_onnx(op: Op, w: Any) -> None:
    """Both ends beside the value, axis by axis: opset 17 has no circular padding."""
    (last,) = w.inputs(op)
    last_axis = len(op.shape) - 1
    for axis, (size, before, after) in enumerate(zip(op.in_shape, op["before"], op["after"], strict=True)):
        parts = [w.inner(op, f"tail{axis}"), last, w.inner(op, f"head{axis}")]
        for name, start, stop in ((parts[0], size - before, size), (parts[2], 0, after)):
            w.node("Slice", [last, *map(w.integers, ([start], [stop], [axis + 1]))], name)
        last = w.output(op) if axis == last_axis else w.inner(op, f"wrapped{axis}")
        w.node("Concat", parts, last, axis=axis + 1)


def _roll_shape(op: Op) -> Shape:
    if len(op["shifts"]) != len(op["axes"]) or not all(0 <= axis < len(op.in_shape) for axis in op["axes"]):
        raise ValueError(f"shifts {op['shifts']} along axes {op['axes']} of {op.in_shape}")
    return op.in_shape


def _roll(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return inputs[0].roll(op["shifts"], [axis + 1 for axis in op["axes"]])


def _pull_roll(op: Op, tensors: Tensors) -> Pull:
    back, axes = [-shift for shift in op["shifts"]], [axis + 1 for axis in op["axes"]]
    return lambda kept, flow: [Flow(flow.gradient.roll(back, axes), fresh=True)]


def _roll_onnx(op: Op, w: Any) -> None:
    (last,) = w.inputs(op)
    for i, (shift, axis) in enumerate(zip(op["shifts"], op["axes"], strict=True)):
        size = op.shape[axis]
        cut, final = (-shift) % size, i == len(op["axes"]) - 1
        parts = []
        for name, start, stop in (("tail", cut, size), ("head", 0, cut)):
            parts.append(w.inner(op, f"{name}{i}"))
            w.node("Slice", [last, *map(w.integers, ([start], [stop], [axis + 1]))], parts[-1])
        last = w.output(op) if final else w.inner(op, f"rolled{i}")
        w.node("Concat", parts, last, axis=axis + 1)


GROWTH = {"nearest": (1, 2), "linear": (1,), "bilinear": (2,), "bicubic": (2,)}
"""Modes -> over how many axes."""


def _upsample_shape(op: Op) -> Shape:
    axes = len(op.in_shape) - 1
    if axes not in GROWTH.get(op["mode"], ()) or len(op["size"]) != axes or min(op["size"]) < 1:
        raise ValueError(f"{op.in_shape} enlarged to {op['size']} by {op['mode']!r}")
    return (op.in_shape[0], *op["size"])


def _upsample(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    corners = None if op["mode"] == "nearest" else bool(op["align_corners"])
    return F.interpolate(inputs[0], size=list(op["size"]), mode=op["mode"], align_corners=corners)


def _upsample_onnx(op: Op, w: Any) -> None:
    mode = {"nearest": "nearest", "bicubic": "cubic"}.get(op["mode"], "linear")
    half = "asymmetric" if mode == "nearest" else "align_corners" if op["align_corners"] else "half_pixel"
    more = {"nearest_mode": "floor"} if mode == "nearest" else {"cubic_coeff_a": -0.75} if mode == "cubic" else {}
    sizes = w.sizes(op.shape)
    w.node(
        "Resize", [*w.inputs(op), "", "", sizes], w.output(op), coordinate_transformation_mode=half, mode=mode, **more
    )


# --------------------------------------------------------------------------------------------------------------- ONNX


def _reshape_onnx(op: Op, w: Any) -> None:
    w.node("Reshape", [*w.inputs(op), w.integers([-1, *op.shape])], w.output(op))


def _flatten_onnx(op: Op, w: Any) -> None:
    w.node("Flatten", w.inputs(op), w.output(op), axis=1)


def _permute_onnx(op: Op, w: Any) -> None:
    w.node("Transpose", w.inputs(op), w.output(op), perm=[0, *(axis + 1 for axis in op["order"])])


def _expand_onnx(op: Op, w: Any) -> None:
    (source,) = w.inputs(op)
    missing = len(op.shape) - len(op.in_shape)
    if missing:
        w.node("Unsqueeze", [source, w.integers(range(1, 1 + missing))], w.inner(op, "wide"))
        source = w.inner(op, "wide")
    w.node("Expand", [source, w.integers([1, *op.shape])], w.output(op))


def _concat_onnx(op: Op, w: Any) -> None:
    w.node("Concat", w.batched_inputs(op), w.output(op), axis=op["axis"] + 1)


def _slice_onnx(op: Op, w: Any) -> None:
    bounds = ([op["start"]], [op["stop"]], [op["axis"] + 1], [op["step"]])
    w.node("Slice", [*w.inputs(op), *map(w.integers, bounds)], w.output(op))


# ------------------------------------------------------------------------------------------------------------ capture


def _aten_reshape(call: Any, x: Any, *_: Any, **__: Any) -> Any:
    """Reshapes keep the elements' order, so only the outcome matters."""
    return call.reshape(x)


def _aten_permute(call: Any, x: Any, dims: Any) -> Any:
    return call.permute(x, [dim % call.rank(x) for dim in dims])


def _aten_transpose(call: Any, x: Any, first: int, second: int) -> Any:
    order = list(range(call.rank(x)))
    order[first % len(order)], order[second % len(order)] = order[second % len(order)], order[first % len(order)]
    return call.permute(x, order)


def _aten_t(call: Any, x: Any) -> Any:
    return call.permute(x, list(range(call.rank(x)))[::-1])


def _aten_expand(call: Any, x: Any, *_: Any, **__: Any) -> Any:
    return call.expand(x)


def _aten_cat(call: Any, tensors: Any, dim: int = 0) -> Any:
    values = call.side_by_side(tensors)
    return call.emit("concat", values, axis=call.axis(call.first_value(tensors), dim)) if len(values) > 1 else values[0]


def _aten_hstack(call: Any, tensors: Any) -> Any:
    return _aten_cat(call, tensors, min(1, call.rank(call.first_value(tensors)) - 1))


def _aten_stack(call: Any, tensors: Any, dim: int = 0) -> Any:
    rank = call.rank(call.first_value(tensors)) + 1
    return _aten_cat(call, [call.apply("unsqueeze.default", part, dim % rank) for part in tensors], dim % rank)


def _aten_slice(call: Any, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    size = call.full_size(x, dim)
    low, high = _bound(start, size, 0), _bound(end, size, size)
    return call.cut(x, dim, low, high, step)


def _bound(value: int | None, size: int, default: int) -> int:
    if value is None:
        return default
    return min(max(value + size if value < 0 else value, 0), size)


def _aten_narrow(call: Any, x: Any, dim: int, start: int, length: int) -> Any:
    return _aten_slice(call, x, dim, start, start + length)


def _aten_select(call: Any, x: Any, dim: int, index: int) -> Any:
    index %= call.full_size(x, dim)
    return call.reshape(call.cut(x, dim, index, index + 1, 1))


def _aten_slice_scatter(
    call: Any, x: Any, part: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    """`x` with a range of one axis replaced: what an in-place change of a slice is."""
    size = call.full_size(x, dim)
    low, high = _bound(start, size, 0), _bound(end, size, size)
    if step != 1:
        call.refuse(f"an in-place change of every {step}th entry", "a range")
    before = [call.cut(x, dim, 0, low, 1)] if low > 0 else []
    after = [call.cut(x, dim, high, size, 1)] if high < size else []
    return call.apply("cat.default", [*before, part, *after], dim) if before or after else part


def _aten_index_select(call: Any, x: Any, dim: int, index: Any) -> Any:
    numbers = tuple(int(i) for i in call.numbers(index))
    return call.emit("take", [call.value(x)], axis=call.axis(x, dim), index=numbers)


def _aten_flip(call: Any, x: Any, dims: Any) -> Any:
    for dim in dims:
        axis = call.axis(x, dim)
        x = call.emit("take", [x], axis=axis, index=tuple(reversed(range(x.shape[axis]))))
    return x


def _aten_index(call: Any, x: Any, indices: Any) -> Any:
    """`x[:, index]`, of one axis and fixed numbers."""
    axes = [i for i, index in enumerate(indices) if index is not None]
    if len(axes) != 1 or len(call.numbers_shape(indices[axes[0]])) != 1:
        call.refuse("indexing along several axes", "one axis by a list of numbers")
    return _aten_index_select(call, x, axes[0], indices[axes[0]])


def _aten_unfold(call: Any, x: Any, dim: int, size: int, step: int) -> Any:
    """Windows along one axis, which becomes their number; their entries lie in a new last axis. Side by side only."""
    length = call.full_size(x, dim)
    count = (length - size) // step + 1
    if step != size:
        call.refuse(f"windows of {size} every {step}", "windows side by side")
    rank, dim = call.rank(x), dim % call.rank(x)
    x = call.cut(x, dim, 0, count * size, 1)
    parted = call.apply("unflatten.int", x, dim, [count, size])
    order = [*range(dim + 1), *range(dim + 2, rank + 1), dim + 1]
    return call.apply("permute.default", parted, order)


def _aten_im2col(call: Any, x: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    """Windows side by side as columns (C * kh * kw, positions)."""
    channels, height, width = call.map(x, 2).shape
    (kh, kw), apart = kernel, {*dilation, *padding}
    if list(kernel) != list(stride) or apart != {0, 1} or height % kh or width % kw:
        call.refuse(f"unfolding by {list(kernel)} every {list(stride)}", "windows side by side that fill the map")
    x = call.emit("reshape", [x], to=(channels, height // kh, kh, width // kw, kw))
    x = call.emit("permute", [x], order=(0, 2, 4, 1, 3))
    return call.emit("reshape", [x], to=(channels * kh * kw, (height // kh) * (width // kw)))


def _aten_col2im(call: Any, x: Any, size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    """The way back."""
    (height, width), (kh, kw), apart = size, kernel, {*dilation, *padding}
    if list(kernel) != list(stride) or apart != {0, 1} or height % kh or width % kw:
        call.refuse(f"folding by {list(kernel)} every {list(stride)}", "windows side by side that fill the map")
    x = call.value(x)
    channels = x.shape[0] // (kh * kw)
    x = call.emit("reshape", [x], to=(channels, kh, kw, height // kh, width // kw))
    x = call.emit("permute", [x], order=(0, 3, 1, 4, 2))
    return call.emit("reshape", [x], to=(channels, height, width))


def _aten_chunk(call: Any, x: Any, chunks: int, dim: int = 0) -> list[Any]:
    size = call.full_size(x, dim)
    return _aten_split(call, x, -(-size // chunks), dim)


def _aten_split(call: Any, x: Any, sizes: Any, dim: int = 0) -> list[Any]:
    size = call.full_size(x, dim)
    if isinstance(sizes, int):
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [call.cut(x, dim, start, start + length, 1) for start, length in zip(starts, sizes, strict=True)]


def _aten_unbind(call: Any, x: Any, dim: int = 0) -> list[Any]:
    pieces = [call.cut(x, dim, i, i + 1, 1) for i in range(call.full_size(x, dim))]
    return [call.apply("squeeze.dim", piece, dim) for piece in pieces]


def _aten_pad(call: Any, x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    value = 0.0 if value is None else float(value)
    rank = call.rank(x)
    before, after = [0] * rank, [0] * rank
    for i in range(len(pad) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pad[2 * i], pad[2 * i + 1]
    x = call.value(x)
    if not any(before) and not any(after):
        return x
    kept = call.per_sample_axes(x)
    if any(before[axis] or after[axis] for axis in range(rank) if axis not in kept):
        call.refuse("padding of the batch", "padding of the samples")
    return call.emit(
        "pad", [x], before=tuple(before[a] for a in kept), after=tuple(after[a] for a in kept), mode=mode, value=value
    )


def _aten_constant_pad(call: Any, x: Any, pad: Any, value: float = 0) -> Any:
    return _aten_pad(call, x, pad, "constant", value)


def _aten_pad_mode(mode: str) -> Any:
    return lambda call, x, pad: _aten_pad(call, x, pad, mode)


def _aten_roll(call: Any, x: Any, shifts: Any, dims: Any = ()) -> Any:
    if not dims:
        call.refuse("a roll over all elements", "a roll along dimensions", "name the dimensions")
    shifts, dims = (tuple([part] if isinstance(part, int) else part) for part in (shifts, dims))
    return call.emit("roll", [call.value(x)], shifts=shifts, axes=tuple(call.axis(x, dim) for dim in dims))


def _aten_upsample(mode: str, corners: bool) -> Any:
    def translate(call: Any, x: Any, size: Any = None, *rest: Any, **more: Any) -> Any:
        aligned = bool(rest[0]) if corners and rest and isinstance(rest[0], bool) else False
        aligned = bool(more.get("align_corners", aligned))
        target = call.out_shape()[1:]
        x = call.map(x, len(target))
        factors = [f for part in (*rest, *more.values()) for f in (part if isinstance(part, list | tuple) else [part])]
        scales = [factor for factor in factors if isinstance(factor, float)]
        pairs = zip(x.shape[1:], scales, target, strict=False)  # no factors where sizes were given
        if not aligned and any(abs(size * factor - out) > 1e-6 * out for size, factor, out in pairs):
            found = f"resizing {x.shape[1:]} by factors {tuple(scales)} that give no whole sizes"
            call.refuse(found, "sizes", "use size=..., or recompute_scale_factor=True")
        return call.emit("upsample", [x], size=tuple(target), mode=mode, align_corners=aligned)

    return translate


def _aten_detach(call: Any, x: Any) -> Any:
    if not hasattr(x, "tensor"):
        call.note("detach() is passed over: training sends gradients through it")
    return x


def _aten_drop(call: Any, x: Any, *_: Any, **__: Any) -> Any:
    """Copies, and casts: whole numbers are held as floats."""
    return call.cast(x)


def _aten_dropout(call: Any, x: Any, p: float, train: bool) -> Any:
    if train and p:
        call.refuse("dropout that is active in evaluation mode", "training=self.training")
    return x


# ------------------------------------------------------------------------------------------------------ ONNX, reading


def _read_same(node: Any, x: Any, *_: Any) -> Any:
    return x


def _read_dropout(node: Any, x: Any, ratio: Any = None, training: Any = None) -> Any:
    if node.results > 1 or (training is not None and node.number(training)):
        node.refuse("a dropout in training, or its mask", "a model exported in evaluation mode")
    return x


def _read_cast(node: Any, x: Any) -> Any:
    """Floats stay float32; whole numbers are what embeddings read."""
    import torch

    to = node.get("to")
    if to in (1, 10, 11, 16):  # the floating-point types
        return x if x.is_floating_point() else x.to(torch.float32)
    return x.to(torch.bool if to == 9 else torch.int64)


def _read_reshape(node: Any, x: Any, target: Any) -> Any:
    sizes = node.whole(target)
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _read_flatten(node: Any, x: Any) -> Any:
    axis = node.get("axis", 1)
    if axis % x.ndim == 1:
        return x.flatten(1)
    return x.reshape(prod(x.shape[: axis % x.ndim]), -1)


def _read_transpose(node: Any, x: Any) -> Any:
    return x.permute(node.get("perm") or list(range(x.ndim))[::-1])


def _read_squeeze(node: Any, x: Any, axes: Any = None) -> Any:
    found = node.axes(axes, x.ndim) or [axis for axis, size in enumerate(x.shape) if size == 1]
    return x.squeeze(found)


def _read_unsqueeze(node: Any, x: Any, axes: Any = None) -> Any:
    found = node.axes(axes)
    for axis in sorted(axis % (x.ndim + len(found)) for axis in found):
        x = x.unsqueeze(axis)
    return x


def _read_expand(node: Any, x: Any, target: Any) -> Any:
    sizes = node.whole(target)
    missing = max(x.ndim - len(sizes), 0)
    sizes = [1] * missing + sizes
    shape = (1,) * (len(sizes) - x.ndim) + tuple(x.shape)
    return x.expand([own if size == 1 else size for own, size in zip(shape, sizes, strict=True)])


def _read_tile(node: Any, x: Any, repeats: Any) -> Any:
    for axis, count in enumerate(node.whole(repeats)):
        x = x if count == 1 else x.new_empty(0) if count == 0 else _side_by_side([x] * count, axis)
    return x


def _side_by_side(parts: Sequence[Any], axis: int) -> Any:
    import torch

    return torch.cat(list(parts), axis)


def _read_concat(node: Any, *parts: Any) -> Any:
    import torch

    like = next(part for part in parts if isinstance(part, torch.Tensor))
    batch = max(part.shape[0] for part in parts)
    found = []
    for part in parts:
        part = part if isinstance(part, torch.Tensor) else torch.from_numpy(part)
        if part.numel() == 0:
            continue
        spread = part.shape[0] == 1 != batch and node.get("axis") % like.ndim != 0
        found.append(part.expand(batch, *part.shape[1:]) if spread else part)
    return _side_by_side(found, node.get("axis"))


def _read_slice(node: Any, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    starts, ends = node.whole(starts), node.whole(ends)
    over = [axis % x.ndim for axis in (range(len(starts)) if axes is None else node.whole(axes))]
    steps = [1] * len(starts) if steps is None else node.whole(steps)
    for start, end, axis, step in zip(starts, ends, over, steps, strict=True):
        picked = range(x.shape[axis])[start:end:step]
        if step < 0:
            x = _entries(x, axis, list(picked))
        elif len(picked) < x.shape[axis]:
            x = x[(*[slice(None)] * axis, slice(picked.start, picked.stop, step))]
    return x


def _entries(x: Any, axis: int, index: Sequence[int]) -> Any:
    import torch

    return x.index_select(axis, torch.tensor(list(index)))


def _read_gather(node: Any, x: Any, index: Any) -> Any:
    import numpy as np
    import torch

    axis = node.get("axis", 0) % x.ndim
    if isinstance(index, torch.Tensor):
        if not node.places or x.ndim != 2 or axis:
            node.refuse("entries that depend on the input's values", "fixed numbers, or an embedding of the input")
        return torch.nn.functional.embedding(index, x)
    numbers = np.asarray(index)
    if numbers.ndim == 0:
        return x.select(axis, int(numbers) % x.shape[axis])
    taken = _entries(x, axis, [int(i) % x.shape[axis] for i in numbers.reshape(-1)])
    return taken if numbers.ndim == 1 else taken.reshape(*x.shape[:axis], *numbers.shape, *x.shape[axis + 1 :])


def _read_split(node: Any, x: Any, sizes: Any = None) -> Any:
    axis = node.get("axis", 0) % x.ndim
    given = node.get("split") if sizes is None else node.whole(sizes)
    if given is None:
        each = -(-x.shape[axis] // node.results)
        given = [min(each, x.shape[axis] - i * each) for i in range(node.results)]
    return list(x.split(given, axis))


def _read_pad(node: Any, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    from torch.nn import functional as F

    amounts = node.get("pads") if pads is None else node.whole(pads)
    over = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in node.whole(axes)]
    before, after = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(over):
        before[axis], after[axis] = amounts[i], amounts[len(over) + i]
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    mode = modes[node.get("mode", "constant")]
    if mode == "constant":
        flat = [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]
        fill = node.get("value", 0.0) if value is None else node.number(value)
        return F.pad(x, flat, value=0.0 if fill == SMALLEST else fill)
    if before[0] or after[0] or min(*before, *after) < 0:
        node.refuse(f"{mode} padding {before}, {after}", "borders of a sample")
    if before[1] or after[1]:  # torch copies borders of positions alone
        x = _entries(x, 1, _border(mode, x.shape[1], before[1], after[1]))
    if not any(before[2:]) and not any(after[2:]):
        return x
    flat = [amount for axis in reversed(range(2, x.ndim)) for amount in (before[axis], after[axis])]
    return F.pad(x, flat, mode=mode)


def _border(mode: str, size: int, before: int, after: int) -> list[int]:
    """Entries of an axis with borders that are copies of what is there."""
    import numpy as np

    modes: dict[str, Any] = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    return [int(i) for i in np.pad(np.arange(size), (before, after), mode=modes[mode])]


def _read_resize(node: Any, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    """Positions that stay are left out; nearest by ONNX's own formula, linear and cubic where torch has the same."""
    from torch.nn import functional as F

    axes = [axis % x.ndim for axis in node.get("axes") or range(x.ndim)]
    if sizes is not None and len(node.whole(sizes)):
        wanted = dict(zip(axes, node.whole(sizes), strict=True))
        factors = {axis: size / x.shape[axis] for axis, size in wanted.items()}
    else:
        import numpy as np

        factors = dict(zip(axes, map(float, np.asarray(scales).reshape(-1)), strict=True))
        wanted = {axis: int(x.shape[axis] * factor) for axis, factor in factors.items()}
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        node.refuse("sizes that keep the aspect ratio", "sizes as they are")
    changed = [axis for axis in axes if wanted[axis] != x.shape[axis]]
    if any(axis < 2 for axis in changed):
        node.refuse(f"a resize of axes {changed}", "positions of a map alone")
    if not changed:
        return x
    mode, how = node.get("mode", "nearest"), node.get("coordinate_transformation_mode", "half_pixel")
    if mode == "nearest":
        for axis in changed:
            index = _nearest(node, x.shape[axis], wanted[axis], factors[axis], how)
            size = x.shape[axis]
            plain = [i * size // wanted[axis] for i in range(wanted[axis])]
            if index != plain:
                x, wanted[axis] = _entries(x, axis, index), len(index)
        target = [wanted.get(axis, x.shape[axis]) for axis in range(2, x.ndim)]
        return x if target == list(x.shape[2:]) else F.interpolate(x, size=target, mode="nearest")
    spatial = x.ndim - 2
    named = {("linear", 1): "linear", ("linear", 2): "bilinear", ("cubic", 2): "bicubic"}.get((mode, spatial))
    half = how == "half_pixel" or (how == "pytorch_half_pixel" and min(wanted[axis] for axis in changed) > 1)
    exact = all(abs(factors[axis] * x.shape[axis] - wanted[axis]) < 1e-4 for axis in changed)
    cubic = mode != "cubic" or abs(node.get("cubic_coeff_a", -0.75) + 0.75) < 1e-6
    if named is None or not (half or how == "align_corners") or not exact or not cubic or node.get("antialias", 0):
        node.refuse(f"{mode} over {spatial} axes by {how}", "linear, bilinear or bicubic, half_pixel or align_corners")
    target = [wanted.get(axis, x.shape[axis]) for axis in range(2, x.ndim)]
    return F.interpolate(x, size=target, mode=str(named), align_corners=how == "align_corners")


def _nearest(node: Any, size: int, out: int, factor: float, how: str) -> list[int]:
    """Which entry each output takes (ONNX, Resize: coordinate_transformation_mode and nearest_mode)."""
    import numpy as np

    i = np.arange(out)
    places = {
        "asymmetric": i / factor,
        "half_pixel": (i + 0.5) / factor - 0.5,
        "pytorch_half_pixel": (i + 0.5) / factor - 0.5 if out > 1 else i * 0.0,
        "align_corners": i * (size - 1) / max(out - 1, 1),
    }
    if how not in places:
        node.refuse(f"nearest by {how}", "one of " + ", ".join(places))
    rounding = node.get("nearest_mode", "round_prefer_floor")
    at = places[how]
    rounded = {
        "floor": np.floor(at), "ceil": np.ceil(at), "round_prefer_ceil": np.floor(at + 0.5),
        "round_prefer_floor": np.ceil(at - 0.5),
    }[rounding]  # fmt: skip
    return [int(k) for k in np.clip(rounded, 0, size - 1)]


def _read_depth_to_space(node: Any, x: Any) -> Any:
    batch, channels, height, width = x.shape
    block = node.get("blocksize")
    inner = channels // block**2
    if node.get("mode", "DCR") == "DCR":
        parted = x.reshape(batch, block, block, inner, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        parted = x.reshape(batch, inner, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return parted.reshape(batch, inner, height * block, width * block)


def _read_space_to_depth(node: Any, x: Any) -> Any:
    batch, channels, height, width = x.shape
    block = node.get("blocksize")
    parted = x.reshape(batch, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return parted.reshape(batch, channels * block**2, height // block, width // block)


_VIEWS = (
    "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "squeeze.default", "squeeze.dim",
    "squeeze.dims", "unsqueeze.default", "unflatten.int", "view_as.default",
)  # fmt: skip

register(
    Operator(
        kind="input", doc="the sample after the input adapter", arity=(0, 0), shape=_given, macs="computes nothing",
        keeps=keeps_nothing, forward=_input, given=True, onnx=None, aten={},
    ),
    Operator(
        kind="constant", doc="a tensor that no input changes: a position table, a class token, a number", arity=(0, 0),
        tensors=_constant_tensors, shape=_given, macs="computes nothing", keeps=keeps_nothing, forward=_constant,
        onnx=_constant_onnx, aten={},
    ),
    Operator(
        kind="flatten", doc="all axes as one vector", shape=_flatten_shape, macs="a view", keeps=keeps_nothing,
        forward=_flatten, pull=_pull_reshape, view=True, in_order=True, alias=True, onnx=_flatten_onnx, aten={},
        from_onnx={"Flatten": Reading(_read_flatten)},
    ),
    Operator(
        kind="reshape", doc="the same elements in order under another shape", args={"to": tuple}, shape=_reshape_shape,
        macs="a view, or a copy", keeps=keeps_nothing, forward=_reshape, pull=_pull_reshape, view=True, in_order=True,
        alias=True, onnx=_reshape_onnx, aten=dict.fromkeys(_VIEWS, _aten_reshape),
        from_onnx={"Reshape": Reading(_read_reshape, ("value", "-")), "Squeeze": Reading(_read_squeeze),
                   "Unsqueeze": Reading(_read_unsqueeze), "Identity": Reading(_read_same),
                   "Dropout": Reading(_read_dropout, ("-",) * 3), "Cast": Reading(_read_cast),
                   "CastLike": Reading(_read_same)},
    ),
    Operator(
        kind="permute", doc="axes in another order", args={"order": tuple}, shape=_permute_shape, macs="a view",
        keeps=keeps_nothing, forward=_permute, pull=_pull_permute, view=True, alias=True, onnx=_permute_onnx,
        aten={
            "permute.default": _aten_permute, "transpose.int": _aten_transpose, "t.default": _aten_t,
            "swapaxes.default": _aten_transpose, "numpy_T.default": _aten_t,
        },
        from_onnx={"Transpose": Reading(_read_transpose), "DepthToSpace": Reading(_read_depth_to_space),
                   "SpaceToDepth": Reading(_read_space_to_depth)},
    ),
    Operator(
        kind="expand", doc="repeated along axes of size 1", args={"to": tuple}, shape=_expand_shape, macs="a view",
        keeps=keeps_nothing, forward=_expand, pull=_pull_expand, alias=True, onnx=_expand_onnx,
        aten={"expand.default": _aten_expand, "expand_as.default": _aten_expand},
        from_onnx={"Expand": Reading(_read_expand, ("value", "-"))},
    ),
    Operator(
        kind="concat", doc="values one behind the other along an axis", arity=(1, 10_000), args={"axis": int},
        shape=_concat_shape, macs="a copy", keeps=keeps_nothing, forward=_concat, pull=_pull_concat, joins="side",
        onnx=_concat_onnx,
        aten={"cat.default": _aten_cat, "stack.default": _aten_stack, "hstack.default": _aten_hstack},
        from_onnx={"Concat": Reading(_read_concat), "Tile": Reading(_read_tile, ("-", "-"))},
    ),
    Operator(
        kind="slice", doc="a range of one axis, with a step",
        args={"axis": int, "start": int, "stop": int, "step": int},
        shape=_slice_shape, macs="a view", keeps=keeps_nothing, forward=_slice, pull=_pull_slice, alias=True,
        onnx=_slice_onnx,
        aten={
            "slice.Tensor": _aten_slice, "narrow.default": _aten_narrow, "select.int": _aten_select,
            "chunk.default": _aten_chunk, "split.Tensor": _aten_split, "split_with_sizes.default": _aten_split,
            "split.sizes": _aten_split, "unbind.int": _aten_unbind, "slice_scatter.default": _aten_slice_scatter,
            "unfold.default": _aten_unfold, "im2col.default": _aten_im2col, "col2im.default": _aten_col2im,
        },
        from_onnx={"Slice": Reading(_read_slice, ("-",) * 5), "Split": Reading(_read_split, ("-", "-"))},
    ),
    Operator(
        kind="take", doc="entries of one axis by number",
        args={"axis": int, "index": tuple}, shape=_take_shape, macs="a copy",
        keeps=keeps_nothing, forward=_take, pull=linear_pull, onnx=_take_onnx,
        aten={"index_select.default": _aten_index_select, "index.Tensor": _aten_index, "flip.default": _aten_flip},
        from_onnx={"Gather": Reading(_read_gather, ("weight", "-"))},
    ),
    Operator(
        kind="pad", doc="borders of zeros, a constant, or copies (reflect, replicate, circular)",

        args={"before": tuple, "after": tuple, "mode": str, "value": float}, shape=_pad_shape, macs="a copy",
        keeps=keeps_nothing, forward=_pad,
        pull=_pull_pad, onnx=_pad_onnx,
        aten={
            "pad.default": _aten_pad, "constant_pad_nd.default": _aten_constant_pad,
            **{f"{torch}_pad{n}d.default": _aten_pad_mode(mode) for n in (1, 2) for torch, mode in
               (("reflection", "reflect"), ("replication", "replicate"))},
        },
        from_onnx={"Pad": Reading(_read_pad, ("-",) * 4)},
    ),
    Operator(
        kind="roll", doc="shifted along axes, what leaves one end enters at the other",
        args={"shifts": tuple, "axes": tuple},
        shape=_roll_shape, macs="a copy", keeps=keeps_nothing, forward=_roll, pull=_pull_roll, onnx=_roll_onnx,
        aten={"roll.default": _aten_roll},
    ),
    Operator(
        kind="upsample", doc="a map resized: nearest, linear, bilinear, bicubic",
        args={"size": tuple, "mode": str, "align_corners": bool}, shape=_upsample_shape,
        macs="interpolation, not a multiply-accumulate by a weight", keeps=keeps_nothing, forward=_upsample,
        pull=linear_pull, onnx=_upsample_onnx,
        aten={
            **{f"upsample_{mode}{n}d.{form}": _aten_upsample(mode, mode != "nearest")
               for mode, n in (("nearest", 1), ("nearest", 2), ("linear", 1), ("bilinear", 2), ("bicubic", 2))
               for form in ("default", "vec")},
        },
        from_onnx={"Resize": Reading(_read_resize, ("-",) * 4)},
    ),
)  # fmt: skip

DROPPED: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("clone.default", "contiguous.default", "alias.default",
         "lift_fresh_copy.default", "_to_copy.default", "to.dtype", "to.dtype_layout", "to.device", "type_as.default",
         "_assert_tensor_metadata.default"), _aten_drop,
    ),
    "detach.default": _aten_detach,
    **dict.fromkeys(
        ("dropout.default", "feature_dropout.default", "alpha_dropout.default", "feature_alpha_dropout.default"),
        _aten_dropout,
    ),
}  # fmt: skip
"""ATen calls that change nothing in evaluation."""
