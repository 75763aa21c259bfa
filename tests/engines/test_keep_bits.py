"""Inputs of live layers in 8 and 16 bits: what is kept by hand, unbiased gradients, the same draws again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import InputSpec, LayerUpdate
from stages.cost.training import saved_activation_bytes
from stages.engines.choice import Engine, TrainedNet, make_net
from stages.engines.native.memory import memory_of
from stages.engines.native.net import NativeNet
from stages.engines.parameter import Floats
from stages.engines.torch.net import SparseNet
from stages.errors import UsageError
from stages.graphs.graph import Graph
from stages.graphs.keeping import held_bytes, holding, stored_bytes
from stages.models.deploy import Backbone
from stages.operators import Op
from stages.planning.budget import Budget
from stages.settings.training import Training
from stages.sparse_training import Checkpointing, StreamTraining, train_stream
from stages.training.optimizers import Optimizing
from tests.engines.protocol import named_gradients, net_of, on_every_engine
from tests.engines.random_graphs import cases, random_backbone, random_input
from tests.engines.torch.test_net import kept_bytes
from tests.test_sparse_training import new_run, stream

FEW = settings(max_examples=25, deadline=None, derandomize=True)
X: Floats = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
PULL: Floats = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
WHOLE = (LayerUpdate("l", "output", tuple(range(4)), 4),)


def linear(engine: str, bits: int, rounding: str) -> Backbone:
    op = Op("l", "linear", ("input",), (4,), ((10,),), bias=True)
    tensors = {"l.weight": np.zeros((4, 10), np.float32), "l.bias": np.zeros(4, np.float32)}
    kept = Engine(engine, keep_bits=bits, keep_rounding=rounding)
    return Backbone(Graph((Op("input", "input", (), (10,)), op)), tensors, InputSpec("features", (10,)), kept)


def gradient(net: TrainedNet, x: Floats = X, pull: Floats = PULL) -> Floats:
    _, kept = net.forward(net.prefix(x))
    net.backward(kept, pull)
    return named_gradients(net)["l.weight"]


def by_hand(x: Floats, bits: int) -> np.ndarray:
    """Each sample's values, as whole numbers of steps between its least and largest, to the nearest."""
    low, high = x.min(1, keepdims=True).astype(np.float64), x.max(1, keepdims=True).astype(np.float64)
    step = (high - low) / (2**bits - 1)
    return low + step * np.floor((x - low) / step + 0.5)


@on_every_engine
@pytest.mark.parametrize("bits", [8, 16])
def test_to_the_nearest_by_hand(engine: str, bits: int) -> None:
    found = gradient(make_net(linear(engine, bits, "nearest"), WHOLE))
    exact = PULL.astype(np.float64).T @ by_hand(X, bits)
    unit = 2.0**-24 * len(X) * 8 * (np.abs(PULL).T @ np.abs(X)) + 2.0**-22 * np.abs(PULL).sum(0)[:, None] * np.ptp(X)
    assert (np.abs(found - exact) <= unit).all()
    if bits == 8:
        assert (np.abs(found - PULL.T @ X) > unit).any()  # it is not the float's


@on_every_engine
def test_by_chance_the_mean_is_the_gradient_and_to_the_nearest_it_is_not(engine: str) -> None:
    """E[g^T Q(x)] = g^T x: the mean of 400 draws within 5 of its own standard errors, every element."""
    net, draws = make_net(linear(engine, 8, "stochastic"), WHOLE), []
    for seed in range(400):
        net.draw(seed)
        draws.append(gradient(net).astype(np.float64))
    exact = PULL.astype(np.float64).T @ X
    mean, error = np.mean(draws, 0), np.std(draws, 0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(mean - exact) <= 5 * error + 1e-6).all()
    nearest = gradient(make_net(linear(engine, 8, "nearest"), WHOLE))
    assert (np.abs(nearest - exact) > 5 * error + 1e-6).any()


@on_every_engine
def test_values_that_are_all_the_same_are_kept_exactly(engine: str) -> None:
    x = np.repeat(np.linspace(-3, 5, 6, dtype=np.float32)[:, None], 10, 1)
    net = make_net(linear(engine, 8, "stochastic"), WHOLE)
    assert np.allclose(gradient(net, x), PULL.T @ x, rtol=1e-6, atol=1e-5)


@on_every_engine
def test_a_seed_gives_its_draws_again_and_calls_after_it_their_own(engine: str) -> None:
    net = make_net(linear(engine, 8, "stochastic"), WHOLE)
    net.draw(7)
    first, second = gradient(net), gradient(net)
    net.draw(7)
    assert np.array_equal(gradient(net), first)
    assert np.array_equal(gradient(net), second)
    assert not np.array_equal(first, second)
    net.draw(8)
    assert not np.array_equal(gradient(net), first)


def test_draws_do_not_depend_on_the_number_of_threads() -> None:
    backbone = linear("native", 8, "stochastic")
    x, pull = np.tile(X, (5, 1)), np.tile(PULL, (5, 1))
    nets = [NativeNet(backbone.graph, backbone.tensors, WHOLE, keep_bits=8, threads=count) for count in (1, 3)]
    found = [gradient(net, x, pull) for net in nets]
    assert np.array_equal(found[0], found[1])


@on_every_engine
@FEW
@given(cases(), st.sampled_from([16, 8]))
def test_features_do_not_change_and_gradients_hardly(engine: str, case, bits: int) -> None:  # type: ignore[no-untyped-def]
    graph, updates, batch, seed = case
    backbone, x = random_backbone(graph, seed, torch.float32), random_input(graph, batch, seed, torch.float32).numpy()
    plain, narrow = (
        net_of(backbone, updates, engine),
        make_net(replace(backbone, engine=Engine(engine, keep_bits=bits)), updates),
    )
    pull = np.cos(np.arange(batch * graph.feature_dim, dtype=np.float32)).reshape(batch, -1)
    features = []
    for net in (plain, narrow):
        found, kept = net.forward(net.prefix(x))
        net.backward(kept, pull)
        features.append(found)
    assert np.array_equal(*features)
    exact, found = named_gradients(plain), named_gradients(narrow)
    for name, value in exact.items():
        size = np.linalg.norm(value)
        # each kept value is off by less than a step, the 255th (or 65535th) part of its sample's range
        assert np.linalg.norm(found[name] - value) <= 20 / (2**bits - 1) * max(size, worst(exact)), name


def worst(gradients) -> float:  # type: ignore[no-untyped-def]
    return float(max(np.abs(value).max(initial=0) for value in gradients.values())) * 10 + 1


@FEW
@given(cases(), st.sampled_from([32, 16, 8]))
def test_kept_bytes_are_predicted_to_the_byte(case, bits: int) -> None:  # type: ignore[no-untyped-def]
    graph, updates, batch, seed = case
    backbone, x = random_backbone(graph, seed, torch.float32), random_input(graph, batch, seed, torch.float32)
    net = SparseNet(replace(backbone, engine=Engine("torch", keep_bits=bits)), updates)
    assert kept_bytes(net, x) == saved_activation_bytes(graph, updates, batch, bits)
    native = make_net(replace(backbone, engine=Engine("native", keep_bits=bits)), updates)
    assert isinstance(native, NativeNet)
    assert native.sizes.kept_bytes == memory_of(graph, updates, bits).kept


def test_bytes_by_hand() -> None:
    assert [stored_bytes(10, 3, bits) for bits in (32, 16, 8)] == [120, 3 * 28, 3 * 18]
    graph = linear("native", 8, "nearest").graph
    held = holding(graph, WHOLE)
    assert held.narrow == {"input"}
    assert held_bytes(graph, held, 2, 8) == 2 * (10 + 8)


def test_what_an_activation_needs_too_stays_as_it_is() -> None:
    """A SiLU's input is kept for its slope, whatever a live layer that reads it as well would take."""
    ops = (
        Op("input", "input", (), (4,)),
        Op("a", "linear", ("input",), (4,), ((4,),), bias=True),
        Op("act", "silu", ("a",), (4,), ((4,),)),
        Op("b", "linear", ("a",), (4,), ((4,),), bias=True),
        Op("sum", "add", ("act", "b"), (4,), ((4,), (4,))),
    )
    updates = tuple(LayerUpdate(name, "output", (0, 1), 4) for name in ("a", "b"))
    held = holding(Graph(ops), updates)
    assert held.values == {"input", "a"}
    assert held.narrow == {"input"}


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_stream_that_was_stopped_draws_as_if_it_had_not(engine: str) -> None:
    config = StreamTraining(engine=engine, keep_bits=8, optimizing=Optimizing(learning_rate=0.05))
    blocks, saved = stream(6), []
    straight = train_stream(new_run(), blocks, config)
    train_stream(new_run(), blocks[:4], config, checkpoint=Checkpointing(write=saved.append, every=4))
    assert encode(train_stream(new_run(), blocks, config, resume=saved[-1])) == encode(straight)
    plain = train_stream(new_run(), blocks, replace(config, keep_bits=32))
    name = "blocks.03.conv.weight"
    assert not np.array_equal(straight.model.tensors[name], plain.model.tensors[name])


def test_the_plan_says_in_how_many_bits() -> None:
    start = new_run()
    assert start.plan is not None
    told = replace(start, plan=replace(start.plan, facts={"keep_bits": 8}))
    config = StreamTraining(engine="native", optimizing=Optimizing(learning_rate=0.05))
    by_plan = train_stream(told, stream(3), config)
    asked = train_stream(start, stream(3), replace(config, keep_bits=8))
    assert all(np.array_equal(value, asked.model.tensors[name]) for name, value in by_plan.model.tensors.items())


def test_other_widths_are_refused() -> None:
    with pytest.raises(UsageError, match="32, 16 or 8"):
        Budget(keep_bits=4)
    with pytest.raises(UsageError, match="32, 16 or 8"):
        Training(keep_bits=4)
