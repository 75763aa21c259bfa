"""Timing operators, with a clock that counts calls instead of seconds."""

import itertools

import numpy as np
import pytest
import torch

from stages.graphs.graph import Graph
from stages.measurement.latency import WARM_UP, median_and_spread, repeat, time_layers
from tests.cost.nets import HAND_MADE, inverted_residual


def tensors(graph: Graph) -> dict[str, torch.Tensor]:
    found = {f"{op.name}.weight": torch.ones(op.weight_shape) for op in graph.layers}
    return found | {f"{op.name}.bias": torch.zeros(op.out_channels) for op in graph.layers if op.bias}


def test_repeat_leaves_the_warm_up_out():
    now, runs = itertools.count(), []
    seconds = repeat(lambda: runs.append(next(now)), 3, clock=lambda: float(next(now)))
    assert len(runs) == 3 + WARM_UP
    assert list(seconds) == [2.0, 2.0, 2.0]


def test_median_and_spread():
    assert median_and_spread(np.array([1.0, 2.0, 3.0, 4.0, 100.0])) == (3.0, 2.0)


@pytest.mark.parametrize("name", HAND_MADE)
def test_every_layer_is_timed_with_what_follows_it(name):
    graph = HAND_MADE[name]()
    now, done = itertools.count(), []
    x = torch.zeros(1, *graph.input_shape)
    times = time_layers(graph, tensors(graph), x, 4, clock=lambda: float(next(now)), on_step=done.append)
    assert list(times) == [op.name for op in graph.layers]
    # each timed call takes one tick: a layer and every operator behind it, up to the next layer
    followers = dict.fromkeys(times, 0)
    layer = ""
    for op in graph.ops[1:]:
        layer = op.name if op.is_layer else layer
        followers[layer] += 1
    for layer, one in times.items():
        assert list(one.forward) == [followers[layer]] * 4
        assert list(one.input_gradient) == [followers[layer]] * 4
        assert list(one.weight_gradient) == [1] * 4
        assert list(one.backward) == [followers[layer] + 1] * 4
    assert done == list(range(1, len(graph.ops)))


def test_the_tensors_stay_as_they_were():
    graph = inverted_residual()
    given = tensors(graph)
    before = {name: tensor.clone() for name, tensor in given.items()}
    time_layers(graph, given, torch.zeros(1, 3, 8, 8), 1)
    assert all(torch.equal(given[name], before[name]) and not given[name].requires_grad for name in given)
