"""Folding BatchNorm, and records to backbones and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stages.artifacts.codec import to_tree
from stages.artifacts.hdf5 import decode, encode, encode_tree
from stages.artifacts.records import Head, InputSpec, Model, Plan, Run, Step
from stages.engines.choice import Engine, choose, make_net
from stages.engines.parameter import Floats
from stages.engines.torch.program import FROZEN_CHUNK
from stages.engines.torch.reference import run
from stages.errors import DataError, UsageError
from stages.graphs.graph import Graph
from stages.graphs.record import graph_tree
from stages.graphs.updates import whole_update
from stages.models.deploy import Backbone, deploy, open_graph, store, with_graph
from stages.models.modules import state, trainable
from stages.models.registry import build, input_spec
from stages.operators import Op
from tests.engines.protocol import on_every_engine
from tests.models.nets import Classifier, PreActivation, folded, randomise, write_module
from tests.models.test_registry import SMALL
from tests.rounding import check_features, longest_sum, no_worse


def folded_error(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Largest difference between a module and its folded graph, relative to the largest output."""
    module = module.to(dtype)
    graph, tensors = folded(module, shape)
    assert all(op.kind != "batchnorm" for op in graph.ops)
    x = torch.randn(3, *shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = module(x), run(graph, tensors, x)
    assert found.dtype == dtype
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("arch", SMALL)
def test_folding_is_exact_on_the_registry(arch: str) -> None:
    module, shape = randomise(build(arch, SMALL[arch])), input_spec(arch, SMALL[arch]).shape
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    graph, tensors = folded(module, shape)
    with torch.no_grad():
        found, plain, exact = run(graph, tensors, x), module(x), module.double()(x.double())
    no_worse(found, plain, exact, longest_sum(graph))
    assert folded_error(module, shape, torch.float64) < 1e-10


@pytest.mark.parametrize(("module", "shape"), [(PreActivation(), (3, 8, 8)), (Classifier(), (3, 16, 16))])
def test_folding_is_exact_on_user_models(module: nn.Module, shape: tuple[int, ...]) -> None:
    assert folded_error(randomise(module), shape, torch.float64) < 1e-10


class Chain(nn.Module):
    """Layers one after another, some with BatchNorm, a residual addition around each, with a branch into BatchNorm."""

    def __init__(self, kinds: list[str], channels: int, affine: bool, eps: float) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        for kind in kinds:
            norm = nn.BatchNorm2d(channels, affine=affine, eps=eps)
            plain = nn.Conv2d(channels, channels, 3, padding=1, bias="bias" in kind)
            deep = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
            parts = {"norm": [norm], "conv": [plain, norm], "bias": [plain, norm], "deep": [deep, norm, nn.ReLU()]}
            self.parts.append(nn.Sequential(*parts[kind]))
        self.stem = nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = x + part(x)
        return x.mean((2, 3))


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["norm", "conv", "bias", "deep"]), min_size=1, max_size=4),
    channels=st.integers(1, 4),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 0.5]),
    seed=st.integers(0, 100),
)
def test_folding_any_chain(kinds: list[str], channels: int, affine: bool, eps: float, seed: int) -> None:
    module = randomise(Chain(kinds, channels, affine, eps), seed)
    assert folded_error(module, (2, 5, 5), torch.float64) < 1e-10


def test_a_batchnorm_that_cannot_be_folded_becomes_a_scale_of_its_name() -> None:
    graph, tensors = folded(randomise(PreActivation()), (3, 8, 8))
    assert [op.name for op in graph.layers] == ["stem", "bn1", "conv1", "conv2"]  # bn2 is folded into conv1
    assert graph["bn1"].kind == "scale"
    assert graph["bn1"].is_depthwise
    assert tensors["bn1.weight"].shape == graph["bn1"].weight_shape == (6,)
    assert graph["conv1"].bias


def test_a_layer_that_others_read_is_not_changed() -> None:
    """The stem's output goes into bn1 and into the sum: folding bn1 into it would change the sum."""
    module = randomise(PreActivation())
    _, tensors = folded(module, (3, 8, 8))
    assert torch.equal(tensors["stem.weight"], module.stem.weight)


def test_batchnorm_on_vectors_without_a_layer_before_it_becomes_a_scale_of_features() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.late = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.conv(x).mean((2, 3)))

    late = randomise(Late())
    graph, tensors = folded(late, (3, 8, 8))
    assert [(op.name, op.kind, op.shape) for op in graph.layers] == [
        ("conv", "conv", (4, 6, 6)),
        ("late", "scale", (4,)),
    ]
    assert tensors["late.weight"].shape == (4,)
    assert folded_error(late, (3, 8, 8), torch.float64) < 1e-10


# ------------------------------------------------------------------------------------------------------------ records


def old_record(arch: str, **arch_args: Any) -> Model:
    """As schema 1 has it: tensors under the names of the module's state dict, and no graph."""
    module = randomise(build(arch, arch_args))
    return Model(arch, arch_args, input_spec(arch, arch_args), "batchnorm", state(module))


def record(arch: str, **arch_args: Any) -> Model:
    return with_graph(old_record(arch, **arch_args))


def inputs(model: Model | Backbone, count: int = 2) -> Floats:
    return np.random.default_rng(0).random((count, *model.input.shape), np.float32)


TOKENS = ("vit-tiny",)
"""Architectures that work on tokens, for which the native engine has no kernels."""


@on_every_engine
@pytest.mark.parametrize("arch", SMALL)
def test_deploy_and_store_keep_the_features(arch: str, engine: str) -> None:
    engine = "auto" if arch in TOKENS else engine
    model = record(arch, **SMALL[arch])
    x = inputs(model)
    with torch.no_grad():
        tensor = torch.from_numpy(x)
        expected, trains = randomise(build(arch, SMALL[arch]))(tensor), trainable(model)(tensor)
        exact = randomise(build(arch, SMALL[arch])).double()(tensor.double())
    first = deploy(model, engine=engine)
    for found in (trains, first.features(x)):
        no_worse(found, expected, exact, longest_sum(first.graph))
    stored = store(model, first)
    again = deploy(stored, engine=engine)
    assert stored.form == "deploy"
    assert again.graph == first.graph
    for backbone in (first, again):
        for name, value in backbone.tensors.items():
            assert (value.dtype, value.flags.c_contiguous) == (np.float32, True)
            assert np.array_equal(value, first.tensors[name])
    check_features(again.features(x), first, x)


@on_every_engine
@pytest.mark.parametrize("arch", SMALL)
def test_features_are_the_plain_interpreters(arch: str, engine: str) -> None:
    engine = "auto" if arch in TOKENS else engine
    backbone = deploy(record(arch, **SMALL[arch]), engine=engine)
    x = inputs(backbone, FROZEN_CHUNK + 3)
    check_features(backbone.features(x), backbone, x)


def test_features_refuse_another_shape() -> None:
    backbone = deploy(record("cnn4", **SMALL["cnn4"]))
    with pytest.raises(DataError, match="shape"):
        backbone.features(np.zeros((1, 1, 32, 32), np.float32))


def test_the_engine_is_the_one_that_was_asked_for() -> None:
    model, notes = record("mlp", **SMALL["mlp"]), list[str]()
    engines = [deploy(model, engine=engine, on_note=notes.append).engine for engine in ("auto", "torch")]
    assert engines == [choose("auto", deploy(model).graph), Engine("torch")]
    with pytest.raises(UsageError, match="--engine: 'tpu'"):
        deploy(model, engine="tpu")


def test_why_another_engine_computes_is_said() -> None:
    """A power has no kernel in the native engine."""
    model, notes = record("mlp", **SMALL["mlp"]), list[str]()
    graph = open_graph(model)
    last = Op(
        "square", "power", (graph.output,), graph.ops[-1].shape, (graph.ops[-1].shape,), args=(("exponent", 2.0),)
    )
    squared = replace(model, graph=graph_tree(Graph((*graph.ops, last), graph.blocks)))
    backbone = deploy(squared, on_note=notes.append)
    assert backbone.engine.name == "torch"
    assert notes == [backbone.engine.note]
    assert "operator square: kind 'power'" in notes[0]
    x = inputs(model)
    check_features(backbone.features(x), backbone, x)


def test_weights_are_float32_numbers_that_are_finite() -> None:
    model = store(record("mlp", **SMALL["mlp"]), deploy(record("mlp", **SMALL["mlp"])))
    name = "blocks.00.linear.weight"
    for other in (np.asfortranarray(model.tensors[name]), model.tensors[name].astype(np.float64)):
        found = deploy(replace(model, tensors={**model.tensors, name: other})).tensors[name]
        assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)
        assert np.array_equal(found, model.tensors[name])
    with pytest.raises(DataError, match=f"{name}: complex128, expected numbers"):
        deploy(replace(model, tensors={**model.tensors, name: model.tensors[name].astype(complex)}))


def test_deploy_does_not_share_memory_with_the_record() -> None:
    model = store(record("mlp", **SMALL["mlp"]), deploy(record("mlp", **SMALL["mlp"])))
    backbone = deploy(model)
    before = model.tensors["blocks.00.linear.weight"].copy()
    backbone.tensors["blocks.00.linear.weight"][...] = 0
    np.testing.assert_array_equal(model.tensors["blocks.00.linear.weight"], before)


@pytest.mark.parametrize("arch", SMALL)
def test_a_record_of_schema_1_is_read_as_the_same_model(arch: str) -> None:
    old = old_record(arch, **SMALL[arch])
    new = with_graph(old)
    assert old.graph is None
    assert new.graph is not None
    first = deploy(old)
    as_schema_1 = replace(store(old, first), graph=None)
    for same in (deploy(new), deploy(as_schema_1)):
        assert same.graph == first.graph
        assert same.tensors.keys() == first.tensors.keys()
        assert all(np.array_equal(value, first.tensors[name]) for name, value in same.tensors.items())
    assert with_graph(new) is new


def test_a_scale_was_a_depthwise_convolution_in_schema_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old_preactivation.py").write_text("from tests.models.nets import PreActivation as Net\n")
    monkeypatch.syspath_prepend(tmp_path)
    arch = "old_preactivation:Net"
    module = randomise(PreActivation())
    old = Model(arch, {}, InputSpec("image", (3, 8, 8)), "batchnorm", state(module))
    new = store(old, deploy(old, allow=arch))
    wide = {name: array.reshape(-1, 1, 1, 1) if name == "bn1.weight" else array for name, array in new.tensors.items()}
    again = with_graph(replace(new, graph=None, tensors=wide), allow=arch)
    assert open_graph(again) == open_graph(new)
    assert again.tensors["bn1.weight"].shape == (6,)
    x, found = inputs(again), deploy(again)
    with torch.no_grad():
        plain, exact = module(torch.from_numpy(x)), module.double()(torch.from_numpy(x).double())
    no_worse(found.features(x), plain, exact, longest_sum(found.graph))


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize("form", ["batchnorm", "deploy"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("stem.weight"), r"stem.weight: missing, expected shape \(16, 3, 3, 3\)"),
        (lambda tensors: tensors.update({"stem.weight": np.zeros((16, 1, 3, 3), np.float32)}), r"stem.weight: shape"),
        (lambda tensors: tensors.update({"tail.weight": np.zeros(3, np.float32)}), "tail.weight: not a tensor"),
        (lambda tensors: tensors["stem.weight"].fill(np.nan), "stem.* not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(schema: int, form: str, change: Any, message: str) -> None:
    model = record("mcunet-5fps", size=32) if schema == 2 else old_record("mcunet-5fps", size=32)
    model = store(model, deploy(model)) if form == "deploy" else model
    model = replace(model, graph=None) if schema == 1 else model
    tensors = {name: value.copy() for name, value in model.tensors.items()}
    change(tensors)
    with pytest.raises(DataError, match=message):
        deploy(replace(model, tensors=tensors))


def test_what_trains_is_in_the_records_own_form() -> None:
    model = record("cnn4", **SMALL["cnn4"])
    deployed = store(model, deploy(model))
    x = inputs(model)
    for one, statistics in ((model, 8), (deployed, 0)):
        net = trainable(one)
        assert not net.training
        assert len(list(net.buffers())) == statistics  # mean and variance of four BatchNorms
        assert len(list(net.parameters())) == len(one.tensors) - statistics
        state = {name: value.numpy() for name, value in net.state_dict().items()}
        assert {name: array.tolist() for name, array in net.arrays(state).items()} == {
            name: array.tolist() for name, array in one.tensors.items()
        }
        with torch.no_grad():
            check_features(net(torch.from_numpy(x)), deploy(one), x)


def test_in_training_batchnorm_takes_the_batchs_statistics_and_collects_them() -> None:
    model, module = record("cnn4", **SMALL["cnn4"]), randomise(build("cnn4", SMALL["cnn4"]))
    net, x = trainable(model).train(), torch.rand(5, *model.input.shape)
    torch.testing.assert_close(net(x), module.train()(x), rtol=1e-5, atol=1e-6)
    collected = net.arrays({name: value.numpy() for name, value in net.state_dict().items()})
    for name, value in state(module).items():
        np.testing.assert_allclose(collected[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_users_classifier_is_cut_when_its_tensors_are_absent_from_schema_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arch = "user_models:classifier"
    tensors = state(build(arch, {}, allow=arch))
    spec = InputSpec("image", (3, 16, 16))
    whole = Model(arch, {}, spec, "batchnorm", tensors)
    cut = replace(whole, tensors={name: value for name, value in tensors.items() if not name.startswith("fc.")})
    x = inputs(whole)

    def layers(backbone: Backbone) -> list[str]:
        return [op.name for op in backbone.graph.layers]

    assert layers(deploy(whole, allow=arch))[-1] == "fc"
    assert deploy(whole, allow=arch).features(x).shape == (2, 5)
    assert layers(deploy(cut, allow=arch))[-1] == "point"
    assert deploy(cut, allow=arch).features(x).shape == (2, 16)
    assert trainable(cut, allow=arch)(torch.from_numpy(x)).shape == (2, 16)
    stored, features = store(cut, deploy(cut, allow=arch)), deploy(cut, allow=arch).features(x)
    with pytest.raises(UsageError, match="repeat --arch"):
        deploy(cut)
    monkeypatch.setattr("stages.models.registry.build", None)  # the record carries its graph: no code is needed now
    assert np.array_equal(deploy(stored).features(x), features)


class Twice(nn.Module):
    """A convolution under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x).mean((2, 3))


def twice() -> nn.Module:
    return Twice()


def test_every_name_of_one_tensor_is_exported_with_what_was_trained() -> None:
    from stages.importing import Importing, import_model
    from stages.models.state import user_state

    spec = InputSpec("image", (3, 8, 8), (1.0,), (0.0,))
    model = import_model(Importing(arch="tests.models.test_deploy:twice", input=spec)).model
    key = next(name for name in model.tensors if name.endswith(".weight"))
    trained = {**model.tensors, key: model.tensors[key] + 1}
    state = user_state(model, trained)
    assert state.keys() == Twice().state_dict().keys()
    np.testing.assert_array_equal(state["first.weight"], trained[key])
    np.testing.assert_array_equal(state["again.weight"], trained[key])


def test_a_file_of_schema_1_goes_on_with_its_head_plan_and_history() -> None:
    """As version 1 wrote it: tensors under the deploy form's names, and neither graph nor state."""
    model = record("cnn4", **SMALL["cnn4"])
    model = store(model, deploy(model))
    backbone = deploy(model)
    layers = [whole_update(op) for op in backbone.graph.layers]
    width = backbone.graph.feature_dim
    head = Head("linear", np.arange(2), np.ones((2, width), np.float32), np.zeros(2, np.float32), np.ones(2, bool))
    plan = Plan("full", tuple(layers), 10, "paper", 10)
    run = Run(replace(model, head=head), plan=plan, history=(Step("import", "0.1", {}, 0, {}),))
    tree = to_tree(run)
    groups = {
        name: group for name, group in tree.groups["model"].groups.items() if name in ("input", "tensors", "head")
    }
    assert tree.groups["model"].groups.keys() - groups.keys() == {"graph", "state", "rest"}
    old_model = replace(tree.groups["model"], groups=groups)
    old = replace(tree, attrs={**tree.attrs, "schema": 1}, groups={**tree.groups, "model": old_model})
    read = decode(encode_tree(old))
    assert isinstance(read, Run)
    assert read.model.graph is None
    assert (read.plan, read.history) == (run.plan, run.history)
    again = with_graph(read.model)
    assert open_graph(again) == open_graph(model)
    net = make_net(deploy(read.model), read.plan.updates)
    x = inputs(model)
    assert np.array_equal(net.features(x), make_net(backbone, layers).features(x))
    written = decode(encode(replace(read, model=again)))
    assert isinstance(written, Run)
    assert written.model.state == model.state
