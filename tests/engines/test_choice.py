"""Which engine runs a model, and that what a user asks for by name computes what the other engine computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.artifacts.records import Array, Block, LayerUpdate, Model, Run
from stages.engines import choice
from stages.engines.choice import DEVICES, ENGINES, Engine, TrainedNet, choose, make_net, threads_of
from stages.engines.native import library
from stages.engines.native.lowering import NotCovered
from stages.engines.native.net import NativeNet, available_processors
from stages.engines.parameter import Floats
from stages.errors import PartMissing, UsageError
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone, deploy
from stages.models.modules import state
from stages.models.registry import build, input_spec
from stages.operators import Op
from stages.settings import declared
from stages.settings.training import Training
from stages.sparse_training import StreamTraining, train_stream
from stages.training.adaptation import Adapting, adapt
from stages.training.updates import Source, cache_prefix, gradient_update
from tests.engines.protocol import closed, named_gradients, needs_native, net_of, on_every_engine
from tests.engines.torch.test_net import chain
from tests.rounding import check_features, longest_sum, no_worse

SMALL = {"cnn4": {"width": 8, "size": 28}, "mobilenetv2-w0.35": {"size": 32}, "squeezenet": {"size": 64}}


def squared() -> Graph:
    """A graph with an operator for which the native engine has no kernel."""
    ops = chain().ops
    return Graph((*ops, Op("square", "power", ("last",), (5,), ((5,),), args=(("exponent", 2.0),))))


# -------------------------------------------------------------------------------------------------------- the choice


def test_the_options_name_the_engines_and_devices() -> None:
    assert declared.ENGINES == ENGINES
    engine, device = (known for each, known in declared.declared(Training) if each.name in ("engine", "device"))
    assert (engine.metavar, device.metavar) == ("|".join(ENGINES), "|".join(DEVICES))
    assert (engine.choices, device.choices) == (ENGINES, ())  # a device may have a number


@needs_native
def test_the_native_engine_runs_what_it_has_kernels_for() -> None:
    assert choose("auto", chain()) == choose("native", chain()) == Engine("native")
    assert choose("torch", chain()) == Engine("torch")


def test_torch_runs_the_rest_and_says_why() -> None:
    chosen = choose("auto", squared())
    assert (chosen.name, chosen.device) == ("torch", "cpu")
    assert "operator square: kind 'power'" in chosen.note
    with pytest.raises(NotCovered, match=r"operator square: kind 'power'.*--engine torch"):
        choose("native", squared())


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(library, "HERE", tmp_path)
    library.library.cache_clear()
    yield
    library.library.cache_clear()


def test_torch_runs_everything_where_the_library_was_not_built(unbuilt: None) -> None:
    chosen = choose("auto", chain())
    assert (chosen.name, chosen.device) == ("torch", "cpu")
    assert "not built on this machine" in chosen.note
    with pytest.raises(PartMissing, match="not built on this machine"):
        choose("native", chain())


def test_without_torch_what_needs_it_says_so(unbuilt: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_torch", lambda: False)
    for wanted in ("torch", "auto"):
        with pytest.raises(PartMissing, match=r"torch is not installed.*edgetrain\[torch\]"):
            choose(wanted, chain())


@needs_native
def test_without_torch_the_native_engine_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_torch", lambda: False)
    assert choose("auto", chain()) == Engine("native")
    with pytest.raises(PartMissing, match=r"kind 'power'.*torch is not installed"):
        choose("auto", squared())


@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_a_device_that_is_not_there_is_named(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PartMissing, match="--device cuda:1: no CUDA device"):
        choose(wanted, chain(), "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose(wanted, chain(), "cuda:1") == Engine("torch", "cuda:1")


@pytest.mark.parametrize(
    ("wanted", "device", "message"),
    [
        ("tpu", "cpu", "--engine: 'tpu', expected one of auto, native, torch"),
        ("auto", "vulkan:0", "--device: 'vulkan:0', expected one of cpu, cuda"),
        ("native", "cuda", "--device: cuda with --engine native, expected --engine torch"),
    ],
)
def test_what_cannot_be_is_refused(wanted: str, device: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(wanted, chain(), device)


@needs_native
def test_threads_are_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert threads_of(Engine("torch")) == 7
    assert threads_of(Engine("native")) == available_processors() >= 1


# --------------------------------------------------------------------------------------------- what architectures say


def model(arch: str) -> Model:
    return Model(arch, SMALL[arch], input_spec(arch, SMALL[arch]), "batchnorm", state(build(arch, SMALL[arch], seed=3)))


def some_updates(base: Backbone) -> tuple[LayerUpdate, ...]:
    layers = base.graph.layers[-6::2]
    halves = [tuple(range(0, op.out_channels, 2)) for op in layers]
    return tuple(
        LayerUpdate(op.name, "output", live, op.out_channels, live if op.bias else ())
        for op, live in zip(layers, halves, strict=True)
    )


def inputs(base: Backbone, count: int) -> Floats:
    return np.random.default_rng(0).standard_normal((count, *base.graph.input_shape), dtype=np.float32)


def squares(features: torch.Tensor) -> torch.Tensor:
    return features.square().mean()


def gradients(net: TrainedNet, source: Source, micro_batch: int = 0) -> dict[str, Array]:
    gradient_update(net, source, closed(squares), micro_batch=micro_batch)
    return named_gradients(net)


@on_every_engine
@pytest.mark.parametrize("arch", SMALL)
def test_gradients_are_as_near_to_the_exact_ones_as_the_torch_engines(arch: str, engine: str) -> None:
    """Those of the whole batch, in micro-batches and from cached prefixes."""
    base = deploy(model(arch))
    updates, x = some_updates(base), inputs(base, 5)
    double = replace(base, tensors={name: value.astype(np.float64) for name, value in base.tensors.items()})
    exact = gradients(net_of(double, updates, "torch"), x.astype(np.float64))
    plain = gradients(net_of(base, updates, "torch"), x)
    net = net_of(base, updates, engine)
    cache = cache_prefix(net, x)
    whole, parts = gradients(net, x), gradients(net, x, 3)
    positions = max(int(np.prod(op.shape[1:] or (1,))) for op in base.graph.layers)
    longest = max(longest_sum(base.graph), positions * len(x))  # weight gradients add up positions and samples
    for name, truth in exact.items():
        for found in (whole, parts):
            no_worse(found[name], plain[name], truth, longest)
    for found, cached in ((whole, gradients(net, cache)), (parts, gradients(net, cache, 3))):
        assert found.keys() == cached.keys() == exact.keys()
        assert all(np.array_equal(cached[name], value) for name, value in found.items())


@on_every_engine
@pytest.mark.parametrize("arch", SMALL)
def test_features_are_as_near_to_the_exact_ones_as_those_of_stock_operators(arch: str, engine: str) -> None:
    base = deploy(model(arch), engine=engine)
    assert base.engine == Engine(engine)
    x = inputs(base, 3)
    check_features(base.features(x), base, x)
    net = make_net(base, some_updates(base))
    assert net.layout.split()[0] == engine
    check_features(net.features(x), base, x)


@on_every_engine
def test_adaptation_changes_live_values_alone_and_repeats(engine: str) -> None:
    base = deploy(model("mobilenetv2-w0.35"), engine=engine)
    updates, x, y = some_updates(base), inputs(base, 8), np.arange(8) % 2
    how = Adapting(iterations=3, learning_rates=(1e-3,))
    results = [adapt(base, updates, x, y, how, np.random.default_rng(0)).net.tensors() for _ in range(2)]
    live = {name: update for update in updates for name in (f"{update.layer}.weight", f"{update.layer}.bias")}
    for name, before in base.tensors.items():
        assert np.array_equal(results[0][name], results[1][name])
        update = live.get(name)
        still = np.setdiff1d(np.arange(len(before)), update.channels if update else ())
        assert np.array_equal(results[0][name][still], before[still])
        assert update is None or not np.array_equal(results[0][name], before)


@needs_native
def test_a_stream_trains_by_either_engine_alike() -> None:
    rng = np.random.default_rng(0)
    blocks = [Block(rng.integers(0, 256, (6, 28, 28), np.uint8), np.arange(6) % 3, "NHW", round=i) for i in range(3)]
    losses = {}
    for engine in ENGINES:
        result = train_stream(Run(model("cnn4")), iter(blocks), StreamTraining(plan="last-layer", engine=engine))
        losses[engine] = result.metrics["train-sparse"]["loss"]
    assert np.array_equal(losses["auto"], losses["native"])
    np.testing.assert_allclose(losses["native"], losses["torch"], rtol=1e-3)


@needs_native
def test_the_same_bits_are_the_native_engines():
    arch = "cnn4"
    base = deploy(model(arch), same_bits=True)
    assert base.engine == Engine("native", same_bits=True)
    x = np.random.default_rng(0).standard_normal((3, *base.graph.input_shape), dtype=np.float32)
    plain = NativeNet(base.graph, base.tensors, (), same_bits=True, width=1)
    assert np.array_equal(base.features(x), plain.features(x))
    for wrong in ({"engine": "torch"}, {"device": "cuda"}):
        with pytest.raises(UsageError, match="--same-bits"):
            deploy(model(arch), same_bits=True, **wrong)
