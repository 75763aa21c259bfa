"""Random graphs over all kinds of the table, drawn by hypothesis: maps, tokens, vectors, gates, attention, sharing."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from stages.artifacts.records import InputSpec, LayerUpdate
from stages.engines.torch import reference
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.operators import TABLE, Op, Shape
from tests.engines.random_graphs import plans
from tests.rounding import as_tensors

SMOOTH = ("sigmoid", "tanh", "silu", "gelu", "mish", "hardswish", "elu", "softmax")
BENT = ("relu", "relu6", "hardsigmoid", "leaky_relu", "prelu", "clamp", "abs")
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "gelu": {"approximate": "none"},
    "elu": {"alpha": 1.0, "scale": 1.1},
    "softmax": {"axis": 0},
    "leaky_relu": {"slope": 0.2},
    "prelu": {"slopes": 1},
    "clamp": {"low": -1.0, "high": 2.0},
}


class Growing:
    """A graph that grows operator by operator; shapes follow from the table's rules."""

    def __init__(self, draw: st.DrawFn, shape: Shape) -> None:
        self.draw = draw
        self.ops = [Op("input", "input", (), shape)]

    def add(self, kind: str, *inputs: Op, out: Shape = (), shares: str = "", **attributes: Any) -> Op:
        operator = TABLE[kind]
        args = tuple((name, attributes.pop(name)) for name in operator.args)
        shapes = tuple(op.shape for op in inputs)
        op = Op(
            f"{kind}{len(self.ops)}", kind, tuple(op.name for op in inputs), out or (shapes[0] if shapes else ()),
            shapes, args=args, shares=shares, **attributes,
        )  # fmt: skip
        self.ops.append(replace(op, shape=operator.shape(op)))
        return self.ops[-1]

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def like(self, value: Op) -> Op:
        """An earlier value of the same shape."""
        return self.pick(*(op for op in self.ops if op.shape == value.shape and op.inputs), value)

    # ---------------------------------------------------------------------------------------------- any shape

    def activation(self, x: Op) -> Op:
        kind = self.pick(*SMOOTH, *BENT)
        return self.add(kind, x, **ATTRIBUTES.get(kind, {}))

    def residual(self, x: Op) -> Op:
        return self.add(self.pick("add", "subtract", "multiply"), *self.draw(st.permutations([x, self.like(x)])))

    def constant(self, x: Op) -> Op:
        shape = self.pick(x.shape, x.shape[1:], (1,) * (len(x.shape) - 1) + x.shape[-1:], ())
        other = self.add("constant", out=shape) if shape else self.add("constant")
        return self.add(self.pick("add", "multiply", "subtract"), *self.draw(st.permutations([x, other])))

    def gate(self, x: Op) -> Op:
        """Squeeze-and-excitation's product: everything but one axis averaged away."""
        kept = self.pick(*range(len(x.shape)))
        axes = tuple(axis for axis in range(len(x.shape)) if axis != kept) or (0,)
        kind = self.pick("mean", "sum", "amax")
        small = self.add(self.pick("sigmoid", "tanh"), self.add(kind, x, axes=axes, keepdim=True))
        return self.add("multiply", *self.draw(st.permutations([x, small])))

    def quotient(self, x: Op) -> Op:
        """Two quotients that stay of order one."""
        if self.flag():
            axis = self.pick(*range(len(x.shape)))
            norm = self.add("vector_norm", x, order=self.pick(1, 2), axes=(axis,), keepdim=True)
            return self.add("divide", x, self.add("add", norm, self.add("exp", self.add("tanh", norm))))
        return self.add("divide", x, self.add("exp", self.add("tanh", self.like(x))))

    def curve(self, x: Op) -> Op:
        power = self.add("power", self.add("tanh", x), exponent=2.0)
        return self.pick(power, self.add("log", self.add("exp", self.add("sigmoid", power))))

    def join(self, x: Op) -> Op:
        axis = self.pick(*range(len(x.shape)))
        rest = (*x.shape[:axis], *x.shape[axis + 1 :])
        same = [op for op in self.ops if len(op.shape) == len(x.shape) and prod(op.shape) < 100]
        others = [op for op in same if (*op.shape[:axis], *op.shape[axis + 1 :]) == rest]
        return self.add("concat", x, self.pick(*others, x), axis=axis)

    def cut(self, x: Op) -> Op:
        axis = self.pick(*range(len(x.shape)))
        size = x.shape[axis]
        if size == 1 or self.flag():
            index = tuple(self.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)))
            return self.add("take", x, axis=axis, index=index)
        start = self.draw(st.integers(0, size - 1))
        return self.add("slice", x, axis=axis, start=start, stop=size, step=self.pick(1, 2) if start else 2)

    def pad(self, x: Op) -> Op:
        rank = len(x.shape)
        before, after = ((0,) * (rank - 1) + (self.pick(0, 1, 2),) for _ in range(2))
        mode = self.pick("constant", "replicate", "circular") if x.shape[-1] > 1 else "constant"
        return self.add("pad", x, before=before, after=after, mode=mode, value=0.5)

    def turn(self, x: Op) -> Op:
        if self.flag():
            return self.add("permute", x, order=tuple(self.draw(st.permutations(range(len(x.shape))))))
        axis = self.pick(*range(len(x.shape)))
        return self.add("roll", x, shifts=(self.pick(1, -2),), axes=(axis,))

    def scale(self, x: Op) -> Op:
        return self.add("scale", x, axis=self.pick(*range(len(x.shape))), bias=self.flag())

    def again(self, x: Op) -> Op:
        """A layer that is called once more."""
        fitting = [op for op in self.ops if op.is_layer and not op.shares and op.in_shape == x.shape]
        if not fitting:
            return self.scale(x)
        op = self.pick(*fitting)
        self.ops.append(replace(op, name=f"{op.name}.again{len(self.ops)}", inputs=(x.name,), shares=op.name))
        return self.ops[-1]

    # ------------------------------------------------------------------------------------------------------ maps

    def conv(self, x: Op) -> Op:
        groups = self.pick(*(g for g in range(1, x.shape[0] + 1) if x.shape[0] % g == 0))
        out = self.pick(groups, 2 * groups, x.shape[0])
        kernel = self.pick((1, 1), (3, 3), (3, 1))
        padding = tuple(k // 2 for k in kernel)
        stride = self.pick((1, 1), (1, 1), (2, 1))
        return self.add(
            "conv", x, out=(out, 1, 1), kernel=kernel, stride=stride, padding=padding, dilation=(1, 1), groups=groups,
            bias=self.flag(),
        )  # fmt: skip

    def enlarge(self, x: Op) -> Op:
        size = tuple(min(2 * n, 8) for n in x.shape[1:])
        if self.flag():
            return self.add("upsample", x, size=size, mode=self.pick("nearest", "bilinear"), align_corners=False)
        return self.add(
            "conv_transpose", x, out=(self.pick(2, 4), 1, 1), kernel=(2, 2), stride=self.pick((1, 1), (2, 2)),
            padding=(0, 0), dilation=(1, 1), groups=self.pick(1, 2) if x.shape[0] % 2 == 0 else 1, bias=self.flag(),
            output_padding=(0, 0),
        )  # fmt: skip

    def pool(self, x: Op) -> Op:
        kind = self.pick("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
        if kind.startswith("adaptive"):
            return self.add(kind, x, size=(self.pick(1, 2, 3), self.pick(1, 2)))
        kernel = tuple(min(2, n) for n in x.shape[1:])
        dilated = {"dilation": (1, 1)} if kind == "max_pool" else {}
        return self.add(kind, x, kernel=kernel, stride=self.pick((1, 1), kernel), padding=(0, 0), **dilated)

    def groupnorm(self, x: Op) -> Op:
        groups = self.pick(*(g for g in range(1, x.shape[0] + 1) if x.shape[0] % g == 0))
        plain = self.add("groupnorm", x, groups=groups, eps=0.1)
        return self.add("scale", plain, axis=0, bias=self.flag()) if self.flag() else plain

    def tokens(self, x: Op) -> Op:
        flat = self.add("reshape", x, to=(x.shape[0], prod(x.shape[1:])))
        return self.add("permute", flat, order=(1, 0)) if self.flag() else flat

    # ---------------------------------------------------------------------------------------------------- tokens

    def linear(self, x: Op) -> Op:
        return self.add("linear", x, out=(self.pick(2, 4, x.shape[-1]),), bias=self.flag())

    def layernorm(self, x: Op) -> Op:
        plain = self.add("layernorm", x, axes=1, eps=0.1)
        return self.add("scale", plain, axis=-1, bias=self.flag()) if self.flag() else plain

    def attend(self, x: Op) -> Op:
        """Heads of width 2."""
        heads = []
        for _ in range(3):
            wide = self.add("linear", x, out=(4,), bias=self.flag())
            heads.append(self.add("permute", self.add("reshape", wide, to=(x.shape[0], 2, 2)), order=(1, 0, 2)))
        mixed = self.add("attention", *heads, scale=0.7, causal=self.flag())
        return self.add("reshape", self.add("permute", mixed, order=(1, 0, 2)), to=(x.shape[0], 4))

    def product(self, x: Op) -> Op:
        """Every token with every other."""
        turned = self.add("permute", self.like(x), order=(1, 0))
        shares = self.add("softmax", self.add("matmul", x, turned), axis=1)
        return self.add("matmul", shares, x)

    def class_token(self, x: Op) -> Op:
        return self.add("concat", self.add("constant", out=(1, x.shape[1])), x, axis=0)


ANY = (
    Growing.activation, Growing.activation, Growing.residual, Growing.residual, Growing.constant, Growing.gate,
    Growing.quotient, Growing.curve, Growing.join, Growing.cut, Growing.pad, Growing.turn, Growing.scale, Growing.again,
)  # fmt: skip
MAPS = (
    Growing.conv, Growing.conv, Growing.enlarge, Growing.pool, Growing.pool, Growing.groupnorm, Growing.tokens,
)  # fmt: skip
TOKENS = (Growing.linear, Growing.linear, Growing.layernorm, Growing.attend, Growing.product, Growing.class_token)
VECTORS = (Growing.linear, Growing.layernorm)
STEPS: dict[int, tuple[Callable[[Growing, Op], Op], ...]] = {
    3: (*MAPS, *MAPS, *ANY), 2: (*TOKENS, *TOKENS, *ANY), 1: (*VECTORS, *VECTORS, *ANY),
}  # fmt: skip


@st.composite
def graphs(draw: st.DrawFn, most: int = 7) -> Graph:
    """A graph whose values keep below a few hundred elements, ending in features, with at least one layer."""
    shape = draw(st.sampled_from([(2, 4, 5), (4, 3, 3), (2, 4, 5), (3, 4), (4, 6), (5,)]))
    grow = Growing(draw, shape)
    value = grow.ops[0]
    for _ in range(draw(st.integers(2, most))):
        step = draw(st.sampled_from(STEPS[len(value.shape)]))
        value = step(grow, value)
    while len(value.shape) > 1:
        value = grow.add("mean", value, axes=(len(value.shape) - 1,), keepdim=False)
    if draw(st.booleans()) or not any(op.is_layer for op in grow.ops):
        value = grow.add("linear", value, out=(3,), bias=True)
    return Graph(tuple(grow.ops))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Graph, tuple[LayerUpdate, ...], int, int]:
    """(graph, plan, batch, seed of the tensors); the plan's layers are heard by the output."""
    graph = draw(graphs().filter(lambda graph: heard_layers(graph)))
    return graph, draw(plans(graph).filter(lambda plan: is_heard(graph, plan))), draw(st.integers(1, 3)), draw(SEEDS)


SEEDS = st.integers(0, 2**16)


def heard_layers(graph: Graph) -> list[Op]:
    """Layers that the output depends on."""
    return [op for op in graph.layers if graph.gradient_flow({op.name})]


def is_heard(graph: Graph, plan: tuple[LayerUpdate, ...]) -> bool:
    return all(graph.gradient_flow({update.layer}) for update in plan if update.trains)


def random_backbone(graph: Graph, seed: int, dtype: torch.dtype) -> Backbone:
    """Weights that keep activations of order one."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for op in graph.ops:
        for what, shape in op.tensors.items():
            fan = prod(shape[1:]) if op.is_layer and len(shape) > 1 else 1
            value = (torch.randn(shape, generator=rng, dtype=torch.float64) / fan**0.5).to(dtype)
            tensors[f"{op.name}.{what}"] = value.numpy()
    kind = {3: "image", 2: "signal", 1: "features"}[len(graph.input_shape)]
    return Backbone(graph, tensors, InputSpec(kind, graph.input_shape))


def random_input(graph: Graph, batch: int, seed: int, dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(seed + 1)
    return torch.randn(batch, *graph.input_shape, generator=rng, dtype=torch.float64).to(dtype)


def dense_gradients(
    backbone: Backbone, x: Tensor, loss: Callable[[Tensor], Tensor], detached: Set[str] = frozenset()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features and every tensor's gradient by stock autograd; layers in `detached` get their inputs detached."""
    tensors = {name: value.clone().requires_grad_() for name, value in as_tensors(backbone.tensors).items()}
    values = {backbone.graph.ops[0].name: x}
    for op in backbone.graph.ops[1:]:
        inputs = [values[name].detach() if op.owner in detached else values[name] for name in op.inputs]
        values[op.name] = reference.apply(op, inputs, tensors)
    features = values[backbone.graph.output]
    loss(features).backward()  # type: ignore[no-untyped-call]
    return features.detach(), {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in tensors.items()}


def mark(op: Op, update: LayerUpdate, allowed: dict[str, Tensor]) -> None:
    """Set the live entries of boolean tensors, channel by channel, from the meaning of the axes."""
    weight = allowed[f"{op.name}.weight"]
    inside, outside = op.in_channels // op.groups, op.out_channels // op.groups
    for channel in update.channels:
        group = channel // (inside if update.axis == "input" else outside)
        if op.is_depthwise:
            weight[channel] = True
        elif op.operator.input_first and update.axis == "output":
            weight[group * inside : (group + 1) * inside, channel % outside] = True
        elif op.operator.input_first or update.axis == "output":
            weight[channel] = True
        else:
            weight[group * outside : (group + 1) * outside, channel % inside] = True
    for channel in update.bias:
        allowed[f"{op.name}.bias"][channel] = True
