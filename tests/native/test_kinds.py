"""Every kind that the native engine has a rule for, between layers that train, against double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.artifacts.records import LayerUpdate
from stages.engines.native import library
from stages.engines.native.lowering import uncovered
from stages.engines.native.rules import GENERAL, RULES
from stages.graphs.graph import Graph
from stages.operators import Op
from stages.operators.recurrent import GATES
from tests.native.test_net import live_slices, native, pull, train, weighted
from tests.operators.random_graphs import dense_gradients, random_backbone, random_input

pytestmark = pytest.mark.skipif(not library.is_built(), reason="the native library is not built: make setup")
MAP = (6, 5, 7)
WINDOW = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}


def op(name: str, kind: str, sources: list[Op], shape: tuple[int, ...], facts=None, **args) -> Op:
    return Op(
        name, kind, tuple(source.name for source in sources), shape, tuple(source.shape for source in sources),
        args=tuple(args.items()), **(facts or {}),
    )  # fmt: skip


def between(kind: str, shape: tuple[int, ...] = MAP, facts=None, *, gate: tuple[int, ...] = (), **args) -> Graph:
    """conv -> the operator (with a gate of its own as second input, where it has two) -> conv -> mean -> linear."""
    entry = Op("input", "input", (), (3, 5, 7))
    first = op("first", "conv", [entry], MAP, {**WINDOW, "bias": True})
    ops = [entry, first]
    inputs = [first]
    if gate:
        sizes = gate if len(gate) == 3 and gate[1:] != (1, 1) else MAP
        side = op("side", "conv", [entry], sizes, {**WINDOW, "bias": True})
        ops.append(side)
        if sizes != gate:
            side = op("squeeze", "mean", [side], gate, axes=(1, 2), keepdim=True)
            ops.append(side)
        inputs.append(side)
    middle = op("middle", kind, inputs, shape, facts, **args)
    ops.append(middle)
    if len(shape) == 3:
        ops.append(op("second", "conv", [middle], (4, *shape[1:]), {**WINDOW, "bias": True}))
        ops.append(op("mean", "global_pool", [ops[-1]], (4,)))
    ops.append(op("last", "linear", [ops[-1]], (5,), {"bias": True}))
    return Graph(tuple(ops))


def with_constant() -> Graph:
    """A table of numbers that no input changes, added to what the first layer makes."""
    ops = list(between("add", gate=MAP).ops)
    table = op("table", "constant", [], MAP)
    ops[2] = table
    ops[3] = op("middle", "add", [ops[1], table], MAP)
    return Graph(tuple(ops))


def through(*middle: tuple[str, tuple[int, ...], dict]) -> Graph:
    """As `between`, with several operators in a row, each (kind, shape, arguments)."""
    entry = Op("input", "input", (), (3, 5, 7))
    ops = [entry, op("first", "conv", [entry], MAP, {**WINDOW, "bias": True})]
    for number, (kind, shape, args) in enumerate(middle):
        ops.append(op(f"middle{number}", kind, [ops[-1]], shape, **args))
    shape = ops[-1].shape
    if len(shape) == 3:
        ops.append(op("second", "conv", [ops[-1]], (4, *shape[1:]), {**WINDOW, "bias": True}))
    if len(ops[-1].shape) > 1:
        ops.append(op("flat", "flatten", [ops[-1]], (int(np.prod(ops[-1].shape)),)))
    ops.append(op("last", "linear", [ops[-1]], (5,), {"bias": True}))
    return Graph(tuple(ops))


def against(kind: str, other: tuple[int, ...], *, first: bool = False, table: bool = False) -> Graph:
    """first -> kind with a second value of another shape (a mean over what is 1 in it, made positive; or a table)."""
    entry = Op("input", "input", (), (3, 5, 7))
    ops = [entry, op("first", "conv", [entry], MAP, {**WINDOW, "bias": True})]
    if table:
        ops.append(op("side", "constant", [], other))
        ops.append(op("positive", "exp", [ops[-1]], other))
    else:
        ops.append(op("side", "conv", [entry], MAP, {**WINDOW, "bias": True}))
        axes = tuple(axis for axis, size in enumerate(other) if size == 1)
        if axes:
            ops.append(op("mean", "mean", [ops[-1]], other, axes=axes, keepdim=True))
        ops.append(op("positive", "sigmoid", [ops[-1]], other))
        ops.append(op("above", "exp", [ops[-1]], other))
    pair = [ops[1], ops[-1]]
    if kind == "divide" and first:  # by what stays clear of 0
        ops.append(op("share", "sigmoid", [ops[1]], MAP))
        ops.append(op("divisor", "exp", [ops[-1]], MAP))
        pair[0] = ops[-1]
    ops.append(op("middle", kind, pair[::-1] if first else pair, MAP))
    ops.append(op("second", "conv", [ops[-1]], (4, 5, 7), {**WINDOW, "bias": True}))
    ops.append(op("pool", "global_pool", [ops[-1]], (4,)))
    ops.append(op("last", "linear", [ops[-1]], (5,), {"bias": True}))
    return Graph(tuple(ops))


def shuffle() -> Graph:
    """Channels of three groups in turn, by views of four axes, with an activation among them."""
    return through(
        ("reshape", (3, 2, 5, 7), {"to": (3, 2, 5, 7)}),
        ("permute", (2, 3, 5, 7), {"order": (1, 0, 2, 3)}),
        ("relu6", (2, 3, 5, 7), {}),
        ("reshape", MAP, {"to": MAP}),
    )


def bordered(shape: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...], mode: str, value=0.0) -> Graph:
    return between("pad", shape, before=before, after=after, mode=mode, value=value)


MOVES = {
    "permute": between("permute", (5, 7, 6), order=(1, 2, 0)),
    "shuffle": shuffle(),
    "as a map": through(("reshape", (210,), {"to": (210,)}), ("reshape", (10, 3, 7), {"to": (10, 3, 7)})),
    "expand": through(
        ("mean", (6, 1, 1), {"axes": (1, 2), "keepdim": True}), ("expand", (6, 4, 3), {"to": (6, 4, 3)})
    ),
    "roll": between("roll", shifts=(2, -1), axes=(1, 2)),
    "slice of rows": between("slice", (6, 2, 7), axis=1, start=1, stop=5, step=2),
    "take of columns": between("take", (6, 5, 4), axis=2, index=(6, 0, 0, 3)),
    "pad with a number": bordered((6, 7, 8), (0, 1, 0), (0, 1, 1), "constant", 0.5),
    "pad channels": bordered((8, 5, 7), (1, 0, 0), (1, 0, 0), "constant"),
    "crop": bordered((6, 4, 8), (0, -1, 2), (0, 0, -1), "constant"),
    **{f"pad {mode}": bordered((6, 7, 10), (0, 1, 2), (0, 1, 1), mode)
       for mode in ("reflect", "replicate", "circular")},
    "nearest by halves": between("upsample", (6, 8, 9), size=(8, 9), mode="nearest", align_corners=False),
    "smaller": between("upsample", (6, 3, 4), size=(3, 4), mode="bilinear", align_corners=False),
    **{f"{mode} {corners}": between("upsample", (6, 9, 15), size=(9, 15), mode=mode, align_corners=corners)
       for mode in ("bilinear", "bicubic") for corners in (False, True)},
    "mean of columns": between("mean", (6, 5, 1), axes=(2,), keepdim=True),
    "mean of channels": through(("mean", (5, 7), {"axes": (0,), "keepdim": False})),
    "sum": between("sum", (1, 5, 7), axes=(0,), keepdim=True),
    "concat of rows": between("concat", (6, 10, 7), gate=MAP, axis=1),
    "multiply by a plane": against("multiply", (1, 5, 7)),
    "multiply by a column": against("multiply", (6, 5, 1), first=True),
    "add a number": against("add", (), table=True),
    "subtract from a row": against("subtract", (6, 1, 7), first=True),
    "subtract from a gate": against("subtract", (6, 1, 1), first=True),
    "divide": against("divide", MAP),
    "divide by a gate": against("divide", (6, 1, 1)),
    "divide by a plane": against("divide", (1, 5, 7)),
    "divide a gate": against("divide", (6, 1, 1), first=True),
    "divide by a number": against("divide", (), table=True),
}  # fmt: skip
"""What runs by tables, at least in part."""


def on_tokens(*middle: tuple[str, tuple[int, ...], dict], shape: tuple[int, ...] = (35, 6)) -> Graph:
    """conv -> tokens -> the operators -> a vector -> linear."""
    if shape == (35, 6):
        before = [("reshape", (6, 35), {"to": (6, 35)}), ("permute", (35, 6), {"order": (1, 0)})]
    else:
        before = [("reshape", shape, {"to": shape})]
    after = middle[-1][1]
    count = int(np.prod(after))
    return through(*before, *middle, ("reshape", (count,), {"to": (count,)}))


def attended(shape: tuple[int, ...] = (2, 35, 2), *, causal: bool = False, mask: tuple[int, ...] | None = None,
             trains: bool = False) -> Graph:  # fmt: skip
    """conv -> tokens -> queries, keys and values in heads -> attention (with a mask, perhaps of a layer) -> linear."""
    ops = list(on_tokens(("scale", (35, 6), {"axis": -1, "facts": {"bias": True}})).ops[:5])
    parts = []
    for name in ("queries", "keys", "values"):
        ops.append(op(name, "linear", [ops[4]], (35, 4), {"bias": True}))
        ops.append(op(f"{name} parted", "reshape", [ops[-1]], (35, 2, 2), to=(35, 2, 2)))
        ops.append(op(f"{name} headed", "permute", [ops[-1]], (2, 35, 2), order=(1, 0, 2)))
        if len(shape) == 4:
            ops.append(op(f"{name} again", "reshape", [ops[-1]], shape, to=shape))
        parts.append(ops[-1])
    if mask is not None:
        ops.append(op("mask", "constant", [], mask))
        if trains:
            ops.append(op("masking", "linear", [ops[-1]], mask, {"bias": True}))
        parts.append(ops[-1])
    ops.append(op("middle", "attention", parts, shape, scale=0.7, causal=causal))
    ops.append(op("flat", "reshape", [ops[-1]], (140,), to=(140,)))
    ops.append(op("last", "linear", [ops[-1]], (5,), {"bias": True}))
    return Graph(tuple(ops))


def multiplied(first: tuple[int, ...], second: tuple[int, ...], shape: tuple[int, ...]) -> Graph:
    """Two convolutions as values of these shapes, their product, linear."""
    entry = Op("input", "input", (), (3, 5, 7))
    ops = [entry]
    sides = []
    for name, wanted in (("first", first), ("side", second)):
        channels, rest = (-(-int(np.prod(wanted)) // 35), wanted)
        ops.append(op(name, "conv", [entry], (channels, 5, 7), {**WINDOW, "bias": True}))
        ops.append(op(f"{name} flat", "reshape", [ops[-1]], (35 * channels,), to=(35 * channels,)))
        count = int(np.prod(rest))
        ops.append(op(f"{name} cut", "slice", [ops[-1]], (count,), axis=0, start=0, stop=count, step=1))
        ops.append(op(f"{name} shaped", "reshape", [ops[-1]], rest, to=rest))
        sides.append(ops[-1])
    ops.append(op("middle", "matmul", sides, shape))
    count = int(np.prod(shape))
    ops.append(op("flat", "reshape", [ops[-1]], (count,), to=(count,)))
    ops.append(op("last", "linear", [ops[-1]], (5,), {"bias": True}))
    return Graph(tuple(ops))


FOUR = (3, 2, 5, 7)
BIAS = {"facts": {"bias": True}}
TOKENS = {
    "linear on tokens": on_tokens(("linear", (35, 9), BIAS)),
    "linear on tokens, behind and before others": on_tokens(
        ("linear", (35, 9), BIAS),
        ("relu6", (35, 9), {}),
        ("linear", (35, 4), BIAS),
        ("gelu", (35, 4), {"approximate": "none"}),
    ),
    "linear on columns": on_tokens(("linear", (6, 5, 9), BIAS), shape=MAP),
    "linear on four axes": on_tokens(("linear", (3, 2, 5, 9), BIAS), shape=FOUR),
    "linear on one token": on_tokens(("linear", (1, 9), BIAS), shape=(1, 210)),
    "scale on tokens": on_tokens(("scale", (35, 6), {"axis": -1, **BIAS})),
    "scale on columns": on_tokens(("scale", MAP, {"axis": 2, **BIAS}), shape=MAP),
    "scale on four axes": on_tokens(("scale", FOUR, {"axis": -1, **BIAS}), shape=FOUR),
    "softmax of tokens": on_tokens(("softmax", (35, 6), {"axis": 1})),
    "softmax of columns": on_tokens(("log_softmax", MAP, {"axis": 2}), shape=MAP),
    "softmax of four axes": on_tokens(("softmax", FOUR, {"axis": 3}), shape=FOUR),
    "layernorm of tokens": on_tokens(("layernorm", (35, 6), {"axes": 1, "eps": 1e-3})),
    "layernorm of columns": on_tokens(("layernorm", MAP, {"axes": 1, "eps": 1e-3}), shape=MAP),
    "layernorm of planes": on_tokens(("layernorm", MAP, {"axes": 2, "eps": 1e-3}), shape=MAP),
    "layernorm of four axes": on_tokens(("layernorm", FOUR, {"axes": 1, "eps": 1e-3}), shape=FOUR),
    "layernorm of all of four axes": on_tokens(("layernorm", FOUR, {"axes": 4, "eps": 1e-3}), shape=FOUR),
    "matmul": multiplied((9, 6), (6, 11), (9, 11)),
    "matmul of batches": multiplied((4, 3, 5), (4, 5, 2), (4, 3, 2)),
    "matmul of four axes": multiplied((2, 3, 4, 5), (2, 3, 5, 6), (2, 3, 4, 6)),
    "matmul of one with many": multiplied((4, 3, 5), (5, 7), (4, 3, 7)),
    "matmul of many with each": multiplied((2, 1, 4, 5), (3, 5, 6), (2, 3, 4, 6)),
    "attention": attended(),
    "attention, causal": attended(causal=True),
    "attention of four axes": attended((1, 2, 35, 2)),
    "attention with a mask": attended(mask=(35, 35)),
    "attention with a mask for each head": attended(mask=(2, 35, 35)),
    "attention with a mask of keys": attended(mask=(1, 35)),
    "attention with a mask that trains": attended(mask=(35, 35), trains=True),
    "attention with a mask of keys that trains": attended(mask=(2, 1, 35), trains=True),
}
"""What runs on rows."""

RECURRENT = {
    f"{kind}{' in reverse' if reverse else ''}{' with biases' if biased else ''}": on_tokens(
        (kind, (35, 5), {"hidden": 5, "reverse": reverse, "biased": biased}),
        ("linear", (35, 4), BIAS),
    )
    for kind in ("gru", "lstm")
    for reverse in (False, True)
    for biased in (False, True)
} | {
    "gru of one step": on_tokens(("gru", (1, 18), {"hidden": 18, "reverse": False, "biased": True}), shape=(1, 210)),
    "lstm of one unit": on_tokens(("lstm", (35, 1), {"hidden": 1, "reverse": False, "biased": True})),
    "lstm upon gru": on_tokens(
        ("gru", (35, 7), {"hidden": 7, "reverse": False, "biased": True}),
        ("relu", (35, 7), {}),
        ("lstm", (35, 4), {"hidden": 4, "reverse": True, "biased": True}),
    ),
}
"""What runs step by step of time."""

CASES = {
    **MOVES,
    **TOKENS,
    **RECURRENT,
    "adaptive_max_pool": between("adaptive_max_pool", (6, 2, 3), size=(2, 3)),
    "amax": between("amax", (6,), axes=(1, 2), keepdim=False),
    "prelu": between("prelu", slopes=6),
    "prelu of one slope": between("prelu", slopes=1),
    "leaky_relu": between("leaky_relu", slope=0.1),
    "elu": between("elu", alpha=0.7, scale=1.3),
    **{kind: between(kind) for kind in ("hardswish", "hardsigmoid", "silu", "sigmoid", "tanh", "mish", "abs")},
    "exp": between("exp"),
    "softplus": between("softplus", beta=1.5),
    "gelu": between("gelu", approximate="none"),
    "gelu tanh": between("gelu", approximate="tanh"),
    "clamp": between("clamp", low=-0.5, high=0.8),
    "softmax": between("softmax", axis=0),
    "log_softmax": between("log_softmax", axis=0),
    "layernorm": between("layernorm", axes=3, eps=1e-5),
    "groupnorm": between("groupnorm", groups=3, eps=1e-5),
    "instancenorm": between("groupnorm", groups=6, eps=1e-5),
    "scale": between("scale", facts={"bias": True}, axis=0),
    "multiply": between("multiply", gate=MAP),
    "multiply by a gate": between("multiply", gate=(6, 1, 1)),
    "slice": between("slice", (3, 5, 7), axis=0, start=2, stop=5, step=1),
    "adaptive_avg_pool": between("adaptive_avg_pool", (6, 2, 3), size=(2, 3)),
    "upsample": between("upsample", (6, 10, 21), size=(10, 21), mode="nearest", align_corners=False),
    "mean": between("mean", (6,), axes=(1, 2), keepdim=False),
    "flatten": between("flatten", (210,)),
    "reshape": between("reshape", (210,), to=(210,)),
    "add": between("add", gate=MAP),
    "add a value per channel": between("add", gate=(6, 1, 1)),
    "subtract": between("subtract", gate=MAP),
    "subtract a value per channel": between("subtract", gate=(6, 1, 1)),
    "take": between("take", (4, 5, 7), axis=0, index=(4, 5, 1, 1)),
    "slice with steps": between("slice", (3, 5, 7), axis=0, start=1, stop=6, step=2),
    "pad": between("pad", (6, 8, 8), before=(0, 2, 0), after=(0, 1, 1), mode="constant", value=0.0),
    "constant": with_constant(),
    "concat": between("concat", (12, 5, 7), gate=MAP, axis=0),
    "relu": between("relu"),
    "relu6": between("relu6"),
    "max_pool": between("max_pool", MAP, WINDOW),
    "avg_pool": between("avg_pool", MAP, {**WINDOW, "count_include_pad": False}),
}


def plan(graph: Graph) -> list[LayerUpdate]:
    """All channels of the first layers and half of the middle one's, so that a gradient passes everything."""
    found = []
    for layer in graph.layers:
        every = tuple(range(0, layer.out_channels, 2 if layer.name == "middle" or layer.kind in GATES else 1))
        found.append(LayerUpdate(layer.name, "output", every, layer.out_channels))
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [0, 1])
def test_values_and_gradients(name, width):
    graph = CASES[name]
    backbone, x = random_backbone(graph, 5, torch.float64), random_input(graph, 3, 5, torch.float64)
    features, dense = dense_gradients(backbone, x, weighted)
    found, gradients = train(native(backbone, plan(graph), width=width), x.float().numpy())
    assert np.linalg.norm(found - features.numpy()) <= 3e-6 * float(features.norm())
    scale = max(1.0, *(float(gradient.norm()) for gradient in dense.values()))
    for tensor, value in live_slices(graph, plan(graph), dense).items():
        assert np.linalg.norm(gradients[tensor] - value) <= 3e-6 * scale, tensor


def test_every_kind_with_a_rule_is_tested():
    tested = {op.kind for graph in CASES.values() for op in graph.ops}
    assert set(RULES) | set(GENERAL) == tested


@pytest.mark.parametrize("name", CASES)
def test_frozen_operators_give_the_same(name):
    """In the prefix they run in chains of rows where they can; channels may lie in another order."""
    graph = CASES[name]
    backbone, x = random_backbone(graph, 6, torch.float32), random_input(graph, 2, 6, torch.float32)
    trained = native(backbone, plan(graph)).features(x.numpy())
    frozen = native(backbone, []).features(x.numpy())
    assert np.allclose(frozen, trained, rtol=1e-5, atol=1e-5)
    assert pull(frozen).shape == frozen.shape


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        (between("softmax", axis=1), "axis 1"),
        (between("scale", facts={"bias": True}, axis=1), "channels along axis 1 of 3"),
        (between("amax", (6, 7), axes=(1,), keepdim=False), "axes"),
        (between("roll", (6, 2048, 2048), shifts=(1,), axes=(1,)), "a table of 25165824 entries"),
    ],
)
def test_what_has_no_kernel_is_named(graph, found):
    assert found in uncovered(graph)
    assert "middle" in uncovered(graph)


def test_a_kernel_that_is_no_parameter_is_refused_by_name() -> None:
    """A blur, say: the torch engine runs such a model."""
    graph = between("conv", facts={**WINDOW, "frozen": True})
    reason = str(uncovered(graph))
    assert "no parameters of the model" in reason
