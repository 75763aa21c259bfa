"""The cost table and the two inference peaks."""

import pytest

from stages.cost.model import (
    cost_table,
    full_backward_macs,
    inference_peak_bytes,
    last_blocks,
    paper_buffer_bytes,
    paper_peak_bytes,
    weight_count,
)
from stages.errors import UsageError
from stages.graphs.graph import Graph
from stages.operators import Op
from tests.cost.nets import backbone, classifier, conv, inverted_residual, op_input, unary

KB = 1024
NETS = {
    "mcunet": ("mcunet-5fps", {}),
    "mbv2": ("mobilenetv2-w0.35", {"mix": True}),
    "proxyless": ("proxyless-w0.3", {"mix": True}),
}


def net(name: str) -> Graph:
    arch, arguments = NETS[name]
    return backbone(arch, **arguments)


@pytest.mark.parametrize(
    ("name", "weights", "layers", "blocks"),
    [("mcunet", 463_216, 42, 14), ("mbv2", 288_864, 52, 17), ("proxyless", 357_680, 61, 20)],
)
def test_table_4(name, weights, layers, blocks):
    graph = net(name)
    assert (weight_count(graph), len(graph.layers), len(graph.blocks)) == (weights, layers, blocks)


@pytest.mark.parametrize(("name", "kilobytes"), [("mcunet", 640), ("mbv2", 896), ("proxyless", 512)])
def test_papers_inference_peak(name, kilobytes):
    assert paper_peak_bytes(net(name)) == kilobytes * KB


def test_grouped_layers_are_charged_one_group_of_output():
    x = op_input(8, 4)
    assert paper_buffer_bytes(conv("c", x, 16)) == 4 * (128 + 256)
    assert paper_buffer_bytes(conv("c", x, 8, k=3, groups=8)) == 4 * (128 + 16)


def test_cost_table_by_hand():
    table = {row.layer: row for row in cost_table(inverted_residual())}
    assert list(table) == ["stem", "b.expand", "b.depthwise", "b.project"]
    row = table["b.depthwise"]
    assert (row.weights, row.parameters) == (8 * 9, 8 * 9 + 8)
    assert row.macs == row.input_gradient_macs == row.weight_gradient_macs == 8 * 9 * 64
    assert row.backward_macs == 2 * 8 * 9 * 64
    assert (row.input_bytes, row.output_bytes, row.mask_bytes) == (4 * 512, 4 * 512, 64)
    assert table["b.project"].mask_bytes == 0


def test_full_backward_is_twice_the_forward_pass():
    assert full_backward_macs(net("mcunet")) == 44_907_008


def test_liveness_peak_of_a_residual_block_by_hand():
    # while the depthwise convolution runs: the block's input (kept for the addition), its own input and its output
    assert inference_peak_bytes(inverted_residual()) == 4 * (4 * 64 + 8 * 64 + 8 * 64)


def test_an_activation_overwrites_its_input_only_where_nothing_else_reads_it():
    x = op_input(1, 4)
    a, b = conv("a", x, 4), conv("b", op_input(1, 4), 4)
    act = unary("relu", a)
    after = Op("sum", "add", (act.name, "b"), (4, 4, 4), ((4, 4, 4),) * 2)
    shared = Op("sum", "add", (act.name, "a"), (4, 4, 4), ((4, 4, 4),) * 2)
    assert inference_peak_bytes(Graph((x, a, act))) == 4 * (16 + 64)
    assert inference_peak_bytes(Graph((x, a, act, b, after))) == 4 * (16 + 64 + 64)
    assert inference_peak_bytes(Graph((x, a, act, shared))) == 4 * (64 + 64)


def test_a_models_input_is_never_overwritten():
    x = op_input(1, 4)
    assert inference_peak_bytes(Graph((x, unary("relu", x)))) == 4 * (16 + 16)


def test_flattening_copies_nothing():
    assert inference_peak_bytes(classifier()) == 4 * (32 + 48)  # the convolution; then 48 + 5


@pytest.mark.parametrize(("blocks", "layers"), [(1, 4), (6, 19), (17, 52), (99, 52)])
def test_last_blocks_include_the_mix_layer(blocks, layers):
    names = last_blocks(net("mbv2"), blocks)
    assert len(names) == layers
    assert names[-1] == "mix"
    assert ("stem" in names) == (blocks >= 17)


def test_last_blocks_needs_a_block():
    with pytest.raises(UsageError, match="--blocks"):
        last_blocks(net("mcunet"), 0)
