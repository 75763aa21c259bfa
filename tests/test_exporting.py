"""`export`: other tools get a model that computes what ours computes."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import nn

from stages.artifacts.records import Head, InputSpec, Model
from stages.errors import DataError, UsageError
from stages.exporting import Exported, _compare, export, format_of
from stages.importing import Importing, Weights, import_model, input_from_text
from stages.models import registry
from stages.models.deploy import deploy, store, with_graph
from stages.models.heads import logits
from stages.models.modules import state
from tests.models.nets import Classifier, PreActivation, randomise, write_module
from tests.models.test_registry import SMALL
from tests.rounding import (
    check_features,
    check_probabilities,
    exact_features,
    exact_logits,
    longest_sum,
    no_worse,
    plain_features,
)

USER = "user_models:classifier"


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_module(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return USER


def record(arch: str, form: str = "batchnorm", *, allow: str | None = None, spec: InputSpec | None = None) -> Model:
    args = SMALL.get(arch, {})
    module = randomise(registry.build(arch, args, allow=allow))
    old = Model(arch, args, spec or registry.input_spec(arch, args), "batchnorm", state(module))
    model = with_graph(old, allow=allow)
    return store(model, deploy(model)) if form == "deploy" else model


def with_head(model: Model, kind: str, classes: int = 3) -> Model:
    rng = np.random.default_rng(0)
    width = deploy(model).graph.feature_dim
    bias = rng.normal(size=classes).astype(np.float32) if kind == "linear" else np.zeros(classes, np.float32)
    weight = rng.normal(size=(classes, width)).astype(np.float32)
    names = tuple("abcdefgh"[:classes])
    return replace(model, head=Head(kind, np.arange(classes), weight, bias, np.ones(classes, bool), names))


def loaded(exported: Exported) -> dict[str, torch.Tensor]:
    if exported.format == "pth":
        return torch.load(io.BytesIO(exported.data), weights_only=True)
    return safetensors.torch.load(exported.data)


@pytest.mark.parametrize(("arch", "format"), [*((arch, "pth") for arch in SMALL), ("cnn4", "safetensors")])
def test_a_state_dict_loads_strictly_and_computes_the_same(arch: str, format: str) -> None:
    model = record(arch, "deploy")
    exported = export(model, format)
    module = registry.build(arch, SMALL[arch])
    module.load_state_dict(loaded(exported), strict=True)
    x = torch.rand(2, *model.input.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        check_features(module(x), deploy(model), x)
    assert exported.difference <= 1e-4


@pytest.mark.parametrize(("arch", "kind"), [*((arch, "linear") for arch in SMALL), ("cnn4", "prototypes")])
def test_onnx_computes_the_same(arch: str, kind: str) -> None:
    model = with_head(record(arch, "deploy"), kind)
    exported = export(model, "onnx")
    session = onnxruntime.InferenceSession(exported.data, providers=["CPUExecutionProvider"])
    x = torch.rand(3, *model.input.shape, generator=torch.Generator().manual_seed(5))
    features, scores, answers = session.run(["features", "logits", "probabilities"], {"input": x.numpy()})
    backbone = deploy(model)
    assert model.head is not None
    check_features(features, backbone, x)
    check_probabilities(answers, model.head, backbone, x)
    check_probabilities(torch.from_numpy(scores).softmax(1), model.head, backbone, x)
    plain, exact = (
        exact_logits(model.head, plain_features(backbone, x)),
        exact_logits(model.head, exact_features(backbone, x)),
    )
    no_worse(scores, plain.float(), exact, longest_sum(backbone.graph))


@pytest.mark.parametrize(("arch", "form"), [*((arch, "deploy") for arch in SMALL), ("ds-cnn", "batchnorm")])
def test_what_is_exported_can_be_imported_again(arch: str, form: str) -> None:
    model = with_head(record(arch, form), "linear")
    exported = export(model, "safetensors")
    weights = Weights(
        {name: value.numpy() for name, value in loaded(exported).items() if "num_batches" not in name}, False
    )
    settings = Importing(arch=arch, arch_args=SMALL[arch], classifier="keep", classes=("a", "b", "c"))
    again = import_model(settings, weights).model
    x = torch.rand(2, *model.input.shape, generator=torch.Generator().manual_seed(5))
    check_features(deploy(again).features(x.numpy()), deploy(model), x)
    assert again.head is not None
    assert model.head is not None
    np.testing.assert_array_equal(again.head.weight, model.head.weight)
    np.testing.assert_array_equal(again.head.bias, model.head.bias)
    if form == "batchnorm":
        assert all(np.array_equal(again.tensors[name], value) for name, value in model.tensors.items())


@pytest.mark.parametrize("kind", ["linear", "prototypes"])
def test_beside_a_model_that_ends_in_features_the_head_is_a_classifier(kind: str) -> None:
    model = with_head(record("cnn4", "deploy"), kind)
    exported = export(model, "pth")
    found = loaded(exported)
    own = registry.build("cnn4", SMALL["cnn4"]).state_dict().keys()
    assert found.keys() == own | {"classifier.weight", "classifier.bias"}
    assert any("strict=False" in note for note in exported.notes)
    assert model.head is not None
    weight, bias = found["classifier.weight"].numpy(), found["classifier.bias"].numpy()
    if kind == "linear":
        assert np.array_equal(weight, model.head.weight)
        assert np.array_equal(bias, model.head.bias)
    else:  # rows of length `scale` times the features are the cosines times the scale and the features' length
        x = np.random.default_rng(5).random((5, 1, 28, 28), np.float32)
        features = deploy(model).features(x)
        scores = logits(model.head, features) * np.linalg.norm(features, axis=1, keepdims=True)
        np.testing.assert_allclose(features @ weight.T + bias, scores, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(weight, axis=1), model.head.scale, rtol=1e-5)
    bare = export(model, "pth", head=False)
    assert loaded(bare).keys() == own
    assert not bare.notes


@pytest.mark.parametrize("classes", [5, 3])
@pytest.mark.parametrize("kind", ["linear", "prototypes"])
def test_a_head_goes_into_the_classifier_that_was_cut(user_code: str, kind: str, classes: int) -> None:
    module = randomise(Classifier(classes=5))
    weights = Weights({name: value.numpy() for name, value in module.state_dict().items() if "num_b" not in name}, True)
    settings = Importing(arch=user_code, input=input_from_text("3x16x16"))
    model = with_head(import_model(settings, weights).model, kind, classes)
    exported = export(model, "pth")
    assert any("fc has 3 rows where the imported model has 5" in note for note in exported.notes) == (classes == 3)
    own = Classifier(classes=classes).eval()
    own.load_state_dict(loaded(exported), strict=True)
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    assert model.head is not None
    with torch.no_grad():
        answers = logits(model.head, deploy(model).features(x.numpy())).argmax(1)
        np.testing.assert_array_equal(own(x).argmax(1), answers)
    without = Classifier(classes=5).eval()
    without.load_state_dict(loaded(export(model, "pth", head=False)), strict=True)
    assert torch.equal(without.fc.weight, module.fc.weight)


def test_a_classifier_without_bias_cannot_hold_a_heads(user_code: str) -> None:
    settings = Importing(arch=user_code, arch_args={"bias": False}, input=input_from_text("3x16x16"))
    model = import_model(settings).model
    with pytest.raises(UsageError, match="fc: a layer without bias cannot hold the head's"):
        export(with_head(model, "linear"), "pth")
    assert "fc.bias" not in loaded(export(with_head(model, "prototypes"), "pth"))


@pytest.mark.parametrize("form", ["batchnorm", "deploy"])
@pytest.mark.parametrize("format", ["pth", "safetensors", "onnx"])
def test_a_users_classifier_comes_back_whole(user_code: str, form: str, format: str) -> None:
    module = randomise(Classifier())
    weights = Weights({name: value.numpy() for name, value in module.state_dict().items() if "num_b" not in name}, True)
    settings = Importing(arch=user_code, input=input_from_text("3x16x16"), classifier="keep")
    model = import_model(settings, weights).model
    model = store(model, deploy(model)) if form == "deploy" else model
    exported = export(model, format)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = module(x)
    if format == "onnx":
        session = onnxruntime.InferenceSession(exported.data, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])
    else:
        own = Classifier().eval()
        own.load_state_dict(loaded(exported), strict=True)
        with torch.no_grad():
            found = own(x)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(x.double())
    no_worse(found, expected, exact, 9 * 8)


@pytest.mark.parametrize("format", ["pth", "onnx"])
def test_code_is_run_for_schema_1_only_and_only_when_allowed(
    user_code: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = record(user_code, allow=user_code, spec=input_from_text("3x16x16"))
    old = Model(
        user_code, {}, model.input, "batchnorm", state(randomise(registry.build(user_code, {}, allow=user_code)))
    )
    with pytest.raises(UsageError, match="repeat --arch"):
        export(old, format)
    expected = export(old, format, allow=user_code).data
    monkeypatch.setattr("stages.models.registry.build", None)
    assert export(model, format).data == expected


def test_batchnorm_that_became_a_layer_goes_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Train the scale that a pre-activation BatchNorm became; its values must come back in that BatchNorm."""
    (tmp_path / "preactivation_model.py").write_text("from tests.models.nets import PreActivation as Net\n")
    monkeypatch.syspath_prepend(tmp_path)
    arch = "preactivation_model:Net"
    model = record(arch, "deploy", allow=arch, spec=input_from_text("3x8x8"))
    tensors = {name: np.array(value) for name, value in model.tensors.items()}
    tensors["bn1.weight"] *= -1.5
    tensors["conv1.bias"] += 1.0
    model = replace(model, tensors=tensors)
    own = PreActivation().eval()
    own.load_state_dict(loaded(export(model, "pth")), strict=True)
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        check_features(own(x), deploy(model), x)


class Bare(nn.Module):
    """A BatchNorm without weight and bias, before the only convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.bn(x)).mean((2, 3))


def test_a_batchnorm_without_weights_holds_no_negative_scale() -> None:
    arch = f"{__name__}:Bare"
    model = record(arch, allow=arch, spec=input_from_text("3x8x8"))
    own = Bare().eval()
    own.load_state_dict(loaded(export(model, "pth")), strict=True)
    deployed = store(model, deploy(model))
    own.load_state_dict(loaded(export(deployed, "pth")), strict=True)
    turned = replace(deployed, tensors={**deployed.tensors, "bn.weight": -deployed.tensors["bn.weight"]})
    with pytest.raises(UsageError, match="bn: BatchNorm without weight and bias"):
        export(turned, "pth")
    assert export(turned, "onnx").difference < 1e-4


@pytest.mark.parametrize("format", ["onnx", "pth"])
def test_pooling_in_all_its_ways_is_exported(format: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pooling_model.py").write_text("from tests.models.nets import Pools\n")
    monkeypatch.syspath_prepend(tmp_path)
    arch = "pooling_model:Pools"
    model = record(arch, "deploy", allow=arch, spec=input_from_text("3x13x11"))
    kinds = {op.kind for op in deploy(model).graph.ops}
    assert kinds >= {"conv", "relu", "relu6", "max_pool", "avg_pool", "concat", "add", "flatten", "linear"}
    assert export(model, format).difference < 1e-4


def test_onnx_says_what_its_input_is() -> None:
    model = with_head(record("ds-cnn"), "linear")
    found = onnx.load_from_string(export(model, "onnx").data)
    (entry,) = found.metadata_props
    facts = json.loads(entry.value)
    assert facts["input"]["hop_samples"] == 160
    assert facts["classes"] == ["a", "b", "c"]
    assert facts["arch"] == "ds-cnn"
    assert [entry.version for entry in found.opset_import] == [17]


def test_the_same_model_gives_the_same_bytes() -> None:
    model = with_head(record("cnn4"), "prototypes")
    for format in ("pth", "safetensors", "onnx"):
        assert export(model, format).data == export(model, format).data


def test_a_class_nobody_has_seen_cannot_be_exported() -> None:
    model = with_head(record("mlp"), "linear")
    assert model.head is not None
    model = replace(model, head=replace(model.head, known=np.array([True, False, True])))
    with pytest.raises(UsageError, match="class b was never seen"):
        export(model, "onnx")
    assert export(model, "onnx", head=False).difference < 1e-4


def test_a_difference_is_an_error() -> None:
    ours = {"features": np.array([[1.0, -200.0]])}
    assert _compare(ours, {"features": np.array([[1.0, -200.01]])}) == pytest.approx(0.01)
    with pytest.raises(DataError, match=r"features differ by 0\.03"):
        _compare(ours, {"features": np.array([[1.03, -200.0]])})
    with pytest.raises(DataError, match="differ by nan"):
        _compare(ours, {"features": np.array([[np.nan, -200.0]])})


def test_a_state_dict_without_our_head_is_the_modules_own() -> None:
    model = record("mobilenetv1")
    module = registry.build("mobilenetv1", SMALL["mobilenetv1"])
    module.load_state_dict(loaded(export(model, "pth")), strict=True)
    assert state(module).keys() == model.tensors.keys()  # the registry's modules have the names of their operators
    assert all(np.array_equal(value, model.tensors[name]) for name, value in state(module).items())


@pytest.mark.parametrize(("name", "format"), [("a.pth", "pth"), ("b.c.pt", "pth"), ("x.onnx", "onnx")])
def test_format_by_name(name: str, format: str) -> None:
    assert format_of(name) == format


@pytest.mark.parametrize("name", ["-", "model", "a.h5", "onnx"])
def test_a_name_that_says_nothing_needs_a_format(name: str) -> None:
    with pytest.raises(UsageError, match="--format"):
        format_of(name)


def test_an_unknown_format_is_refused() -> None:
    arguments: Any = (record("mlp"), "tflite")
    with pytest.raises(UsageError, match="'tflite', expected onnx, pth, safetensors"):
        export(*arguments)
