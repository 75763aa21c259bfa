"""The forward pass over candidates: fast equals plain, and stopping early leaves the estimate unbiased."""

from dataclasses import replace
from functools import cache
from itertools import permutations

import numpy as np
import pytest

from stages.artifacts.live import Version
from stages.artifacts.records import Block, LayerUpdate, Model
from stages.errors import DataError, UsageError
from stages.graphs.graph import Graph
from stages.models import registry
from stages.models.deploy import deploy
from stages.models.inputs import adapt
from stages.models.modules import state
from stages.planning.baselines import named_plan
from stages.training.updates import PrefixCache
from stages.valuation.forward import ANYTIME_CHUNK, Forward, scoring_order, standing_for
from stages.valuation.scoring import Weights
from tests.rounding import check_features, exact_features

ARGS = {"width": 6, "size": 16}
RNG = np.random.default_rng(0)
EQUAL = np.full(40, 1 / 40)
ENGINES = ("native", "torch")


@cache
def backbone(engine="native"):
    tensors = state(registry.build("cnn4", ARGS, seed=2))
    model = Model("cnn4", ARGS, registry.input_spec("cnn4", ARGS), "batchnorm", tensors)
    return deploy(model, engine=engine)


START = backbone()
FIRST, *_, THIRD, LAST = (op.name for op in START.graph.layers)
PLAN = named_plan("last-2", START.graph)
SOME = (
    LayerUpdate(THIRD, "output", (1, 4), 6, bias=(0, 4)),
    LayerUpdate(LAST, "output", (0, 2, 3), 6),
)
"""Some channels of the last two layers."""


def pool(size=40):
    rng = np.random.default_rng(1)
    return Block(rng.integers(0, 255, (size, 16, 16)).astype(np.uint8), np.arange(size) % 3, "NHW")


def inputs(block):
    return adapt(block.x, "NHW", START.input)


def weights(layer=None, engine="native"):
    """The start, or what a trainer publishes that has changed all weights of a layer."""
    return published({} if layer is None else {f"{layer}.weight": slice(None)}, engine)


def published(changed, engine="native"):
    """The start with these rows of these tensors changed, as a trainer publishes them."""
    start = Weights(backbone(engine), None)
    tensors = {name: start.backbone.tensors[name].copy() for name in changed}
    for name, rows in changed.items():
        tensors[name][rows] = tensors[name][rows] * 1.5 + 0.25
    return start.at(Version(1, tensors, None)) if changed else start


class Keys:
    """A generator that draws the keys it was given."""

    def __init__(self, keys):
        self.keys = np.array(keys, float)

    def random(self, size):
        assert size == len(self.keys)
        return self.keys


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("updates", [None, PLAN, SOME], ids=["no plan", "last-2", "some channels"])
def test_features_follow_the_weights(updates, engine):
    """Also where layers change of which no plan spoke: the trainer may train more than the plan."""
    forward, block = Forward(backbone(engine), updates), pool()
    for layer in (None, LAST, FIRST, None):
        known = weights(layer, engine)
        looked = forward.look(block, EQUAL, known, rng=RNG)
        check_features(looked.features, known.backbone, inputs(block))
        np.testing.assert_array_equal(looked.pool.x, block.x)
        np.testing.assert_array_equal(looked.mass, EQUAL)


BESIDE = {
    "another channel of a live layer": {f"{LAST}.weight": [0, 1]},
    "a bias that the plan freezes": {f"{LAST}.bias": [3]},
    "another bias of a live layer": {f"{THIRD}.bias": [0, 5]},
    "one weight": {f"{THIRD}.weight": (0, 2, 1, 1)},
}
"""Changes in the plan's layers, outside its channels."""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("changed", BESIDE.values(), ids=BESIDE)
def test_a_change_in_a_live_layer_beside_the_plans_channels_is_noticed(changed, engine):
    """And what the plan says is still followed after it, and the way back."""
    forward, block = Forward(backbone(engine), SOME), pool()
    for rows in (changed, {f"{LAST}.weight": [2, 3]}, {}):
        known = published(rows, engine)
        looked = forward.look(block, EQUAL, known, rng=RNG)
        check_features(looked.features, known.backbone, inputs(block))


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_whose_names_are_not_in_their_order_may_all_change(engine):
    """A net that begins with its stem, `train-sparse --full` behind it: blocks come before it by the alphabet alone."""
    args = {"size": 32, "width": 0.35}
    tensors = state(registry.build("mobilenetv2", args, seed=2))
    model = Model("mobilenetv2", args, registry.input_spec("mobilenetv2", args), "batchnorm", tensors)
    start = deploy(model, engine=engine)
    x = np.random.default_rng(1).integers(0, 255, (6, 32, 32, 3)).astype(np.uint8)
    block = Block(x, np.arange(6) % 3, "NHWC")
    changed = {name: value * np.float32(1.01) for name, value in start.tensors.items()}
    known = Weights(start, None).at(Version(1, changed, None))
    looked = Forward(start, None).look(block, np.full(6, 1 / 6), known, rng=RNG)
    check_features(looked.features, known.backbone, adapt(x, "NHWC", start.input))


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_layers_stay_prepared_while_the_plan_is_kept(engine, monkeypatch):
    """Other arrays of the same values are no change, nor are the plan's own channels: no net is built again."""
    forward, block = Forward(backbone(engine), SOME), pool()
    monkeypatch.setattr(Forward, "_train", lambda self, layers: pytest.fail(f"{layers} taken for changed"))
    start = Weights(backbone(engine), None)
    copies = start.at(Version(1, {name: value.copy() for name, value in START.tensors.items()}, None))
    for known in (copies, published({f"{THIRD}.weight": [1, 4], f"{THIRD}.bias": [0, 4]}, engine)):
        forward.look(block, EQUAL, known, rng=RNG)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("updates", [PLAN, SOME], ids=["last-2", "some channels"])
def test_what_is_sent_is_the_frozen_layers_output(updates, engine):
    """The engine may lay channels out in an order of its own, which it names."""
    forward, block = Forward(backbone(engine), updates, send=True), pool()
    looked = forward.look(block, EQUAL, weights(engine=engine), rng=RNG)
    name, layout = looked.pool.facts["boundary"].split(" ", 1)
    assert layout.strip("()").split(" ")[0] == engine
    before = replace(START, graph=Graph(START.graph.ops[: START.graph.position[name] + 1]))
    found = looked.pool.columns["boundary0"]
    if engine == "native":  # (N, H, W, C)
        found = np.moveaxis(found, 3, 1)
        expected = exact_features(before, inputs(block)).numpy()
        apart = np.abs(found[:, :, None] - expected[:, None]).max((0, 3, 4))
        order = apart.argmin(0)
        assert sorted(order) == list(range(len(order)))
        found = found[:, order]
    check_features(found, before, inputs(block))
    np.testing.assert_array_equal(forward.attach(block).columns["boundary0"], looked.pool.columns["boundary0"])
    assert forward.attach(block).facts == looked.pool.facts


@pytest.mark.parametrize("engine", ENGINES)
def test_another_net_of_the_plan_goes_on_from_what_is_sent(engine):
    """To the bits of the features that it computes from the pixels."""
    sent = Forward(backbone(engine), SOME, send=True).attach(pool())
    other = Forward(backbone(engine), SOME)
    boundary = PrefixCache.from_arrays({"boundary0": sent.columns["boundary0"]}).boundary
    looked = other.look(pool(), EQUAL, weights(engine=engine), rng=RNG)
    np.testing.assert_array_equal(other._net.suffix(boundary), looked.features)


def test_the_layout_tells_engines_and_plans_apart():
    """Native channels lie in an order that depends on which of them train."""
    other = (SOME[0], replace(SOME[1], channels=(0, 2, 4)))
    told = [
        Forward(backbone(engine), updates, send=True).attach(pool()).facts["boundary"]
        for engine, updates in [("native", SOME), ("native", other), ("native", SOME), ("torch", SOME)]
    ]
    assert told[0] == told[2]
    assert len(set(told)) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_sending_needs_something_frozen_that_stays_frozen(engine):
    start = backbone(engine)
    for updates in (None, named_plan("full", START.graph)):
        with pytest.raises(UsageError, match="--send"):
            Forward(start, updates, send=True)
    forward = Forward(start, PLAN, send=True)
    with pytest.raises(DataError, match=r"beside the plan's live channels.*leave --send out, or train the same plan"):
        forward.look(pool(), EQUAL, weights(FIRST, engine), rng=RNG)


def test_natively_sending_needs_the_very_plan():
    """What else changes asks for another order of channels than the trainer of the plan has."""
    forward = Forward(START, SOME, send=True)
    forward.look(pool(), EQUAL, published({f"{LAST}.weight": [0, 2]}), rng=RNG)
    with pytest.raises(DataError, match="beside the plan's live channels"):
        forward.look(pool(), EQUAL, published({f"{LAST}.weight": [1]}), rng=RNG)


def test_scoring_stops_when_the_batch_is_wanted():
    forward, asked = Forward(START, PLAN), []
    block = pool()

    def ready():
        asked.append(1)
        return len(asked) == 2

    looked = forward.look(block, EQUAL, weights(), ready=ready, rng=np.random.default_rng(3))
    assert len(looked.pool) == 2 * ANYTIME_CHUNK
    check_features(looked.features, weights().backbone, inputs(looked.pool))
    masses = np.bincount(looked.pool.y, weights=looked.mass)
    np.testing.assert_allclose(masses, np.bincount(block.y) / 40)


def test_one_of_every_class_is_always_scored():
    block = pool()
    block = Block(block.x, np.arange(40) % 11, "NHW")
    looked = Forward(START, PLAN).look(block, EQUAL, weights(), ready=lambda: True, rng=RNG)
    assert len(np.unique(looked.pool.y)) == 11
    assert looked.mass.sum() == pytest.approx(1.0)


def test_stopping_anywhere_is_unbiased_by_enumeration():
    """Over all orders of chance, at every place where scoring may stop, the mean estimate is the pool's value."""
    labels, mass = np.array([0, 1, 0, 1, 0]), np.array([0.1, 0.3, 0.2, 0.05, 0.35])
    values = np.array([3.0, -1.0, 4.0, 1.0, -5.0])
    for stop in range(2, 6):
        estimates = []
        for keys in permutations(range(5)):
            rows = np.sort(scoring_order(labels, Keys(keys))[:stop])
            assert len(np.unique(labels[rows])) == 2
            estimates.append(standing_for(labels, mass, rows) @ values[rows])
        assert np.mean(estimates) == pytest.approx(mass @ values)
        assert stop == 5 or np.std(estimates) > 0.1


def test_the_order_mixes_classes_in_proportion():
    labels = np.array([0] * 8 + [1] * 4)
    order = labels[scoring_order(labels, np.random.default_rng(5))]
    assert [int(np.sum(order[:n])) for n in (2, 3, 6, 9, 12)] == [1, 1, 2, 3, 4]
