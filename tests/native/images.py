"""Writes program images of small nets for the tests of the C library alone: `python -m tests.native.images FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stages.artifacts.records import LayerUpdate
from stages.engines.native.inspector import lower_inspection
from stages.engines.native.lowering import lower
from stages.engines.native.program import encode
from stages.graphs.graph import Graph
from stages.operators import Op
from stages.planning.links import chain_of
from stages.planning.policies import turns_of


def conv(name: str, source: str, before: tuple[int, ...], after: tuple[int, ...], kernel: int, **facts) -> Op:
    axes = len(before) - 1
    facts = {"stride": 1, "padding": kernel // 2, "dilation": 1} | facts
    per_axis = {key: (facts.pop(key),) * axes for key in ("stride", "padding", "dilation")}
    return Op(
        name, "conv", (source,), after, in_shapes=(before,), kernel=(kernel,) * axes, bias=True, **per_axis, **facts
    )  # fmt: skip


def plain(name: str, kind: str, sources: tuple[str, ...], shape: tuple[int, ...], before=None, **facts) -> Op:
    return Op(name, kind, sources, shape, in_shapes=(shape if before is None else before,) * len(sources), **facts)


def blocks() -> Graph:
    """A stem and three inverted residual blocks, one with a shortcut: rings, chains and overlays."""
    ops = [Op("input", "input", (), (3, 19, 17)), conv("stem", "input", (3, 19, 17), (12, 10, 9), 3, stride=2)]
    ops.append(plain("stem.act", "relu6", ("stem",), (12, 10, 9)))
    value, shape = "stem.act", (12, 10, 9)
    for number, (wide, out, kernel, stride) in enumerate(((20, 9, 5, 1), (36, 9, 3, 1), (27, 21, 7, 2))):
        name = f"block{number}"
        middle, after = (wide, *shape[1:]), (wide, *(-(-size // stride) for size in shape[1:]))
        end = (out, *after[1:])
        ops += [
            conv(f"{name}.expand", value, shape, middle, 1),
            plain(f"{name}.expand.act", "relu6", (f"{name}.expand",), middle),
            conv(f"{name}.depthwise", f"{name}.expand.act", middle, after, kernel, stride=stride, groups=wide),
            plain(f"{name}.depthwise.act", "relu", (f"{name}.depthwise",), after),
            conv(f"{name}.project", f"{name}.depthwise.act", after, end, 1),
        ]
        if end == shape:
            ops.append(plain(f"{name}.add", "add", (f"{name}.project", value), end))
        value, shape = ops[-1].name, end
    ops.append(plain("mean", "global_pool", (value,), shape[:1], shape))
    return Graph(tuple(ops))


def mixed() -> Graph:
    """Dense, grouped and dilated layers, every pooling, a concatenation, a flattening and linear layers."""
    window = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    ops = (
        Op("input", "input", (), (4, 11, 13)),
        conv("dense", "input", (4, 11, 13), (18, 11, 13), 3),
        plain("dense.act", "relu", ("dense",), (18, 11, 13)),
        plain("most", "max_pool", ("dense.act",), (18, 6, 7), (18, 11, 13), **window),
        conv("grouped", "most", (18, 6, 7), (12, 6, 7), 3, groups=3, dilation=2, padding=2),
        conv("narrow", "most", (18, 6, 7), (5, 6, 7), 1),
        Op("both", "concat", ("grouped", "narrow"), (17, 6, 7), ((12, 6, 7), (5, 6, 7)), args=(("axis", 0),)),
        plain("even", "avg_pool", ("both",), (17, 3, 4), (17, 6, 7), **window),
        plain("flat", "flatten", ("even",), (204,), (17, 3, 4)),
        Op("linear", "linear", ("flat",), (70,), in_shapes=((204,),), bias=True),
        plain("linear.act", "relu6", ("linear",), (70,)),
        Op("last", "linear", ("linear.act",), (19,), in_shapes=((70,),), bias=True),
    )
    return Graph(ops)


def tensors(graph: Graph) -> dict[str, np.ndarray]:
    """Weights made of whole numbers: the same bits wherever they are made."""
    rng = np.random.default_rng(7)
    made = {}
    for op in graph.ops:
        for what, shape in op.tensors.items():
            scale = 1.5 / np.sqrt(np.prod(shape[1:])) if what == "weight" and op.is_layer else 1.0
            made[f"{op.name}.{what}"] = (rng.integers(-224, 225, shape) / 128 * scale).astype(np.float32)
    return made


def part(graph: Graph, layer: str, axis: str, every: int, *, bias: bool = False, detached: bool = False) -> LayerUpdate:
    op = graph[layer]
    count = op.out_channels if axis == "output" else op.in_channels
    biases = tuple(range(0, op.out_channels, 2)) if bias else ()
    return LayerUpdate(layer, axis, tuple(range(0, count, every)), count, biases, detached)


def cases() -> Iterator[tuple[str, Graph, list[LayerUpdate]]]:
    graph, other = blocks(), mixed()
    yield "blocks-none", graph, []
    yield "blocks-part", graph, [
        part(graph, "block1.expand", "output", 2), part(graph, "block1.depthwise", "output", 3),
        part(graph, "block2.depthwise", "output", 2, bias=True), part(graph, "block2.project", "input", 2),
    ]  # fmt: skip
    yield "blocks-all", graph, [part(graph, op.name, "output", 1, bias=True) for op in graph.layers]
    yield "mixed-part", other, [
        part(other, "dense", "output", 4), part(other, "grouped", "input", 2, bias=True),
        part(other, "narrow", "input", 5, detached=True), part(other, "linear", "output", 3),
    ]  # fmt: skip
    yield "mixed-all", other, [part(other, op.name, "output", 1, bias=True) for op in other.layers]
    from tests.native.test_kinds import CASES, plan

    for name in ("mish", "softmax", "groupnorm", "multiply by a gate", "subtract a value per channel", "take", "pad",
                 "adaptive_avg_pool", "upsample", "constant", "divide by a gate", "prelu", "amax", "adaptive_max_pool",
                 "shuffle", "bicubic False", "concat of rows", "sum", "linear on tokens", "scale on four axes",
                 "layernorm of columns", "softmax of tokens", "matmul of many with each", "attention, causal",
                 "attention with a mask of keys that trains", "gru with biases",
                 "lstm in reverse with biases"):  # fmt: skip
        yield name.replace(",", "").replace(" ", "_"), CASES[name], plan(CASES[name])


def made_again(graph: Graph, updates: list[LayerUpdate]) -> dict[str, str]:
    """All that can be, from what enters the trained part."""
    chain = chain_of(graph, updates)
    how = {item: "recompute" for link in chain.links for item in link.items}
    return how | dict.fromkeys(chain.before, "keep")


def options() -> Iterator[tuple[str, Graph, list[LayerUpdate], dict[str, Any]]]:
    """All cases, with how they are lowered."""
    for name, graph, updates in cases():
        yield name, graph, updates, {}
        if name in ("blocks-all", "mixed-part"):
            yield f"{name}-in-turns", graph, updates, {"turns": turns_of(graph, tuple(updates), 2)}
            yield f"{name}-again", graph, updates, {"how": made_again(graph, updates)}
        if name in ("blocks-part", "mixed-all"):
            yield f"{name}-8-bits", graph, updates, {"keep_bits": 8}
            yield f"{name}-16-bits", graph, updates, {"keep_bits": 16, "nearest": True}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, graph, updates, how in options():
        for suffix, separate in (("shared", False), ("separate", True)):
            lowering = lower(graph, updates, separate=separate, **how)
            (folder / f"{name}.{suffix}.image").write_bytes(encode(lowering, tensors(graph)))
    for name, graph, first in (("blocks-fisher", blocks(), "block0.depthwise"), ("mixed-fisher", mixed(), "dense")):
        for suffix, separate in (("shared", False), ("separate", True)):
            lowering = lower_inspection(graph, [first], separate=separate).lowering
            (folder / f"{name}.{suffix}.image").write_bytes(encode(lowering, tensors(graph)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
