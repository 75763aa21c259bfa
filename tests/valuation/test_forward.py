"""The forward pass over candidates: fast equals plain, and stopping early leaves the estimate unbiased."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from stages.artifacts.live import Version
from stages.artifacts.records import Block, Model
from stages.errors import DataError, UsageError
from stages.graphs.graph import Graph
from stages.models import registry
from stages.models.deploy import deploy, state
from stages.models.inputs import adapt
from stages.planning.baselines import named_plan
from stages.valuation.forward import ANYTIME_CHUNK, Forward, scoring_order, standing_for
from stages.valuation.scoring import Weights
from tests.rounding import check_features

ARGS = {"width": 6, "size": 16}
RNG = np.random.default_rng(0)


def backbone():
    tensors = state(registry.build("cnn4", ARGS, seed=2))
    return deploy(Model("cnn4", ARGS, registry.input_spec("cnn4", ARGS), "batchnorm", tensors))


START = backbone()
PLAN = named_plan("last-2", START.graph)


def pool(size=40):
    rng = np.random.default_rng(1)
    return Block(rng.integers(0, 255, (size, 16, 16)).astype(np.uint8), np.arange(size) % 3, "NHW")


def weights(layer=None):
    start = Weights(START, None)
    if layer is None:
        return start
    name = f"{layer}.weight"
    return start.at(Version(1, {name: START.tensors[name].numpy() * 1.5}, None))


class Keys:
    """A generator that draws the keys it was given."""

    def __init__(self, keys):
        self.keys = np.array(keys, float)

    def random(self, size):
        assert size == len(self.keys)
        return self.keys


@pytest.mark.parametrize("updates", [None, PLAN], ids=["no plan", "last-2"])
def test_features_follow_the_weights(updates):
    """Also where layers change of which no plan spoke: the trainer may train more than the plan."""
    forward, block = Forward(START, updates), pool()
    names = [op.name for op in START.graph.layers]
    for known in (weights(), weights(names[-1]), weights(names[0]), weights()):
        looked = forward.look(block, np.full(40, 1 / 40), known, rng=RNG)
        check_features(looked.features, known.backbone, adapt(block.x, "NHW", START.input))
        np.testing.assert_array_equal(looked.pool.x, block.x)
        np.testing.assert_array_equal(looked.mass, np.full(40, 1 / 40))


def test_what_is_sent_is_the_frozen_layers_output():
    forward, block = Forward(START, PLAN, send=True), pool()
    looked = forward.look(block, np.full(40, 1 / 40), weights(), rng=RNG)
    [name] = looked.pool.facts["boundary"].split()
    before = Graph(START.graph.ops[: START.graph.position[name] + 1])
    found = torch.from_numpy(looked.pool.columns["boundary0"])
    check_features(found, replace(START, graph=before), adapt(block.x, "NHW", START.input))
    np.testing.assert_array_equal(forward.attach(block).columns["boundary0"], looked.pool.columns["boundary0"])


def test_sending_needs_something_frozen_that_stays_frozen():
    for updates in (None, named_plan("full", START.graph)):
        with pytest.raises(UsageError, match="--send"):
            Forward(START, updates, send=True)
    forward = Forward(START, PLAN, send=True)
    with pytest.raises(DataError, match="below the plan's first live layer"):
        forward.look(pool(), np.ones(40), weights(START.graph.layers[0].name), rng=RNG)


def test_scoring_stops_when_the_batch_is_wanted():
    forward, asked = Forward(START, PLAN), []
    block = pool()

    def ready():
        asked.append(1)
        return len(asked) == 2

    looked = forward.look(block, np.full(40, 1 / 40), weights(), ready=ready, rng=np.random.default_rng(3))
    assert len(looked.pool) == 2 * ANYTIME_CHUNK
    check_features(looked.features, weights().backbone, adapt(looked.pool.x, "NHW", START.input))
    masses = np.bincount(looked.pool.y, weights=looked.mass)
    np.testing.assert_allclose(masses, np.bincount(block.y) / 40)


def test_one_of_every_class_is_always_scored():
    block = pool()
    block = Block(block.x, np.arange(40) % 11, "NHW")
    looked = Forward(START, PLAN).look(block, np.full(40, 1 / 40), weights(), ready=lambda: True, rng=RNG)
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
