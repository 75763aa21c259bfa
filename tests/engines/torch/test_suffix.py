"""The parts of the backward pass, each against a plain way to compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.grad import conv2d_weight

from stages.artifacts.records import LayerUpdate
from stages.engines.torch import masks, program, weight_gradients
from stages.engines.torch.live import Live, channels_of
from stages.engines.torch.masks import pack, unpack
from stages.engines.torch.weight_gradients import OUTER_PAIRS, _outer_gradient, weight_gradient
from stages.graphs.graph import Graph
from stages.graphs.keeping import layer_holds
from stages.operators import Op
from stages.operators.op import Flow, Kept
from stages.operators.pooling import window_index
from tests.rounding import value_bounds

FEW = settings(max_examples=30, deadline=None, derandomize=True)


def image(shape: tuple[int, ...], seed: int, channels_last: bool, dtype=torch.float64) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return program.laid_out(x, channels_last)


# --------------------------------------------------------------------------------------------------------------- masks


def passes(activation: str, output: torch.Tensor) -> torch.Tensor:
    """Where gradients pass an activation, by its own rule, which reads the output alone: activations run in place."""
    shape = tuple(output.shape[1:])
    op = Op("act", activation, ("x",), shape, (shape,))
    rule = op.operator.passes
    assert rule is not None
    return rule(op, (), output.detach())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 1, 4), (3, 1, 2, 5), (2, 3, 1, 1), (1, 1, 1, 1), (0, 2, 3, 4), (2, 5)])
def test_strides_say_what_the_layout_is(shape, channels_last):
    """Arrays bring any along axes of length 1, and torch chooses kernels, and so last bits, by them."""
    plain = torch.arange(float(np.prod(shape))).reshape(shape)
    odd = plain.as_strided(shape, [77 if size == 1 else step for size, step in zip(shape, plain.stride(), strict=True)])
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    usual = torch.empty(shape).to(memory_format=layout)
    for value in (plain, odd):
        found = program.laid_out(value, channels_last)
        assert torch.equal(found, plain)
        assert found.stride() == usual.stride() or not found.numel()
    assert program.laid_out(found, channels_last).data_ptr() == found.data_ptr()


@FEW
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.booleans(), st.sampled_from(["relu", "relu6"]))
def test_bits_say_where_gradients_pass(shape, channels_last, activation):
    x = (4 * image(tuple(shape), 1, channels_last)).requires_grad_()
    output = F.relu(x) if activation == "relu" else F.relu6(x)
    output.sum().backward()
    bits = pack(passes(activation, output), channels_last)
    assert bits.dtype == torch.uint8
    assert bits.numel() == -(-output.numel() // 8)
    assert torch.equal(unpack(bits, shape[0], tuple(shape[1:]), channels_last).double(), x.grad)


def test_bits_by_hand():
    output = torch.tensor([[0.0, 1.0, 6.0, 5.9, 0.0, 2.0, 0.0, 0.0, 3.0, 6.0]])
    assert pack(passes("relu", output), False).tolist() == [0b01110100, 0b11000000]
    assert pack(passes("relu6", output), False).tolist() == [0b01010100, 0b10000000]


@FEW
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_the_torch_form_of_packing_is_numpys(passes):
    """Accelerators pack with torch; both forms must read each other's bits."""
    flat = torch.tensor(passes)
    bits = masks._pack_anywhere(flat)
    assert bits.tolist() == np.packbits(passes).tolist()
    assert masks._unpack_anywhere(bits)[: len(flat)].bool().tolist() == passes


def max_pool_gradient(op: Op, index: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of the pool's input from what it keeps and the gradient of its output."""
    rule = op.operator.pull
    assert rule is not None
    return rule(op, {})(Kept({}, None, None, index), Flow(gradient, fresh=False))[0].gradient


def pool(kernel, stride, padding, in_shape, dilation=None) -> Op:
    dilation = dilation or (1,) * len(kernel)
    spatial = zip(in_shape[1:], kernel, stride, padding, dilation, strict=True)
    shape = (in_shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spatial))
    return Op("pool", "max_pool", ("x",), shape, (in_shape,), kernel, stride, padding, dilation)


POOLS = [
    pool((2, 2), (2, 2), (0, 0), (3, 6, 8)),
    pool((3, 3), (2, 2), (1, 1), (2, 7, 5)),
    pool((3, 2), (1, 2), (1, 0), (1, 5, 6)),
    pool((2, 3), (1, 1), (0, 1), (2, 8, 9), dilation=(3, 2)),
    pool((3,), (1,), (1,), (4, 9)),
    pool((2,), (2,), (0,), (2, 7)),
]


@pytest.mark.parametrize("op", POOLS, ids=lambda op: f"{op.kernel}{op.stride}{op.padding}{op.dilation}")
@pytest.mark.parametrize("channels_last", [False, True])
def test_max_pool_goes_back_to_the_maxima(op, channels_last):
    x = image((3, *op.in_shape), 5, channels_last).requires_grad_()
    torch_pool = F.max_pool1d if len(op.kernel) == 1 else F.max_pool2d
    output = torch_pool(x, op.kernel, op.stride, op.padding, op.dilation)
    gradient = image(tuple(output.shape), 6, channels_last)
    output.backward(gradient)
    index = window_index(op, [x.detach()], output)
    assert index.dtype == torch.uint8
    assert index.shape == output.shape
    assert torch.allclose(max_pool_gradient(op, index, gradient), x.grad, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "dtype", "index_bytes"), [(16, torch.uint8, 1), (17, torch.int16, 2), (182, torch.int32, 4)]
)
def test_a_windows_index_takes_the_bytes_that_number_its_positions(size, dtype, index_bytes):
    op = pool((size, size), (1, 1), (0, 0), (1, size, size))
    x = torch.zeros(1, 1, size, size)
    x[..., -1, -1] = 1
    index = window_index(op, [x], x)
    assert index.item() == size**2 - 1
    assert index.dtype == dtype
    assert op.operator.keeps(op, {0}).own_bytes(op, 3) == 3 * index_bytes == 3 * index.element_size()
    assert torch.equal(max_pool_gradient(op, index, torch.ones(1, 1, 1, 1)), x)


# ---------------------------------------------------------------------------------------------------- weight gradients


def conv(channels, out, groups, kernel, stride, padding, dilation, size) -> Op:
    spatial = zip(size, kernel, stride, padding, dilation, strict=True)
    shape = (out, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spatial))
    return Op("conv", "conv", ("x",), shape, ((channels, *size),), kernel, stride, padding, dilation, groups)


CONVS = {
    "pointwise": conv(6, 4, 1, (1, 1), (1, 1), (0, 0), (1, 1), (5, 4)),
    "pointwise strided": conv(6, 4, 1, (1, 1), (2, 3), (0, 0), (1, 1), (5, 7)),
    "pointwise padded": conv(3, 4, 1, (1, 1), (1, 1), (1, 1), (1, 1), (5, 4)),
    "dense": conv(3, 5, 1, (3, 5), (2, 1), (1, 2), (1, 1), (7, 6)),
    "dilated": conv(3, 5, 1, (3, 3), (1, 1), (2, 2), (2, 2), (7, 6)),
    "grouped": conv(12, 8, 4, (3, 3), (1, 1), (1, 1), (1, 1), (4, 5)),
    "multiplier": conv(4, 8, 4, (3, 3), (1, 1), (1, 1), (1, 1), (4, 5)),
    "depthwise": conv(6, 6, 6, (3, 3), (2, 2), (1, 1), (1, 1), (7, 7)),
    "depthwise covering": conv(6, 6, 6, (5, 5), (1, 1), (2, 2), (1, 1), (4, 4)),
    "depthwise large": conv(6, 6, 6, (7, 5), (2, 1), (3, 2), (1, 1), (8, 7)),
    "depthwise huge map": conv(2, 2, 2, (5, 5), (1, 1), (2, 2), (1, 1), (9, 9)),
    "line": conv(6, 4, 2, (5,), (2,), (2,), (1,), (11,)),
    "depthwise line": conv(6, 6, 6, (5,), (1,), (4,), (2,), (9,)),
}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_weight_gradients_of_live_channels(kind, axis, channels_last):
    op = CONVS[kind]
    count = op.out_channels if axis == "output" else op.in_channels
    weight = image(op.weight_shape, 1, False).requires_grad_()
    x = image((3, *op.in_shape), 2, channels_last)
    gradient = image((3, *op.shape), 3, channels_last)
    rule = F.conv1d if len(op.kernel) == 1 else F.conv2d
    rule(x, weight, None, op.stride, op.padding, op.dilation, op.groups).backward(gradient)
    for channels in ((0,), (count - 1,), tuple(range(0, count, 2)), (0, 1), tuple(range(count))):
        update = LayerUpdate("conv", axis, channels, count)
        live = Live(op, update, {"conv.weight": weight.detach()})
        _, sliced = layer_holds(Graph((Op("x", "input", (), op.in_shape), op)), op, update)
        kept = channels_of(op, x, live.channels) if sliced else x
        expected = live.weight_of({"conv.weight": weight.grad})
        found = weight_gradient(live, op, kept, gradient)
        assert found.shape == live.weight.shape
        assert torch.allclose(found, expected, atol=1e-11), channels


def test_both_forms_of_depthwise_gradients_are_met():
    """The table above crosses the limit between outer products and torch's own form."""
    pairs = {name: op.in_shape[1] * op.in_shape[-1] * op.shape[1] * op.shape[-1] for name, op in CONVS.items()}
    assert pairs["depthwise large"] <= OUTER_PAIRS < pairs["depthwise huge map"]


@FEW
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2))
def test_outer_products_of_positions(batch, size, taps, stride, padding, dilation):
    if size + 2 * padding < dilation * (taps - 1) + 1:
        return
    op = conv(3, 3, 3, (taps, 3), (stride, 1), (padding, 1), (dilation, 1), (size, 4))
    weight = image(op.weight_shape, 1, False).requires_grad_()
    x, gradient = image((batch, *op.in_shape), 2, True), image((batch, *op.shape), 3, True)
    F.conv2d(x, weight, None, op.stride, op.padding, op.dilation, 3).backward(gradient)
    assert torch.allclose(_outer_gradient(op, x, gradient), weight.grad, atol=1e-11)


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_are_selected_in_the_tensors_own_layout(channels_last):
    x, channels = image((2, 5, 3, 4), 0, channels_last), torch.tensor([0, 3])
    chosen = channels_of(Op("act", "relu", ("x",), (5, 3, 4), ((5, 3, 4),)), x, channels)
    assert torch.equal(chosen, x[:, [0, 3]])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert chosen.is_contiguous(memory_format=layout)


# ------------------------------------------------------------------------------------------------- forward execution


def residual() -> Graph:
    def activation(name, kind, source):
        return Op(name, kind, (source,), (4, 5, 5), ((4, 5, 5),))

    def layer(name, source, channels=4):
        return Op(name, "conv", (source,), (4, 5, 5), ((channels, 5, 5),), (3, 3), (1, 1), (1, 1), (1, 1), bias=True)

    return Graph(
        (
            Op("input", "input", (), (3, 5, 5)),
            layer("a", "input", 3),
            activation("a.act", "relu", "a"),
            layer("b", "a.act"),
            Op("sum", "add", ("b", "a.act"), (4, 5, 5), ((4, 5, 5),) * 2),
            activation("sum.act", "relu6", "sum"),
            layer("c", "sum.act"),
            Op("flat", "flatten", ("sum.act",), (100,), ((4, 5, 5),)),
        )
    )


def everything(graph: Graph) -> set[str]:
    return {op.name for op in graph.ops}


def test_activations_are_fused_behind_layers_and_sums_overwrite_what_nothing_else_reads():
    steps = {step.out: step for step in program.fuse(residual(), everything(residual()), {"c", "flat"})}
    assert list(steps) == ["a.act", "b", "sum", "sum.act", "c", "flat"]
    assert (steps["a.act"].op.name, steps["a.act"].activation) == ("a", "relu")
    assert steps["sum"].overwrite == 0
    assert steps["sum"].drop == ("b", "a.act")
    assert steps["sum.act"].overwrite == 0


def test_a_layer_whose_output_is_kept_is_not_fused():
    steps = {step.out: step for step in program.fuse(residual(), everything(residual()), {"a", "flat"})}
    assert steps["a"].activation == ""
    assert steps["a.act"].overwrite is None


def test_what_a_flattening_shares_is_not_overwritten():
    graph = residual()
    ops = (*graph.ops, Op("late", "relu", ("sum.act",), (4, 5, 5), ((4, 5, 5),)))
    steps = {step.out: step for step in program.fuse(Graph(ops), everything(Graph(ops)), {"flat", "late"})}
    assert steps["late"].overwrite is None


def test_values_from_outside_are_not_overwritten():
    steps = program.fuse(residual(), {"sum", "sum.act"}, {"sum.act"})
    assert [(step.out, step.overwrite) for step in steps] == [("sum", None), ("sum.act", 0)]


def test_without_onednn_the_same_comes_out(monkeypatch):
    """On builds without the fused kernels the stock operators run."""
    graph = residual()
    tensors = {f"{op.name}.weight": image(op.weight_shape, 4, False, torch.float32) for op in graph.layers}
    tensors |= {f"{op.name}.bias": torch.ones(op.out_channels) for op in graph.layers}
    x = image((2, 3, 5, 5), 0, False, torch.float32)
    bounds = value_bounds(graph, tensors, x, torch.float32)
    for works in (program.pointwise_works(), False):
        monkeypatch.setattr(program, "pointwise_works", lambda works=works: works)
        runner = program.Program(graph, tensors, everything(graph), {"c", "flat"}, channels_last=True)
        for name, found in runner({"input": x}).items():
            bounds[name].check(found, name)


def test_weights_are_prepared_once_for_all_batch_sizes(monkeypatch):
    graph = residual()
    tensors = {f"{op.name}.weight": image(op.weight_shape, 4, False, torch.float32) for op in graph.layers}
    tensors |= {f"{op.name}.bias": torch.ones(op.out_channels) for op in graph.layers}
    runner = program.Program(graph, tensors, everything(graph), {"flat"}, channels_last=True)
    laid_out, packed = [], program.packed
    monkeypatch.setattr(program, "packed", lambda op, *rest: laid_out.append(op.name) or packed(op, *rest))
    x = image((7, 3, 5, 5), 0, False, torch.float32)
    together = runner({"input": x})["flat"]
    for size in (1, 2, 3, 1, 7):
        assert torch.equal(runner({"input": x[:size]})["flat"], together[:size])
    assert len(laid_out) == len(set(laid_out))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [(2, 1), (2, 2), (1, 3)])
def test_no_strided_1x1_convolution_reaches_torch(
    stride: tuple[int, int], channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN's kernel for AVX2 writes past its buffer there (docs/decisions.md)."""
    out = (2, *((size - 1) // step + 1 for size, step in zip((5, 7), stride, strict=True)))
    window: dict[str, tuple[int, ...]] = {"kernel": (1, 1), "stride": stride, "padding": (0, 0), "dilation": (1, 1)}
    op = Op("c", "conv", ("x",), out, ((2, 5, 7),), groups=2, **window)  # type: ignore[arg-type]
    x, gradient = image((3, 2, 5, 7), 0, channels_last), image((3, *out), 1, channels_last)
    expected = conv2d_weight(x, (2, 1, 1, 1), gradient, stride, groups=2)
    called: list[tuple[int, ...]] = []

    def watched(x, shape, gradient, stride, *rest):
        called.append(stride)
        return conv2d_weight(x, shape, gradient, stride, *rest)

    monkeypatch.setattr(weight_gradients, "conv2d_weight", watched)
    torch.testing.assert_close(weight_gradients.depthwise_gradient(op, x, gradient), expected)
    assert called == [(1, 1)]
