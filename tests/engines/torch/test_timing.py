"""Timing operators in torch, with a clock that counts calls instead of seconds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stages.engines.parameter import Floats
from stages.engines.torch.timing import time_layers
from stages.graphs.graph import Graph
from tests.cost.nets import HAND_MADE, inverted_residual


def tensors(graph: Graph) -> dict[str, Floats]:
    found = {f"{op.name}.weight": np.ones(op.weight_shape, np.float32) for op in graph.layers}
    return found | {f"{op.name}.bias": np.zeros(op.out_channels, np.float32) for op in graph.layers if op.bias}


@pytest.mark.parametrize("name", HAND_MADE)
def test_every_layer_is_timed_with_what_follows_it(name):
    graph = HAND_MADE[name]()
    now, done = itertools.count(), []
    x = np.zeros((1, *graph.input_shape), np.float32)
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
    before = {name: value.copy() for name, value in given.items()}
    time_layers(graph, given, np.zeros((1, 3, 8, 8), np.float32), 1)
    assert all(np.array_equal(given[name], before[name]) for name in given)
