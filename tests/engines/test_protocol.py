"""The protocol of nets, over every engine: exact gradients in any batches, and nothing frozen ever moves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.artifacts.records import LayerUpdate
from stages.engines.choice import TrainedNet
from stages.engines.parameter import Boundary, Floats
from stages.errors import DataError
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.training.optimizers import OPTIMIZERS, Optimizing, checked_step, make_optimizer
from tests.engines.protocol import (
    bounded,
    check_gradients,
    closed,
    in_turns,
    live_entries,
    live_slices,
    named_gradients,
    net_of,
    on_every_engine,
)
from tests.engines.random_graphs import cases, random_backbone, random_input
from tests.engines.torch.test_net import chain, conv, weighted
from tests.rounding import as_tensors, check_features

FEW = settings(max_examples=30, deadline=None, derandomize=True)
LOSS = closed(weighted)
MIDDLE = LayerUpdate("middle", "output", (0, 2), 4, (1,))
PLAN = (MIDDLE, LayerUpdate("last", "input", (1, 3), 4))


@pytest.fixture
def backbone() -> Backbone:
    return random_backbone(chain(), 3, torch.float32)


@pytest.fixture
def x() -> Floats:
    return random_input(chain(), 5, 3, torch.float32).numpy()


def rows(boundary: Boundary, which: slice) -> Boundary:
    return tuple(value[which] for value in boundary)


def trained(net: TrainedNet, x: Floats, optimizer: str = "sgd", steps: int = 1) -> TrainedNet:
    how = Optimizing(optimizer=optimizer, weight_decay=0.1, momentum=0.9 if optimizer == "sgd" else 0.0)
    moving = make_optimizer(net.parameters(), how)
    for _ in range(steps):
        features, kept = net.forward(net.prefix(x))
        loss, gradient = LOSS(features)
        net.backward(kept, gradient)
        checked_step(moving, loss, rate=0.05, clip_norm=1.0, where="step")
    return net


# ------------------------------------------------------------------------------------------------ what engines compute


@on_every_engine
@FEW
@given(cases(), st.integers(1, 4))
def test_features_and_gradients_are_those_of_dense_autograd_whatever_the_micro_batch(engine, case, size):
    backbone, x, bound, dense = bounded(case, weighted, torch.float32)
    graph, updates, batch, _ = case
    net = net_of(backbone, updates, engine)
    boundary = net.prefix(x.numpy())
    features, kept = net.forward(boundary)
    for found in (features, net.suffix(boundary), net.features(x.numpy())):
        assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)
        bound.check(found, "features")
    gradient = LOSS(features)[1]
    _, kept = net.forward(boundary)
    net.backward(kept, gradient)
    check_gradients(named_gradients(net), dense, graph, updates)
    for start in range(0, batch, size):
        part = slice(start, start + size)
        _, kept = net.forward(rows(boundary, part))
        net.backward(kept, gradient[part])
    check_gradients(named_gradients(net), dense, graph, updates)


@on_every_engine
def test_more_samples_than_an_engine_takes_at_once(engine, backbone):
    """Engines hold a few samples at a time: their lots are summed, and each has its own place in the batch."""
    case = (chain(), PLAN, 37, 3)
    backbone, x, bound, dense = bounded(case, weighted, torch.float32)
    net = net_of(backbone, PLAN, engine)
    features, kept = net.forward(net.prefix(x.numpy()))
    bound.check(features, "features")
    net.backward(kept, LOSS(features)[1])
    check_gradients(named_gradients(net), dense, chain(), PLAN)


@on_every_engine
@FEW
@given(cases(), st.integers(1, 3))
def test_channels_that_take_turns_get_their_gradients_and_the_others_none(engine, case, count):
    backbone, x, bound, dense = bounded(case, weighted, torch.float32)
    graph, updates, _, _ = case
    turns = in_turns(updates, count)
    assume(all(any(update.trains for update in turn) for turn in turns))
    assume(not any(op.operator.weight_gradient for op in graph.layers))  # units of recurrent layers train together
    net = net_of(backbone, updates, engine, turns)
    before, boundary = net.live_tensors(), net.prefix(x.numpy())
    for number in (*range(count), 0):
        moving = net.turn(number)
        features, kept = net.forward(boundary)
        bound.check(features, "features")
        net.backward(kept, LOSS(features)[1])
        others = [p for p in net.parameters() if not any(p is each for each in moving)]
        assert not any(parameter.gradient.any() for parameter in others)
        gradients = named_gradients(net)
        mine = [update for update in turns[number] if update.trains]
        check_gradients(live_slices(graph, mine, whole(backbone, updates, gradients)), dense, graph, mine)
    assert all(np.array_equal(before[name], value) for name, value in net.live_tensors().items())
    for parameter in net.turn(count - 1):
        parameter.value[...] = 7
    marked = live_entries(graph, turns[-1], backbone.tensors)
    for name, value in whole(backbone, updates, net.live_tensors()).items():
        old = whole(backbone, updates, before)[name]
        assert np.array_equal(value, np.where(marked[name], 7, old))


@on_every_engine
def test_places_say_where_every_live_value_lies(engine, backbone):
    for turns in ((), in_turns(PLAN, 2)):
        net = net_of(backbone, PLAN, engine, turns)
        found = {name: np.full(value.size, np.nan) for name, value in backbone.tensors.items()}
        for place in net.places():
            assert np.isnan(found[place.name][place.ids]).all()
            found[place.name][place.ids] = place.parameter.value.reshape(-1)[place.at]
        marked = live_entries(chain(), PLAN, backbone.tensors)
        for name, value in backbone.tensors.items():
            live = marked[name].reshape(-1)
            assert np.array_equal(found[name][live], np.asarray(value).reshape(-1)[live])
            assert np.isnan(found[name][~live]).all()


def whole(backbone: Backbone, updates, live: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors with these live slices of them, zeros elsewhere."""
    graph, found = backbone.graph, {name: np.zeros(value.shape, np.float32) for name, value in backbone.tensors.items()}
    for update in updates:
        alone = replace(update, channels=(), bias=())
        weight = [replace(alone, channels=(channel,)) for channel in update.channels]
        bias = [replace(alone, bias=(channel,)) for channel in update.bias]
        for name, ones in ((f"{update.layer}.weight", weight), (f"{update.layer}.bias", bias)):
            for one, values in zip(ones, live.get(name, ()), strict=True):
                found[name][live_entries(graph, [one], found)[name]] = np.reshape(values, -1)
    return found


@on_every_engine
def test_gradients_add_up_until_somebody_sets_them_to_0(engine, backbone, x):
    net = net_of(backbone, PLAN, engine)
    boundary = net.prefix(x[:2])  # of more samples there are several sums, each added in its turn
    features, kept = net.forward(boundary)
    net.backward(kept, LOSS(features)[1])
    once = [parameter.gradient.copy() for parameter in net.parameters()]
    _, kept = net.forward(boundary)
    net.backward(kept, LOSS(features)[1])
    for parameter, gradient in zip(net.parameters(), once, strict=True):
        assert np.array_equal(parameter.gradient, 2 * gradient)  # doubling is exact, and the same pass gives the same


@on_every_engine
def test_a_gradient_may_have_any_precision_and_layout(engine, backbone, x):
    net = net_of(backbone, PLAN, engine)
    found = []
    for form in (lambda g: g, lambda g: np.asfortranarray(g), lambda g: g.astype(np.float64), frozen):
        features, kept = net.forward(net.prefix(x))
        net.backward(kept, form(LOSS(features)[1]))
        found.append(named_gradients(net))
    for other in found[1:]:
        assert all(np.array_equal(other[name], value) for name, value in found[0].items())


@on_every_engine
def test_inputs_may_have_any_layout_and_are_left_alone(engine, backbone, x):
    net = net_of(backbone, PLAN, engine)
    expected, before = net.features(x), x.copy()
    twice = np.repeat(x, 2, axis=0)[::2]
    turned = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for same in (x, frozen(x), twice, turned):
        assert np.array_equal(net.features(same), expected)
        assert np.array_equal(net.suffix(net.prefix(same)), net.suffix(net.prefix(x)))
    trained(net, x)
    assert np.array_equal(x, before)


def frozen(array: Floats) -> Floats:
    """A copy that nobody may write to."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@on_every_engine
def test_no_samples_have_no_features_and_no_gradient(engine, backbone, x):
    net = net_of(backbone, PLAN, engine)
    assert net.features(x[:0]).shape == (0, 5)
    features, kept = net.forward(net.prefix(x[:0]))
    assert features.shape == (0, 5)
    net.backward(kept, features)
    assert not any(parameter.gradient.any() for parameter in net.parameters())


@on_every_engine
def test_a_live_layer_that_nothing_reads_gets_no_gradient(engine, x):
    ops = chain().ops
    graph = Graph((*ops[:3], conv("dead", "act", (4, 6, 6), (4, 6, 6)), *ops[3:]))
    net = net_of(random_backbone(graph, 0, torch.float32), [replace(MIDDLE, layer="dead"), MIDDLE], engine)
    features, kept = net.forward(net.prefix(x))
    net.backward(kept, LOSS(features)[1])
    moved = {name for name, gradient in named_gradients(net).items() if gradient.any()}
    assert moved == {"middle.weight", "middle.bias"}


# -------------------------------------------------------------------------------------------------------- what changes


@on_every_engine
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(FEW, max_examples=8)
@given(cases())
def test_only_live_values_ever_move(engine, optimizer, case):
    graph, updates, batch, seed = case
    backbone = random_backbone(graph, seed, torch.float32)
    before = {name: value.copy() for name, value in backbone.tensors.items()}
    net = net_of(backbone, updates, engine)
    boundary = net.prefix(random_input(graph, batch, seed, torch.float32).numpy())
    entered = [value.copy() for value in boundary]
    after = trained(net, random_input(graph, batch, seed, torch.float32).numpy(), optimizer, steps=3).tensors()
    allowed = live_entries(graph, updates, before)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert np.array_equal(after[name][~allowed[name]], value[~allowed[name]]), name
        assert np.array_equal(backbone.tensors[name], value), "the caller's backbone changed"
    assert any((after[name] != value)[allowed[name]].any() for name, value in before.items())
    again = net.prefix(random_input(graph, batch, seed, torch.float32).numpy())
    for value, old, new in zip(boundary, entered, again, strict=True):
        assert np.array_equal(value, old), "training changed what the prefix gave"
        assert np.array_equal(new, old), "the prefix changed"


@on_every_engine
def test_features_follow_the_parameters(engine, backbone, x):
    net = net_of(backbone, PLAN, engine)
    before = net.features(x)
    for parameter in net.parameters():
        parameter.value += 0.5
    moved = replace(backbone, tensors=net.tensors())
    for found in (net.features(x), net.suffix(net.prefix(x)), net.forward(net.prefix(x))[0]):
        assert np.abs(found - before).max() > 1e-3
        check_features(found, moved, x)
    expected = live_slices(chain(), PLAN, as_tensors(backbone.tensors))
    for name, value in net.live_tensors().items():
        assert np.array_equal(value.reshape(len(value), -1), expected[name].numpy() + np.float32(0.5))


@on_every_engine
@FEW
@given(cases())
def test_live_slices_are_those_of_the_whole_tensors(engine, case):
    graph, updates, _, seed = case
    backbone = random_backbone(graph, seed, torch.float32)
    net, other, third = (net_of(backbone, updates, engine) for _ in range(3))
    for parameter in net.parameters():
        parameter.value *= np.float32(-0.5)
    taken, changed, whole = net.live_tensors(), net.changed_tensors(), net.tensors()
    halved = {name: value * np.float32(-0.5) for name, value in backbone.tensors.items()}
    expected = live_slices(graph, updates, halved)
    assert list(taken) == list(changed)
    assert taken.keys() == expected.keys()
    allowed = live_entries(graph, updates, backbone.tensors)
    for name, value in backbone.tensors.items():
        assert (whole[name].dtype, whole[name].shape) == (np.float32, value.shape)
        assert np.array_equal(whole[name], np.where(allowed[name], halved[name], value))
        assert np.array_equal(changed.get(name, whole[name]), whole[name])
        assert name not in taken or np.array_equal(taken[name].reshape(len(taken[name]), -1), expected[name])
    other.load_live(taken)
    third.load_whole(whole)
    for same in (other, third):
        assert all(np.array_equal(value, whole[name]) for name, value in same.tensors().items())


@on_every_engine
def test_what_was_taken_out_stays_as_it_was(engine, backbone, x):
    """Copies: training on changes none of them."""
    net = net_of(backbone, PLAN, engine)
    taken, whole = net.live_tensors(), net.tensors()
    before = [{name: value.copy() for name, value in part.items()} for part in (taken, whole)]
    trained(net, x)
    for part, old in zip((taken, whole), before, strict=True):
        assert all(np.array_equal(value, old[name]) for name, value in part.items())
    assert not np.array_equal(net.tensors()["middle.weight"], whole["middle.weight"])
    net.load_live(taken)
    assert all(np.array_equal(value, whole[name]) for name, value in net.tensors().items())
    for value in taken.values():
        value += 1
    assert all(np.array_equal(value, whole[name]) for name, value in net.tensors().items())


@on_every_engine
def test_live_slices_of_another_plan_are_refused(engine, backbone):
    net = net_of(backbone, [MIDDLE], engine)
    taken = net.live_tensors()
    shapes = {name: value.shape for name, value in taken.items()}
    assert shapes == {"middle.weight": (2, 4, 3, 3), "middle.bias": (1,)}
    with pytest.raises(DataError, match="live slice"):
        net.load_live({"middle.weight": taken["middle.weight"]})
    with pytest.raises(DataError, match=r"middle.weight.*\(1, 4, 3, 3\)"):
        net.load_live({**taken, "middle.weight": taken["middle.weight"][:1]})


@on_every_engine
def test_where_nothing_trains_nothing_changes(engine, backbone, x):
    net = net_of(backbone, [], engine)
    assert net.parameters() == []
    assert net.live_tensors() == net.changed_tensors() == {}
    assert all(np.array_equal(value, backbone.tensors[name]) for name, value in net.tensors().items())
    features, kept = net.forward(net.prefix(x))
    check_features(features, backbone, x)
    net.backward(kept, features)
    assert np.array_equal(net.features(x), features)


# --------------------------------------------------------------------------------------------------------- the boundary


@on_every_engine
def test_the_boundary_is_all_that_crosses_into_the_trained_part(engine, backbone, x):
    sizes = {"stem": 2 * 36, "middle": 4 * 36, "last": 4}
    for layer, size in sizes.items():
        net = net_of(backbone, [LayerUpdate(layer, "output", (0,), backbone.graph[layer].out_channels)], engine)
        assert net.boundary == backbone.graph[layer].inputs
        assert [value.reshape(len(x), -1).shape for value in net.prefix(x)] == [(len(x), size)]


@on_every_engine
def test_a_net_of_the_same_plan_takes_the_boundary_of_another(engine, backbone, x):
    net, other = (net_of(backbone, PLAN, engine) for _ in range(2))
    assert (net.boundary, net.layout) == (other.boundary, other.layout)
    assert np.array_equal(other.suffix(net.prefix(x)), net.features(x))


@on_every_engine
def test_a_part_of_the_boundary_is_that_of_a_part_of_the_batch(engine, backbone, x):
    """`gradient_update` and caches cut it: a sample's values depend on no other."""
    net = net_of(backbone, PLAN, engine)
    whole = net.prefix(x)
    for value, part in zip(whole, net.prefix(x[1:3]), strict=True):
        assert np.array_equal(value[1:3], part)


# ---------------------------------------------------------------------------------------------------- what is refused


@on_every_engine
@pytest.mark.parametrize(
    ("updates", "found"),
    [
        ([LayerUpdate("nowhere", "output", (0,), 4)], "'nowhere', expected a layer of this model"),
        ([LayerUpdate("sum", "output", (0,), 4)], "'sum', expected a layer of this model"),
        ([replace(MIDDLE, axis_channels=8)], "8 output channels"),
        ([replace(MIDDLE, axis="sideways")], "sideways"),
        ([replace(MIDDLE, channels=(), bias=())], "nothing trains"),
        ([replace(MIDDLE, channels=(2, 0))], "ascending"),
        ([replace(MIDDLE, channels=(1, 1))], "ascending"),
        ([replace(MIDDLE, channels=(4,))], "0 to 3"),
        ([replace(MIDDLE, bias=(-1,))], "0 to 3"),
        ([MIDDLE, MIDDLE], "each layer once"),
    ],
)
def test_a_plan_of_another_model_is_refused(engine, backbone, updates, found):
    with pytest.raises(DataError, match=found):
        net_of(backbone, updates, engine)


@on_every_engine
def test_biases_of_a_layer_without_bias_are_refused(engine):
    graph = Graph(tuple(replace(op, bias=False) if op.name == "middle" else op for op in chain().ops))
    with pytest.raises(DataError, match=r"middle.* bias.*expected none"):
        net_of(random_backbone(graph, 0, torch.float32), [MIDDLE], engine)


@on_every_engine
def test_an_input_of_another_shape_is_refused(engine, backbone, x):
    net = net_of(backbone, [MIDDLE], engine)
    for call in (net.prefix, net.features):
        with pytest.raises(DataError, match=r"\(N, 2, 6, 6\)"):
            call(x[:, :, 1:])
