"""Shortcut back-propagation: where residual branches begin, and what detaching them costs and keeps."""

import numpy as np
import pytest
import torch

from stages.artifacts.records import LayerUpdate, Model
from stages.cost.model import block_entries, last_blocks
from stages.cost.training import plan_backward_macs, reached, saved_activation_bytes
from stages.graphs.capture import Captured, capture
from stages.graphs.graph import Graph
from stages.graphs.updates import whole_update
from stages.models import registry
from stages.models.deploy import Backbone, deploy
from stages.models.modules import state
from stages.operators import Op
from stages.planning.budget import Budget
from stages.planning.layers import select_layers
from stages.planning.problem import Channels, Evidence, pose
from stages.planning.shortcuts import residual_entries, with_detached
from stages.training.updates import gradient_update
from tests.engines.protocol import closed, named_gradients, net_of
from tests.planning.problems import random_scores


def graph_of(arch: str) -> Graph:
    spec = registry.input_spec(arch, {})
    return deploy(Model(arch, {}, spec, "batchnorm", state(registry.build(arch, {})))).graph


def conv(name: str, source: str, out: int = 4) -> Op:
    return Op(name, "conv", (source,), (out, 3, 3), in_shapes=((4, 3, 3),), kernel=(1, 1), stride=(1, 1),
              padding=(0, 0), dilation=(1, 1), bias=False)  # fmt: skip


def plain(name: str, kind: str, *sources: str) -> Op:
    return Op(name, kind, sources, (4, 3, 3), in_shapes=((4, 3, 3),))


def residual() -> Graph:
    """stem - relu - [a - mask - b] + shortcut - last - features; every layer is 4 x 4 over 3 x 3 positions."""
    return Graph(
        (
            Op("input", "input", (), (4, 3, 3)),
            conv("stem", "input"),
            plain("start", "relu", "stem"),
            conv("a", "start"),
            plain("mask", "relu", "a"),
            conv("b", "mask"),
            plain("sum", "add", "start", "b"),
            conv("last", "sum"),
            Op("features", "global_pool", ("last",), (4,), in_shapes=((4, 3, 3),)),
        )
    )


MACS = 4 * 4 * 9
"""Of any layer of `residual`, forward, input gradient and weight gradient alike."""


def test_a_branch_begins_behind_the_shortcut():
    assert residual_entries(residual()) == {"a"}


@pytest.mark.parametrize(
    ("arch", "blocks"),
    [
        ("mcunet-5fps", (2, 4, 6, 8, 9, 11, 12)),
        ("mobilenetv2-w0.35", (2, 4, 5, 7, 8, 9, 11, 12, 14, 15)),
        ("proxyless-w0.3", (2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18)),
        ("mobilenetv1", ()),
        ("cnn4", ()),
    ],
)
def test_entries_of_the_architectures(arch, blocks):
    assert residual_entries(graph_of(arch)) == {f"blocks.{number:02d}.expand" for number in blocks}


def test_an_addition_of_two_projections_has_no_shortcut():
    ops = residual().ops
    crossing = Graph((*ops[:6], conv("side", "start"), plain("sum", "add", "side", "b"), *ops[7:]))
    assert residual_entries(crossing) == frozenset()


def test_gradients_take_the_shortcut():
    graph = residual()
    stem = [whole_update(graph["stem"])]
    assert plan_backward_macs(graph, stem) == 4 * MACS  # input gradients of a, b and last; weight gradient of the stem
    short = with_detached(graph, stem, {"a"})
    assert [(update.layer, update.trains) for update in short] == [("stem", True), ("a", False)]
    assert plan_backward_macs(graph, short) == 2 * MACS  # input gradient of last; weight gradient of the stem
    assert reached(graph, short) == {"stem", "start", "sum", "last", "features"}


def test_what_a_detached_branch_keeps():
    graph = residual()
    exact = [whole_update(graph["stem"])]
    bit_masks = 2 * 5  # `start` and `mask`: 36 elements each, 5 bytes of bits
    assert saved_activation_bytes(graph, exact) == 4 * 36 + bit_masks
    assert saved_activation_bytes(graph, with_detached(graph, exact, {"a"})) == 4 * 36 + 5


def test_a_live_layer_inside_a_branch_pays_its_own_block_only():
    graph = residual()
    plan = with_detached(graph, [whole_update(graph["stem"]), whole_update(graph["a"])], {"a"})
    assert [update.detached for update in plan] == [False, True]
    assert plan_backward_macs(graph, plan) == 2 * MACS + 2 * MACS  # weight gradients; input gradients of b and last


def test_nothing_is_detached_where_no_gradient_would_come_by():
    graph = residual()
    assert with_detached(graph, [whole_update(graph["last"])], {"a"}) == (whole_update(graph["last"]),)


def test_a_search_reaches_further_at_the_same_cost():
    graph = graph_of("mcunet-5fps")
    window = block_entries(graph, last_blocks(graph, 9))
    budget = Budget(memory_bytes=None, backward_macs=5_000_000, latency_s=None)
    scores = random_scores(graph, 3, window)

    def earliest(detached):
        problem = pose(graph, scores, budget, Channels(ratios=(0.25,)), Evidence(), detached=detached)
        found = problem.complete(select_layers(problem, "knapsack").updates)
        assert plan_backward_macs(graph, found) <= 5_000_000
        return min(graph.position[update.layer] for update in found if update.trains), found

    exact, _ = earliest(frozenset())
    short, updates = earliest(residual_entries(graph))
    assert short < exact
    assert all(update.layer in residual_entries(graph) for update in updates if update.detached)


def test_entries_of_blocks():
    graph = graph_of("mcunet-5fps")
    assert block_entries(graph, ("blocks.00.depthwise", "blocks.09.project", "blocks.10.expand",
                                 "blocks.10.depthwise")) == ("blocks.10.expand",)  # fmt: skip


def test_bare_rows_have_no_ratio():
    assert LayerUpdate("a", "output", (), 4, detached=True).ratio == 0
    assert np.isclose(LayerUpdate("a", "output", (1,), 4).ratio, 0.25)


# --------------------------------------------------------------------------------------------------------- transformers


def test_branches_of_a_transformer_begin_with_the_scale_of_their_norm():
    assert residual_entries(small_vit().graph) == {f"blocks.{block}.norm{half}" for block in (0, 1) for half in (1, 2)}


def test_a_branch_without_a_layer_is_none():
    ops = residual().ops
    bare = Graph((*ops[:3], plain("branch", "sigmoid", "start"), plain("sum", "add", "start", "branch"), *ops[7:]))
    assert residual_entries(bare) == frozenset()


def test_a_constant_in_a_branch_does_not_end_it():
    ops = residual().ops
    weighed = Graph(
        (
            *ops[:6],
            Op("gamma", "constant", (), (4, 1, 1)),
            Op("weighed", "multiply", ("b", "gamma"), (4, 3, 3), in_shapes=((4, 3, 3), (4, 1, 1))),
            plain("sum", "add", "start", "weighed"),
            *ops[7:],
        )
    )
    assert residual_entries(weighed) == {"a"}


def small_vit() -> Captured:
    return capture(registry.build("vit-tiny", {"size": 32, "depth": 2}, seed=0).double(), (3, 32, 32))


def test_a_transformers_shortcut_gradients_are_those_of_detached_branches():
    """Against autograd through the user's module, every norm's input detached; in float64."""
    module = registry.build("vit-tiny", {"size": 32, "depth": 2}, seed=0).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for block in module.blocks:
        for norm in (block.norm1, block.norm2):
            norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))
    module(x).square().sum().backward()
    wanted = {name: value.grad.numpy() for name, value in module.named_parameters() if value.grad is not None}

    captured = small_vit()
    live = [whole_update(op) for op in captured.graph.layers if op.name != "patch_embed.proj"]
    updates = with_detached(captured.graph, live, residual_entries(captured.graph))
    backbone = Backbone(captured.graph, captured.tensors, registry.input_spec("vit-tiny", {"size": 32, "depth": 2}))
    net = net_of(backbone, updates, "torch")
    gradient_update(net, x.numpy(), closed(lambda features: features.square().sum()))
    seen = named_gradients(net)
    assert seen.keys() <= wanted.keys()
    assert len(seen) == 2 * 12 + 2
    for name, found in seen.items():
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(found, wanted[name], rtol=0, atol=1e-10 * scale, err_msg=name)
