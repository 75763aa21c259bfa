"""Operators that move values, or make each of a few others by fixed weights: reshapes, permutations, slices, borders,
resizing, sums and means over any axes.

One pair of steps serves them all: `gather` makes every output from the inputs that a table names, `scatter` is its
transpose and so its backward pass. Tables are constants of the image, four bytes an entry; where a cheaper step does,
`rules` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stages.engines.native.builder import Builder, map_of
from stages.engines.native.program import Buffer, Integers, Ref, Step, float_word
from stages.graphs.moves import OUTSIDE, moved
from stages.operators import Op, Shape

if TYPE_CHECKING:
    from stages.engines.native.rules import Node

Doubles = NDArray[np.float64]
CUBIC = -0.75
"""The constant of PyTorch's bicubic kernel."""
MOST_ENTRIES = 1 << 22
"""Of a table: beyond, the image would be larger than what it moves is worth."""


def places(shape: Sequence[int]) -> Integers:
    """Where each element of a value lies in its buffer, in the value's own shape.

    >>> places((2, 1, 3)).tolist()
    [[[0, 2, 4]], [[1, 3, 5]]]
    """
    size = map_of(tuple(shape))
    return np.arange(size.floats).reshape(size.pixels, size.channels).T.reshape(tuple(shape))


# --------------------------------------------------------------------------------------------------------------- tables


def sources(op: Op) -> tuple[Integers, Doubles | None]:
    """For every element of the output the numbers of the input's elements that it is made of, (*op.shape, K), OUTSIDE
    where there is none; and their weights, (*op.shape, K), None for 1."""
    if op.kind == "upsample":
        return _resized(op)
    ids = np.arange(prod(op.in_shape)).reshape(op.in_shape)
    return moved(op, ids)[..., None], None


def _resized(op: Op) -> tuple[Integers, Doubles | None]:
    """A map resized: along each axis the inputs that an output takes, and the products of their weights."""
    ids = np.arange(prod(op.in_shape)).reshape(op.in_shape)[..., None]
    weights = np.ones_like(ids, np.float64)
    for axis, (size, wanted) in enumerate(zip(op.in_shape[1:], op.shape[1:], strict=True), start=1):
        taken, shares = axis_taps(size, wanted, op["mode"], bool(op["align_corners"]))
        near = np.moveaxis(np.take(ids, taken, axis), axis + 1, -1)  # (..., wanted, ..., K, k)
        ids = near.reshape(*near.shape[:-2], -1)
        before = np.moveaxis(np.take(weights, taken, axis), axis + 1, -1)
        share = shares.reshape(wanted, *(1,) * (len(op.shape) - axis - 1), 1, shares.shape[1])
        weights = (before * share).reshape(ids.shape)
    return ids, None if op["mode"] == "nearest" else weights


def axis_taps(size: int, wanted: int, mode: str, align_corners: bool) -> tuple[Integers, Doubles]:
    """Along one axis: which inputs each output takes, (wanted, k), and their weights; as torch's `interpolate` has it
    for a size.

    >>> axis_taps(2, 4, "linear", False)[1].tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [1.0, 0.0]]
    """
    if mode == "nearest":
        return np.array([[o * size // wanted] for o in range(wanted)]), np.ones((wanted, 1))
    taken, weights = [], []
    for o in range(wanted):
        if align_corners:
            at = o * (size - 1) / (wanted - 1) if wanted > 1 else 0.0
        else:
            at = (o + 0.5) * size / wanted - 0.5
        if mode != "bicubic":
            at = max(at, 0.0)
        first = min(floor(at), size - 1) if mode != "bicubic" else floor(at)
        t = at - first
        row = [(first, 1 - t), (first + 1, t)] if mode != "bicubic" else list(enumerate(_cubic(t), start=first - 1))
        if mode != "bicubic" and first == size - 1:
            row = [(first, 1.0), (first, 0.0)]
        taken.append([min(max(number, 0), size - 1) for number, _ in row])
        weights.append([share for _, share in row])
    return np.array(taken), np.array(weights)


def _cubic(t: float) -> list[float]:
    def near(x: float) -> float:
        return ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1

    def far(x: float) -> float:
        return ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


# ---------------------------------------------------------------------------------------------------------------- steps


class Table:
    """A table in the image: `count` entries of `taps` places each, in `floats` values."""

    def __init__(self, builder: Builder, ids: Integers, weights: Doubles | None, made: Shape, of: Shape) -> None:
        """`ids` (*made, K) numbers elements of a value of shape `of`."""
        self.builder, self.taps, self.count, self.floats = builder, ids.shape[-1], prod(made), prod(of)
        order = np.argsort(places(made).reshape(-1))
        numbers = ids.reshape(self.count, self.taps)[order]
        where = np.where(numbers < 0, OUTSIDE, places(of).reshape(-1)[numbers])
        self.index = builder.indices(where.reshape(-1))
        self.weights: Ref | None = None
        if weights is not None:
            shares = weights.reshape(self.count, self.taps)[order].astype(np.float32).reshape(-1)
            self.weights = builder.constant(lambda tensors: shares, len(shares))

    def gather(self, x: Ref, y: Ref, into: list[Step], *, add: Ref | None = None, outside: float = 0.0) -> None:
        """y[i] = add[i] + sum over k of weight[i, k] x[index[i, k]]; `outside` for what is no input's."""
        self._emit("gather", x, y, into, add, a0=float_word(outside))

    def scatter(self, x: Ref, y: Ref, into: list[Step], *, add: Ref | None = None) -> None:
        """y = add, and y[index[i, k]] += weight[i, k] x[i]."""
        self._emit("scatter", x, y, into, add, a0=0)

    def _emit(self, kind: str, x: Ref, y: Ref, into: list[Step], add: Ref | None, a0: int) -> None:
        self.builder.emit(
            into, kind, x=x, y=y, r=add, m=self.index, w=self.weights, n=self.count, ci=self.floats, co=self.taps,
            ldx=1, ldy=1, hi=1, wi=1, ho=1, wo=1, a0=a0,
        )  # fmt: skip


def move(builder: Builder, node: Node, into: list[Step]) -> None:
    """Forward of whatever `sources` knows."""
    op = node.op
    node.table = Table(builder, *sources(op), op.shape, op.in_shape)
    outside = op["value"] if op.kind == "pad" and op["mode"] == "constant" else 0.0
    node.table.gather(node.inputs[0][0], node.y[0], into, outside=outside)


def move_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """The gradient of its input."""
    assert node.table is not None
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", prod(node.op.in_shape))
    node.table.scatter(g[0], dx[0], into, add=None if add is None else add[0])
    return dx


def refuses_move(op: Op) -> str:
    """A table that would be too large."""
    taps = {"bilinear": 4, "linear": 2, "bicubic": 16}.get(op["mode"], 1) if op.kind == "upsample" else 1
    entries = taps * max(op.elements, prod(op.in_shape))
    return f"a table of {entries} entries" if entries > MOST_ENTRIES else ""


# ------------------------------------------------------------------------------------------------ many axes or parts


def reduce(builder: Builder, node: Node, into: list[Step]) -> None:
    """Sum or mean over any axes: the transpose of repeating."""
    op = node.op
    kept = tuple(1 if axis in op["axes"] else size for axis, size in enumerate(op.in_shape))
    ids = np.broadcast_to(np.arange(prod(kept)).reshape(kept), op.in_shape)[..., None]
    share = prod(kept) / prod(op.in_shape) if op.kind == "mean" else 1.0
    node.table = Table(builder, ids, np.full(ids.shape, share) if op.kind == "mean" else None, op.in_shape, op.shape)
    node.table.scatter(node.inputs[0][0], node.y[0], into)


def reduce_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """Each input's share of the gradient."""
    assert node.table is not None
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", prod(node.op.in_shape))
    node.table.gather(g[0], dx[0], into, add=None if add is None else add[0])
    return dx


def join(builder: Builder, node: Node, into: list[Step]) -> None:
    """Values one behind the other along any axis: each is scattered to its place."""
    for which, x in enumerate(node.inputs):
        part_of(builder, node, which).scatter(x[0], node.y[0], into, add=node.y[0] if which else None)


def join_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """One input's part of the gradient."""
    dx = builder.buffer(f"gradient {node.op.inputs[which]}", prod(node.op.in_shapes[which]))
    part_of(builder, node, which).gather(g[0], dx[0], into, add=None if add is None else add[0])
    return dx


def part_of(builder: Builder, node: Node, which: int) -> Table:
    """Where one input of a concatenation stands in its output."""
    op, axis = node.op, node.op["axis"]
    start = sum(shape[axis] for shape in op.in_shapes[:which])
    shape = op.in_shapes[which]
    ids = np.arange(prod(op.shape)).reshape(op.shape)
    own = ids[(slice(None),) * axis + (slice(start, start + shape[axis]),)]
    return Table(builder, own[..., None], None, shape, op.shape)


def repeated(builder: Builder, shape: Shape, whole: Shape) -> Table:
    """A value of `shape` repeated to `whole`, as numpy broadcasts."""
    ids = np.broadcast_to(np.arange(prod(shape)).reshape(shape), whole)[..., None]
    return Table(builder, ids, None, whole, shape)
