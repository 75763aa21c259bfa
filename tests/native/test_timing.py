"""Timing layers in the native engine, with a clock that counts calls instead of seconds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stages.engines.native import library
from stages.engines.native.lowering import lower
from stages.engines.native.net import NativeNet
from stages.engines.native.timing import time_layers
from stages.graphs.updates import every_layer
from tests.cost.nets import HAND_MADE, inverted_residual
from tests.engines.torch.test_timing import tensors

pytestmark = pytest.mark.skipif(not library.is_built(), reason="the native library is not built: make setup")


@pytest.mark.parametrize("name", HAND_MADE)
def test_every_step_is_timed_once_and_counts_with_its_layer(name):
    graph = HAND_MADE[name]()
    now, done = itertools.count(), []
    x = np.zeros((1, *graph.input_shape), np.float32)
    times = time_layers(graph, tensors(graph), x, 4, clock=lambda: float(next(now)), on_step=done.append)
    assert list(times) == [op.name for op in graph.layers]
    program = lower(graph, every_layer(graph), chains=False)
    # each run takes one tick
    saves = sum(step.saves for step in program.suffix)
    forward = len(program.prefix) + len(program.suffix) - saves
    assert sum(one.forward[0] for one in times.values()) == forward
    assert sum(one.backward[0] for one in times.values()) == saves + len(program.backward)
    for op in graph.layers:
        assert set(times[op.name].forward) == {times[op.name].forward[0]}
        assert list(times[op.name].weight_gradient) == [1 + op.bias] * 4
    assert done == sorted(done)
    assert done[-1] == len(graph.ops) - 1


def test_steps_are_run_on_what_a_pass_left_and_change_no_weight():
    graph = inverted_residual()
    given = tensors(graph)
    before = {name: value.copy() for name, value in given.items()}
    time_layers(graph, given, np.zeros((1, 3, 8, 8), np.float32), 1)
    assert all(np.array_equal(given[name], before[name]) for name in given)


def test_a_run_of_steps_says_whether_it_may():
    graph = inverted_residual()
    net = NativeNet(graph, tensors(graph), every_layer(graph)[-1:], threads=1)
    run, handle = net._library.et_run, net._workers[0].handle
    steps = net.sizes.steps
    assert run(handle, 0, steps) == 11  # nothing went through yet
    _, kept = net.forward(net.prefix(np.zeros((1, 3, 8, 8), np.float32)))
    net.backward(kept, np.ones((1, graph.feature_dim), np.float32))
    assert run(handle, 0, steps + 1) == run(handle, steps + 1, 0) == 11
    chained = [i for i, step in enumerate(net.lowering.prefix) if step.kind == "chain"]
    assert all(run(handle, i + 1, 1) == 11 for i in chained)
    assert chained
