"""Graphs for the cost and planning tests: the paper's backbones, and small ones made by hand."""

from functools import cache

from stages.graphs.graph import Graph
from stages.models.registry import build, input_spec
from stages.operators import Op
from tests.models.nets import folded


@cache
def backbone(arch: str, **arguments: object) -> Graph:
    """A registry model in deploy form at its default input."""
    return folded(build(arch, arguments), input_spec(arch, arguments).shape)[0]


def op_input(channels: int, size: int) -> Op:
    return Op("input", "input", (), (channels, size, size))


def conv(name: str, source: Op, out: int, k: int = 1, stride: int = 1, groups: int = 1, block: int = -1) -> Op:
    """A same-padded square convolution with bias."""
    shape = (out, *(-(-size // stride) for size in source.shape[1:]))
    return Op(
        name,
        "conv",
        (source.name,),
        shape,
        (source.shape,),
        (k, k),
        (stride, stride),
        (k // 2, k // 2),
        (1, 1),
        groups,
        bias=True,
        block=block,
    )


def unary(kind: str, source: Op, name: str | None = None) -> Op:
    shape = source.shape[:1] if kind == "global_pool" else source.shape
    return Op(name or f"{source.name}.{kind}", kind, (source.name,), shape, (source.shape,))


def inverted_residual() -> Graph:
    """3x8x8 -> stem 4 -> expand 8, depthwise 3x3, project 4, added to the block's input -> pool: 4 layers, 1 block."""
    x = op_input(3, 8)
    stem = conv("stem", x, 4, k=3)
    stem_act = unary("relu6", stem)
    expand = conv("b.expand", stem_act, 8, block=0)
    expand_act = unary("relu6", expand)
    depthwise = conv("b.depthwise", expand_act, 8, k=3, groups=8, block=0)
    depthwise_act = unary("relu6", depthwise)
    project = conv("b.project", depthwise_act, 4, block=0)
    total = Op("b.add", "add", ("b.project", stem_act.name), (4, 8, 8), ((4, 8, 8),) * 2, block=0)
    ops = (x, stem, stem_act, expand, expand_act, depthwise, depthwise_act, project, total, unary("global_pool", total))
    return Graph(ops, ("b",))


def fire() -> Graph:
    """2x6x6 -> squeeze 4 -> two branches of 5 and 6 channels that share its output, concatenated -> conv 3 -> pool."""
    x = op_input(2, 6)
    squeeze = conv("squeeze", x, 4)
    act = unary("relu", squeeze)
    left, right = conv("left", act, 5), conv("right", act, 6, k=3)
    left_act, right_act = unary("relu", left), unary("relu", right)
    shapes = (left_act.shape, right_act.shape)
    both = Op("cat", "concat", (left_act.name, right_act.name), (11, 6, 6), shapes, args=(("axis", 0),))
    pooled = Op("pool", "max_pool", ("cat",), (11, 3, 3), ((11, 6, 6),), (2, 2), (2, 2), (0, 0), (1, 1))
    last = conv("last", pooled, 3)
    return Graph((x, squeeze, act, left, left_act, right, right_act, both, pooled, last, unary("global_pool", last)))


def classifier() -> Graph:
    """2x4x4 -> conv 3 -> relu -> flatten -> linear 5 -> relu -> linear 4."""
    x = op_input(2, 4)
    first = conv("conv", x, 3, k=3)
    act = unary("relu", first)
    flat = Op("flat", "flatten", (act.name,), (48,), (act.shape,))
    middle = Op("fc1", "linear", ("flat",), (5,), ((48,),), bias=True)
    middle_act = unary("relu", middle)
    last = Op("fc2", "linear", (middle_act.name,), (4,), ((5,),), bias=True)
    return Graph((x, first, act, flat, middle, middle_act, last))


HAND_MADE = {"inverted_residual": inverted_residual, "fire": fire, "classifier": classifier}
