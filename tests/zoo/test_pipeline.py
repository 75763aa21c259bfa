"""Every specimen through the whole product: import, deploy, profile, plan, train, and out again as .pth and .onnx.

Each step is compared with the user's own module in torch. What one import gives serves all tests of a specimen.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Block, Head, InputSpec, LayerUpdate, Plan, Run
from stages.engines.choice import make_net
from stages.engines.parameter import Floats
from stages.engines.torch import reference
from stages.engines.torch.net import SparseNet
from stages.errors import UsageError
from stages.exporting import export, state_dict
from stages.importing import Importing, Weights, import_model
from stages.models.deploy import Backbone, deploy, store
from stages.models.modules import state
from stages.profiling import Profiling, profile_run
from stages.scoring import Scoring, score_layers
from stages.training.optimizers import Optimizing, checked_step, make_optimizer
from stages.training.updates import gradient_update
from tests.engines.protocol import closed, live_entries
from tests.rounding import as_tensors
from tests.zoo import ZOO, Specimen, result, selection
from tests.zoo.specimen import tensors

SPECIMENS = selection(refused=False)
LAYOUTS = {"image": "NCHW", "signal": "NCT", "features": "ND"}

every = pytest.mark.parametrize("specimen", SPECIMENS)


def made(name: str) -> nn.Module:
    """The factory that the product is told: a module with other weights than the ones that it is given."""
    return ZOO[name].build(seed=1)


ARCH = f"{__name__}:made"


def settings(specimen: Specimen) -> Importing:
    kind = {3: "image", 2: "signal", 1: "features"}[len(specimen.input_shape)]
    return Importing(
        arch=ARCH,
        arch_args={"name": specimen.name},
        input=InputSpec(kind, specimen.input_shape),
        result=0 if len(tensors(specimen.build()(specimen.example()))) > 1 else None,
    )


@cache
def imported(name: str) -> tuple[Run, nn.Module]:
    """The run record of a specimen, and the module whose weights it was given."""
    specimen = ZOO[name]
    module = made(name)  # what the state dict leaves out is the factory's
    module.load_state_dict(specimen.build().state_dict())
    run = import_model(settings(specimen), Weights(state(module), ordered=True))
    record = decode(encode(profile_run(run, Profiling(measure=False))))
    assert isinstance(record, Run)
    return record, module


ENDS = (lambda y: y, lambda y: F.softmax(y, 1), lambda y: F.log_softmax(y, 1))
"""What may stand behind a classifier's last layer."""


def backbone_of(run: Run, engine: str = "auto") -> Backbone:
    return deploy(run.model, engine=engine)


@torch.no_grad()
def penultimate(module: nn.Module, x: Tensor, cut: bool) -> Tensor:
    """What the module's last linear layer reads, or without `cut` what it gives; else the module's answer: (N, D)."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        part.register_forward_hook(lambda part, inputs, output: seen.append((inputs[0], output)))
        for part in module.modules()
        if isinstance(part, nn.Linear) and "weight" in part._parameters  # no parametrisation, which is no layer's own
    ]
    answer = result(module(x))
    for hook in hooks:
        hook.remove()
    for inputs, output in reversed(seen):
        output = output.flatten(1)
        if output.shape == answer.shape and any(torch.equal(how(output), answer) for how in ENDS):
            return inputs.flatten(1) if cut else output
    return answer if answer.ndim == 2 else answer.flatten(2).mean(2)


def is_cut(run: Run) -> bool:
    """Whether the record's head stands for the module's classifier."""
    return any("classifier" in row for row in run.model.state)


def within(found: Floats, module: nn.Module, specimen: Specimen, x: Tensor, *, cut: bool) -> None:
    """Assert that features err no more against float64 than a few times what the module's own float32 does."""
    double = made(specimen.name).double()
    double.load_state_dict(module.state_dict())
    exact, single = penultimate(double, x.double(), cut), penultimate(module, x, cut)
    size = float(exact.abs().max())
    bound = 16 * float((single - exact).abs().max()) + 64 * torch.finfo(torch.float32).eps * size
    assert found.shape == exact.shape
    error = float((torch.from_numpy(found) - exact).abs().max())
    assert error <= bound, f"error {error:.3g} of {size:.3g}, at most {bound:.3g}"


def samples(specimen: Specimen, count: int = 8) -> Block:
    """A support set of two classes."""
    kind = settings(specimen).input.kind
    return Block(specimen.example(count, seed=3).numpy(), np.arange(count) % 2, LAYOUTS[kind])


@cache
def planned(name: str, criterion: str = "score") -> Run:
    specimen = ZOO[name]
    run, _ = imported(name)
    config = Scoring(memory="256KiB", macs="40%", criterion=criterion, head="linear", train_bias=True)
    return score_layers(run, samples(specimen), config, rng=np.random.default_rng(0))


# ---------------------------------------------------------------------------------------------------------------- tests


@every
def test_deployed_features_are_the_modules(specimen: Specimen) -> None:
    run, module = imported(specimen.name)
    x = specimen.example(3, seed=7)
    for engine in sorted({backbone_of(run).engine.name, "torch"}):
        within(backbone_of(run, engine).features(x.numpy()), module, specimen, x, cut=is_cut(run))


@every
def test_the_profile_counts_every_layer(specimen: Specimen) -> None:
    run, _ = imported(specimen.name)
    graph = backbone_of(run).graph
    assert run.profile is not None
    assert run.profile.layer == tuple(op.name for op in graph.layers)
    tables = np.array([op.kind == "embedding" for op in deploy(run.model).graph.layers])  # which multiply nothing
    assert ((run.profile.columns["macs"] > 0) != tables).all()
    assert run.profile.totals["macs"] >= run.profile.columns["macs"].sum()


@every
@pytest.mark.parametrize("criterion", ["score", "l2"])
def test_a_plan_keeps_to_its_budget(specimen: Specimen, criterion: str) -> None:
    plan = planned(specimen.name, criterion).plan
    assert plan is not None
    assert plan.updates
    assert plan.memory_bytes <= 2**18
    assert plan.backward_macs <= 0.4 * plan.facts["full_backward_macs"]


def spread(backbone: Backbone) -> tuple[LayerUpdate, ...]:
    """Some channels of the first, a middle and the last layers, along both axes, with biases."""
    layers = backbone.graph.layers
    chosen = sorted({0, len(layers) // 3, len(layers) // 2, len(layers) - 1})
    heard = [i for i in chosen if backbone.graph.gradient_flow({layers[i].name})]
    updates = []
    for number, i in enumerate(heard):
        op = layers[i]
        axis = "input" if number % 2 and not op.operator.by_output else "output"
        count = op.in_channels if axis == "input" else op.out_channels
        live = tuple(range(0, count, 2))
        updates.append(LayerUpdate(op.name, axis, live, count, tuple(range(0, op.out_channels, 3)) if op.bias else ()))
    return tuple(updates)


@every
def test_gradients_are_autograds(specimen: Specimen) -> None:
    """In float64, at the first layers and the last, through every operator between them."""
    from tests.engines.torch.test_net import expected_gradients

    run, _ = imported(specimen.name)
    single = backbone_of(run)
    backbone = replace(single, tensors={name: value.astype(np.float64) for name, value in single.tensors.items()})
    updates, x = spread(backbone), specimen.example(2, seed=5, dtype=torch.float64)
    leaves = {name: value.clone().requires_grad_() for name, value in as_tensors(backbone.tensors).items()}
    loss(reference.run(backbone.graph, leaves, x)).backward()
    dense = {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in leaves.items()}
    net = SparseNet(backbone, updates)
    loss(net.suffix(net.prefix(x))).backward()
    for parameter, value in zip(net.parameters(), expected_gradients(net, backbone, dense, updates), strict=True):
        assert parameter.grad is not None
        size = float(value.abs().max())  # torch's hardsigmoid takes 1 / 6 in float32, whatever it is given
        torch.testing.assert_close(parameter.grad, value, rtol=1e-5, atol=1e-6 * size + 1e-12)


def loss(features: Tensor) -> Tensor:
    return (features * torch.linspace(-1, 2, features.numel(), dtype=features.dtype).reshape(features.shape)).sum()


def trained(run: Run, specimen: Specimen) -> tuple[Backbone, tuple[LayerUpdate, ...], dict[str, Floats]]:
    """The backbone, a plan's updates, and the tensors after three updates of Adam with weight decay, by the engine
    that users get."""
    backbone, plan = backbone_of(run), run.plan
    assert isinstance(plan, Plan)
    net = make_net(backbone, plan.updates)
    optimizer = make_optimizer(net.parameters(), Optimizing(optimizer="adamw", weight_decay=0.1))
    for step in range(3):
        value = gradient_update(net, specimen.example(4, seed=step).numpy(), closed(loss))
        checked_step(optimizer, value, rate=1e-3, clip_norm=0.0, where=specimen.name)
    return backbone, plan.updates, net.tensors()


@every
def test_only_live_values_move(specimen: Specimen) -> None:
    backbone, updates, after = trained(planned(specimen.name), specimen)
    allowed = live_entries(backbone.graph, [update for update in updates if update.trains], backbone.tensors)
    moved = 0
    for name, before in backbone.tensors.items():
        assert np.array_equal(after[name][~allowed[name]], before[~allowed[name]]), name
        assert np.isfinite(after[name]).all() or name.endswith(".value")
        moved += int((after[name] != before)[allowed[name]].sum())
    assert moved > 0


def with_head(run: Run, classes: int = 5) -> Run:
    """The run with a random linear head."""
    rng = np.random.default_rng(0)
    width = deploy(run.model).graph.feature_dim
    weight, bias = (rng.normal(size=size).astype(np.float32) for size in ((classes, width), (classes,)))
    return replace(
        run, model=replace(run.model, head=Head("linear", np.arange(classes), weight, bias, np.ones(classes, bool)))
    )


@dataclass(frozen=True)
class Trained:
    run: Run
    features: Floats
    x: Tensor


@cache
def trained_run(name: str) -> Trained:
    specimen = ZOO[name]
    run = planned(name)
    backbone, _, after = trained(run, specimen)
    changed = replace(backbone, tensors=after)
    run = replace(run, model=store(run.model, changed))
    x = specimen.example(3, seed=11)
    rows = next((len(run.model.rest[row["name"]]) for row in run.model.state if "classifier" in row), 5)
    return Trained(with_head(run, rows), deploy(run.model).features(x.numpy()), x)


UNWRITABLE = {
    **dict.fromkeys(("spectral", "pruned", "bit-resnet", "sincnet"), "parametri"),
    "tied-autoencoder": "weight: .*in one",
}
"""Specimens whose state dict cannot hold what was trained: computed weights, or one trained in one of its two uses."""


@every
def test_the_state_dict_loads_into_a_fresh_module(specimen: Specimen) -> None:
    one = trained_run(specimen.name)
    if specimen.name in UNWRITABLE:
        with pytest.raises(UsageError, match=UNWRITABLE[specimen.name]):
            state_dict(one.run.model)
        return
    whole = is_cut(one.run)
    exported = export(one.run.model, "pth", head=whole)
    fresh = made(specimen.name)
    fresh.load_state_dict(torch.load(io.BytesIO(exported.data), weights_only=True), strict=True)
    within(one.features, fresh, specimen, one.x, cut=whole)
    if whole:
        head = one.run.model.head
        assert head is not None
        logits = F.linear(penultimate(fresh, one.x, True), torch.tensor(head.weight), torch.tensor(head.bias))
        with torch.no_grad():
            answer = result(fresh(one.x))
        assert any(torch.allclose(how(logits), answer, rtol=1e-4, atol=1e-4) for how in ENDS)


@every
def test_onnxruntime_computes_the_same(specimen: Specimen) -> None:
    one = trained_run(specimen.name)
    exported = export(one.run.model, "onnx")
    session = onnxruntime.InferenceSession(exported.data, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = one.x[:batch]
        (found,) = session.run(["features"], {"input": x.numpy()})
        size = float(np.abs(one.features).max())
        assert float(np.abs(found - one.features[:batch]).max()) <= 2e-4 * size
