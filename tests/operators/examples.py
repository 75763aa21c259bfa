"""Small operators of every kind, with inputs and tensors: what the contracts of the table are tested on.

Every example is one operator whose inputs are named `x0`, `x1`, ...; `alone` puts it into a graph of its own with a
live `scale` before each input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from stages.artifacts.records import LayerUpdate
from stages.graphs.graph import Graph
from stages.operators import TABLE, Op, Shape


@dataclass(frozen=True)
class Example:
    """One operator, and what its inputs may be."""

    op: Op
    domain: str = "all"
    """`all` numbers, `positive` ones, `entries` of a table, or `distinct`: no two within one another's rounding."""

    @property
    def id(self) -> str:
        marks = [f"{k}={v}" for k, v in self.op.args]
        marks += [f"{k}={getattr(self.op, k)}" for k in self.op.operator.fields]
        sizes = " ".join("x".join(map(str, shape)) or "()" for shape in self.op.in_shapes)
        sizes = sizes or f"-> {self.op.shape}"
        return f"{self.op.kind} {sizes} {' '.join(marks)}".replace(", ", ",")

    def inputs(self, batch: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
        """Random values (batch, *in_shape) per input."""
        rng = torch.Generator().manual_seed(seed)
        return [self._values((batch, *shape), rng).to(dtype) for shape in self.op.in_shapes]

    def _values(self, shape: Shape, rng: torch.Generator) -> Tensor:
        if self.domain == "distinct":  # a permutation of equally spaced numbers
            count = prod(shape)
            return ((torch.randperm(count, generator=rng, dtype=torch.float64) - count / 2 + 0.3) / 7).reshape(shape)
        if self.domain == "entries":  # numbers below 5, also after a scale of 1.3
            return torch.randint(0, 4, shape, generator=rng).double()
        values = 2 * torch.randn(shape, generator=rng, dtype=torch.float64)
        return values.abs() + 0.5 if self.domain == "positive" else values

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """Random tensors of the operator by name."""
        rng = torch.Generator().manual_seed(seed + 1)
        drawn = {}
        for what, shape in self.op.operator.tensors(self.op).items():
            value = torch.randn(shape, generator=rng, dtype=torch.float64)
            drawn[f"{self.op.name}.{what}"] = (value.abs() + 0.5 if what == "running_var" else value).to(dtype)
        return drawn


def make(kind: str, *in_shapes: Shape, out: Shape | None = None, domain: str = "all", **attributes: Any) -> Example:
    """An example of a kind; `out` where the shape does not follow from the inputs."""
    operator = TABLE[kind]
    args = tuple((name, attributes.pop(name)) for name in operator.args)
    inputs = tuple(f"x{i}" for i in range(len(in_shapes)))
    op = Op("op", kind, inputs, out or (in_shapes[0] if in_shapes else ()), tuple(in_shapes), args=args, **attributes)
    return Example(replace(op, shape=operator.shape(op)), domain)


def conv(channels: int, shape: Shape, kernel: Shape, kind: str = "conv", **attributes: Any) -> Example:
    """A convolution with defaults."""
    axes = len(kernel)
    defaults: dict[str, Any] = {"stride": (1,) * axes, "padding": (0,) * axes, "dilation": (1,) * axes, "bias": True}
    return make(kind, shape, out=(channels, *shape[1:]), kernel=kernel, **(defaults | attributes))


def transposed(channels: int, shape: Shape, kernel: Shape, **attributes: Any) -> Example:
    """A transposed convolution with defaults."""
    attributes.setdefault("output_padding", (0,) * len(kernel))
    return conv(channels, shape, kernel, "conv_transpose", **attributes)


def pool(kind: str, shape: Shape, kernel: Shape, **attributes: Any) -> Example:
    """A pooling with defaults; its maxima have no doubles."""
    axes = len(kernel)
    defaults: dict[str, Any] = {"stride": kernel, "padding": (0,) * axes}
    defaults |= {"dilation": (1,) * axes} if kind == "max_pool" else {}
    return make(kind, shape, kernel=kernel, domain="distinct", **(defaults | attributes))


def reduction(kind: str, shape: Shape, axes: Shape, keepdim: bool, **attributes: Any) -> Example:
    return make(kind, shape, axes=axes, keepdim=keepdim, domain="distinct", **attributes)


def opaque(
    function: str, *in_shapes: Shape, out: Shape, args: Sequence[Any] | None = None, dtype: str = "float32",
    result: int = 0, macs: int = 0, domain: str = "all", full: Sequence[Any] | None = None,
) -> Example:  # fmt: skip
    """A pure function of torch, its inputs first unless `args` says otherwise; `full` where the batch is not first."""
    inputs = [value_of(i, shape) for i, shape in enumerate(in_shapes)]
    call = {
        "args": inputs if args is None else list(args),
        "kwargs": {},
        "full": [{"batch": 1}, *out] if full is None else full,
    }
    text = json.dumps({**call, "dtype": dtype, "result": result})
    return make("opaque", *in_shapes, out=out, function=function, arguments=text, macs=macs, domain=domain)


def value_of(i: int, shape: Shape, dtype: str = "float32") -> dict[str, Any]:
    """An input as an argument of an opaque function, the batch first."""
    return {"x": i, "full": [{"batch": 1}, *shape], "dtype": dtype}


MAP, LINE, TOKENS, VECTOR = (4, 6, 5), (4, 7), (5, 6), (6,)

EVERYWHERE = [MAP, LINE, VECTOR]
"""Shapes that activations are tried on."""

PLAIN = (
    "relu", "relu6", "hardsigmoid", "sigmoid", "tanh", "exp", "sign", "hardswish", "silu", "mish", "abs",
)  # fmt: skip
"""Functions of an element without attributes."""

BINARY = [
    (MAP, MAP), (MAP, (4, 1, 1)), ((4, 1, 1), MAP), (MAP, ()), ((), VECTOR), (MAP, (5,)), (VECTOR, VECTOR),
    ((4, 1, 5), (6, 1)),
]  # fmt: skip
"""Pairs of shapes that broadcast."""

EXAMPLES: tuple[Example, ...] = (
    make("input", out=MAP),
    make("constant", out=MAP),
    make("constant", out=()),
    # convolutions
    conv(6, MAP, (3, 3), padding=(1, 1)),
    conv(6, MAP, (1, 1), bias=False),
    conv(6, MAP, (1, 1), stride=(2, 2)),
    conv(6, MAP, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
    conv(4, MAP, (3, 3), padding=(1, 1), groups=4),
    conv(8, MAP, (3, 3), padding=(1, 1), groups=4, bias=False),
    conv(4, (4, 2, 2), (7, 7), padding=(3, 3), groups=4),
    conv(4, (4, 3, 3), (5, 5), padding=(2, 2)),
    conv(6, LINE, (3,), stride=(2,), padding=(1,)),
    conv(4, LINE, (5,), padding=(4,), dilation=(2,), groups=4),
    transposed(6, (4, 3, 2), (2, 2), stride=(2, 2)),
    transposed(6, (4, 3, 2), (3, 3), stride=(2, 3), padding=(1, 1), output_padding=(1, 2), groups=2),
    transposed(6, (4, 3, 4), (3, 2), stride=(2, 1), dilation=(2, 3), output_padding=(1, 0), groups=2, bias=False),
    transposed(4, (4, 3, 2), (4, 4), stride=(2, 2), padding=(1, 1), groups=4),
    transposed(5, LINE, (4,), stride=(2,), padding=(1,), output_padding=(1,)),
    # products
    make("linear", VECTOR, out=(4,), bias=True),
    make("linear", VECTOR, out=(4,), bias=False),
    make("linear", TOKENS, out=(5, 4), bias=True),
    make("linear", (2, 3, 6), out=(2, 3, 4), bias=False),
    make("linear", (2, 3, 6), out=(2, 3, 4), bias=True),
    make("matmul", (3, 4), (4, 5)),
    make("matmul", (2, 3, 4), (2, 4, 5)),
    make("matmul", (2, 3, 4), (4, 5)),
    make("matmul", (3, 4), (2, 4, 5)),
    make("matmul", (2, 1, 3, 4), (3, 4, 5)),
    make("attention", (5, 4), (5, 4), (5, 4), scale=0.5, causal=False),
    make("attention", (2, 5, 4), (2, 7, 4), (2, 7, 3), scale=0.3, causal=False),
    make("attention", (2, 5, 4), (2, 5, 4), (2, 5, 4), scale=0.5, causal=True),
    make("attention", (2, 5, 4), (2, 5, 4), (2, 5, 4), (2, 5, 5), scale=0.5, causal=False),
    make("attention", (2, 5, 4), (2, 5, 4), (2, 5, 4), (5, 5), scale=0.5, causal=False),
    make("attention", (3, 2, 5, 4), (3, 2, 5, 4), (3, 2, 5, 4), (2, 1, 5), scale=0.5, causal=False),
    # over steps, and tables
    *(make(kind, TOKENS, hidden=3, reverse=reverse, biased=biased) for kind in ("gru", "lstm")
      for reverse, biased in ((False, True), (True, False))),
    make("gru", (1, 4), hidden=5, reverse=False, biased=True),
    make("embedding", VECTOR, out=(6, 3), entries=6, domain="entries"),
    make("embedding", (2, 3), out=(2, 3, 4), entries=5, domain="entries"),
    # fewer tokens
    *(make("drop_tokens", TOKENS, TOKENS[:1], keep=keep, fuse=fuse, domain="distinct")
      for keep, fuse in ((2, True), (2, False), (1, True), (3, True))),
    # other functions of torch
    opaque("erf.default", MAP, out=MAP),
    opaque("cumsum.default", MAP, out=MAP, args=[value_of(0, MAP), -1]),
    opaque("maximum.default", MAP, MAP, out=MAP, domain="distinct"),
    opaque("lerp.Tensor", MAP, MAP, out=MAP, args=[
        value_of(0, MAP), value_of(1, MAP), {"tensor": "value0", "shape": [5]}]),
    opaque("gather.default", TOKENS, out=(5, 2), args=[
        value_of(0, TOKENS), 2, {"numbers": [1, 0] * 15, "shape": [3, 5, 2], "dtype": "int64"}]),
    opaque("topk.default", VECTOR, out=(2,), args=[value_of(0, VECTOR), 2, -1], domain="distinct"),
    opaque("gt.Scalar", MAP, out=MAP, args=[value_of(0, MAP), 0.5], dtype="bool"),
    opaque("where.self", MAP, MAP, MAP, out=MAP, args=[
        value_of(0, MAP, "bool"), value_of(1, MAP), value_of(2, MAP)]),
    opaque("repeat.default", VECTOR, out=(12,), args=[value_of(0, VECTOR), [1, 2]]),
    opaque("bmm.default", (2, 3), (3, 4), out=(2, 4), macs=24),
    opaque("cumsum.default", TOKENS, out=TOKENS, full=[5, {"batch": 1}, 6], args=[
        {"x": 0, "full": [5, {"batch": 1}, 6], "dtype": "float32"}, 0]),
    # norms
    make("batchnorm", MAP, axis=0, eps=1e-5),
    make("batchnorm", TOKENS, axis=1, eps=1e-3),
    make("batchnorm", VECTOR, axis=0, eps=1e-5),
    make("layernorm", TOKENS, axes=1, eps=1e-5),
    make("layernorm", MAP, axes=3, eps=1e-6),
    make("layernorm", VECTOR, axes=1, eps=1e-5),
    make("groupnorm", MAP, groups=2, eps=1e-5),
    make("groupnorm", MAP, groups=4, eps=1e-5),
    make("groupnorm", LINE, groups=1, eps=1e-5),
    make("groupnorm", VECTOR, groups=3, eps=1e-5),
    make("scale", MAP, axis=0, bias=True),
    make("scale", MAP, axis=1, bias=False),
    make("scale", TOKENS, axis=1, bias=True),
    make("scale", TOKENS, axis=-1, bias=True),
    make("scale", VECTOR, axis=0, bias=False),
    # activations
    *(make(kind, shape) for kind in PLAIN for shape in EVERYWHERE),
    *(make("clamp", shape, low=-1.0, high=2.0) for shape in EVERYWHERE),
    make("clamp", MAP, low=-1.0, high=3.0e38),
    make("leaky_relu", MAP, slope=0.1),
    make("leaky_relu", VECTOR, slope=-0.5),
    make("prelu", MAP, slopes=4),
    make("prelu", LINE, slopes=1),
    make("elu", MAP, alpha=1.0, scale=1.0),
    make("softplus", MAP, beta=1.0),
    make("softplus", VECTOR, beta=2.5),
    make("elu", VECTOR, alpha=1.67, scale=1.05),
    *(make(kind, MAP, axis=axis) for kind in ("softmax", "log_softmax") for axis in (0, 2)),
    *(make(kind, VECTOR, axis=0) for kind in ("softmax", "log_softmax")),
    *(make("gelu", TOKENS, approximate=how) for how in ("none", "tanh")),
    make("log", MAP, domain="positive"),
    *(make("power", MAP, exponent=exponent, domain="positive") for exponent in (2.0, 0.5, -0.5, -1.0, 1.7)),
    make("power", VECTOR, exponent=3.0),
    # arithmetic
    *(make(kind, *shapes) for kind in ("add", "subtract", "multiply") for shapes in BINARY),
    *(make("divide", *shapes, domain="positive") for shapes in BINARY),
    # pooling
    pool("max_pool", MAP, (2, 2)),
    pool("max_pool", MAP, (3, 3), stride=(2, 1), padding=(1, 1), ceil_mode=True),
    pool("max_pool", (2, 9, 9), (2, 3), stride=(2, 2), dilation=(3, 2), padding=(1, 1)),
    pool("max_pool", LINE, (3,), stride=(2,), padding=(1,)),
    pool("max_pool", (2, 18, 18), (17, 17), stride=(1, 1)),
    pool("avg_pool", MAP, (2, 2)),
    pool("avg_pool", MAP, (3, 3), stride=(2, 2), padding=(1, 1), count_include_pad=False),
    pool("avg_pool", MAP, (3, 3), stride=(2, 2), padding=(1, 1), ceil_mode=True),
    pool("avg_pool", MAP, (3, 2), stride=(2, 2), padding=(1, 0), ceil_mode=True, count_include_pad=False),
    pool("avg_pool", LINE, (3,), stride=(2,), padding=(1,)),
    pool("avg_pool", LINE, (3,), stride=(2,), padding=(1,), ceil_mode=True, count_include_pad=False),
    make("adaptive_avg_pool", MAP, size=(4, 3)),
    make("adaptive_avg_pool", MAP, size=(7, 1)),
    make("adaptive_avg_pool", LINE, size=(3,)),
    make("adaptive_max_pool", MAP, size=(3, 1), domain="distinct"),
    make("adaptive_max_pool", LINE, size=(3,), domain="distinct"),
    make("adaptive_max_pool", (2, 17, 17), size=(1, 1), domain="distinct"),
    make("global_pool", MAP),
    make("global_pool", LINE),
    *(reduction(kind, MAP, axes, keep) for kind in ("mean", "sum", "amax") for axes in ((0,), (1, 2), (0, 1, 2))
      for keep in (True, False)),
    *(reduction("max", shape, axes, keep) for shape, axes in ((MAP, (1,)), (VECTOR, (0,))) for keep in (True, False)),
    reduction("max", (300, 2), (0,), False),
    *(reduction("vector_norm", MAP, axes, keep, order=order) for order in (1, 2)
      for axes, keep in (((0,), True), ((1, 2), False))),
    # shapes
    make("flatten", MAP),
    make("flatten", VECTOR),
    make("reshape", MAP, to=(2, 2, 30)),
    make("reshape", MAP, to=(120, 1)),
    make("reshape", (1,), to=()),
    make("permute", MAP, order=(1, 2, 0)),
    make("permute", TOKENS, order=(1, 0)),
    make("expand", (4, 1, 1), to=MAP),
    make("expand", VECTOR, to=(3, 1, 6)),
    make("expand", (), to=(2, 3)),
    make("concat", MAP, (2, 6, 5), axis=0),
    make("concat", TOKENS, (1, 6), (2, 6), axis=0),
    make("concat", VECTOR, axis=0),
    make("slice", MAP, axis=0, start=1, stop=3, step=1),
    make("slice", MAP, axis=2, start=0, stop=5, step=2),
    make("slice", VECTOR, axis=0, start=5, stop=6, step=1),
    make("take", MAP, axis=0, index=(3, 0, 0, 2)),
    make("take", TOKENS, axis=1, index=(5,)),
    make("pad", MAP, before=(0, 1, 2), after=(0, 2, 0), mode="constant", value=0.0),
    make("pad", MAP, before=(1, 0, 0), after=(2, 0, 0), mode="constant", value=-1.5),
    make("pad", MAP, before=(0, -1, 0), after=(0, 0, -2), mode="constant", value=0.0),
    make("pad", VECTOR, before=(1,), after=(0,), mode="constant", value=2.0),
    *(make("pad", MAP, before=(0, 1, 2), after=(0, 2, 1), mode=mode, value=0.0)
      for mode in ("reflect", "replicate", "circular")),
    *(make("pad", MAP, before=(0, 0, 2), after=(0, 0, 1), mode=mode, value=0.0)
      for mode in ("reflect", "replicate", "circular")),
    *(make("pad", LINE, before=(0, 3), after=(0, 1), mode=mode, value=0.0)
      for mode in ("reflect", "replicate", "circular")),
    *(make("pad", TOKENS, before=(2, 0), after=(1, 0), mode=mode, value=0.0)
      for mode in ("reflect", "replicate", "circular")),
    *(make("pad", VECTOR, before=(2,), after=(1,), mode=mode, value=0.0)
      for mode in ("reflect", "replicate", "circular")),
    make("roll", MAP, shifts=(2, -1), axes=(1, 2)),
    make("roll", TOKENS, shifts=(0,), axes=(0,)),
    make("roll", VECTOR, shifts=(13,), axes=(0,)),
    make("upsample", MAP, size=(12, 10), mode="nearest", align_corners=False),
    make("upsample", MAP, size=(9, 3), mode="nearest", align_corners=False),
    *(make("upsample", MAP, size=(11, 10), mode=mode, align_corners=corners)
      for mode in ("bilinear", "bicubic") for corners in (True, False)),
    make("upsample", MAP, size=(3, 4), mode="bilinear", align_corners=False),
    make("upsample", MAP, size=(1, 7), mode="bilinear", align_corners=True),
    make("upsample", LINE, size=(12,), mode="linear", align_corners=False),
    make("upsample", LINE, size=(12,), mode="nearest", align_corners=False),
)  # fmt: skip

SOURCES = ("input", "constant")
"""Kinds without inputs."""


def selected(*, sources: bool = False, **facts: Any) -> list[Example]:
    """The examples whose operators have these facts (`trains=True`), with or without those that read nothing."""
    return [
        example
        for example in EXAMPLES
        if (sources or example.op.kind not in SOURCES)
        and all(getattr(example.op.operator, name) == value for name, value in facts.items())
    ]


# ------------------------------------------------------------------------------------------ a graph around an example


@dataclass(frozen=True)
class Alone:
    """An operator in a graph of its own: the input (D,) is cut into its inputs, each behind a scale `live0`, ..."""

    graph: Graph
    tensors: Mapping[str, Tensor]
    x: Tensor
    """(N, D)."""

    def updates(self, wanted: Sequence[int]) -> tuple[LayerUpdate, ...]:
        """A plan that trains the scales before these inputs."""
        sizes = {i: self.graph[f"live{i}"].out_channels for i in wanted}
        return tuple(LayerUpdate(f"live{i}", "output", tuple(range(n)), n) for i, n in sorted(sizes.items()))


def alone(example: Example, batch: int, dtype: torch.dtype = torch.float64, *, scales: bool = True) -> Alone:
    """The example's operator in a graph of its own, with its inputs' values put side by side as `x`."""
    inputs = example.inputs(batch, dtype)
    ops = [Op("input", "input", (), (sum(x[0].numel() for x in inputs),))]
    tensors = example.tensors(dtype)
    start = 0
    for i, x in enumerate(inputs):
        ops += _entrance(i, start, x[0].numel(), tuple(x.shape[1:]), ops[0].shape, scales)
        start += x[0].numel()
        if scales:
            tensors[f"live{i}.weight"] = torch.linspace(0.7, 1.3, x[0].numel(), dtype=dtype)
    ops.append(example.op)
    if len(example.op.shape) != 1:
        ops.append(as_vector("op", example.op.shape))
    return Alone(Graph(tuple(ops)), tensors, torch.cat([x.reshape(batch, -1) for x in inputs], 1))


def as_vector(name: str, shape: Shape) -> Op:
    """A value as features."""
    size = (prod(shape),)
    return Op("features", "reshape", (name,), size, (shape,), args=(("to", size),))


def _entrance(i: int, start: int, size: int, shape: Shape, whole: Shape, scales: bool) -> list[Op]:
    bounds = (("axis", 0), ("start", start), ("stop", start + size), ("step", 1))
    ops = [] if (size,) == whole else [Op(f"part{i}", "slice", ("input",), (size,), (whole,), args=bounds)]
    part = ops[0].name if ops else "input"
    if scales:
        ops.append(Op(f"live{i}", "scale", (part,), (size,), ((size,),), args=(("axis", 0),)))
    ops.append(Op(f"x{i}", "reshape", (ops[-1].name if ops else part,), shape, ((size,),), args=(("to", shape),)))
    return ops
