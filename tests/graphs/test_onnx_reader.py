"""ONNX files: what others made agrees or is refused by name, and what is no readable model gets one line."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, version_converter
from torch import Tensor, nn

from stages.engines.torch.reference import run
from stages.errors import DataError, UsageError
from stages.exporting import export
from stages.graphs.onnx_patterns import put_together
from stages.graphs.onnx_reader import OnnxNet, parse, readable
from stages.importing import Importing, import_file, import_onnx, input_from_text
from stages.models.deploy import deploy, open_graph
from stages.models.heads import logits
from stages.models.registry import image_input
from tests.rounding import as_tensors, longest_sum, no_worse

FLOAT = TensorProto.FLOAT


def exported(
    net: nn.Module, shape: tuple[int, ...], *, opset: int = 17, dynamic: bool = False, fold: bool = True
) -> bytes:
    """What PyTorch's exporter writes."""
    buffer = io.BytesIO()
    axes = {"x": {0: "n"}} if dynamic else None
    mode = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(), (torch.randn(1, *shape),), buffer, opset_version=opset, dynamo=False, input_names=["x"],
            dynamic_axes=axes, do_constant_folding=fold, training=mode,
        )  # fmt: skip
    return buffer.getvalue()


class Small(nn.Module):
    """Two convolutions and a classifier around any function."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.fc, self.function = nn.Linear(8, 5), function
        nn.init.uniform_(self.bn.running_var, 0.5, 1.5)
        nn.init.normal_(self.bn.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.function(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def check(found: Any, net: nn.Module, x: Tensor) -> None:
    """As near to the net's outputs in float64 as the net itself in float32."""
    with torch.no_grad():
        expected = net(x)
        exact = net.double()(x.double())
    no_worse(found, expected, exact, 72)  # a 3 x 3 convolution of 8 channels


# ------------------------------------------------------------------------------------------------- what it must give


@pytest.mark.parametrize("opset", [11, 13, 17, 20])
@pytest.mark.parametrize("dynamic", [False, True], ids=["one sample", "any number"])
@pytest.mark.parametrize("fold", [False, True], ids=["batchnorm", "folded"])
def test_a_file_gives_the_nets_own_features_and_classifier(opset: int, dynamic: bool, fold: bool) -> None:
    net = Small()
    found = import_onnx(
        Importing(classifier="keep"), exported(net, (3, 16, 16), opset=opset, dynamic=dynamic, fold=fold), "f.onnx"
    )
    model = found.run.model
    assert model.arch == "onnx"
    assert model.form == "batchnorm"
    kinds = [op.kind for op in open_graph(model).ops]
    assert ("batchnorm" in kinds) == (not fold)
    assert [op.name for op in open_graph(model).layers][:1] == ["stem"]
    x = torch.randn(4, 3, 16, 16)
    assert model.head is not None
    check(logits(model.head, deploy(model).features(x.numpy())), net, x)


def test_what_export_writes_comes_back_with_its_input_and_head(tmp_path: Path) -> None:
    first = import_onnx(
        Importing(classifier="keep", scale=(0.5,), offset=(0.25,)), exported(Small(), (3, 16, 16)), "f"
    ).run.model
    path = tmp_path / "back.onnx"
    path.write_bytes(export(first, "onnx").data)
    again = import_file(Importing(), path).run.model
    assert (again.input.scale, again.input.offset, again.input.shape) == ((0.5,), (0.25,), (3, 16, 16))
    x = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    exact = run(deploy(first).graph, as_tensors(deploy(first).tensors, torch.float64), torch.from_numpy(x).double())
    no_worse(deploy(again).features(x), deploy(first).features(x), exact, longest_sum(deploy(again).graph))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"input": 3}', '{"input": {"kind": "image", "shape": "abc", "scale": [1], "offset": [0]}}',
             '{"input": {"kind": "smell", "shape": [3], "scale": [1], "offset": [0], "sample_rate_hz": 0}}'],
)  # fmt: skip
def test_metadata_of_another_making_are_passed_over(text: str) -> None:
    model = onnx.load_model_from_string(exported(Small(), (3, 16, 16)))
    model.metadata_props.add(key="edgetrain", value=text)
    found = import_onnx(Importing(), bytes(model.SerializeToString()), "f").run.model
    assert found.input == image_input(3, 16, 16)


def test_pictures_with_channels_last_are_turned() -> None:
    class Last(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 3, 1, 2))

    net = Last()
    data = exported(net, (16, 20, 3))
    model = import_onnx(Importing(classifier="keep"), data, "f").run.model
    assert model.input.shape == (3, 16, 20)
    x = torch.randn(2, 16, 20, 3)
    assert model.head is not None
    check(logits(model.head, deploy(model).features(x.permute(0, 3, 1, 2).contiguous().numpy())), net, x)


WHOLE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "gelu": (nn.functional.gelu, "gelu"),
    "gelu in another order": (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "gelu"),
    "gelu by tanh": (lambda x: nn.functional.gelu(x, approximate="tanh"), "gelu"),
    "silu": (nn.functional.silu, "silu"),
    "mish": (nn.functional.mish, "mish"),
    "hardswish": (nn.functional.hardswish, "hardswish"),
    "hardswish by relu6": (lambda x: x * nn.functional.relu6(x + 3) / 6, "hardswish"),
    "hardsigmoid by clamp": (lambda x: (x + 3).clamp(0, 6) / 6, "hardsigmoid"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_functions_in_pieces_become_one_operator(name: str) -> None:
    function, kind = WHOLE[name]
    model = import_onnx(Importing(), exported(Small(function), (3, 16, 16), opset=13), "f").run.model
    kinds = Counter(op.kind for op in open_graph(model).ops)
    assert kinds[kind] == 1
    assert not kinds.keys() & {"sigmoid", "tanh", "softplus", "multiply", "add", "divide", "clamp", "relu6", "opaque"}


def test_a_function_that_others_read_into_stays_in_pieces() -> None:
    def leaky(x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return x * gate + gate

    model = import_onnx(Importing(), exported(Small(leaky), (3, 16, 16), opset=13), "f").run.model
    kinds = Counter(op.kind for op in open_graph(model).ops)
    assert (kinds["sigmoid"], kinds["multiply"], kinds["silu"]) == (1, 1, 0)


class Tokens(nn.Module):
    """A transformer's block in opset 14: LayerNorm and attention in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.attention, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x))
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (h, 2 * h, h + 1))
        h = h + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(h.mean(1))


def test_layernorm_attention_and_biases_become_whole() -> None:
    model = import_onnx(Importing(), exported(Tokens(), (7, 6), opset=14), "f").run.model
    graph = open_graph(model)
    kinds = Counter(op.kind for op in graph.ops)
    assert (kinds["layernorm"], kinds["attention"], kinds["softmax"], kinds["matmul"]) == (1, 1, 0, 0)
    assert next(op for op in graph.layers if op.kind == "linear").bias


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("dynamic", [False, True])
def test_recurrent_layers_come_as_layers(kind: Any, dynamic: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(6, 7, num_layers=2, bidirectional=True, batch_first=True)
            self.fc = nn.Linear(14, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.rnn(x)[0][:, -1])

    model = import_onnx(Importing(), exported(Net(), (9, 6), dynamic=dynamic), "f").run.model
    name = kind.__name__.lower()
    assert Counter(op.kind for op in open_graph(model).ops)[name] == 4


# ------------------------------------------------------------------------------------------------ what others have made


def of_the_package() -> Iterator[tuple[str, Any, list[Any], list[Any]]]:
    """onnx's own models with inputs and outputs: those of single operators, and those converted from PyTorch."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in collect_testcases(None):
            for inputs, outputs in (case.data_sets or [])[:1]:
                yield case.name, case.model, list(inputs), list(outputs)
    root = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for folder in sorted([*root.glob("pytorch-converted/*"), *root.glob("pytorch-operator/*")]):
        model = onnx.load(folder / "model.onnx")
        try:
            parts = [
                [
                    numpy_helper.to_array(onnx.load_tensor(path))
                    for path in sorted(folder.glob(f"test_data_set_0/{what}_*.pb"))
                ]
                for what in ("input", "output")
            ]
        except Exception:  # sequences, which are no tensors
            continue
        yield folder.name, model, *parts


def readied(model: Any, inputs: list[Any]) -> bytes | None:
    """The model of a supported opset, all inputs but the first as initialisers; None where it has no such form."""
    try:
        version = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        model = version_converter.convert_version(model, 13) if version < 11 else model
        initial = {tensor.name for tensor in model.graph.initializer}
        given = [value for value in model.graph.input if value.name not in initial]
        for value, array in list(zip(given, inputs, strict=False))[1:]:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), value.name))
    except Exception:  # what onnx itself cannot convert or hold
        return None
    for entry in model.opset_import:
        entry.version = min(entry.version, 21) if entry.domain in ("", "ai.onnx") else entry.version
    return bytes(model.SerializeToString())


ODD = {
    "test_operator_add_broadcast": "its data hold no numbers",
    "test_operator_add_size1_right_broadcast": "its data hold no numbers",
    "test_operator_add_size1_singleton_broadcast": "its data hold no numbers",
    "test_operator_addconstant": "its data hold no numbers",
}


def test_files_that_others_made_agree_or_are_refused_by_name() -> None:
    outcomes: Counter[str] = Counter()
    wrong, nameless = [], 0
    for name, model, inputs, outputs in of_the_package():
        first = inputs[0] if inputs and isinstance(inputs[0], np.ndarray) else np.zeros(())
        if not inputs or first.ndim == 0 or first.dtype != np.float32 or name in ODD:
            continue
        data = readied(model, inputs)
        if data is None:
            continue
        try:
            net = OnnxNet(put_together(parse(data, name)), channels_last=False).eval()
            with torch.no_grad():
                found = net(torch.from_numpy(first.copy()))
        except (UsageError, DataError) as error:
            outcomes["refused"] += 1
            nameless += not error.where
            continue
        outcomes["agrees"] += 1
        for mine, theirs in zip(found if isinstance(found, tuple) else (found,), outputs, strict=False):
            if not isinstance(theirs, np.ndarray):  # a sequence
                continue
            a, b = np.asarray(mine), theirs
            if b.dtype.kind == "f" and not (
                a.shape == b.shape and np.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
            ):
                wrong.append(name)
    assert not wrong
    assert not nameless
    assert outcomes["agrees"] > 450


# ------------------------------------------------------------------------------------------------------------ bad input


def model_of(
    nodes: list[Any], *, inputs: Any = None, initial: dict[str, Any] | None = None, opset: int = 17, **more: Any
) -> bytes:
    given = inputs or [helper.make_tensor_value_info("x", FLOAT, ["n", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("y", FLOAT, ["a", "b", "c", "d"])]
    tensors = [numpy_helper.from_array(np.asarray(a), name) for name, a in (initial or {}).items()]
    graph = helper.make_graph(nodes, "g", given, outputs, tensors)
    domains = [helper.make_opsetid("", opset), *more.get("domains", [])]
    return bytes(helper.make_model(graph, opset_imports=domains, ir_version=8).SerializeToString())


RELU = [helper.make_node("Relu", ["x"], ["y"], name="act")]
WEIGHT = np.ones((4, 3, 3, 3), np.float32)
CONV = [helper.make_node("Conv", ["x", "w"], ["y"], name="layer")]


def external() -> bytes:
    model = onnx.load_model_from_string(model_of(CONV, initial={"w": WEIGHT}))
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    tensor.ClearField("raw_data")
    return bytes(model.SerializeToString())


def external_constant() -> bytes:
    """In a node's attribute, inside a branch."""
    tensor = numpy_helper.from_array(WEIGHT, "secret")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    tensor.ClearField("raw_data")
    side = helper.make_graph(
        [helper.make_node("Constant", [], ["b"], value=tensor)], "side", [],
        [helper.make_tensor_value_info("b", FLOAT, [4, 3, 3, 3])],
    )  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], then_branch=side, else_branch=side)
    return model_of([node], initial={"c": np.array(True)})


def of_another_domain() -> bytes:
    node = helper.make_node("Relu", ["x"], ["y"], domain="com.acme")
    return model_of([node], domains=[helper.make_opsetid("com.acme", 1)])


def quantised() -> bytes:
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    return model_of([node], initial={"s": np.float32(1), "z": np.uint8(0)})


def hardmax() -> bytes:
    """An operator that no torch call becomes."""
    return model_of([helper.make_node("Hardmax", ["x"], ["y"])])


def of_two_inputs() -> bytes:
    inputs = [helper.make_tensor_value_info(name, FLOAT, [1, 3]) for name in "xz"]
    return model_of([helper.make_node("Add", ["x", "z"], ["y"])], inputs=inputs)


def of_open_shape() -> bytes:
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["n", 3, "h", "w0"])]
    return model_of(CONV, initial={"w": WEIGHT}, inputs=inputs)


def of_a_volume() -> bytes:
    inputs = [helper.make_tensor_value_info("x", FLOAT, [1, 3, 4, 4, 4])]
    return model_of(CONV, initial={"w": np.ones((2, 3, 1, 1, 1), np.float32)}, inputs=inputs)


def circular() -> bytes:
    return model_of([helper.make_node("Add", ["x", "y"], ["z"]), helper.make_node("Relu", ["z"], ["y"])])


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: b"hello, this is no model\n", "not an ONNX model, or cut short"),
    "nothing": (lambda: b"", "no operators"),
    "cut short": (lambda: model_of(CONV, initial={"w": WEIGHT})[:-40], "not an ONNX model, or cut short|not valid"),
    "opset 8": (lambda: model_of(RELU, opset=8), "opset 8, expected 11 to 21; convert it with onnx.version_converter"),
    "custom operator": (of_another_domain, "custom operator com.acme.Relu"),
    "external data": (external, "w lies in another file"),
    "external data in a branch": (external_constant, "secret lies in another file"),
    "quantised": (quantised, "a quantised model"),
    "random": (lambda: model_of([helper.make_node("RandomNormalLike", ["x"], ["y"])]), "random numbers"),
    "unknown operator": (lambda: model_of([helper.make_node("Nonsense", ["x"], ["y"])]), "not valid"),
    "no kind for it": (hardmax, "operator Hardmax, expected one of docs/operators.md"),
    "two inputs": (of_two_inputs, r"2 inputs \(x, z\), expected a model of one input"),
    "open shape": (of_open_shape, r"an input of open shape, 3 x \? x \? per sample.*--input"),
    "no layer": (lambda: model_of(RELU), "no convolution or linear layer"),
    "weights that do not fit": (
        lambda: model_of(CONV, initial={"w": np.ones((4, 2, 3, 3), np.float32)}), "layer: Conv cannot be computed",
    ),
    "a cycle": (circular, "not valid"),
    "5 axes": (of_a_volume, "samples of shape|vectors, signals or images"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(make())
    with pytest.raises((DataError, UsageError), match=message):
        import_file(Importing(), path)


def test_every_byte_that_is_changed_is_refused_or_read() -> None:
    """A corrupt file never ends in anything but one of our errors."""
    data = bytearray(exported(Small(), (3, 8, 8)))
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            broken[place] = rng.integers(256)
        with suppress(DataError, UsageError):
            import_onnx(Importing(), bytes(broken), "f.onnx")


def test_a_tflite_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(b"\x1c\0\0\0TFL3" + bytes(100))
    with pytest.raises(DataError, match=r"a \.tflite file, expected an \.onnx file, or weights"):
        import_file(Importing(), path)


def test_an_onnx_file_needs_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(exported(Small(), (3, 16, 16)))
    with pytest.raises(UsageError, match=r"--arch: cnn4 for an \.onnx file"):
        import_file(Importing(arch="cnn4"), path)
    other = Importing(input=input_from_text("3x20x20"))
    with pytest.raises(UsageError, match=r"samples of shape \(3, 20, 20\), expected 3 x 16 x 16"):
        import_file(other, path)


def test_every_reading_is_of_a_type_that_onnx_has() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert set(readable()) - known == {"Silu"}  # ours, for x * sigmoid(x)
    assert len(readable()) > 90
