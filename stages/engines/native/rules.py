"""What each kind of operator becomes: one row per kind, nothing of a kind is known elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from stages.artifacts.records import LayerUpdate
from stages.engines.native import layers, matrices, moves
from stages.engines.native.builder import Builder, geometry, map_of
from stages.engines.native.program import (
    ACTIVATIONS,
    ADAPTIVE,
    COUNT_PAD,
    MOST_ROWS,
    Buffer,
    Floats,
    Ref,
    Step,
    Tensors,
    float_word,
)
from stages.engines.native.recurrent import Recurrent
from stages.graphs.units import BITS, Unit
from stages.operators import Op
from stages.operators.recurrent import GATES


@dataclass
class Node:
    """One unit on its way through a rule."""

    unit: Unit
    inputs: list[Buffer]
    y: Buffer
    layer: layers.Layer | Recurrent | None = None
    residual: Buffer | None = None
    pulls: bool = False
    """A gradient flows through it into at least one input: what that needs must be kept."""
    kept: Buffer | None = None
    """What `forward` kept for `backward`, where it keeps anything of its own."""
    table: moves.Table | None = None
    """What `forward` moved values by."""
    rows: dict[str, Buffer] = field(default_factory=dict)
    """What `forward` made of values on its way (`matrices`)."""
    places: dict[str, Ref] = field(default_factory=dict)
    """Constants that both ways read."""

    @property
    def op(self) -> Op:
        return self.unit.op


def same(op: Op) -> str:
    """Channel c of the output is made of channel c of the inputs."""
    return "same"


def fixed(op: Op) -> str:
    """The graph's own order."""
    return "fixed"


def joined(op: Op) -> str:
    """The inputs' channels, one value's behind the other's."""
    return "joined"


def always(op: Op) -> bool:
    """Whatever the operator."""
    return True


Forward = Callable[[Builder, Node, list[Step]], None]
Backward = Callable[[Builder, Node, int, Buffer, Buffer | None, list[Step]], Buffer]
"""(builder, node, which input, gradient of the output, what other readers gave, steps) -> that input's gradient."""


@dataclass(frozen=True)
class Rule:
    """How a kind of operator is lowered."""

    channels: Callable[[Op], str]
    """Its output's channels: the `same` as its inputs', its `own`, all its inputs' `joined`, or `fixed` in order."""
    forward: Forward
    backward: Backward
    rows: bool = False
    """It can run row by row, in one step."""
    in_place: Callable[[Op], bool] = lambda op: False
    """Whether its output may take the place of its first input."""
    refuses: Callable[[Op], str] = lambda op: ""
    """Why this operator cannot be lowered; empty where it can."""
    any_axes: bool = False
    """It treats values of more than three axes, or of none, as vectors, or does not care."""


# -------------------------------------------------------------------------------------------------------------- layers


def layer_of(builder: Builder, op: Op, update: LayerUpdate | None) -> layers.Layer | Recurrent:
    """A layer's weights in the image."""
    return Recurrent(builder, op, update) if op.kind in GATES else layers.Layer(builder, op, update)


def _layer(builder: Builder, node: Node, into: list[Step]) -> None:
    assert isinstance(node.layer, layers.Layer)
    layers.forward(node.layer, node.unit, node.inputs[0], node.y, node.residual, into)


def _recurrent(builder: Builder, node: Node, into: list[Step]) -> None:
    assert isinstance(node.layer, Recurrent)
    keep = node.pulls or node.layer.update is not None
    node.layer.forward(node.inputs[0], node.y, into, keep=keep)


def _layer_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    assert node.layer is not None
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", prod(node.op.in_shape), over=add)
    node.layer.input_gradient(g, add, dx, into)
    return dx


def _layer_channels(op: Op) -> str:
    if layers.on_tokens(op):
        return "fixed"
    if op.is_depthwise:
        return "same"
    return "fixed" if op.groups > 1 else "own"


def _refuses_layer(op: Op) -> str:
    rows = (1, 1, *op.kernel)[-2]
    return f"a kernel of {rows} rows" if rows > MOST_ROWS else ""


def _tokens(op: Op) -> str:
    """Layers whose channels are not the first axis, or of a value that lies in its own order: they run on rows."""
    return "tokens" if layers.on_tokens(op) else ""


def _refuses_middle_axis(op: Op) -> str:
    last = len(op.shape) - 1
    return "" if op.channel_axis % len(op.shape) == last else f"channels along axis {op.channel_axis} of {last + 1}"


# ---------------------------------------------------------------------------------------------------------- activations


def flat(shape: Sequence[int]) -> dict[str, int | Ref]:
    """The words of a step over all values of a map."""
    size = map_of(tuple(shape))
    return {
        "hi": size.height, "wi": size.width, "ho": size.height, "wo": size.width, "ci": size.channels,
        "co": size.channels, "ldx": size.channels, "ldy": size.channels,
    }  # fmt: skip


PARAMETERS = {"leaky_relu": ("slope",), "elu": ("alpha", "scale"), "clamp": ("low", "high"), "softplus": ("beta",)}
"""Numbers that an activation is made with, in the order of the step's."""


def _function(op: Op) -> dict[str, int | Ref]:
    """The words that say which function of an element an activation is."""
    kind = "gelu_tanh" if op.kind == "gelu" and op["approximate"] == "tanh" else op.kind
    numbers = [float_word(op[name]) for name in PARAMETERS.get(kind, ())]
    return {"act": ACTIVATIONS[kind], **dict(zip(("a0", "a1"), numbers, strict=False))}


def _activation(builder: Builder, node: Node, into: list[Step]) -> None:
    builder.emit(into, "unary", **flat(node.op.shape), **_function(node.op), x=node.inputs[0][0], y=node.y[0])


def _activation_back(
    builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]
) -> Buffer:
    words = flat(node.op.shape) | _function(node.op)
    return _elementwise(builder, node, "unary_dx", words, node.inputs[0], g, add, into)


def _elementwise(
    builder: Builder, node: Node, kind: str, words: dict[str, int | Ref], kept: Buffer, g: Buffer, add: Buffer | None,
    into: list[Step],
) -> Buffer:  # fmt: skip
    """The input's gradient as a function of a kept value and the output's gradient, value by value."""
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", g.floats, over=g if add is None else add)
    more = None if add is None else add[0]
    builder.emit(into, kind, **words, x=kept[0], w=g[0], r=more, ldr=words["ldx"], y=dx[0])
    return dx


def _prelu(builder: Builder, node: Node, into: list[Step]) -> None:
    """max(x, 0) + slope min(x, 0)."""
    op, sizes, x = node.op, flat(node.op.shape), node.inputs[0][0]
    below = builder.buffer(f"{op.name} below 0", op.elements)
    builder.emit(into, "unary", **sizes, **BELOW, x=x, y=below[0])
    builder.emit(into, "unary", **sizes, act=ACTIVATIONS["relu"], x=x, y=node.y[0])
    builder.emit(into, "multiply", **sizes, x=below[0], r=_slopes(builder, op), ldr=0, w=node.y[0], y=node.y[0])


def _prelu_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    op, sizes, x = node.op, flat(node.op.shape), node.inputs[0][0]
    below = builder.buffer(f"gradient below 0 of {op.name}", op.elements)
    builder.emit(into, "unary_dx", **sizes, **BELOW, x=x, w=g[0], y=below[0])
    dx = _elementwise(builder, node, "unary_dx", sizes | {"act": ACTIVATIONS["relu"]}, node.inputs[0], g, add, into)
    builder.emit(into, "multiply", **sizes, x=below[0], r=_slopes(builder, op), ldr=0, w=dx[0], y=dx[0])
    return dx


def _slopes(builder: Builder, op: Op) -> Ref:
    """A slope for each channel, in their order."""
    name, order = f"{op.owner}.weight", builder.channels.of[op.name]
    return builder.constant(lambda tensors: np.broadcast_to(tensors[name], len(order))[order], len(order))


BELOW: dict[str, int | Ref] = {"act": ACTIVATIONS["clamp"], "a0": float_word(-np.inf), "a1": float_word(0)}
"""min(x, 0); its slope at 0 is 1, and that of ReLU is 0, as PReLU's are."""


def _softmax(builder: Builder, node: Node, into: list[Step]) -> None:
    logarithm = int(node.op.kind == "log_softmax")
    builder.emit(into, "softmax", **flat(node.op.shape), x=node.inputs[0][0], y=node.y[0], n=logarithm)


def _softmax_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    words = flat(node.op.shape) | {"n": int(node.op.kind == "log_softmax")}
    return _elementwise(builder, node, "softmax_dx", words, node.y, g, add, into)


def _refuses_axis(op: Op) -> str:
    return f"axis {op['axis']}" if op["axis"] % len(op.shape) else ""


# -------------------------------------------------------------------------------------------------------- normalisation


def _norm_words(op: Op) -> dict[str, int | Ref]:
    groups = 1 if op.kind == "layernorm" else op["groups"]
    return flat(op.shape) | {"n": groups, "a0": float_word(op["eps"])}


def _norm(builder: Builder, node: Node, into: list[Step]) -> None:
    room = builder.buffer(f"statistics {node.op.name}", 4 * node.op.shape[0])
    builder.emit(into, "norm", **_norm_words(node.op), x=node.inputs[0][0], y=node.y[0], m=room[0])


def _norm_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    room = builder.buffer(f"statistics {node.op.name}", 4 * node.op.shape[0])
    words = _norm_words(node.op) | {"m": room[0]}
    return _elementwise(builder, node, "norm_dx", words, node.inputs[0], g, add, into)


def _refuses_layernorm(op: Op) -> str:
    return f"the last {op['axes']} of {len(op.shape)} axes" if op["axes"] != len(op.shape) else ""


# ------------------------------------------------------------------------------------------------------------- products


def _is_vector(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """One value per channel, to be repeated over the pixels of the other value."""
    alike = len(shape) == len(whole) <= 3 and shape[:1] == whole[:1]
    return alike and prod(shape[1:]) == 1 < prod(whole[1:])


def _of_equals(op: Op) -> str:
    """Channel by channel, unless something has to be repeated along them."""
    plain = all(shape == op.shape or _is_vector(shape, op.shape) for shape in op.in_shapes)
    return "same" if plain else "fixed"


def _first_is_whole(op: Op) -> bool:
    return op.in_shapes[0] == op.shape


def _operand(builder: Builder, node: Node, which: int, into: list[Step], *, spread: bool = False) -> tuple[Ref, int]:
    """One input of a product or sum: where it lies, and how far its pixels lie apart: 0 for a value per channel (where
    it may be one: `spread`). What has another shape is repeated to the whole first."""
    op, x = node.op, node.inputs[which]
    if op.in_shapes[which] == op.shape:
        return x[0], map_of(op.shape).channels
    if spread and _is_vector(op.in_shapes[which], op.shape):
        return x[0], 0
    whole = builder.buffer(f"{op.inputs[which]} repeated", op.elements)
    moves.repeated(builder, op.in_shapes[which], op.shape).gather(x[0], whole[0], into)
    return whole[0], map_of(op.shape).channels


def _operands(builder: Builder, node: Node, into: list[Step], *, either: bool) -> dict[str, int | Ref]:
    """Both inputs as the words of a step; `either` may come first."""
    first = 1 if either and _is_vector(node.op.in_shapes[0], node.op.shape) else 0
    x, _ = _operand(builder, node, first, into)
    r, apart = _operand(builder, node, 1 - first, into, spread=True)
    return {"x": x, "r": r, "ldr": apart}


def _own_gradient(
    builder: Builder, node: Node, which: int, whole: Buffer, add: Buffer | None, into: list[Step]
) -> Buffer:
    """An input's gradient from that of the input repeated to the whole."""
    op = node.op
    if op.in_shapes[which] == op.shape:
        return plus(builder, op.inputs[which], op.shape, whole, add, into)
    if _is_vector(op.in_shapes[which], op.shape):
        return plus(builder, op.inputs[which], op.in_shapes[which], _over_pixels(builder, op, whole, into), add, into)
    dx = builder.buffer(f"gradient {op.inputs[which]}", prod(op.in_shapes[which]))
    table = moves.repeated(builder, op.in_shapes[which], op.shape)
    table.scatter(whole[0], dx[0], into, add=None if add is None else add[0])
    return dx


def _multiply(builder: Builder, node: Node, into: list[Step]) -> None:
    op = node.op
    words = flat(op.shape) | _operands(builder, node, into, either=op.kind == "multiply")
    builder.emit(into, "multiply", **words, y=node.y[0], n=int(op.kind == "divide"))


def _multiply_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    op, sizes = node.op, flat(node.op.shape)
    divides = int(op.kind == "divide")
    r, apart = _operand(builder, node, 1 - which, into, spread=True)
    if op.in_shapes[which] == op.shape:
        dx = builder.buffer(f"gradient {op.inputs[which]}", op.elements, over=add)
        more = None if add is None else add[0]
        builder.emit(into, "multiply", **sizes, x=g[0], r=r, ldr=apart, w=more, y=dx[0], n=divides)
        return dx
    if _is_vector(op.in_shapes[which], op.shape) and not divides:
        dx = builder.buffer(f"gradient {op.inputs[which]}", prod(op.in_shapes[which]), over=add)
        more = None if add is None else add[0]
        builder.emit(into, "dot", **sizes, x=g[0], r=r, ldr=apart, w=more, y=dx[0])
        return dx
    whole = builder.buffer(f"gradient {op.inputs[which]} repeated", op.elements)
    builder.emit(into, "multiply", **sizes, x=g[0], r=r, ldr=apart, y=whole[0], n=divides)
    return _own_gradient(builder, node, which, whole, add, into)


def _divide_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """Of x / r: g / r, and - g (x / r) / r."""
    if which == 0:
        return _multiply_back(builder, node, which, g, add, into)
    op, sizes = node.op, flat(node.op.shape)
    r, apart = _operand(builder, node, 1, into, spread=True)
    parts = builder.buffer(f"gradient {op.name} times it", op.elements)
    builder.emit(into, "multiply", **sizes, x=g[0], r=node.y[0], ldr=sizes["ldx"], y=parts[0])
    whole = builder.buffer(f"gradient {op.inputs[1]} repeated", op.elements, over=parts)
    builder.emit(into, "multiply", **sizes, x=parts[0], r=r, ldr=apart, y=whole[0], n=1)
    return _less(builder, op, _own_gradient(builder, node, 1, whole, None, into), add, into)


def _bits_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """The bits have been applied to g already."""
    return plus(builder, node.op.inputs[0], node.op.in_shape, g, add, into)


def plus(builder: Builder, name: str, shape: Sequence[int], g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """g where nothing is to be added, else a new buffer with the sum."""
    if add is None:
        return g
    total = builder.buffer(f"gradient {name}", g.floats, over=add)
    sizes = flat(shape)
    builder.emit(into, "add", **sizes, x=g[0], r=add[0], y=total[0], ldr=sizes["ldx"])
    return total


# ------------------------------------------------------------------------------------------------ additions and copies


def _sum(builder: Builder, node: Node, into: list[Step]) -> None:
    op = node.op
    words = flat(op.shape) | _operands(builder, node, into, either=op.kind == "add")
    builder.emit(into, "add", **words, y=node.y[0], n=int(op.kind == "subtract"))


def _sum_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    op = node.op
    if op.kind == "subtract" and which == 1:
        return _less(builder, op, _own_gradient(builder, node, which, g, None, into), add, into)
    return _own_gradient(builder, node, which, g, add, into)


def _over_pixels(builder: Builder, op: Op, g: Buffer, into: list[Step]) -> Buffer:
    """The sum over all pixels of a gradient."""
    channels = op.shape[0]
    total = builder.buffer(f"gradient of a channel of {op.name}", channels)
    ones = builder.constant(lambda tensors: np.ones(channels, np.float32), channels)
    builder.emit(into, "dot", **flat(op.shape), x=g[0], r=ones, y=total[0])
    return total


def _less(builder: Builder, op: Op, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """add - g."""
    sizes = flat(op.in_shapes[1])
    total = builder.buffer(f"gradient {op.inputs[1]}", g.floats, over=add)
    if add is None:
        builder.emit(into, "fill", **sizes, y=total[0])
    from_ = total if add is None else add
    builder.emit(into, "add", **sizes, x=from_[0], r=g[0], y=total[0], ldr=sizes["ldx"], n=1)
    return total


def _constant(builder: Builder, node: Node, into: list[Step]) -> None:
    """Copied into the arena, where its readers look for it."""
    op = node.op
    name, size = f"{op.name}.value", map_of(op.shape)

    def pixels(tensors: Tensors) -> Floats:
        return tensors[name].reshape(size.channels, size.pixels).T

    _copy(builder, into, builder.constant(pixels, op.elements), node.y[0], op.shape, size.channels, size.channels)


def _copy(
    builder: Builder, into: list[Step], source: Ref, target: Ref, shape: Sequence[int], ldx: int, ldy: int
) -> None:
    """Copy the channels of a map, from pixels of ldx floats to pixels of ldy."""
    sizes = flat(shape) | {"ldx": ldx, "ldy": ldy}
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
    sizes = flat(shapes[which])
    builder.emit(into, "add", **(sizes | {"ldx": op.shape[0]}), x=g[at], r=add[0], y=own[0], ldr=sizes["ldy"])
    return own


def _chosen(op: Op) -> list[int]:
    """Numbers of the input's channels that the output has."""
    return list(op["index"]) if op.kind == "take" else list(range(op["start"], op["stop"], op["step"]))


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """Ranges of consecutive numbers: (place of the first, the first, how many).

    >>> _ranges([4, 5, 2, 2])
    [(0, 4, 2), (2, 2, 1), (3, 2, 1)]
    """
    found: list[tuple[int, int, int]] = []
    for at, number in enumerate(numbers):
        if found and found[-1][1] + found[-1][2] == number:
            place, first, count = found.pop()
            found.append((place, first, count + 1))
        else:
            found.append((at, number, 1))
    return found


def _take(builder: Builder, node: Node, into: list[Step]) -> None:
    op = node.op
    for at, first, count in _ranges(_chosen(op)):
        shape = (count, *op.shape[1:])
        _copy(builder, into, node.inputs[0][first], node.y[at], shape, op.in_shape[0], op.shape[0])


def _take_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    op, sizes = node.op, flat(node.op.in_shape)
    dx = builder.buffer(f"gradient {op.inputs[0]}", prod(op.in_shape), over=add)
    if add is None:
        builder.emit(into, "fill", **sizes, y=dx[0])
    else:
        builder.emit(into, "copy", **sizes, x=add[0], y=dx[0])
    for at, first, count in _ranges(_chosen(op)):
        own = flat((count, *op.shape[1:])) | {"ldx": op.shape[0], "ldy": sizes["ldx"], "ldr": sizes["ldx"]}
        builder.emit(into, "add", **own, x=g[at], r=dx[first], y=dx[first])
    return dx


def _pad(builder: Builder, node: Node, into: list[Step]) -> None:
    """A depthwise layer whose only weight is 1: what it reads outside of the map is 0."""
    builder.emit(into, "depthwise", **_pad_words(builder, node.op), x=node.inputs[0][0], y=node.y[0])


def _pad_words(builder: Builder, op: Op) -> dict[str, int | Ref]:
    channels = op.shape[0]
    ones = builder.constant(lambda tensors: np.ones(channels, np.float32), channels)
    top, left = (0, 0, *op["before"][1:])[-2:]
    return _window(op) | {"ph": top, "pw": left, "w": ones}


def _pad_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", prod(node.op.in_shape), over=add)
    more = None if add is None else add[0]
    builder.emit(into, "depthwise_dx", **_pad_words(builder, node.op), x=g[0], r=more, y=dx[0])
    return dx


def _refuses_pad(op: Op) -> str:
    if op["mode"] != "constant" or op["value"] != 0:
        return f"mode {op['mode']}, value {op['value']}"
    least = min(*op["before"], *op["after"])
    return f"{op['before']} before, {op['after']} after" if op["before"][0] or op["after"][0] or least < 0 else ""


def _turns(op: Op) -> bool:
    """Whether flattening changes the order of values: pixels of channels become channels of pixels."""
    return prod(op.in_shape[1:]) > 1


def _flatten_channels(op: Op) -> str:
    return "fixed" if _turns(op) else "same"


def _refuses_reshape(op: Op) -> str:
    """A vector made of a map, or a vector of another shape."""
    vector = op.shape[0] == op.in_shape[0] and prod(op.shape[1:]) == prod(op.in_shape[1:]) == 1
    return "" if vector or len(op.shape) == 1 else f"{op.in_shape} as {op.shape}"


def _flatten(builder: Builder, node: Node, into: list[Step]) -> None:
    sizes = flat(node.op.in_shape)
    if not _turns(node.op):
        builder.emit(into, "copy", **sizes, x=node.inputs[0][0], y=node.y[0])
        return
    builder.emit(into, "transpose", **sizes, x=node.inputs[0][0], y=node.y[0], n=0)


def _flatten_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    op = node.op
    if not _turns(op):
        return plus(builder, op.inputs[0], op.in_shape, g, add, into)
    dx = builder.buffer(f"gradient {op.inputs[0]}", prod(op.in_shape), over=add)
    sizes = flat(op.in_shape)
    more = None if add is None else add[0]
    builder.emit(into, "transpose", **sizes, x=g[0], y=dx[0], r=more, ldr=sizes["ldx"], n=1)
    return dx


# -------------------------------------------------------------------------------------------------------------- pooling


def _window(op: Op) -> dict[str, int | Ref]:
    channels = op.in_channels
    words = geometry(op) | {"ci": channels, "co": channels, "ldx": channels, "ldy": channels, "ldr": channels}
    return words | {"flags": COUNT_PAD if op.kind == "avg_pool" and op.count_include_pad else 0}


def _adaptive(op: Op) -> dict[str, int | Ref]:
    sizes = zip(map_sizes(op.in_shape), map_sizes(op.shape), strict=True)
    rows, columns = (max(-(-(o + 1) * size // out) - o * size // out for o in range(out)) for size, out in sizes)
    return _window(op) | {"kh": rows, "kw": columns, "flags": ADAPTIVE}


def map_sizes(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    size = map_of(tuple(shape))
    return size.height, size.width


def _adaptive_max(builder: Builder, node: Node, into: list[Step]) -> None:
    if node.pulls:
        node.kept = builder.buffer(f"index {node.op.name}", -(-node.op.elements // 4))
    index = None if node.kept is None else node.kept[0]
    builder.emit(into, "max_pool", **_adaptive(node.op), x=node.inputs[0][0], y=node.y[0], m=index)


def _adaptive_max_back(
    builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]
) -> Buffer:
    assert node.kept is not None
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", prod(node.op.in_shape), over=add)
    more = None if add is None else add[0]
    builder.emit(into, "max_pool_dx", **_adaptive(node.op), x=g[0], r=more, y=dx[0], m=node.kept[0])
    return dx


def _refuses_adaptive_max(op: Op) -> str:
    words = _adaptive(op)
    taps = int(words["kh"]) * int(words["kw"])  # type: ignore[arg-type]
    return f"bins of {taps} positions" if taps > 256 else _refuses_adaptive(op)


def _adaptive_pool(builder: Builder, node: Node, into: list[Step]) -> None:
    builder.emit(into, "avg_pool", **_adaptive(node.op), x=node.inputs[0][0], y=node.y[0])


def _adaptive_pool_back(
    builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]
) -> Buffer:
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", prod(node.op.in_shape), over=add)
    more = None if add is None else add[0]
    builder.emit(into, "avg_pool_dx", **_adaptive(node.op), x=g[0], r=more, y=dx[0])
    return dx


def _refuses_adaptive(op: Op) -> str:
    rows = _adaptive(op)["kh"]
    return f"bins of {rows} rows" if int(rows) > MOST_ROWS else ""  # type: ignore[arg-type]


def _nearest(builder: Builder, node: Node, into: list[Step]) -> None:
    builder.emit(into, "nearest", **_window(node.op), x=node.inputs[0][0], y=node.y[0])


def _nearest_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    return _spread(builder, node, "nearest_dx", g, add, into)


def _refuses_upsample(op: Op) -> str:
    whole = all(out % size == 0 for size, out in zip(op.in_shape[1:], op.shape[1:], strict=True))
    return "" if op["mode"] == "nearest" and whole else f"mode {op['mode']} from {op.in_shape} to {op.shape}"


def _refuses_mean(op: Op) -> str:
    return "" if op["axes"] == tuple(range(1, len(op.in_shape))) else f"axes {op['axes']}"


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
    builder.emit(into, "mean", **flat(node.op.in_shape), x=node.inputs[0][0], y=node.y[0])


def _mean_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", prod(node.op.in_shape), over=add)
    sizes = flat(node.op.in_shape)
    more = None if add is None else add[0]
    builder.emit(into, "mean_dx", **sizes, x=g[0], y=dx[0], r=more, ldr=sizes["ldx"])
    return dx


def _amax(builder: Builder, node: Node, into: list[Step]) -> None:
    builder.emit(into, "amax", **flat(node.op.in_shape), x=node.inputs[0][0], y=node.y[0])


def _amax_back(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    """Shared evenly among all that are the largest."""
    dx = builder.buffer(f"gradient {node.op.inputs[0]}", prod(node.op.in_shape), over=add)
    words = flat(node.op.in_shape) | {"r": None if add is None else add[0]}
    builder.emit(into, "amax_dx", **words, x=node.inputs[0][0], b=node.y[0], w=g[0], ldr=words["ldx"], y=dx[0])
    return dx


def _input(builder: Builder, node: Node, into: list[Step]) -> None:
    builder.emit(into, "input", **flat(node.op.shape), y=node.y[0])


def _no_gradient(builder: Builder, node: Node, which: int, g: Buffer, add: Buffer | None, into: list[Step]) -> Buffer:
    raise AssertionError(node.op.kind)


RULES: dict[str, Rule] = {
    "input": Rule(fixed, _input, _no_gradient, rows=True),
    "conv": Rule(_layer_channels, _layer, _layer_back, rows=True, refuses=_refuses_layer),
    "linear": Rule(_layer_channels, _layer, _layer_back, any_axes=True),
    "scale": Rule(same, _layer, _layer_back, rows=True, refuses=_tokens),
    **{kind: Rule(fixed, _recurrent, _layer_back) for kind in GATES},
    **{kind: Rule(same, _activation, _bits_back, rows=True, in_place=always, any_axes=True) for kind in BITS},
    **{
        kind: Rule(same, _activation, _activation_back, rows=True, in_place=always, any_axes=True)
        for kind in (
            "leaky_relu", "elu", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "clamp", "exp",
            "softplus", "mish", "abs",
        )
    },
    **{kind: Rule(same, _softmax, _softmax_back, refuses=_refuses_axis) for kind in ("softmax", "log_softmax")},
    "layernorm": Rule(fixed, _norm, _norm_back, refuses=_refuses_layernorm),
    "groupnorm": Rule(fixed, _norm, _norm_back),
    "add": Rule(_of_equals, _sum, _sum_back, in_place=_first_is_whole, any_axes=True),
    "subtract": Rule(_of_equals, _sum, _sum_back, in_place=_first_is_whole, any_axes=True),
    "multiply": Rule(_of_equals, _multiply, _multiply_back, any_axes=True),
    "divide": Rule(_of_equals, _multiply, _divide_back, any_axes=True),
    "concat": Rule(joined, _concat, _concat_back, refuses=_refuses_axis),
    **{kind: Rule(fixed, _take, _take_back, refuses=_refuses_axis) for kind in ("slice", "take")},
    "pad": Rule(same, _pad, _pad_back, refuses=_refuses_pad),
    "constant": Rule(fixed, _constant, _no_gradient, any_axes=True),
    "flatten": Rule(_flatten_channels, _flatten, _flatten_back, in_place=lambda op: not _turns(op)),
    "reshape": Rule(
        _flatten_channels, _flatten, _flatten_back, refuses=_refuses_reshape, in_place=lambda op: not _turns(op)
    ),
    "max_pool": Rule(same, _max_pool, _max_pool_back, rows=True, refuses=_refuses_max_pool),
    "avg_pool": Rule(same, _avg_pool, _avg_pool_back, rows=True, refuses=_refuses_layer),
    "adaptive_avg_pool": Rule(same, _adaptive_pool, _adaptive_pool_back, refuses=_refuses_adaptive),
    "global_pool": Rule(same, _mean, _mean_back),
    "mean": Rule(same, _mean, _mean_back, refuses=_refuses_mean),
    "upsample": Rule(same, _nearest, _nearest_back, refuses=_refuses_upsample),
    "adaptive_max_pool": Rule(same, _adaptive_max, _adaptive_max_back, refuses=_refuses_adaptive_max),
    "amax": Rule(same, _amax, _amax_back, refuses=_refuses_mean),
    "prelu": Rule(same, _prelu, _prelu_back),
    "matmul": Rule(fixed, matrices.matmul, matrices.matmul_back, any_axes=True),
    "attention": Rule(
        fixed, matrices.attention, matrices.attention_back, refuses=matrices.refuses_attention, any_axes=True
    ),
}  # fmt: skip
"""One row per kind: the cheapest way."""

MOVED = Rule(fixed, moves.move, moves.move_back, refuses=moves.refuses_move, any_axes=True)
ON_ROWS = Rule(fixed, _layer, _layer_back, refuses=_refuses_middle_axis, any_axes=True)
ALONG_ROWS = Rule(fixed, matrices.softmax, matrices.softmax_back, refuses=matrices.refuses_softmax, any_axes=True)
REDUCED = Rule(fixed, moves.reduce, moves.reduce_back, refuses=moves.refuses_move, any_axes=True)
GENERAL: dict[str, Rule] = {
    **dict.fromkeys(("reshape", "flatten", "permute", "expand", "roll", "slice", "take", "pad", "upsample"), MOVED),
    **dict.fromkeys(("sum", "mean"), REDUCED),
    "scale": ON_ROWS,
    **dict.fromkeys(("softmax", "log_softmax"), ALONG_ROWS),
    "layernorm": Rule(fixed, matrices.layernorm, matrices.layernorm_back, any_axes=True),
    "concat": Rule(fixed, moves.join, moves.join_back, refuses=moves.refuses_move, any_axes=True),
}
"""What else runs by tables, whatever its axes."""


def rule_of(op: Op) -> Rule | None:
    """How an operator is lowered; None where its kind has no kernel."""
    rule, general = RULES.get(op.kind), GENERAL.get(op.kind)
    if general is not None and (rule is None or refused(rule, op)):
        return general
    return rule


def refused(rule: Rule, op: Op) -> str:
    """Why a rule cannot lower an operator; empty where it can."""
    usual = all(1 <= len(shape) <= 3 for shape in (op.shape, *op.in_shapes))
    if not (usual or rule.any_axes):
        return f"values of {sorted({len(shape) for shape in (op.shape, *op.in_shapes)})} axes"
    if op.operator.trains and op.frozen:
        return "weights that are no parameters of the model"
    return rule.refuses(op)


def lowered(op: Op) -> Rule:
    """The rule of an operator that has one."""
    rule = rule_of(op)
    assert rule is not None
    return rule


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
