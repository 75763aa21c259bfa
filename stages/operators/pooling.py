"""Pooling: over windows, to a given size, over all positions or any axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from stages.operators.convolution import check_map, per_axis, read_window, window, window_attributes
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
    keeps_input,
    keeps_nothing,
    register,
)
from stages.operators.shapes import linear_pull

if TYPE_CHECKING:
    from torch import Tensor

AVERAGE = "additions and one multiplication per output; not a multiply-accumulate by a weight"
COMPARED = "comparisons, no multiplication"


def _pool_shape(op: Op) -> Shape:
    dilated = ("dilation",) if op.operator.kind == "max_pool" else ()
    axes = check_map(op, "kernel", "stride", "padding", *dilated)
    apart = op.dilation if dilated else (1,) * axes
    if any(2 * pad > kernel for pad, kernel in zip(op.padding, op.kernel, strict=True)):
        raise ValueError(f"padding {op.padding} of more than half of the window {op.kernel}")
    spatial = zip(op.in_shape[1:], op.kernel, op.stride, op.padding, apart, strict=True)
    sizes = tuple(window(*axis, op.ceil_mode) for axis in spatial)
    if min(sizes) < 1:
        raise ValueError(f"a window {op.kernel} that does not fit the map {op.in_shape[1:]}")
    return (op.in_shape[0], *sizes)


# ------------------------------------------------------------------------------------------------------------ maximum


def _index_bytes(positions: int) -> int:
    """Bytes that number so many positions."""
    return 1 if positions <= 2**8 else 2 if positions <= 2**15 else 4


def _index_dtype(positions: int) -> Any:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[_index_bytes(positions)]


def _keeps_window(op: Op, wanted: Set[int]) -> Keep:
    """One byte per output, 2 or 4 for large windows: which position of the window the maximum came from."""
    return Keep(index_bytes=_index_bytes(prod(op.kernel)))


def _max_pool(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    pool = F.max_pool1d if len(op.kernel) == 1 else F.max_pool2d
    return pool(inputs[0], op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)


def window_index(op: Op, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
    """Which position of its window each maximum came from: (N, *op.shape), one byte while a window has at most 256."""
    import torch
    from torch.nn import functional as F

    pool = F.max_pool1d if len(op.kernel) == 1 else F.max_pool2d
    _, position = pool(inputs[0], op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode, return_indices=True)
    index = torch.zeros_like(position)
    for axis, start in enumerate(_window_starts(op, position.device)):
        inner = prod(op.in_shape[axis + 2 :])
        coordinate = position.div(inner, rounding_mode="floor") % op.in_shape[axis + 1]
        index.mul_(op.kernel[axis]).add_((coordinate - start).div_(op.dilation[axis], rounding_mode="floor"))
    return index.to(_index_dtype(prod(op.kernel)))


def _pull_max_pool(op: Op, tensors: Tensors) -> Pull:
    import torch

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        assert kept.place is not None
        rest = kept.place.to(torch.int64)
        position = torch.zeros_like(rest)
        inner = 1
        for axis, start in reversed(list(enumerate(_window_starts(op, rest.device)))):
            position += (start + rest % op.kernel[axis] * op.dilation[axis]) * inner
            rest = rest.div(op.kernel[axis], rounding_mode="floor")
            inner *= op.in_shape[axis + 1]
        return [Flow(_scattered(flow.gradient, position, op.in_shape), fresh=True)]

    return pull


def _scattered(gradient: Tensor, position: Tensor, shape: Shape) -> Tensor:
    """Gradients (N, C, ...) added where their positions in a channel's map say: (N, *shape)."""
    flat = gradient.new_zeros(len(gradient), shape[0], prod(shape[1:]))
    flat.scatter_add_(2, position.flatten(2), gradient.flatten(2))
    return flat.view(len(gradient), *shape)


def _window_starts(op: Op, device: Any) -> list[Tensor]:
    """Per spatial axis, where each output's window begins in the input (in the padding: below 0), to be broadcast."""
    import torch

    axes = len(op.kernel)
    starts = []
    for axis in range(axes):
        start = torch.arange(op.shape[axis + 1], device=device) * op.stride[axis] - op.padding[axis]
        starts.append(start.view([-1 if i == axis else 1 for i in range(axes)]))
    return starts


def _max_pool_onnx(op: Op, w: Any) -> None:
    w.node("MaxPool", w.inputs(op), w.output(op), **window_attributes(op), ceil_mode=int(op.ceil_mode))


# ------------------------------------------------------------------------------------------------------------ average


def _avg_pool(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    pool = F.avg_pool1d if len(op.kernel) == 1 else F.avg_pool2d
    return pool(inputs[0], op.kernel, op.stride, op.padding, op.ceil_mode, op.count_include_pad)


def _pull_avg_pool(op: Op, tensors: Tensors) -> Pull:
    import torch

    line = len(op.kernel) == 1  # torch has the gradient for planes only: a line is a plane of height 1
    kernel, stride = ((1, *op.kernel), (1, *op.stride)) if line else (op.kernel, op.stride)
    padding = (0, *op.padding) if line else op.padding
    shape = (op.in_shape[0], 1, *op.in_shape[1:]) if line else op.in_shape

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        plane = flow.gradient.unsqueeze(2) if line else flow.gradient
        like_input = plane.new_empty(1).expand(plane.shape[0], *shape)  # only its sizes are read
        spread = torch.ops.aten.avg_pool2d_backward(
            plane, like_input, kernel, stride, padding, op.ceil_mode, op.count_include_pad, None
        )
        return [Flow(spread.squeeze(2) if line else spread, fresh=True)]

    return pull


def _avg_pool_onnx(op: Op, w: Any) -> None:
    """Ceil mode as a pooling of padded sums over padded counts: ONNX counts windows over the end in its own way."""
    more = window_attributes(op, dilated=False)
    if not op.ceil_mode:
        w.node("AveragePool", w.inputs(op), w.output(op), **more, count_include_pad=int(op.count_include_pad))
        return
    axes = len(op.kernel)
    beyond = [
        max(0, (out - 1) * s + k - size - 2 * p)
        for size, out, k, s, p in zip(op.in_shape[1:], op.shape[1:], op.kernel, op.stride, op.padding, strict=True)
    ]
    pads = [0, 0, *op.padding, 0, 0, *(p + b for p, b in zip(op.padding, beyond, strict=True))]
    w.node("Pad", [*w.inputs(op), w.integers(pads), w.number(0.0)], w.inner(op, "padded"))
    w.node("AveragePool", [w.inner(op, "padded")], w.inner(op, "mean"), kernel_shape=op.kernel, strides=op.stride)
    factor = w.constant(op, "share", window_share(op).reshape(1, 1, *op.shape[1:]))
    assert axes
    w.node("Mul", [w.inner(op, "mean"), factor], w.output(op))


def window_share(op: Op) -> Any:
    """Positions of a whole window over those that torch divides by, for every output position: float32 (...)."""
    import numpy as np

    share = np.ones((), np.float32)
    axes = zip(op.in_shape[1:], op.shape[1:], op.kernel, op.stride, op.padding, strict=True)
    for size, out, kernel, step, pad in axes:
        start = np.arange(out) * step - pad
        stop = np.minimum(start + kernel, size + pad)
        if not op.count_include_pad:
            start, stop = np.maximum(start, 0), np.minimum(stop, size)
        share = share[..., None] * (kernel / (stop - start)).astype(np.float32)
    return share


# ------------------------------------------------------------------------------------------------------- given sizes


def _adaptive_shape(op: Op) -> Shape:
    if len(op["size"]) != check_map(op) or min(op["size"]) < 1:
        raise ValueError(f"{op.in_shape} pooled to {op['size']}")
    return (op.in_shape[0], *op["size"])


def _adaptive(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    pool: Any = F.adaptive_avg_pool1d if len(op["size"]) == 1 else F.adaptive_avg_pool2d
    pooled: Tensor = pool(inputs[0], list(op["size"]))
    return pooled


def _adaptive_onnx(op: Op, w: Any) -> None:
    """As products with averaging matrices, one per axis: ONNX has no adaptive pooling."""
    (last,) = w.inputs(op)
    rank = len(op.shape)
    for axis, (size, out) in enumerate(zip(op.in_shape[1:], op["size"], strict=True)):
        matrix = w.constant(op, f"means{axis}", adaptive_means(size, out))
        final = axis == rank - 2
        if rank == 3 and axis == 0:  # rows: (out, size) @ (..., size, W)
            w.node("MatMul", [matrix, last], w.inner(op, "rows"))
            last = w.inner(op, "rows")
        else:
            turned = w.constant(op, f"turned{axis}", adaptive_means(size, out).T)
            w.node("MatMul", [last, turned], w.output(op) if final else w.inner(op, "columns"))


def adaptive_means(size: int, out: int) -> Any:
    """The matrix (out, size) of adaptive average pooling along one axis: bin i is floor(i s / o) .. ceil((i+1) s / o).

    >>> adaptive_means(3, 2).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    """
    import numpy as np

    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        start, stop = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def _keeps_positions(op: Op, wanted: Set[int]) -> Keep:
    """1, 2 or 4 bytes per output: which position of the map the maximum came from."""
    return Keep(index_bytes=_index_bytes(prod(op.in_shape[1:])))


def _adaptive_max(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    pool: Any = F.adaptive_max_pool1d if len(op["size"]) == 1 else F.adaptive_max_pool2d
    pooled: Tensor = pool(inputs[0], list(op["size"]))
    return pooled


def _adaptive_max_index(op: Op, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
    from torch.nn import functional as F

    pool: Any = F.adaptive_max_pool1d if len(op["size"]) == 1 else F.adaptive_max_pool2d
    position: Tensor = pool(inputs[0], list(op["size"]), return_indices=True)[1]
    return position.to(_index_dtype(prod(op.in_shape[1:])))


def _pull_adaptive_max(op: Op, tensors: Tensors) -> Pull:
    import torch

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        assert kept.place is not None
        return [Flow(_scattered(flow.gradient, kept.place.to(torch.int64), op.in_shape), fresh=True)]

    return pull


def _adaptive_max_onnx(op: Op, w: Any) -> None:
    """As a plain pooling where the bins are equal."""
    sizes = op.in_shape[1:]
    if any(size % out for size, out in zip(sizes, op["size"], strict=True)):
        w.refuse(op, f"adaptive max pooling of {sizes} to {op['size']}", "a divisor of the input's size")
    kernel = tuple(size // out for size, out in zip(sizes, op["size"], strict=True))
    w.node("MaxPool", w.inputs(op), w.output(op), kernel_shape=kernel, strides=kernel)


# ------------------------------------------------------------------------------------------------------ all positions


def _global_shape(op: Op) -> Shape:
    if len(op.in_shape) < 2:
        raise ValueError(f"an input {op.in_shape}, a map is needed")
    return op.in_shape[:1]


def _global_pool(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return inputs[0].mean(tuple(range(2, inputs[0].dim())))


def _pull_global_pool(op: Op, tensors: Tensors) -> Pull:
    positions = op.in_shape[1:]

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        each = (flow.gradient / prod(positions)).view(-1, op.in_shape[0], *(1 for _ in positions))
        return [Flow(each.expand(-1, -1, *positions), fresh=False)]

    return pull


def _global_onnx(op: Op, w: Any) -> None:
    w.node("ReduceMean", w.inputs(op), w.output(op), axes=list(range(2, len(op.in_shape) + 1)), keepdims=0)


# ---------------------------------------------------------------------------------------------------------- over axes


def _reduced_shape(op: Op) -> Shape:
    axes = op["axes"]
    if not axes or not all(0 <= axis < len(op.in_shape) for axis in axes) or len(set(axes)) != len(axes):
        raise ValueError(f"axes {axes} of {op.in_shape}")
    if op["keepdim"]:
        return tuple(1 if axis in axes else size for axis, size in enumerate(op.in_shape))
    return tuple(size for axis, size in enumerate(op.in_shape) if axis not in axes)


def _max_shape(op: Op) -> Shape:
    if len(op["axes"]) != 1:
        raise ValueError(f"axes {op['axes']}, one is needed")
    return _reduced_shape(op)


def _norm_shape(op: Op) -> Shape:
    if op["order"] not in (1, 2):
        raise ValueError(f"a vector norm of order {op['order']}, 1 or 2 is needed")
    return _reduced_shape(op)


def _axes(op: Op) -> list[int]:
    return [axis + 1 for axis in op["axes"]]


def _mean(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return inputs[0].mean(_axes(op), keepdim=bool(op["keepdim"]))


def _mean_as_vector(op: Op) -> Op | None:
    """The mean over all positions, read as (C,)."""
    if op["axes"] != tuple(range(1, len(op.in_shape))) or not op["keepdim"]:
        return None
    return replace(op, kind="global_pool", shape=op.shape[:1], args=())


def _sum(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return inputs[0].sum(_axes(op), keepdim=bool(op["keepdim"]))


def _pull_sum(op: Op, tensors: Tensors) -> Pull:
    inside = tuple(1 if axis in op["axes"] else size for axis, size in enumerate(op.in_shape))
    return lambda kept, flow: [Flow(flow.gradient.reshape(-1, *inside).expand(-1, *op.in_shape), fresh=False)]


def _max(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return inputs[0].max(_axes(op)[0], keepdim=bool(op["keepdim"])).values


def _keeps_place(op: Op, wanted: Set[int]) -> Keep:
    """1, 2 or 4 bytes per output: which entry along the axis the maximum is."""
    return Keep(index_bytes=_index_bytes(op.in_shape[op["axes"][0]]))


def _max_index(op: Op, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
    place = inputs[0].max(_axes(op)[0], keepdim=bool(op["keepdim"])).indices
    return place.to(_index_dtype(op.in_shape[op["axes"][0]]))


def _pull_max(op: Op, tensors: Tensors) -> Pull:
    import torch

    axis = _axes(op)[0]

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        assert kept.place is not None
        place, g = kept.place.to(torch.int64), flow.gradient
        place, g = (place, g) if op["keepdim"] else (place.unsqueeze(axis), g.unsqueeze(axis))
        return [Flow(g.new_zeros(len(g), *op.in_shape).scatter_(axis, place, g), fresh=True)]

    return pull


def _mean_onnx(op: Op, w: Any) -> None:
    w.node("ReduceMean", w.inputs(op), w.output(op), axes=_axes(op), keepdims=int(op["keepdim"]))


def _sum_onnx(op: Op, w: Any) -> None:
    w.node("ReduceSum", [*w.inputs(op), w.integers(_axes(op))], w.output(op), keepdims=int(op["keepdim"]))


def _max_onnx(op: Op, w: Any) -> None:
    w.node("ReduceMax", w.inputs(op), w.output(op), axes=_axes(op), keepdims=int(op["keepdim"]))


def _amax(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    return inputs[0].amax(_axes(op), keepdim=bool(op["keepdim"]))


def _keeps_ends(op: Op, wanted: Set[int]) -> Keep:
    """Input and output: equal maxima share the gradient."""
    return Keep(inputs=(0,), output=True)


def _pull_amax(op: Op, tensors: Tensors) -> Pull:
    axes = _axes(op)

    def wide(y: Tensor) -> Tensor:
        for axis in axes if not op["keepdim"] else ():
            y = y.unsqueeze(axis)
        return y

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        assert kept.output is not None
        same = (kept.inputs[0] == wide(kept.output)).to(flow.gradient.dtype)
        return [Flow(same * wide(flow.gradient) / same.sum(axes, keepdim=True), fresh=True)]

    return pull


def _vector_norm(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    import torch

    norm: Tensor = torch.linalg.vector_norm(inputs[0], op["order"], _axes(op), bool(op["keepdim"]))
    return norm


def _vector_norm_onnx(op: Op, w: Any) -> None:
    w.node(f"ReduceL{op['order']}", w.inputs(op), w.output(op), axes=_axes(op), keepdims=int(op["keepdim"]))


# ------------------------------------------------------------------------------------------------------------ capture


def _aten_max_pool(
    call: Any, x: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Any:
    x = call.map(x, call.rank(x) - 2)
    axes = len(x.shape) - 1
    kernel = per_axis(kernel_size, axes)
    return call.emit(
        "max_pool", [x], kernel=kernel, stride=per_axis(stride, axes) if stride else kernel,
        padding=per_axis(padding, axes), dilation=per_axis(dilation, axes), ceil_mode=bool(ceil_mode),
    )  # fmt: skip


def _aten_max_pool_with_indices(call: Any, *arguments: Any, **named: Any) -> list[Any]:
    return [_aten_max_pool(call, *arguments, **named)]


def _aten_avg_pool(
    call: Any, x: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None,
) -> Any:  # fmt: skip
    if divisor_override:
        call.refuse(f"divisor_override={divisor_override}", "the window's own size")
    x = call.map(x, call.rank(x) - 2)
    axes = len(x.shape) - 1
    kernel = per_axis(kernel_size, axes)
    return call.emit(
        "avg_pool", [x], kernel=kernel, stride=per_axis(stride, axes) if stride else kernel,
        padding=per_axis(padding, axes), ceil_mode=bool(ceil_mode), count_include_pad=bool(count_include_pad),
    )  # fmt: skip


def _aten_avg_pool3d(
    call: Any, x: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None,
) -> Any:  # fmt: skip
    """Along the first of three axes alone, as local_response_norm does: the other two become one."""
    kernel, step, pad = (per_axis(part, 3) for part in (kernel_size, stride or kernel_size, padding))
    if kernel[1:] != (1, 1) or step[1:] != (1, 1) or pad[1:] != (0, 0):
        call.refuse(f"averages over windows {kernel}", "windows over one or two axes")
    x = call.map(x, 3)
    flat = call.apply("flatten.using_ints", x, 3, 4)
    window = ([part[0], over] for part, over in ((kernel, 1), (step, 1), (pad, 0)))
    pooled = call.apply("avg_pool2d.default", flat, *window, ceil_mode, count_include_pad, divisor_override)
    return call.apply("unflatten.int", pooled, 3, list(x.full[3:]))


def _aten_adaptive_avg(call: Any, x: Any, output_size: Any) -> Any:
    x = call.map(x, call.rank(x) - 2)
    sizes, wanted = x.shape[1:], call.out_shape()[1:]
    if wanted == sizes:
        return x
    if set(wanted) == {1}:
        return call.emit("mean", [x], axes=tuple(range(1, len(sizes) + 1)), keepdim=True)
    if any(size % want for size, want in zip(sizes, wanted, strict=True)):
        return call.emit("adaptive_avg_pool", [x], size=wanted)
    kernel = tuple(size // want for size, want in zip(sizes, wanted, strict=True))
    return call.emit(
        "avg_pool", [x], kernel=kernel, stride=kernel, padding=(0,) * len(kernel), ceil_mode=False,
        count_include_pad=True,
    )  # fmt: skip


def _aten_adaptive_max(call: Any, x: Any, output_size: Any) -> list[Any]:
    x = call.map(x, call.rank(x) - 2)
    return [call.emit("adaptive_max_pool", [x], size=call.out_shape()[1:])]


def _aten_mean(call: Any, x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    return _aten_over(call, "mean", x, dim, keepdim)


def _aten_sum(call: Any, x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    return _aten_over(call, "sum", x, dim, keepdim)


def _aten_over(call: Any, kind: str, x: Any, dim: Any, keepdim: bool) -> Any:
    dims = [dim] if isinstance(dim, int) else list(dim or range(call.rank(x)))
    axes = tuple(sorted(call.axis(x, each) for each in dims))
    x = call.value(x)
    if kind == "mean" and len(x.shape) > 1 and axes == tuple(range(1, len(x.shape))) and not keepdim:
        return call.emit("global_pool", [x])
    return call.emit(kind, [x], axes=axes, keepdim=bool(keepdim))


def _aten_max(call: Any, x: Any, dim: int, keepdim: bool = False) -> list[Any]:
    return [call.emit("max", [call.value(x)], axes=(call.axis(x, dim),), keepdim=bool(keepdim))]


def _aten_amax(call: Any, x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    dims = [dim] if isinstance(dim, int) else list(dim or range(call.rank(x)))
    axes = tuple(sorted(call.axis(x, each) for each in dims))
    return call.emit("amax", [call.value(x)], axes=axes, keepdim=bool(keepdim))


def _aten_vector_norm(
    call: Any, x: Any, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if order not in (1, 2):
        call.refuse(f"a vector norm of order {order}", "order 1 or 2")
    dims = [dim] if isinstance(dim, int) else list(dim or range(call.rank(x)))
    axes = tuple(sorted(call.axis(x, each) for each in dims))
    return call.emit("vector_norm", [call.value(x)], order=int(order), axes=axes, keepdim=bool(keepdim))


def _aten_norm(call: Any, x: Any, order: float = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    return _aten_vector_norm(call, x, 2 if order is None else order, dim, keepdim)


# ------------------------------------------------------------------------------------------------------ ONNX, reading


def _read_max_pool(node: Any, x: Any) -> Any:
    from torch.nn import functional as F

    kernel = node.get("kernel_shape")
    if node.results > 1 or len(kernel) > 2:
        node.refuse(f"{node.results} results, {len(kernel)} axes", "maxima over 1 or 2 axes")
    x, padding, stride, dilation = read_window(node, x, kernel, float("-inf"))
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):  # more than torch pads
        x = F.pad(x, [pad for pad in reversed(padding) for _ in range(2)], value=float("-inf"))
        padding = [0] * len(kernel)
    pool = F.max_pool1d if len(kernel) == 1 else F.max_pool2d
    return pool(x, kernel, stride, padding, dilation, bool(node.get("ceil_mode", 0)))


def _read_avg_pool(node: Any, x: Any) -> Any:
    from torch.nn import functional as F

    kernel, ceil, counted = node.get("kernel_shape"), bool(node.get("ceil_mode", 0)), node.get("count_include_pad", 0)
    before = x.shape
    x, padding, stride, dilation = read_window(node, x, kernel)
    if len(kernel) == 3 and set(kernel[1:]) == {1}:  # over channels that were made an axis: LRN in pieces
        return F.avg_pool3d(x, kernel, stride, padding, ceil, bool(counted))
    if len(kernel) > 2 or set(dilation) != {1} or (x.shape != before and not counted):
        node.refuse("dilated, over more than 2 axes, or with ends that are padded differently", "a plain average")
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        node.refuse(f"padding {padding} of more than half of the window {kernel}", "half at most")
    pool = F.avg_pool1d if len(kernel) == 1 else F.avg_pool2d
    return pool(x, kernel, stride, padding, ceil, bool(counted))


def _read_over_positions(name: str) -> Reading:
    def rule(node: Any, x: Any) -> Any:
        if x.ndim < 3:
            node.refuse(f"an input of {x.ndim} axes", "a map")
        return getattr(x, name)(list(range(2, x.ndim)), keepdim=True)

    return Reading(rule)


def _read_over_axes(function: Callable[[Any, list[int], bool], Any]) -> Reading:
    """A reduction: axes as attribute or input, all where none are given."""

    def rule(node: Any, x: Any, axes: Any = None) -> Any:
        over = node.axes(axes, x.ndim)
        if not over:
            if node.get("noop_with_empty_axes", 0):
                return x
            node.refuse("a reduction over the batch", "axes of each sample")
        return function(x, over, bool(node.get("keepdims", 1)))

    return Reading(rule, ("-", "-"))


def _over_norm(order: int) -> Callable[[Any, list[int], bool], Any]:
    def function(x: Any, axes: list[int], keepdim: bool) -> Any:
        import torch

        return torch.linalg.vector_norm(x, order, axes, keepdim)

    return function


def _read_normalised(node: Any, x: Any) -> Any:
    """LpNormalization."""
    from torch.nn import functional as F

    return F.normalize(x, node.get("p", 2), node.get("axis", -1))


_WINDOW = ("kernel", "stride", "padding")

register(
    Operator(
        kind="max_pool", doc="the largest value of each window", fields=(*_WINDOW, "dilation", "ceil_mode"),
        shape=_pool_shape, macs=COMPARED, keeps=_keeps_window, forward=_max_pool, index=window_index,
        pull=_pull_max_pool, onnx=_max_pool_onnx,
        aten={
            **{f"max_pool{n}d.default": _aten_max_pool for n in (1, 2)},
            **{f"max_pool{n}d_with_indices.default": _aten_max_pool_with_indices for n in (1, 2)},
        },
        from_onnx={"MaxPool": Reading(_read_max_pool)},
    ),
    Operator(
        kind="avg_pool", doc="the mean of each window", fields=(*_WINDOW, "ceil_mode", "count_include_pad"),
        shape=_pool_shape, macs=AVERAGE, keeps=keeps_nothing, forward=_avg_pool, pull=_pull_avg_pool,
        onnx=_avg_pool_onnx,
        aten={"avg_pool1d.default": _aten_avg_pool, "avg_pool2d.default": _aten_avg_pool,
              "avg_pool3d.default": _aten_avg_pool3d},
        from_onnx={"AveragePool": Reading(_read_avg_pool)},
    ),
    Operator(
        kind="adaptive_avg_pool", doc="means of bins that divide the map into a given number", args={"size": tuple},
        shape=_adaptive_shape, macs=AVERAGE, keeps=keeps_nothing, forward=_adaptive, pull=linear_pull,
        onnx=_adaptive_onnx,
        aten={f"{prefix}adaptive_avg_pool{n}d.default": _aten_adaptive_avg for n in (1, 2) for prefix in ("", "_")},
    ),
    Operator(
        kind="adaptive_max_pool", doc="maxima of bins that divide the map into a given number", args={"size": tuple},
        shape=_adaptive_shape, macs=COMPARED, keeps=_keeps_positions, forward=_adaptive_max,
        index=_adaptive_max_index, pull=_pull_adaptive_max, onnx=_adaptive_max_onnx,
        aten={f"adaptive_max_pool{n}d.default": _aten_adaptive_max for n in (1, 2)},
    ),
    Operator(
        kind="global_pool", doc="the mean over all positions, (C, ...) -> (C,)", shape=_global_shape,
        macs="additions and one multiplication per channel; not a multiply-accumulate by a weight",
        keeps=keeps_nothing, forward=_global_pool, pull=_pull_global_pool, onnx=_global_onnx, aten={},
    ),
    Operator(
        kind="mean", doc="the mean over some axes",
        args={"axes": tuple, "keepdim": bool}, shape=_reduced_shape, macs=AVERAGE,
        keeps=keeps_nothing, forward=_mean, pull=linear_pull, as_vector=_mean_as_vector, onnx=_mean_onnx,
        aten={"mean.dim": _aten_mean, "mean.default": _aten_mean},
        from_onnx={"GlobalAveragePool": _read_over_positions("mean"),
                   "ReduceMean": _read_over_axes(lambda x, axes, keepdim: x.mean(axes, keepdim))},
    ),
    Operator(
        kind="sum", doc="the sum over some axes", args={"axes": tuple, "keepdim": bool}, shape=_reduced_shape,
        macs="additions, no multiplication", keeps=keeps_nothing, forward=_sum, pull=_pull_sum, onnx=_sum_onnx,
        aten={"sum.dim_IntList": _aten_sum},
        from_onnx={"ReduceSum": _read_over_axes(lambda x, axes, keepdim: x.sum(axes, keepdim)),
                   "ReduceSumSquare": _read_over_axes(lambda x, axes, keepdim: (x * x).sum(axes, keepdim))},
    ),
    Operator(
        kind="max", doc="the largest value along one axis", args={"axes": tuple, "keepdim": bool}, shape=_max_shape,
        macs=COMPARED, keeps=_keeps_place, forward=_max, index=_max_index, pull=_pull_max, onnx=_max_onnx,
        aten={"max.dim": _aten_max},
    ),
    Operator(
        kind="amax", doc="the largest value over some axes; equal ones share the gradient",
        args={"axes": tuple, "keepdim": bool},
        shape=_reduced_shape, macs=COMPARED, keeps=_keeps_ends, forward=_amax, pull=_pull_amax, onnx=_max_onnx,
        aten={"amax.default": _aten_amax},
        from_onnx={"GlobalMaxPool": _read_over_positions("amax"),
                   "ReduceMax": _read_over_axes(lambda x, axes, keepdim: x.amax(axes, keepdim)),
                   "ReduceMin": _read_over_axes(lambda x, axes, keepdim: -(-x).amax(axes, keepdim))},
    ),
    Operator(
        kind="vector_norm", doc="the 1- or 2-norm over some axes", args={"order": int, "axes": tuple, "keepdim": bool},
        shape=_norm_shape, macs="squares and their sum, not a multiply-accumulate by a weight", keeps=keeps_input,
        forward=_vector_norm, onnx=_vector_norm_onnx,
        aten={"linalg_vector_norm.default": _aten_vector_norm, "norm.ScalarOpt_dim": _aten_norm},
        from_onnx={"ReduceL1": _read_over_axes(_over_norm(1)), "ReduceL2": _read_over_axes(_over_norm(2)),
                   "LpNormalization": Reading(_read_normalised)},
    ),
)  # fmt: skip
