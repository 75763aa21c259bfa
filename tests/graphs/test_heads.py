"""The heads of an attention, followed through the graph, against what changing a channel really changes."""

import numpy as np
import pytest
import torch

from stages.graphs.capture import capture
from stages.graphs.heads import PRODUCTS, input_heads, output_heads
from stages.models import registry
from tests.cost.nets import inverted_residual
from tests.zoo import ZOO

NETS = ("vit", "vit-fused", "vit-torchvision", "vit-hf", "deit", "swin", "cct", "mobilevit")


def values_of(graph, tensors, x, changed=None, channel=0):
    """Every value of one sample; `changed` names an operator whose output channel is made another one."""
    found = {}
    for op in graph.ops:
        inputs = [x] if op.operator.given else [found[source] for source in op.inputs]
        value = op.operator.forward(op, inputs, tensors)
        if op.name == changed:
            value = value.clone()
            value.select(1 + op.channel_axis % len(op.shape), channel).add_(1.0)
        found[op.name] = value
    return found


def net(name):
    if name == "vit-tiny":
        module, shape = registry.build("vit-tiny", {"size": 32, "depth": 1}, seed=0), (3, 32, 32)
    else:
        module, shape = ZOO[name].build(), ZOO[name].input_shape
    captured = capture(module, shape)
    tensors = {key: torch.as_tensor(np.asarray(value)) for key, value in captured.tensors.items()}
    return captured.graph, tensors, torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETS)
def test_a_channel_changes_its_own_head_alone(name):
    graph, tensors, x = net(name)
    before = values_of(graph, tensors, x)
    rng, layers = np.random.default_rng(0), 0
    for op in graph.layers:
        if (heads := output_heads(graph, op)) is None:
            continue
        layers += 1
        product = next(o for o in graph.ops if o.kind in PRODUCTS and graph.position[o.name] > graph.position[op.name])
        channel = int(rng.integers(op.out_channels))
        after = values_of(graph, tensors, x, op.name, channel)
        axis = before[product.name].ndim - 3
        moved = set()
        for source in product.inputs:
            change = (after[source] - before[source]).abs()
            if change.ndim == before[product.name].ndim:
                moved |= set(change.movedim(axis, 0).flatten(1).amax(1).gt(0).nonzero().flatten().tolist())
        assert moved in ({int(heads[channel])}, set()), op.name  # none: the channel is read by a later product
    assert layers > 0


@pytest.mark.parametrize("name", NETS)
def test_a_head_reaches_its_own_inputs_alone(name):
    graph, tensors, x = net(name)
    before = values_of(graph, tensors, x)
    found = 0
    for op in graph.layers:
        if (heads := input_heads(graph, op)) is None:
            continue
        found += 1
        behind = [o for o in graph.ops if o.kind in PRODUCTS and graph.position[o.name] < graph.position[op.name]]
        last = behind[-1]
        axis = len(last.shape) - 3
        changed = {n: v.clone() for n, v in before.items()}
        head = int(heads.max())
        changed[last.name].select(1 + axis, head).add_(1.0)
        for o in graph.ops[graph.position[last.name] + 1 : graph.position[op.name]]:
            if o.inputs:
                changed[o.name] = o.operator.forward(o, [changed[source] for source in o.inputs], tensors)
        difference = (changed[op.inputs[0]] - before[op.inputs[0]]).abs().flatten(0, -2).amax(0)
        assert np.array_equal(difference.gt(0).numpy(), heads == head), op.name
    assert found > 0


def test_heads_of_the_published_layout():
    """DeiT's qkv: queries, keys and values one behind the other, in each the heads one behind the other."""
    graph, _, _ = net("vit-tiny")
    channel = np.arange(576)
    assert np.array_equal(output_heads(graph, graph["blocks.0.attn.qkv"]), channel % 192 // 64)
    assert np.array_equal(input_heads(graph, graph["blocks.0.attn.proj"]), np.arange(192) // 64)
    assert output_heads(graph, graph["blocks.0.mlp.fc1"]) is None
    assert input_heads(graph, graph["blocks.0.attn.qkv"]) is None


def test_no_heads_where_there_is_no_attention():
    graph = inverted_residual()
    assert all(output_heads(graph, op) is None and input_heads(graph, op) is None for op in graph.layers)
