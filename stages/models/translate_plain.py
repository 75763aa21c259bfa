"""Rules for the operators without weights; their arguments are those of torch's functions and methods."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import fx

from stages.errors import UsageError
from stages.models.builder import Builder, called, per_axis

Rule = Callable[..., None]
"""(builder, node, *arguments of the call)."""


def elementwise(kind: str) -> Rule:
    """The rule of an operator of this kind that works on each value alone."""

    def rule(b: Builder, node: fx.Node, input: Any, inplace: bool = False) -> None:
        b.emit(node, kind, (input,))

    return rule


def clamp(b: Builder, node: fx.Node, input: Any, min: Any = None, max: Any = None, **other: Any) -> None:
    low, high = other.get("min_val", min), other.get("max_val", max)
    if low == 0 and high in (6, None):
        b.emit(node, "relu" if high is None else "relu6", (input,))
        return
    raise UsageError(b.where(node), f"clamp to {low}..{high}", "0..6 (ReLU6) or 0 and up (ReLU)")


def hardtanh(
    b: Builder, node: fx.Node, input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> None:
    clamp(b, node, input, min_val, max_val)


def add(b: Builder, node: fx.Node, input: Any, other: Any, alpha: float = 1) -> None:
    if not isinstance(input, fx.Node) or not isinstance(other, fx.Node) or alpha != 1:
        raise UsageError(b.where(node), "addition of a constant", "the sum of two activations")
    if b.source(input, node).shape != b.source(other, node).shape:
        raise UsageError(b.where(node), f"addition of {b.shape(input)} and {b.shape(other)}", "equal shapes")
    b.emit(node, "add", (input, other))


def concat(b: Builder, node: fx.Node, tensors: Any, dim: int = 0) -> None:
    rank = len(b.shape(node) or ()) + 1
    if dim % rank != 1:
        raise UsageError(b.where(node), f"concatenation along dimension {dim}", "1, the channels")
    b.emit(node, "concat", tuple(tensors))


def drop(b: Builder, node: fx.Node, input: Any, *_: Any, **__: Any) -> None:
    b.alias(node, input)


def reshape(b: Builder, node: fx.Node, input: Any, *_: Any, **__: Any) -> None:
    """Reshapes keep the elements' order, so only the outcome matters: a vector (N, D) is a flatten.

    Other shapes are kept as an alias and must come to a vector before an operator reads them.
    """
    source, shape = b.alias(node, input), b.shape(node)
    if shape is None or prod(shape) != prod(source.shape):
        raise UsageError(b.where(node), f"{called(node)} of {source.shape} to {shape}", "one vector per sample")
    if len(shape) == 1 and len(source.shape) > 1:
        earliest = next(other for other, op in b.by_node.items() if op is source)
        b.emit(node, "flatten", (earliest,))


def mean(b: Builder, node: fx.Node, input: Any, dim: Any = None, keepdim: bool = False) -> None:
    source = b.source(input, node)
    rank = len(source.shape) + 1
    axes = {axis % rank for axis in ((dim,) if isinstance(dim, int) else dim or ())}
    if rank < 3 or axes != set(range(2, rank)):
        raise UsageError(b.where(node), f"mean over dimensions {dim}", "all positions at once, e.g. x.mean((2, 3))")
    b.emit(node, "global_pool", (input,))


def adaptive_pool(b: Builder, node: fx.Node, input: Any, output_size: Any) -> None:
    source = b.source(input, node)
    sizes = source.shape[1:]
    wanted = tuple(w or s for w, s in zip(per_axis(output_size, len(sizes)), sizes, strict=True))
    if set(wanted) == {1}:
        b.emit(node, "global_pool", (input,))
    elif wanted == sizes:
        b.alias(node, input)
    elif any(size % want for size, want in zip(sizes, wanted, strict=True)):
        raise UsageError(b.where(node), f"adaptive pooling of {sizes} to {wanted}", "a divisor of the input's size")
    else:
        kernel = tuple(size // want for size, want in zip(sizes, wanted, strict=True))
        b.emit(node, "avg_pool", (input,), kernel=kernel, stride=kernel, padding=(0,) * len(kernel))


def max_pool(
    b: Builder,
    node: fx.Node,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> None:
    if return_indices:
        raise UsageError(b.where(node), "max pooling with indices", "return_indices=False")
    axes = len(b.source(input, node).shape) - 1
    kernel = per_axis(kernel_size, axes)
    b.emit(
        node,
        "max_pool",
        (input,),
        kernel=kernel,
        stride=per_axis(stride, axes) if stride else kernel,
        padding=per_axis(padding, axes),
        dilation=per_axis(dilation, axes),
        ceil_mode=ceil_mode,
    )


def avg_pool(
    b: Builder,
    node: fx.Node,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> None:
    if divisor_override:
        raise UsageError(b.where(node), f"divisor_override={divisor_override}", "the window's own size")
    axes = len(b.source(input, node).shape) - 1
    kernel = per_axis(kernel_size, axes)
    b.emit(
        node,
        "avg_pool",
        (input,),
        kernel=kernel,
        stride=per_axis(stride, axes) if stride else kernel,
        padding=per_axis(padding, axes),
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
    )
