"""Operators on rows: values whose features are the last axis (tokens), products of two values, attention.

In the arena a value of up to three axes lies as pixels of its first axis, any other in its own order. These operators
want *rows*: the value in its own order, so that its last axis lies side by side. One transposition makes rows of pixels
and another pixels of rows; next to a matrix product it is not seen, and where one of the two sides has a single entry
there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from stages.engines.native.builder import Builder
from stages.engines.native.channels import map_of
from stages.engines.native.program import Buffer, Integers, Ref, Step, float_word
from stages.operators import Op, Shape

if TYPE_CHECKING:
    from stages.engines.native.rules import Node


def lies_by_rows(shape: Sequence[int]) -> bool:
    """Whether a value's buffer holds it in its own order."""
    size = map_of(tuple(shape))
    return size.pixels == 1 or size.channels == 1


def to_rows(
    builder: Builder, x: Buffer, shape: Shape, into: list[Step], *, order: Integers | None = None, name: str = "rows"
) -> Buffer:
    """The value as rows, its last axis in this order (None: its own); `x` itself where nothing has to move."""
    if order is None and lies_by_rows(shape):
        return x
    rows = builder.buffer(name, prod(shape))
    if lies_by_rows(shape):
        _gather(builder, x[0], rows, None, _entries(shape, order), into)
        return rows
    size = map_of(shape)
    builder.emit(
        into, "transpose", x=x[0], y=rows[0], m=_pixels(builder, shape, order), ci=size.channels, ldx=size.channels,
        ldy=1, hi=size.height, wi=size.width, ho=size.height, wo=size.width, n=0,
    )  # fmt: skip
    return rows


def target_of(builder: Builder, y: Buffer, shape: Shape, *, order: Integers | None = None) -> Buffer:
    """Where rows that `settle` brings into `y` are to be made: there itself, if it can be."""
    return y if order is None and lies_by_rows(shape) else builder.buffer(f"rows of {y.name}", prod(shape))


def settle(
    builder: Builder, rows: Buffer, y: Buffer, add: Buffer | None, shape: Shape, into: list[Step], *,
    order: Integers | None = None, at: int = 0,
) -> None:  # fmt: skip
    """y = the value whose rows these are (from `at` on, their last axis in this order), plus `add`, which lies as y."""
    size = map_of(shape)
    words: dict[str, int | Ref] = {"hi": size.height, "wi": size.width, "ho": size.height, "wo": size.width}
    words |= {"ci": size.channels, "ldx": size.channels, "ldy": size.channels, "ldr": size.channels}
    more = None if add is None else add[0]
    if rows is y:
        if add is not None:
            builder.emit(into, "add", **words, x=rows[0], r=more, y=y[0])
    elif not lies_by_rows(shape):
        builder.emit(into, "transpose", **words, x=rows[at], y=y[0], r=more, m=_pixels(builder, shape, order), n=1)
    else:
        back = None if order is None else np.argsort(order)
        _gather(builder, rows[at], y, add, _entries(shape, back), into)


def _pixels(builder: Builder, shape: Shape, order: Integers | None) -> Ref | None:
    """For each pixel of the rows the one of the value, where the last axis is in another order."""
    if order is None:
        return None
    return builder.indices(_entries(shape[1:], order))


def _entries(shape: Sequence[int], order: Integers | None) -> Integers:
    """Numbers of a value's elements, its last axis in this order."""
    numbers = np.arange(prod(shape)).reshape(-1, shape[-1])
    return (numbers if order is None else numbers[:, order]).reshape(-1)


def _gather(builder: Builder, x: Ref, y: Buffer, add: Buffer | None, numbers: Integers, into: list[Step]) -> None:
    count = len(numbers)
    builder.emit(
        into, "gather", x=x, y=y[0], r=None if add is None else add[0], m=builder.indices(numbers), n=count,
        ci=count, co=1, ldx=1, ldy=1, hi=1, wi=1, ho=1, wo=1,
    )  # fmt: skip


def over_rows(rows: int, width: int) -> dict[str, int | Ref]:
    """The words of a step on so many rows, side by side."""
    return {
        "hi": 1, "wi": rows, "ho": 1, "wo": rows, "ci": width, "co": width, "ldx": width, "ldy": width, "ldr": width
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ along the last


def softmax(builder: Builder, node: Node, into: list[Step]) -> None:
    """Along the last axis."""
    shape, logarithm = node.op.shape, int(node.op.kind == "log_softmax")
    x = to_rows(builder, node.inputs[0], shape, into)
    y = target_of(builder, node.y, shape)
    builder.emit(into, "softmax", **_by_last(shape), x=x[0], y=y[0], n=logarithm)
    node.rows["y"] = y
    settle(builder, y, node.y, None, shape, into)


def softmax_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """Its input's gradient, from the kept output."""
    op, shape, dx = node.op, node.op.shape, _gradient(builder, node, which, add)
    rows = to_rows(builder, g, shape, into)
    made = target_of(builder, dx, shape)
    logarithm = int(op.kind == "log_softmax")
    builder.emit(into, "softmax_dx", **_by_last(shape), x=node.rows["y"][0], w=rows[0], y=made[0], n=logarithm)
    settle(builder, made, dx, add, shape, into)
    return dx


def refuses_softmax(op: Op) -> str:
    """Only the last axis lies side by side in rows."""
    return "" if op["axis"] % len(op.shape) == len(op.shape) - 1 else f"axis {op['axis']} of {len(op.shape)}"


def _by_last(shape: Shape) -> dict[str, int | Ref]:
    return over_rows(prod(shape[:-1]), shape[-1])


def layernorm(builder: Builder, node: Node, into: list[Step]) -> None:
    """Over the last axes: each row is a group of its own, in columns (one row's values are pixels of one channel)."""
    x = _columns(builder, node.inputs[0], node.op, into)
    room = builder.buffer(f"statistics {node.op.name}", 4 * _counts(node.op)[0])
    y = node.y if x is node.inputs[0] else builder.buffer(f"columns {node.op.name}", node.op.elements)
    node.rows["x"] = x
    builder.emit(into, "norm", **_norm_words(node.op), x=x[0], y=y[0], m=room[0])
    if y is not node.y:
        _from_columns(builder, y, node.y, None, node.op, into)


def layernorm_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """Its input's gradient, from the kept input."""
    dx = _gradient(builder, node, which, add)
    columns = _columns(builder, g, node.op, into)
    room = builder.buffer(f"statistics {node.op.name}", 4 * _counts(node.op)[0])
    straight = columns is g
    made = dx if straight else builder.buffer(f"columns of {dx.name}", node.op.elements)
    words = _norm_words(node.op) | {"r": None if add is None or not straight else add[0]}
    builder.emit(into, "norm_dx", **words, x=node.rows["x"][0], w=columns[0], y=made[0], m=room[0])
    if not straight:
        _from_columns(builder, made, dx, add, node.op, into)
    return dx


def _counts(op: Op) -> tuple[int, int]:
    """Rows, and values of each."""
    axes = len(op.shape) - op["axes"]
    return prod(op.shape[:axes]), prod(op.shape[axes:])


def _norm_words(op: Op) -> dict[str, int | Ref]:
    rows, width = _counts(op)
    return over_rows(width, rows) | {"n": rows, "a0": float_word(op["eps"])}


def _columns(builder: Builder, x: Buffer, op: Op, into: list[Step]) -> Buffer:
    """The value with a row's values one behind the other's: `x` itself where the rows are its first axis."""
    rows, width = _counts(op)
    if 1 < len(op.shape) <= 3 and rows == op.shape[0]:
        return x
    by_rows = to_rows(builder, x, op.shape, into)
    if rows == 1:
        return by_rows
    columns = builder.buffer(f"columns {op.name}", op.elements)
    builder.emit(into, "transpose", **over_rows(width, rows), x=by_rows[0], y=columns[0], n=1)
    return columns


def _from_columns(builder: Builder, columns: Buffer, y: Buffer, add: Buffer | None, op: Op, into: list[Step]) -> None:
    rows, width = _counts(op)
    by_rows = columns
    if rows > 1:
        by_rows = builder.buffer(f"rows {op.name}", op.elements)
        builder.emit(into, "transpose", **over_rows(width, rows), x=columns[0], y=by_rows[0], n=0)
    settle(builder, by_rows, y, add, op.shape, into)


def _gradient(builder: Builder, node: Node, which: int, add: Buffer | None) -> Buffer:
    op = node.op
    return builder.buffer(f"gradient {op.inputs[which]}", prod(op.in_shapes[which]), over=add)


# ------------------------------------------------------------------------------------------------------------- products


def product(
    builder: Builder, into: list[Step], a: Ref, b: Ref, y: Ref, rows: int, depth: int, columns: int, *,
    turned: bool = False, scale: float = 1.0, add: Ref | None = None, add_apart: int | None = None,
) -> None:  # fmt: skip
    """y (rows, columns) = scale * A B + add; `turned`: A lies as (depth, rows)."""
    apart = columns if add_apart is None else add_apart
    builder.emit(
        into, "matmul", x=a, w=b, y=y, r=add, ldr=apart, hi=1, wi=rows, ho=1, wo=rows, ci=depth, co=columns,
        ldx=rows if turned else depth, ldy=columns, n=int(turned), a0=float_word(scale),
    )  # fmt: skip


def turned(builder: Builder, into: list[Step], x: Ref, rows: int, columns: int) -> Buffer:
    """The transpose of a matrix (rows, columns)."""
    made = builder.buffer("transpose", rows * columns)
    builder.emit(into, "transpose", **over_rows(rows, columns), x=x, y=made[0], n=0)
    return made


def _parts(shape: Shape, batch: Shape) -> Integers:
    """For each product of a batch, which matrix of a value of fewer or repeated ones it takes."""
    own = shape[:-2]
    numbers = np.arange(prod(own)).reshape((1,) * (len(batch) - len(own)) + own)
    return np.broadcast_to(numbers, batch).reshape(-1)


def matmul(builder: Builder, node: Node, into: list[Step]) -> None:
    """Of every pair of matrices."""
    op = node.op
    (*_, rows, depth), columns = op.in_shapes[0], op.shape[-1]
    a, b = (to_rows(builder, x, shape, into) for x, shape in zip(node.inputs, op.in_shapes, strict=True))
    node.rows |= {"a": a, "b": b}
    y = target_of(builder, node.y, op.shape)
    for i, (left, right) in enumerate(_pairs(op)):
        at = a[left * rows * depth], b[right * depth * columns], y[i * rows * columns]
        product(builder, into, *at, rows, depth, columns)
    settle(builder, y, node.y, None, op.shape, into)


def _pairs(op: Op) -> list[tuple[int, int]]:
    batch = op.shape[:-2]
    return list(zip(*(_parts(shape, batch).tolist() for shape in op.in_shapes), strict=True))


def matmul_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """Of the first g B^T, of the second A^T g, summed where a matrix took part in several products."""
    op, dx = node.op, _gradient(builder, node, which, add)
    (*_, rows, depth), columns = op.in_shapes[0], op.shape[-1]
    key = f"gradient {g.name}"
    if key not in node.rows:
        node.rows[key] = to_rows(builder, g, op.shape, into)
    by_rows = node.rows[key]
    made = target_of(builder, dx, op.in_shapes[which])
    begun: set[int] = set()
    for i, pair in enumerate(_pairs(op)):
        mine, at = pair[which], i * rows * columns
        if which == 0:
            other = turned(builder, into, node.rows["b"][pair[1] * depth * columns], depth, columns)
            y, args = made[mine * rows * depth], (rows, columns, depth)
            product(builder, into, by_rows[at], other[0], y, *args, add=y if mine in begun else None)
        else:
            y, args = made[mine * depth * columns], (depth, rows, columns)
            a = node.rows["a"][pair[0] * rows * depth]
            product(builder, into, a, by_rows[at], y, *args, turned=True, add=y if mine in begun else None)
        begun.add(mine)
    settle(builder, made, dx, add, op.in_shapes[which], into)
    return dx


# ------------------------------------------------------------------------------------------------------------ attention


def attention(builder: Builder, node: Node, into: list[Step]) -> None:
    """Head by head: products, their softmax, values."""
    op = node.op
    inputs = [to_rows(builder, x, shape, into) for x, shape in zip(node.inputs, op.in_shapes, strict=True)]
    node.rows |= dict(zip("qkvm", inputs, strict=False))
    y = target_of(builder, node.y, op.shape)
    heads, rows, keys, _, width = _attended(op)
    for head in range(heads):
        shares = _shares(builder, node, head, into)
        at = shares[0], inputs[2][head * keys * width], y[head * rows * width]
        product(builder, into, *at, rows, keys, width)
    settle(builder, y, node.y, None, op.shape, into)


def _attended(op: Op) -> tuple[int, int, int, int, int]:
    """Heads, queries, keys, their features, and the values'."""
    (*batch, rows, depth), (*_, keys, _), (*_, width) = op.in_shapes[:3]
    return prod(batch), rows, keys, depth, width


def _shares(builder: Builder, node: Node, head: int, into: list[Step]) -> Buffer:
    """softmax(scale * Q K^T + mask) of a head (queries, keys)."""
    op = node.op
    _, rows, keys, depth, _ = _attended(op)
    other = turned(builder, into, node.rows["k"][head * keys * depth], keys, depth)
    scores = builder.buffer(f"products {op.name}", rows * keys)
    mask, apart = _mask(builder, node, head)
    q = node.rows["q"][head * rows * depth]
    product(
        builder, into, q, other[0], scores[0], rows, depth, keys, scale=op["scale"], add=mask, add_apart=apart
    )  # fmt: skip
    shares = builder.buffer(f"shares {op.name}", rows * keys, over=scores)
    builder.emit(into, "softmax", **over_rows(rows, keys), x=scores[0], y=shares[0], n=0)
    return shares


def _mask(builder: Builder, node: Node, head: int) -> tuple[Ref | None, int]:
    """What is added to a head's products, and how far its rows lie apart (0: the same for all)."""
    op = node.op
    _, rows, keys, _, _ = _attended(op)
    if op["causal"]:
        later = np.triu(np.full((rows, keys), -np.inf, np.float32), 1)
        if "causal" not in node.places:
            node.places["causal"] = builder.constant(lambda tensors: later, rows * keys)
        return node.places["causal"], keys
    if len(op.in_shapes) < 4:
        return None, keys
    shape = op.in_shapes[3]
    own = _parts(_as_matrix(shape), op.shape[:-2])[head]
    height = _as_matrix(shape)[-2]
    return node.rows["m"][int(own) * height * keys], keys if height > 1 else 0


def _as_matrix(shape: Shape) -> Shape:
    """A mask of one axis is one row."""
    return (1,) * (2 - len(shape)) + tuple(shape)


def attention_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """One of the inputs' gradients; all are made at the first call, head by head, with the shares computed again."""
    op, name = node.op, "d" + "qkvm"[which]
    if name not in node.rows:
        _attention_gradients(builder, node, g, into)
    if add is None and lies_by_rows(op.in_shapes[which]):
        return node.rows[name]
    dx = _gradient(builder, node, which, add)
    settle(builder, node.rows[name], dx, add, op.in_shapes[which], into)
    return dx


def _attention_gradients(builder: Builder, node: Node, g: Buffer, into: list[Step]) -> None:
    op = node.op
    heads, rows, keys, depth, width = _attended(op)
    by_rows = to_rows(builder, g, op.shape, into)
    names = "qkvm"[: len(op.inputs)]
    made = {name: builder.buffer(f"gradient rows {name}", prod(s)) for name, s in zip(names, op.in_shapes, strict=True)}
    node.rows |= {f"d{name}": buffer for name, buffer in made.items()}
    masks: set[int] = set()
    for head in range(heads):
        shares = _shares(builder, node, head, into)
        own = by_rows[head * rows * width]
        product(builder, into, shares[0], own, made["v"][head * keys * width], keys, rows, width, turned=True)
        other = turned(builder, into, node.rows["v"][head * keys * width], keys, width)
        pulled = builder.buffer(f"gradient of shares {op.name}", rows * keys)
        product(builder, into, own, other[0], pulled[0], rows, width, keys)
        scores = builder.buffer(f"gradient of products {op.name}", rows * keys)
        builder.emit(into, "softmax_dx", **over_rows(rows, keys), x=shares[0], w=pulled[0], y=scores[0], n=0)
        q, k = node.rows["q"][head * rows * depth], node.rows["k"][head * keys * depth]
        at = made["q"][head * rows * depth], made["k"][head * keys * depth]
        product(builder, into, scores[0], k, at[0], rows, keys, depth, scale=op["scale"])
        product(builder, into, scores[0], q, at[1], keys, rows, depth, turned=True, scale=op["scale"])
        if "m" in made:
            _mask_gradient(builder, op, head, scores, made["m"], masks, into)


def _mask_gradient(
    builder: Builder, op: Op, head: int, scores: Buffer, made: Buffer, begun: set[int], into: list[Step]
) -> None:
    """That of the products, summed over the heads and rows that share an entry."""
    _, rows, keys, _, _ = _attended(op)
    shape = _as_matrix(op.in_shapes[3])
    own, height = int(_parts(shape, op.shape[:-2])[head]), shape[-2]
    y = made[own * height * keys]
    more = y if own in begun else None
    begun.add(own)
    if height > 1 or rows == 1:
        words = over_rows(height, keys)
        if more is None:
            builder.emit(into, "copy", **words, x=scores[0], y=y)
        else:
            builder.emit(into, "add", **words, x=scores[0], r=more, y=y)
        return
    ones = builder.constant(lambda tensors: np.ones(rows, np.float32), rows)
    product(builder, into, ones, scores[0], y, 1, rows, keys, add=more)


def refuses_attention(op: Op) -> str:
    """Masks that are repeated along the keys, and more than three axes whose heads are several axes are fine."""
    if len(op.in_shapes) < 4:
        return ""
    shape = _as_matrix(op.in_shapes[3])
    _, rows, keys, _, _ = _attended(op)
    return "" if shape[-1] == keys and shape[-2] in (1, rows) else f"a mask {op.in_shapes[3]}"
