"""Random graphs of everything that the native engine has rules for, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from stages.artifacts.records import LayerUpdate
from stages.graphs.graph import Graph
from stages.operators import Op
from tests.engines.random_graphs import plans
from tests.operators.random_graphs import ATTRIBUTES, SEEDS, Growing, heard_layers, is_heard

SMOOTH = ("sigmoid", "tanh", "silu", "gelu", "mish", "hardswish", "elu", "relu", "relu6")
"""Activations without kinks, or with those that `distance_to_kinks` knows."""


def layer(grow: Growing, x: Op) -> Op:
    groups = grow.pick(*(g for g in (1, 1, 2, x.shape[0]) if x.shape[0] % g == 0))
    side = grow.pick(1, 3)
    facts = {
        "padding": (side // 2,) * 2,
        "stride": (grow.pick(1, 1, 2),) * 2,
        "dilation": (1, 1),
        "kernel": (side,) * 2,
    }
    out = groups * grow.pick(1, 2, 3) if groups < x.shape[0] else groups
    return grow.add("conv", x, out=(out, *x.shape[1:]), groups=groups, bias=grow.flag(), **facts)


def activation(grow: Growing, x: Op) -> Op:
    kind = grow.pick(*SMOOTH)
    return grow.add(kind, x, **ATTRIBUTES.get(kind, {}))


def normalised(grow: Growing, x: Op) -> Op:
    kind = grow.pick("layernorm", "groupnorm", "scale", "softmax")
    args = {
        "layernorm": {"axes": 3, "eps": 1e-3},
        "groupnorm": {"groups": grow.pick(*(g for g in (1, 2, 3, x.shape[0]) if x.shape[0] % g == 0)), "eps": 1e-3},
        "scale": {"axis": 0, "bias": grow.flag()},
        "softmax": {"axis": 0},
    }[kind]
    return grow.add(kind, x, **args)


def joined(grow: Growing, x: Op) -> Op:
    kind = grow.pick("add", "subtract", "multiply")
    if grow.flag():
        return grow.add(kind, x, grow.like(x))
    small = grow.add("sigmoid", grow.add("mean", grow.like(x), axes=(1, 2), keepdim=True))
    return grow.add(kind, x, small)


def channels(grow: Growing, x: Op) -> Op:
    count = x.shape[0]
    if count == 1 or grow.flag():
        index = tuple(grow.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5)))
        return grow.add("take", x, axis=0, index=index)
    if grow.flag():
        start = grow.draw(st.integers(0, count - 1))
        return grow.add("slice", x, axis=0, start=start, stop=count, step=grow.pick(1, 2) if start else 2)
    others = [op for op in grow.ops if op.shape[1:] == x.shape[1:] and op.shape[0] < 8]
    return grow.add("concat", x, grow.pick(*others, x), axis=0)


def resized(grow: Growing, x: Op) -> Op:
    _, height, width = x.shape
    kind = grow.pick("pad", "adaptive_avg_pool", "upsample")
    args = {
        "pad": {"before": (0, 1, 0), "after": (0, 0, grow.pick(0, 2)), "mode": "constant", "value": 0.0},
        "adaptive_avg_pool": {"size": (max(1, height - 1), max(1, width // 2))},
        "upsample": {"size": (2 * height, width), "mode": "nearest", "align_corners": False},
    }[kind]
    return grow.add(kind, x, **args) if x.elements < 300 else x


def moved(grow: Growing, x: Op) -> Op:
    """What goes through tables: views of four axes, axes in another order, borders that copy, broadcasting."""
    channels, height, width = x.shape
    kind = grow.pick("shuffle", "permute", "roll", "slice", "pad", "upsample", "sum", "concat", "plane", "share")
    if kind == "shuffle":
        apart = grow.add("reshape", x, to=(channels, height, 1, width))
        return grow.add("reshape", grow.add("permute", apart, order=(3, 2, 1, 0)), to=(width, height, channels))
    if kind == "concat":
        return grow.add("concat", x, grow.like(x), axis=grow.pick(1, 2)) if x.elements < 300 else x
    if kind in ("plane", "share"):
        plane = grow.add("sigmoid", grow.add("mean", x, axes=(grow.pick(0, 1, 2),), keepdim=True))
        pair = (x, plane) if kind == "share" or grow.flag() else (plane, x)
        return grow.add("divide" if kind == "share" else grow.pick("multiply", "add", "subtract"), *pair)
    if kind == "upsample" and x.elements >= 300:
        return x
    args = {
        "permute": {"order": grow.pick((1, 0, 2), (2, 1, 0), (1, 2, 0))},
        "roll": {"shifts": (1, -1), "axes": (0, 2)},
        "slice": {"axis": 1, "start": 1, "stop": height, "step": grow.pick(1, 2)},
        "pad": {"before": (0, 1, 0), "after": (0, 1, 1), "mode": grow.pick("replicate", "circular"), "value": 0.0},
        "upsample": {"size": (height + 1, 2 * width), "mode": grow.pick("bilinear", "bicubic"), "align_corners": False},
        "sum": {"axes": (grow.pick(0, 1, 2),), "keepdim": True},
    }[kind]
    return x if kind == "slice" and height < 2 else grow.add(kind, x, **args)


STEPS = (layer, layer, layer, activation, activation, normalised, joined, joined, channels, resized, moved, moved)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """3 to 8 steps over a map, its mean, a linear layer."""
    grow = Growing(draw, (draw(st.integers(1, 5)), draw(st.integers(3, 6)), draw(st.integers(3, 6))))
    value = layer(grow, grow.ops[0])
    for _ in range(draw(st.integers(3, 8))):
        value = draw(st.sampled_from(STEPS))(grow, value)
    grow.add("linear", grow.add("mean", value, axes=(1, 2), keepdim=False), out=(3,), bias=True)
    return Graph(tuple(grow.ops))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Graph, tuple[LayerUpdate, ...], int, int]:
    """(graph, plan, batch, seed of the tensors); the plan's layers are heard by the output."""
    graph = draw(graphs().filter(lambda graph: heard_layers(graph)))
    return graph, draw(plans(graph).filter(lambda plan: is_heard(graph, plan))), draw(st.integers(1, 3)), draw(SEEDS)
