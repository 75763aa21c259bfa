"""Layers that have settled train no more: by hand on a chain, over a restart, and as a training that ends by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Run
from stages.errors import UsageError
from stages.fsl.settling import Settling, settling_of
from stages.models.modules import trainable
from stages.planning.policies import Velocity
from stages.pretraining import STAGE, Pretraining, pretrain
from tests.test_pretraining import CONFIG, random_run, squares


def net_and_layers():
    net = trainable(random_run().model)
    return net, [op.name for op in net.graph.layers]


def probe():
    return np.random.default_rng(0).standard_normal((4, 1, 16, 16)).astype(np.float32)


def move(net, layer, by):
    with torch.no_grad():
        value = net.values()[f"{layer}.weight"]
        value.add_(by * torch.randn(value.shape, generator=torch.Generator().manual_seed(7)))


def frozen(net):
    return {
        name.rpartition(".")[0]
        for name, value in net.values().items()
        if isinstance(value, torch.nn.Parameter) and not value.requires_grad
    }


def test_layers_leave_front_to_back():
    """The first two layers stay as they are and the third moves: two are frozen after three looks, with their norms."""
    net, layers = net_and_layers()
    settling = Settling(Velocity(), net, probe())
    for look in range(3):
        settling.look()
        assert settling.left == (2 if look == 2 else 0)
        move(net, layers[2], 0.5)
    assert {name for name in frozen(net) if name in layers} == set(layers[:2])
    first = net.graph.position[layers[2]]
    assert all(net.graph.position[name] < first for name in frozen(net))
    assert not settling.ended
    settling.wake()
    assert settling.left == 0
    assert not frozen(net)


def test_a_settled_layer_behind_one_that_moves_stays():
    net, layers = net_and_layers()
    settling = Settling(Velocity(), net, probe())
    for _ in range(4):
        settling.look()
        move(net, layers[0], 0.5)
    assert settling.left == 0


def test_nothing_moves_and_everything_ends():
    net, layers = net_and_layers()
    settling = Settling(Velocity(), net, probe())
    for _ in range(3):
        assert not settling.ended
        settling.look()
    assert settling.ended
    assert settling.left == len(layers)


def test_what_is_remembered_goes_on():
    net, layers = net_and_layers()
    whole, first = Settling(Velocity(), net, probe()), Settling(Velocity(), net, probe())
    for _ in range(2):
        whole.look()
        first.look()
    second = Settling(Velocity(), net, probe())
    second.load(first.state())
    move(net, layers[3], 0.1)
    whole.look()
    second.look()
    assert second.left == whole.left == 3


CALM = replace(CONFIG, epochs=8, lr=0.0, least_lr=0.0, warmup_epochs=0, batchnorm="frozen", validation_tasks=0)


def test_training_ends_when_all_has_settled():
    """At a rate of 0 nothing moves: three looks tell, and five epochs are not made."""
    result = pretrain(random_run(), [squares()], replace(CALM, policy="velocity"), seed=0)
    assert result.metrics[STAGE]["settled_layers"].tolist() == [0, 0, 4]
    assert "settled_layers" not in pretrain(random_run(), [squares()], CALM, seed=0).metrics[STAGE]


MIXED = replace(
    CONFIG, epochs=5, policy="velocity:threshold=0.02,share=0.5", batchnorm="frozen", lr=0.01, warmup_epochs=0
)


def test_what_left_keeps_its_values():
    """Momentum and decay do not move what is frozen."""
    config = replace(MIXED, weight_decay=0.1)
    saved: list[Run] = []
    pretrain(random_run(), [squares()], config, seed=0, save=lambda run: saved.append(decode(encode(run))))
    left = saved[-1].metrics[STAGE]["settled_layers"].astype(int)
    assert left[-1] > 0
    at = int(np.flatnonzero(left)[0])
    weights = [run.extra.groups["pretraining"].groups["weights"].arrays for run in saved]
    first, last = weights[at], weights[-1]
    assert np.array_equal(first["backbone.value0"], last["backbone.value0"])


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_training_is_bit_equal(stop_after):
    saved: list[bytes] = []
    whole = pretrain(random_run(), [squares()], MIXED, seed=0, save=lambda run: saved.append(encode(run)))
    again = pretrain(random_run(), [squares()], MIXED, seed=0, resume=decode(saved[stop_after - 1]))
    assert encode(again) == encode(whole)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("rotate", "static or velocity"),
        ("velocity:every=3", "threshold="),
        ("velocity:probe=means", "threshold="),
        ("velocity:threshold=-1", "at least 0"),
        ("calm", "velocity"),
    ],
)
def test_policies_that_mean_nothing_here(policy, message):
    with pytest.raises(UsageError, match=message):
        Pretraining(policy=policy)


def test_static_freezes_nothing():
    assert settling_of("static") is None
