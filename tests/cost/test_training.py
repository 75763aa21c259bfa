"""What training costs: the paper's tables, hand values, and the engine's own bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts.records import InputSpec, LayerUpdate
from stages.cost import training
from stages.cost.model import full_backward_macs, inference_peak_bytes, last_blocks, paper_peak_bytes
from stages.cost.training import (
    HEAD,
    full_training_bytes,
    live_values,
    memory_bytes,
    plan_backward_macs,
    saved_activation_bytes,
    weight_gradient_macs,
    with_head,
)
from stages.engines.torch.net import SparseNet
from stages.errors import UsageError
from stages.graphs.graph import Graph
from stages.graphs.keeping import layer_holds, slice_bytes, value_bytes
from stages.graphs.updates import whole_update
from stages.models.deploy import Backbone
from tests.cost.nets import HAND_MADE, backbone, classifier, conv, fire, inverted_residual, op_input
from tests.cost.test_model import net

MB, KB = 2**20, 2**10


def update(graph: Graph, layer: str, channels: int | None = None, axis: str = "output", bias: int = 0) -> LayerUpdate:
    """The first `channels` channels (all by default) and the first `bias` biases of a layer."""
    op = graph[layer]
    count = op.out_channels if axis == "output" else op.in_channels
    return LayerUpdate(layer, axis, tuple(range(count if channels is None else channels)), count, tuple(range(bias)))


# ------------------------------------------------------------------------------------------------- the paper's tables


@pytest.mark.parametrize(
    ("name", "kilobytes"),
    [
        ("mcunet", (479.0, 392.3, 281.0, 191.6, 135.9, 80.3)),
        ("mbv2", (432.9, 325.7, 218.4, 148.5, 101.6, 54.7)),
        ("proxyless", (299.3, 241.5, 171.6, 118.0, 89.1, 60.3)),
    ],
)
def test_table_11_saved_activations_of_the_last_blocks(name, kilobytes):
    graph = net(name)
    for blocks, paper in zip((6, 5, 4, 3, 2, 1), kilobytes, strict=True):
        updates = [whole_update(graph[layer], bias=False) for layer in last_blocks(graph, blocks)]
        assert saved_activation_bytes(graph, updates) / KB == pytest.approx(paper, rel=0.003)


@pytest.mark.parametrize(
    ("name", "megabytes", "macs"), [("mcunet", 2.03, 1_474_560), ("mbv2", 1.64, 802_816), ("proxyless", 1.06, 589_824)]
)
def test_table_2_last_layer(name, megabytes, macs):
    graph = net(name)
    updates = [whole_update(graph.layers[-1], bias=False)]
    assert memory_bytes(graph, updates) / MB == pytest.approx(megabytes, abs=0.005)
    assert plan_backward_macs(graph, updates) == macs


def test_table_7_last_layer_with_sgd():
    graph = net("mcunet")
    updates = [whole_update(graph.layers[-1], bias=False)]
    assert memory_bytes(graph, updates, optimizer="sgd") / MB == pytest.approx(1.33, abs=0.005)


@pytest.mark.parametrize(("name", "megabytes"), [("mcunet", 906), ("mbv2", 1049), ("proxyless", 857)])
def test_table_2_full_training(name, megabytes):
    graph = net(name)
    assert full_training_bytes(graph, 100) / MB == pytest.approx(megabytes, rel=0.005)


# ------------------------------------------------------------------------------------------------------------ by hand


def test_backward_macs_of_a_chain_by_hand():
    graph = inverted_residual()
    stem, expand, depthwise, project = (8 * 8 * n for n in (4 * 3 * 9, 8 * 4, 8 * 9, 4 * 8))
    assert plan_backward_macs(graph, [update(graph, "b.project")]) == project
    assert plan_backward_macs(graph, [update(graph, "b.expand", 2)]) == depthwise + project + expand // 4
    assert plan_backward_macs(graph, [update(graph, "stem", 1)]) == expand + depthwise + project + stem // 4
    both = [update(graph, "b.expand", 4), update(graph, "b.project", 1)]
    assert plan_backward_macs(graph, both) == expand // 2 + project // 4 + depthwise + project
    assert plan_backward_macs(graph, [update(graph, "b.expand", 0, bias=3)]) == depthwise + project
    assert plan_backward_macs(graph, []) == 0


def test_gradients_do_not_enter_a_branch_without_live_layers():
    graph = fire()
    last = 11 * 3 * 9
    assert plan_backward_macs(graph, [update(graph, "left")]) == last + 4 * 5 * 36
    assert plan_backward_macs(graph, [update(graph, "left"), update(graph, "right")]) == last + 4 * 5 * 36 + 24 * 9 * 36


def test_everything_trains_at_twice_the_forward_less_the_stems_input_gradient():
    graph = net("mcunet")
    updates = [whole_update(op) for op in graph.layers]
    assert plan_backward_macs(graph, updates) == full_backward_macs(graph) - graph.layers[0].weights * 64 * 64


def kept_input(graph: Graph, update: LayerUpdate, batch: int) -> tuple[str | None, int]:
    """What a live layer keeps of its input: the value's name, none where it keeps a slice of its own, and the bytes."""
    op = graph[update.layer]
    whole, channels = layer_holds(graph, op, update)
    name = next(iter(whole), None)
    return name, value_bytes(graph, name, batch) if name else slice_bytes(op, channels, batch)


def test_kept_input_follows_the_axis():
    graph = inverted_residual()
    assert kept_input(graph, update(graph, "b.project", 1), 2) == ("b.depthwise.relu6", 2 * 4 * 512)
    assert kept_input(graph, update(graph, "b.project", 3, "input"), 2) == (None, 2 * 4 * 3 * 64)
    assert kept_input(graph, update(graph, "b.depthwise", 3), 2) == (None, 2 * 4 * 3 * 64)
    assert kept_input(graph, update(graph, "b.project", 0, bias=4), 2) == (None, 0)


def test_saved_bytes_by_hand():
    graph = inverted_residual()
    masks = 64 + 64  # one bit for each of 512 outputs of two activations
    assert saved_activation_bytes(graph, [update(graph, "b.expand")]) == 4 * 256 + masks
    assert saved_activation_bytes(graph, [update(graph, "b.expand", 0, bias=1)]) == masks
    assert saved_activation_bytes(graph, [update(graph, "b.project")]) == 4 * 512
    assert saved_activation_bytes(graph, [update(graph, "stem")], batch=3) == 3 * 4 * 192 + 3 * (32 + masks)


def test_a_shared_input_is_kept_once():
    graph = fire()
    one, two = [update(graph, "left")], [update(graph, "left"), update(graph, "right")]
    assert saved_activation_bytes(graph, two) - saved_activation_bytes(graph, one) == 6 * 36 // 8
    part = [update(graph, "left", 3, "input"), update(graph, "right", 2, "input")]
    assert saved_activation_bytes(graph, part) - saved_activation_bytes(graph, two) == 4 * (3 + 2 - 4) * 36
    whole = [update(graph, "left", axis="input"), update(graph, "right", axis="input")]
    assert saved_activation_bytes(graph, whole) == saved_activation_bytes(graph, two)


def test_flattened_and_pooled_values_share_their_storage():
    graph = classifier()
    assert kept_input(graph, update(graph, "fc1"), 1) == ("conv.relu", 4 * 48)


def test_memory_models_by_hand():
    graph = inverted_residual()
    updates = [update(graph, "b.expand", 4, bias=4)]
    saved = 4 * 256 + 128
    assert live_values(graph, updates) == 4 * 4 + 4
    assert memory_bytes(graph, updates, model="saved", optimizer="adam") == 4 * 20 * 3 + saved
    assert memory_bytes(graph, updates, model="saved", optimizer="sgd") == 4 * 20 + saved
    assert memory_bytes(graph, updates, model="peak") == 4 * 20 * 3 + saved + inference_peak_bytes(graph)
    assert paper_peak_bytes(graph) > saved
    assert memory_bytes(graph, updates, model="paper") == 4 * 16 * 4 + paper_peak_bytes(graph)


def test_paper_model_takes_the_larger_of_saved_and_buffers():
    graph = inverted_residual()
    updates = [whole_update(op, bias=False) for op in graph.layers]
    saved = saved_activation_bytes(graph, updates)
    assert saved > paper_peak_bytes(graph)
    assert memory_bytes(graph, updates, optimizer="sgd") == 4 * 2 * live_values(graph, updates) + saved


def test_a_linear_head_is_a_layer_like_others():
    graph = with_head(inverted_residual(), 10)
    head = [whole_update(graph[HEAD])]
    assert live_values(graph, head) == 4 * 10 + 10
    assert plan_backward_macs(graph, head) == 40
    assert saved_activation_bytes(graph, head, batch=5) == 5 * 4 * 4
    assert plan_backward_macs(graph, [update(graph, "b.project"), *head]) == 64 * 32 + 40 + 40


@pytest.mark.parametrize("wrong", [{"model": "papers"}, {"optimizer": "lion"}])
def test_unknown_names_are_refused_with_the_known_ones(wrong):
    with pytest.raises(UsageError, match="one of"):
        memory_bytes(inverted_residual(), [], **wrong)


def test_live_share_is_exact_where_the_ratio_is_no_binary_fraction():
    op = conv("c", op_input(6, 5), 6, k=3)
    graph = Graph((op_input(6, 5), op))
    assert weight_gradient_macs(graph, update(graph, "c", 1)) * 6 == weight_gradient_macs(graph, update(graph, "c"))


# ------------------------------------------------------------------------------------------------- against the engine


@st.composite
def plans(draw: st.DrawFn, graph: Graph) -> list[LayerUpdate]:
    """Random updates of up to five layers: axes, channel subsets and biases."""
    layers = draw(st.lists(st.sampled_from(graph.layers), min_size=1, max_size=5, unique_by=lambda op: op.name))
    updates = []
    for op in sorted(layers, key=lambda op: graph.position[op.name]):
        axis = draw(st.sampled_from(["output", "input"])) if op.groups == 1 else "output"
        count = op.out_channels if axis == "output" else op.in_channels
        picked = st.sets(st.integers(0, count - 1), max_size=min(count, 8))
        channels = draw(st.one_of(picked, st.just(set(range(count)))))
        biases = draw(st.sets(st.integers(0, op.out_channels - 1), max_size=4))
        if not channels and not biases:
            biases = {0}
        updates.append(LayerUpdate(op.name, axis, tuple(sorted(channels)), count, tuple(sorted(biases))))
    return updates


def engine_bytes(graph: Graph, updates: list[LayerUpdate], batch: int) -> int:
    """Bytes of the distinct storages that the engine hands to autograd, parameters aside."""
    rng = np.random.default_rng(0)
    tensors = {f"{op.name}.weight": rng.standard_normal(op.weight_shape, np.float32) for op in graph.layers}
    tensors |= {f"{op.name}.bias": np.zeros(op.out_channels, np.float32) for op in graph.layers if op.bias}
    net = SparseNet(Backbone(graph, tensors, InputSpec("image", graph.input_shape)), updates)
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        x = torch.from_numpy(rng.standard_normal((batch, *graph.input_shape), np.float32))
        features = net.suffix(net.prefix(x))
        features.sum().backward()
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)


@pytest.mark.parametrize("name", HAND_MADE)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3))
def test_saved_is_what_the_engine_keeps_on_small_nets(name, data, batch):
    graph = HAND_MADE[name]()
    updates = data.draw(plans(graph))
    assert saved_activation_bytes(graph, updates, batch) == engine_bytes(graph, updates, batch)


@pytest.mark.parametrize("name", ["mcunet", "mbv2", "proxyless"])
@settings(max_examples=4, deadline=None)
@given(data=st.data(), batch=st.integers(1, 2))
def test_saved_is_what_the_engine_keeps_on_the_papers_nets(name, data, batch):
    arch = {"mcunet": "mcunet-5fps", "mbv2": "mobilenetv2-w0.35", "proxyless": "proxyless-w0.3"}[name]
    graph = backbone(arch, mix=True, size=64)
    updates = data.draw(plans(graph))
    assert saved_activation_bytes(graph, updates, batch) == engine_bytes(graph, updates, batch)


def test_every_memory_model_is_documented():
    assert all(f"`{name}`" in (training.__doc__ or "") for name in training.MEMORY_MODELS)
