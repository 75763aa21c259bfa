"""What each kind of operator becomes: one row per kind, nothing of a kind is known elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from stages.engines.native import layers
from stages.engines.native.builder import Builder, geometry, map_of
from stages.engines.native.program import ACTIVATIONS, COUNT_PAD, Buffer, Ref, Step
from stages.engines.native.units import BITS, Unit
from stages.operators import Op


@dataclass
class Node:
    """One unit on its way through a rule."""

    unit: Unit
    inputs: list[Buffer]
    y: Buffer
    layer: layers.Layer | None = None
    residual: Buffer | None = None
    pulls: bool = False
    """A gradient flows through it into at least one input: what that needs must be kept."""
    kept: Buffer | None = None
    """What `forward` kept for `backward`, where it keeps anything of its own."""

    @property
    def op(self) -> Op:
        return self.unit.op


Forward = Callable[[Builder, Node, list[Step]], None]
Backward = Callable[[Builder, Node, int, Buffer, Buffer | None, list[Step]], Buffer]
"""(builder, node, which input, gradient of the output, what other readers gave, steps) -> that input's gradient."""


@dataclass(frozen=True)
class Rule:
    """How a kind of operator is lowered."""

    channels: str
    """Its output's channels: the `same` as its inputs', its `own`, or `fixed` to the graph's order."""
    forward: Forward
    backward: Backward
    rows: bool = False
    """It can run row by row, in one step."""
    refuses: Callable[[Op], str] = lambda op: ""
    """Why this operator cannot be lowered; empty where it can."""


# -------------------------------------------------------------------------------------------------------------- layers


def _layer(builder: Builder, node: Node, into: list[Step]) -> None:
    assert node.layer is not None
    layers.forward(node.layer, node.unit, node.inputs[0], node.y, node.residual, into)


def _layer_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    assert node.layer is not None
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", prod(node.op.in_shape), over=add)
    layers.input_gradient(node.layer, g, add, dx, into)
    return dx


def _refuses_layer(op: Op) -> str:
    rows = (1, 1, *op.kernel)[-2]
    return f"a kernel of {rows} rows" if rows > 64 else ""


# ---------------------------------------------------------------------------------------------------------- activations


def _flat(op: Op, shape: Sequence[int] | None = None) -> dict[str, int | Ref]:
    """The words of a step over all values of a map."""
    size = map_of(tuple(shape or op.shape))
    return {
        "hi": size.height, "wi": size.width, "ho": size.height, "wo": size.width, "ci": size.channels,
        "co": size.channels, "ldx": size.channels, "ldy": size.channels,
    }  # fmt: skip


def _activation(builder: Builder, node: Node, into: list[Step]) -> None:
    x, y = node.inputs[0], node.y
    builder.emit(into, "unary", **_flat(node.op), x=x[0], y=y[0], act=ACTIVATIONS[node.op.kind])


def _bits_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """The bits have been applied to g already."""
    return plus(builder, node.op.inputs[0], node.op.in_shape, g, add, into)


def plus(builder: Builder, name: str, shape: Sequence[int], g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """g where nothing is to be added, else a new buffer with the sum."""
    if add is None:
        return g
    total = builder.buffer(f"gradient {name}", g.floats, over=add)
    sizes = _flat_of(shape)
    builder.emit(into, "add", **sizes, x=g[0], r=add[0], y=total[0], ldr=sizes["ldx"])
    return total


def _flat_of(shape: Sequence[int]) -> dict[str, int | Ref]:
    size = map_of(tuple(shape))
    return {
        "hi": size.height, "wi": size.width, "ho": size.height, "wo": size.width, "ci": size.channels,
        "co": size.channels, "ldx": size.channels, "ldy": size.channels,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ additions and copies


def _add(builder: Builder, node: Node, into: list[Step]) -> None:
    x, r = node.inputs
    sizes = _flat(node.op)
    builder.emit(into, "add", **sizes, x=x[0], r=r[0], y=node.y[0], ldr=sizes["ldx"])


def _add_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    return plus(builder, node.op.inputs[which], node.op.in_shape, g, add, into)


def _copy(
    builder: Builder, into: list[Step], source: Ref, target: Ref, shape: Sequence[int], ldx: int, ldy: int
) -> None:
    """Copy the channels of a map, from pixels of ldx floats to pixels of ldy."""
    sizes = _flat_of(shape) | {"ldx": ldx, "ldy": ldy}
    builder.emit(into, "copy", **sizes, x=source, y=target)


def _concat(builder: Builder, node: Node, into: list[Step]) -> None:
    at, wide = 0, node.op.shape[0]
    for name, x in zip(node.op.inputs, node.inputs, strict=True):
        shape = builder.graph[name].shape
        _copy(builder, into, x[0], node.y[at], shape, shape[0], wide)
        at += shape[0]


def _concat_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    op = node.op
    shapes = [builder.graph[name].shape for name in op.inputs]
    at = sum(shape[0] for shape in shapes[:which])
    own = builder.buffer(f"gradient {op.inputs[which]}", prod(shapes[which]), over=add)
    if add is None:
        _copy(builder, into, g[at], own[0], shapes[which], op.shape[0], shapes[which][0])
        return own
    sizes = _flat_of(shapes[which])
    builder.emit(into, "add", **(sizes | {"ldx": op.shape[0]}), x=g[at], r=add[0], y=own[0], ldr=sizes["ldy"])
    return own


def _turns(op: Op) -> bool:
    """Whether flattening changes the order of values: pixels of channels become channels of pixels."""
    return prod(op.in_shape[1:]) > 1


def _flatten(builder: Builder, node: Node, into: list[Step]) -> None:
    sizes = _flat_of(node.op.in_shape)
    if not _turns(node.op):
        builder.emit(into, "copy", **sizes, x=node.inputs[0][0], y=node.y[0])
        return
    builder.emit(into, "transpose", **sizes, x=node.inputs[0][0], y=node.y[0], n=0)


def _flatten_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    op = node.op
    if not _turns(op):
        return plus(builder, op.inputs[0], op.in_shape, g, add, into)
    dx = builder.buffer(f"gradient {op.inputs[0]}", prod(op.in_shape), over=add)
    sizes = _flat_of(op.in_shape)
    more = None if add is None else add[0]
    builder.emit(into, "transpose", **sizes, x=g[0], y=dx[0], r=more, ldr=sizes["ldx"], n=1)
    return dx


# -------------------------------------------------------------------------------------------------------------- pooling


def _window(op: Op) -> dict[str, int | Ref]:
    channels = op.in_channels
    words = geometry(op) | {"ci": channels, "co": channels, "ldx": channels, "ldy": channels, "ldr": channels}
    return words | {"flags": COUNT_PAD if op.kind == "avg_pool" and op.count_include_pad else 0}


def _max_pool(builder: Builder, node: Node, into: list[Step]) -> None:
    if node.pulls:
        node.kept = builder.buffer(f"index {node.op.name}", -(-node.op.elements // 4))
    index = None if node.kept is None else node.kept[0]
    builder.emit(into, "max_pool", **_window(node.op), x=node.inputs[0][0], y=node.y[0], m=index)


def _max_pool_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    assert node.kept is not None
    return _spread(builder, node, "max_pool_dx", g, add, into, m=node.kept[0])


def _spread(
    builder: Builder, node: Node, kind: str, g: Buffer, add: Buffer | None, into: list[Step], **more: Ref
) -> Buffer:
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", prod(node.op.in_shape), over=add)
    words = _window(node.op) | more | ({} if add is None else {"r": add[0]})
    builder.emit(into, kind, **words, x=g[0], y=dx[0])
    return dx


def _avg_pool(builder: Builder, node: Node, into: list[Step]) -> None:
    builder.emit(into, "avg_pool", **_window(node.op), x=node.inputs[0][0], y=node.y[0])


def _avg_pool_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    return _spread(builder, node, "avg_pool_dx", g, add, into)


def _refuses_max_pool(op: Op) -> str:
    return f"a window of {prod(op.kernel)} positions" if prod(op.kernel) > 256 else _refuses_layer(op)


def _mean(builder: Builder, node: Node, into: list[Step]) -> None:
    builder.emit(into, "mean", **_flat_of(node.op.in_shape), x=node.inputs[0][0], y=node.y[0])


def _mean_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", prod(node.op.in_shape), over=add)
    sizes = _flat_of(node.op.in_shape)
    more = None if add is None else add[0]
    builder.emit(into, "mean_dx", **sizes, x=g[0], y=dx[0], r=more, ldr=sizes["ldx"])
    return dx


def _input(builder: Builder, node: Node, into: list[Step]) -> None:
    builder.emit(into, "input", **_flat(node.op), y=node.y[0])


def _no_gradient(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    raise AssertionError(node.op.kind)


RULES: dict[str, Rule] = {
    "input": Rule("fixed", _input, _no_gradient, rows=True),
    "conv": Rule("own", _layer, _layer_back, rows=True, refuses=_refuses_layer),
    "linear": Rule("own", _layer, _layer_back),
    "relu": Rule("same", _activation, _bits_back, rows=True),
    "relu6": Rule("same", _activation, _bits_back, rows=True),
    "add": Rule("same", _add, _add_back),
    "concat": Rule("fixed", _concat, _concat_back),
    "flatten": Rule("fixed", _flatten, _flatten_back),
    "max_pool": Rule("same", _max_pool, _max_pool_back, rows=True, refuses=_refuses_max_pool),
    "avg_pool": Rule("same", _avg_pool, _avg_pool_back, rows=True, refuses=_refuses_layer),
    "global_pool": Rule("same", _mean, _mean_back),
}
"""One row per kind."""


def in_place(op: Op) -> bool:
    """Whether an operator's output may take the place of its first input."""
    return op.kind in ("relu", "relu6", "add") or (op.kind == "flatten" and not _turns(op))


def apply_bits(builder: Builder, activation: str, out: str, kept: Buffer, g: Buffer, into: list[Step]) -> Buffer:
    """The gradient before a ReLU or ReLU6, from the one behind it."""
    before = builder.buffer(f"gradient before {out}", g.floats, over=g)
    builder.emit(
        into, "mask_back", x=g[0], y=before[0], m=kept[0], n=g.floats, ci=1, co=1, ldx=1, ldy=1, hi=1, wi=1, ho=1,
        wo=1, act=ACTIVATIONS[activation],
    )  # fmt: skip
    return before


def keep_bits(builder: Builder, activation: str, out: str, y: Buffer, into: list[Step]) -> Buffer:
    """One bit per value where a ReLU or ReLU6 lets the gradient pass."""
    assert activation in BITS
    kept = builder.buffer(f"bits {out}", -(-y.floats // 512) * 16)
    builder.emit(
        into, "mask", x=y[0], m=kept[0], n=y.floats, ci=1, co=1, ldx=1, ldy=1, hi=1, wi=1, ho=1, wo=1,
        act=ACTIVATIONS[activation], flags=1,
    )  # fmt: skip
    return kept
