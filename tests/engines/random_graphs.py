"""Random graphs, tensors and plans for the engine's tests, drawn by hypothesis."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import strategies as st

from stages.artifacts.records import InputSpec, LayerUpdate
from stages.engines.torch import reference
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.operators import Op
from stages.planning.shortcuts import with_detached
from tests.rounding import as_tensors


def window(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Output length of a convolution or pooling along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


class Builder:
    """Grows a graph operator by operator."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.ops = [Op("input", "input", (), shape)]

    def add(self, kind: str, inputs: list[Op], shape: tuple[int, ...], **facts) -> Op:
        name = f"{kind}{len(self.ops)}"
        self.ops.append(
            Op(
                name,
                kind,
                tuple(op.name for op in inputs),
                shape,
                in_shapes=tuple(source.shape for source in inputs),
                **facts,
            )
        )
        return self.ops[-1]


@st.composite
def graphs(draw) -> Graph:
    """A graph of 4 to 12 operators of every kind over 1 or 2 spatial axes, with branches, ending in features."""
    axes = draw(st.sampled_from([1, 2, 2, 2]))
    shape = (draw(st.integers(1, 6)), *(draw(st.integers(4, 9)) for _ in range(axes)))
    builder = Builder(shape)
    value = builder.ops[0]
    for _ in range(draw(st.integers(2, 8))):
        kind = draw(st.sampled_from(["conv", "conv", "conv", "relu", "relu6", "add", "concat", "max_pool", "avg_pool"]))
        value = GROW[kind](draw, builder, value)
    return finish(draw, builder, value)


def finish(draw, builder: Builder, value: Op) -> Graph:
    if draw(st.booleans()):
        value = builder.add("global_pool", [value], (value.shape[0],))
    else:
        value = builder.add("flatten", [value], (prod(value.shape),))
    for _ in range(draw(st.integers(0, 2))):
        value = builder.add("linear", [value], (draw(st.integers(1, 7)),), bias=draw(st.booleans()))
        if draw(st.booleans()):
            value = builder.add(draw(st.sampled_from(["relu", "relu6"])), [value], value.shape)
    return Graph(tuple(builder.ops))


def grow_conv(draw, builder: Builder, value: Op) -> Op:
    channels, sizes = value.shape[0], value.shape[1:]
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    out = groups * draw(st.integers(1, 3))
    if draw(st.booleans()):  # depthwise, or as many outputs as inputs: what a later addition needs
        out = channels
    kernel = tuple(draw(st.sampled_from([1, 3, 5])) for _ in sizes)
    dilation = tuple(draw(st.sampled_from([1, 1, 2])) for _ in sizes)
    padding = tuple(draw(st.integers(0, k // 2 * d)) for k, d in zip(kernel, dilation, strict=True))
    stride = tuple(draw(st.sampled_from([1, 1, 2])) for _ in sizes)
    shape = tuple(map(window, sizes, kernel, stride, padding, dilation))
    if min(shape) < 1:
        kernel, dilation, padding, stride, shape = ((1,) * len(sizes),) * 2 + (
            (0,) * len(sizes),
            (1,) * len(sizes),
            sizes,
        )
    return builder.add(
        "conv", [value], (out, *shape), kernel=kernel, stride=stride, padding=padding, dilation=dilation,
        groups=groups, bias=draw(st.booleans()),
    )  # fmt: skip


def grow_activation(kind: str):
    return lambda draw, builder, value: builder.add(kind, [value], value.shape)


def grow_add(draw, builder: Builder, value: Op) -> Op:
    others = [op for op in builder.ops[1:] if op.shape == value.shape] or [value]
    return builder.add("add", [value, draw(st.sampled_from(others))], value.shape)


def grow_concat(draw, builder: Builder, value: Op) -> Op:
    others = [op for op in builder.ops if op.shape[1:] == value.shape[1:] and op.shape[0] <= 8]
    chosen = [value, *draw(st.lists(st.sampled_from(others or [value]), min_size=1, max_size=2))]
    shape = (sum(op.shape[0] for op in chosen), *value.shape[1:])
    return builder.add("concat", chosen, shape, args=(("axis", 0),))


def grow_pool(kind: str):
    def grow(draw, builder: Builder, value: Op) -> Op:
        sizes = value.shape[1:]
        kernel = tuple(draw(st.integers(1, min(3, size))) for size in sizes)
        stride = tuple(draw(st.integers(1, 2)) for _ in sizes)
        padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
        dilation = (1,) * len(sizes)
        shape = tuple(map(window, sizes, kernel, stride, padding))
        return builder.add(
            kind, [value], (value.shape[0], *shape), kernel=kernel, stride=stride, padding=padding, dilation=dilation,
            count_include_pad=draw(st.booleans()),
        )  # fmt: skip

    return grow


GROW = {
    "conv": grow_conv,
    "relu": grow_activation("relu"),
    "relu6": grow_activation("relu6"),
    "add": grow_add,
    "concat": grow_concat,
    "max_pool": grow_pool("max_pool"),
    "avg_pool": grow_pool("avg_pool"),
}


@st.composite
def plans(draw, graph: Graph) -> tuple[LayerUpdate, ...]:
    """Updates of at least one layer: output or input channels, biases, or both; at times some layers detached."""
    layers = draw(st.lists(st.sampled_from(graph.layers), min_size=1, max_size=3, unique_by=lambda op: op.name))
    live = [draw(updates(op)) for op in layers]
    some = st.sets(st.sampled_from([op.name for op in graph.layers]), max_size=3)
    return with_detached(
        graph, live, draw(st.one_of(st.just(set()), some.filter(lambda names: heard(graph, live, names))))
    )


def heard(graph: Graph, live, detached) -> bool:
    """Whether every live layer still gets a gradient."""
    return all(update.layer in graph.gradient_flow({update.layer}, detached) for update in live)


@st.composite
def updates(draw, op: Op) -> LayerUpdate:
    axis = draw(st.sampled_from(["output", "input"]))
    count = op.out_channels if axis == "output" else op.in_channels
    channels = draw(subsets(count))
    bias = draw(subsets(op.out_channels)) if op.bias else ()
    if not channels and not bias:
        channels = (count - 1,)
    return LayerUpdate(op.name, axis, channels, count, bias)


def subsets(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Ascending channel numbers below `count`; often all of them, sometimes none."""
    some = st.sets(st.integers(0, count - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    return st.one_of(some, some, st.just(tuple(range(count))), st.just(()))


@st.composite
def cases(draw) -> tuple[Graph, tuple[LayerUpdate, ...], int, int]:
    """(graph, plan, batch, seed of the tensors)."""
    graph = draw(graphs().filter(lambda graph: graph.layers))
    return graph, draw(plans(graph)), draw(st.integers(1, 4)), draw(st.integers(0, 2**16))


def random_backbone(graph: Graph, seed: int, dtype: torch.dtype) -> Backbone:
    """Weights that keep activations of order one, so that both ends of ReLU6 are met."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for op in graph.layers:
        scale = 2 / prod(op.weight_shape[1:]) ** 0.5
        weight = torch.randn(op.weight_shape, generator=generator, dtype=dtype) * scale
        tensors[f"{op.name}.weight"] = weight.numpy()
        if op.bias:
            tensors[f"{op.name}.bias"] = torch.randn(op.out_channels, generator=generator, dtype=dtype).numpy()
    kind = "image" if len(graph.input_shape) == 3 else "features"  # the engine reads only the graph's shapes
    spec = InputSpec(kind, graph.input_shape if kind == "image" else (1,))
    return Backbone(graph, tensors, spec)


def random_input(graph: Graph, batch: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return 2 * torch.randn(batch, *graph.input_shape, generator=generator, dtype=dtype)


def dense_gradients(
    backbone: Backbone, x: torch.Tensor, loss, detached=frozenset()
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The oracle: features and every tensor's gradient by stock autograd, 0 where the loss does not depend on it.

    Layers in `detached` get their inputs by `Tensor.detach`.
    """
    tensors = {name: value.clone().requires_grad_() for name, value in as_tensors(backbone.tensors).items()}
    values = {backbone.graph.ops[0].name: x}
    for op in backbone.graph.ops[1:]:
        inputs = [values[name].detach() if op.name in detached else values[name] for name in op.inputs]
        values[op.name] = reference.apply(op, inputs, tensors)
    features = values[backbone.graph.ops[-1].name]
    loss(features).backward()
    gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in tensors.items()}
    return features.detach(), gradients


def distance_to_kinks(backbone: Backbone, x: torch.Tensor) -> float:
    """How near any ReLU input is to 0 or 6, or two values of a max-pool window to each other: rounding may cross it."""
    graph, nearest, tensors = backbone.graph, float("inf"), as_tensors(backbone.tensors)
    for op in graph.ops:
        if op.kind not in ("relu", "relu6", "max_pool"):
            continue
        before = Graph(graph.ops[: graph.position[op.inputs[0]] + 1])
        value = reference.run(before, tensors, x)
        if op.kind == "max_pool":
            ordered = value.flatten().unique()
            gaps = ordered.diff() if len(ordered) > 1 else torch.ones(1)
        else:
            gaps = value.abs() if op.kind == "relu" else torch.minimum(value.abs(), (value - 6).abs())
            gaps = gaps[(value != 0) & (value != 6)]  # exactly at a kink (behind another activation) nothing rounds
        nearest = min(nearest, float(gaps.min()) if len(gaps) else nearest)
    return nearest
