"""Engines behind one protocol: what one computes, the other computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.artifacts.records import Block, LayerUpdate, Model, Run
from stages.engines.choice import ENGINES, make_net
from stages.engines.native.library import is_built
from stages.errors import UsageError
from stages.models.deploy import Backbone, deploy, state
from stages.models.registry import build, input_spec
from stages.planning.baselines import named_plan
from stages.settings import training as settings
from stages.sparse_training import StreamTraining, train_stream
from stages.training.adaptation import Adapting, adapt
from stages.training.updates import cache_prefix, gradient_update
from tests.rounding import check_features, longest_sum, no_worse

needs_native = pytest.mark.skipif(not is_built(), reason="the native library is not built: no C compiler")
SMALL = {"cnn4": {"width": 8, "size": 28}, "mobilenetv2-w0.35": {"size": 32}, "squeezenet": {"size": 64}}


def test_the_option_names_the_engines():
    assert settings.ENGINES == ENGINES


def backbone(arch: str) -> Backbone:
    spec = input_spec(arch, SMALL[arch])
    return deploy(Model(arch, SMALL[arch], spec, "batchnorm", state(build(arch, SMALL[arch], seed=3))))


def some_updates(base: Backbone) -> tuple[LayerUpdate, ...]:
    layers = base.graph.layers[-6::2]
    halves = [tuple(range(0, op.out_channels, 2)) for op in layers]
    return tuple(
        LayerUpdate(op.name, "output", live, op.out_channels, live if op.bias else ())
        for op, live in zip(layers, halves, strict=True)
    )


def inputs(base: Backbone, count: int) -> torch.Tensor:
    return torch.randn(count, *base.graph.input_shape, generator=torch.Generator().manual_seed(0))


def gradients(net, x: torch.Tensor, micro_batch: int = 0) -> list[torch.Tensor]:
    for parameter in net.parameters():
        parameter.grad = None
    gradient_update(net, x, lambda features: features.square().mean(), micro_batch=micro_batch)
    return [parameter.grad.clone() for parameter in net.parameters()]


def in_double(base: Backbone) -> Backbone:
    return Backbone(base.graph, {name: tensor.double() for name, tensor in base.tensors.items()}, base.input)


@needs_native
@pytest.mark.parametrize("arch", SMALL)
def test_gradients_are_as_near_to_the_exact_ones_as_the_torch_engines(arch):
    base, updates = backbone(arch), some_updates(backbone(arch))
    x = inputs(base, 5)
    exact = gradients(make_net(in_double(base), updates), x.double())
    torch_engine, native = (gradients(make_net(base, updates, engine), x) for engine in ENGINES)
    positions = max(int(np.prod(op.shape[1:] or (1,))) for op in base.graph.layers)
    longest = max(longest_sum(base.graph), positions * len(x))  # weight gradients add up positions and samples
    for mine, theirs, truth in zip(native, torch_engine, exact, strict=True):
        assert mine.shape == theirs.shape
        no_worse(mine, theirs, truth, longest)


@needs_native
def test_micro_batches_and_cached_prefixes_give_the_same_update():
    base = backbone("mobilenetv2-w0.35")
    net = make_net(base, some_updates(base), "native")
    x = inputs(base, 7)
    whole = gradients(net, x)
    cached = gradients(net, cache_prefix(net, x))
    assert all(map(torch.equal, whole, cached))
    for part, found in zip(whole, gradients(net, x, micro_batch=3), strict=True):
        scale = float(part.abs().max())
        assert float((part - found).abs().max()) <= 8 * len(x) * torch.finfo(torch.float32).eps * scale


@needs_native
def test_only_the_last_forward_pass_can_go_back():
    base = backbone("cnn4")
    net = make_net(base, some_updates(base), "native")
    first = net.suffix(net.prefix(inputs(base, 2)))
    net.suffix(net.prefix(inputs(base, 3)))
    with pytest.raises(RuntimeError, match="another one came since"):
        first.sum().backward()


@needs_native
def test_adaptation_changes_live_values_alone_and_repeats():
    base = backbone("mobilenetv2-w0.35")
    updates = some_updates(base)
    x, y = inputs(base, 8), torch.arange(8) % 2
    how = Adapting(iterations=3, learning_rates=(1e-3,), engine="native")
    results = [adapt(base, updates, x, y, how, np.random.default_rng(0)).net.tensors() for _ in range(2)]
    live = {name: update for update in updates for name in (f"{update.layer}.weight", f"{update.layer}.bias")}
    for name, before in base.tensors.items():
        assert torch.equal(results[0][name], results[1][name])
        update = live.get(name)
        frozen = np.setdiff1d(np.arange(len(before)), update.channels if update else ())
        assert torch.equal(results[0][name][frozen], before[frozen])
        assert update is None or not torch.equal(results[0][name], before)


@needs_native
def test_a_stream_trains_by_the_native_engine():
    arch = "cnn4"
    base = backbone(arch)
    spec = input_spec(arch, SMALL[arch])
    run = Run(Model(arch, SMALL[arch], spec, "batchnorm", state(build(arch, SMALL[arch], seed=3))))
    rng = np.random.default_rng(0)
    blocks = [Block(rng.integers(0, 256, (6, 28, 28), np.uint8), np.arange(6) % 3, "NHW", round=i) for i in range(3)]
    found = {}
    for engine in ENGINES:
        result = train_stream(run, iter(blocks), StreamTraining(plan="last-layer", engine=engine))
        found[engine] = result.metrics["train-sparse"]["loss"]
    assert named_plan("last-layer", base.graph)
    np.testing.assert_allclose(found["native"], found["torch"], rtol=1e-3)


def test_unknown_engines_are_named():
    with pytest.raises(UsageError, match="one of torch, native"):
        make_net(backbone("cnn4"), (), "tpu")


@needs_native
@pytest.mark.parametrize("arch", SMALL)
def test_features_are_as_near_to_the_exact_ones_as_the_torch_engines(arch):
    base = backbone(arch)
    x = inputs(base, 3)
    check_features(replace(base, engine="native").features(x), base, x)
