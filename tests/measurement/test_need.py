"""What is foreseen beside what the engines allocate and the accounting says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stages.cost.model import inference_peak_bytes
from stages.cost.training import memory_bytes, saved_activation_bytes
from stages.engines.choice import Engine, fisher_bytes, threads_of
from stages.engines.native import library
from stages.graphs.updates import every_layer
from stages.measurement.need import FIRST_PASS_BYTES, PEAKS, to_infer, to_inspect, to_train
from tests.native.test_net import allocated, native, small

needs_native = pytest.mark.skipif(not library.is_built(), reason="the native library is not built: make setup")


@pytest.fixture(scope="module")
def backbone():
    return replace(small("mobilenetv2-w0.35"), engine=Engine("native"))


@pytest.fixture(scope="module")
def updates(backbone):
    return every_layer(backbone.graph)[-5:]


def input_bytes(backbone) -> int:
    return 4 * int(np.prod(backbone.graph.input_shape))


@needs_native
@pytest.mark.parametrize("batch", [2, 7])
def test_training_takes_what_the_native_engine_allocates(backbone, updates, batch):
    need = to_train(backbone, updates, 2)
    x = np.zeros((batch, *backbone.graph.input_shape), np.float32)
    net = native(backbone, updates, threads=threads_of(backbone.engine))
    state = 2 * net.live.nbytes
    assert need.fixed + batch * need.sample == allocated(net, x) + net.image.nbytes + state + x.nbytes


@needs_native
def test_training_is_the_arena_model_with_the_frozen_weights_and_the_inputs(backbone, updates):
    workers = threads_of(backbone.engine)
    arena = memory_bytes(backbone.graph, updates, model="arena", batch=3, optimizer="adam", workers=workers)
    need, image = to_train(backbone, updates, 2), native(backbone, updates).image.nbytes
    assert need.fixed + 3 * need.sample == arena + image + 3 * input_bytes(backbone)


@needs_native
def test_features_take_an_arena_for_each_worker(backbone):
    need = to_infer(backbone)
    net = native(backbone, ())
    assert need.sample == input_bytes(backbone) + 4 * backbone.graph.feature_dim
    assert need.fixed == net.image.nbytes + sum(worker.arena.nbytes for worker in net._workers)


@needs_native
def test_a_fisher_pass_takes_what_it_says(backbone):
    window = [op.name for op in backbone.graph.layers[-4:]]
    need, workers = to_inspect(backbone, window), threads_of(backbone.engine)
    image = native(backbone, ()).image.nbytes
    for batch in (workers, workers + 5):
        held = fisher_bytes(backbone.engine, backbone.graph, window, batch)
        assert need.fixed + batch * need.sample == held + image + batch * input_bytes(backbone)


def test_torch_takes_what_the_accounting_says_and_what_its_allocator_does(backbone, updates):
    in_torch = replace(backbone, engine=Engine("torch"))
    peaks = int(PEAKS * inference_peak_bytes(backbone.graph))
    assert to_infer(in_torch).sample == peaks
    assert to_train(in_torch, updates, 2).sample == peaks + saved_activation_bytes(backbone.graph, updates)
    window = [op.name for op in backbone.graph.layers[-4:]]
    assert to_inspect(in_torch, window).sample == peaks + fisher_bytes(in_torch.engine, backbone.graph, window, 1)
    assert to_infer(in_torch).fixed == to_inspect(in_torch, window).fixed == FIRST_PASS_BYTES
