"""`import`: files of weights, by name and by order, classifiers, and what does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from stages.artifacts.hdf5 import encode, encode_tree
from stages.artifacts.records import Array, Group
from stages.errors import DataError, UsageError
from stages.importing import (
    Importing,
    arguments,
    class_list,
    import_model,
    input_from_text,
    numbers,
    read_weights,
)
from stages.models.deploy import deploy
from stages.models.registry import build
from tests.models import nets
from tests.models.nets import Classifier, randomise, write_module
from tests.realdata import real
from tests.rounding import longest_sum, no_worse

ARCH = "cnn4"
SMALL = {"width": 8}
USER = "user_models:classifier"


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_module(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return USER


def state_dict() -> dict[str, Tensor]:
    return randomise(build(ARCH, SMALL)).state_dict()


def as_hdf5(tensors: Mapping[str, Array]) -> bytes:
    """Nested groups, one per part of a tensor's name."""
    nested: dict[str, Any] = {}
    for name, value in tensors.items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value

    def group(node: dict[str, Any]) -> Group:
        arrays = {name: value for name, value in node.items() if not isinstance(value, dict)}
        return Group({}, arrays, {name: group(value) for name, value in node.items() if isinstance(value, dict)})

    return encode_tree(group(nested))


def folded() -> dict[str, Array]:
    module = randomise(build(ARCH, SMALL))
    return {name: value.numpy() for name, value in nets.folded(module, (1, 28, 28))[1].items()}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def imported(path: Path, **settings: Any) -> Any:
    return import_model(Importing(arch=ARCH, arch_args=SMALL, **settings), read_weights(path)).model


# ----------------------------------------------------------------------------------------------------------- formats


def test_state_dicts_of_every_format_are_the_same_record(tmp_path: Path) -> None:
    state = state_dict()
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    save(tmp_path / "b.pth", state)
    save(tmp_path / "c.pt", {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}})
    save(
        tmp_path / "d.bin",
        {name: value.half().float() if value.is_floating_point() else value for name, value in state.items()},
    )
    parallel = {f"module.{name}": value for name, value in state.items()}
    safetensors.torch.save_file(parallel, tmp_path / "e.safetensors")  # keeps no order: only names can fit
    expected = imported(tmp_path / "a.safetensors")
    assert expected.form == "batchnorm"
    assert not any("num_batches" in name for name in expected.tensors)
    for name in ("b.pth", "c.pt", "e.safetensors"):
        found = imported(tmp_path / name)
        assert found.tensors.keys() == expected.tensors.keys()
        assert all(np.array_equal(found.tensors[key], value) for key, value in expected.tensors.items())
    assert not np.array_equal(
        imported(tmp_path / "d.bin").tensors["blocks.00.conv.weight"], expected.tensors["blocks.00.conv.weight"]
    )


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {name: value.to(dtype) for name, value in state_dict().items()}
        safetensors.torch.save_file(state, tmp_path / "a.safetensors")
        tensors = imported(tmp_path / "a.safetensors").tensors
        assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(tensors["blocks.00.conv.weight"], state["blocks.00.conv.weight"].float())


def test_a_folded_file_gives_the_deploy_form(tmp_path: Path) -> None:
    tensors = folded()
    (tmp_path / "w.h5").write_bytes(as_hdf5(tensors))
    model = imported(tmp_path / "w.h5")
    assert model.form == "deploy"
    assert model.tensors.keys() == tensors.keys()
    assert model.head is None


def test_the_classifier_of_a_file_is_kept_only_when_asked_for(tmp_path: Path) -> None:
    tensors = folded()
    weight = np.arange(7 * 8, dtype=np.float32).reshape(7, 8, 1, 1)
    tensors |= {"classifier.weight": weight, "classifier.bias": np.arange(7, dtype=np.float32)}
    path = tmp_path / "w.h5"
    path.write_bytes(as_hdf5(tensors))
    assert imported(path).head is None
    head = imported(path, classifier="keep", classes=tuple("abcdefg")).head
    assert (head.kind, head.names, head.labels.tolist()) == ("linear", tuple("abcdefg"), list(range(7)))
    np.testing.assert_array_equal(head.weight, weight[:, :, 0, 0])
    assert "classifier.weight" not in imported(path, classifier="keep").tensors
    with pytest.raises(DataError, match="2 names, expected 7"):
        imported(path, classifier="keep", classes=("a", "b"))
    with pytest.raises(UsageError, match="ends before its classifier"):
        imported(path, classifier="features")


# ------------------------------------------------------------------------------------------------ unknown names, order


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the same order, every layer under a name that says nothing."""
    layers = {layer: f"net.{i}" for i, layer in enumerate(dict.fromkeys(name.rpartition(".")[0] for name in state))}
    return {f"{layers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value for name, value in state.items()}


def test_other_names_are_matched_by_order_and_shape(tmp_path: Path) -> None:
    state = state_dict()
    extra = {"net.last.weight": torch.randn(4, 8), "net.last.bias": torch.randn(4)}
    model = imported(save(tmp_path / "w.pth", renamed(state) | extra), classifier="keep")
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(model.tensors[name], value)
    assert model.head is not None
    np.testing.assert_array_equal(model.head.weight, extra["net.last.weight"])


def test_a_file_that_keeps_no_order_is_not_guessed(tmp_path: Path) -> None:
    silent = {name.replace("net.", "net.part"): value for name, value in renamed(state_dict()).items()}
    safetensors.torch.save_file(silent, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"blocks\.00\.conv\.weight: missing"):
        imported(tmp_path / "w.safetensors")


def test_another_order_is_refused_with_the_place(tmp_path: Path) -> None:
    state = list(renamed(state_dict()).items())
    path = save(tmp_path / "w.pth", dict(state[1:] + state[:1]))
    with pytest.raises(DataError, match=r"net\.1\.weight has shape \(8,\) where blocks\.00\.conv\.weight has"):
        imported(path)


def test_a_layer_too_many_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", renamed(state_dict()) | {"more.weight": torch.zeros(3, 3)})
    with pytest.raises(DataError, match="9 layers where the architecture has 8"):
        imported(path)


SWAPPED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(3, 3, 3)
        self.first = nn.Conv2d(3, 3, 3)
        self.fc = nn.Linear(3, 2)
    def forward(self, x):
        return self.fc(self.second(self.first(x)).mean((2, 3)))
"""


@pytest.mark.parametrize("order", [("second", "first"), ("first", "second")], ids=["registered", "executed"])
def test_the_order_that_fits_is_taken(order: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SWAPPED.replace("self.second = nn.Conv2d(3, 3, 3)", "self.second = nn.Conv2d(4, 3, 3)")
    (tmp_path / "unequal_model.py").write_text(
        source.replace("first = nn.Conv2d(3, 3, 3)", "first = nn.Conv2d(3, 4, 3)")
    )
    monkeypatch.syspath_prepend(tmp_path)
    arch = "unequal_model:Net"
    state = build(arch, {}, allow=arch).state_dict()
    mixed = {f"{layer}.{what}": state[f"{layer}.{what}"] for layer in (*order, "fc") for what in ("weight", "bias")}
    weights = read_weights(save(tmp_path / "w.pth", renamed(mixed)))
    settings = Importing(arch=arch, input=input_from_text("3x8x8"), classifier="features")
    model = import_model(settings, weights).model
    assert all(np.array_equal(value, state[name]) for name, value in model.tensors.items())


def test_two_orders_that_both_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swapped_model.py").write_text(SWAPPED)
    monkeypatch.syspath_prepend(tmp_path)
    module = build("swapped_model:Net", {}, allow="swapped_model:Net")
    path = save(tmp_path / "w.pth", renamed(module.state_dict()))
    settings = Importing(arch="swapped_model:Net", input=input_from_text("3x8x8"))
    with pytest.raises(DataError, match="two orders of the layers that both fit"):
        import_model(settings, read_weights(path))
    save(path, module.state_dict())
    assert import_model(settings, read_weights(path)).model.tensors.keys() >= {"first.weight", "second.bias"}


# ------------------------------------------------------------------------------------------------------------- misfits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("blocks.02.conv.weight"),
            r"blocks.02.conv.weight: missing, expected shape \(8, 8, 3, 3\)",
        ),
        (
            lambda s: s.update({"blocks.00.conv.weight": torch.zeros(8, 3, 3, 3)}),
            r"blocks.00.conv.weight: shape \(8, 3, 3, 3\), expected",
        ),
        (lambda s: s.update({"head.weight": torch.zeros(4, 3)}), "head.weight: not a tensor of this model"),
        (lambda s: s["blocks.00.conv.weight"].fill_(float("inf")), "blocks.00.conv.weight: a value that is not finite"),
        (lambda s: s.update({"note": "text"}), "note: a str, expected a tensor"),
    ],
)
def test_a_misfit_is_named_with_both_shapes(change: Any, message: str, tmp_path: Path) -> None:
    state = state_dict()
    change(state)
    with pytest.raises(DataError, match=message):
        imported(save(tmp_path / "w.pth", state))


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code in a pickle ran')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Evil()), "not a plain state dict"),
        (b"", "not a file of weights"),
        (b"\xff\xd8\xff\xe0 a jpeg", "not a file of weights"),
        (b"PK\x03\x04 broken", "not a plain state dict"),
        (b"\x08\0\0\0\0\0\0\0{broken}", "a .safetensors file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "w: "),
    ],
)
def test_what_is_no_file_of_weights_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_weights(tmp_path / "w")


def test_whole_models_and_other_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a plain state dict"):
        read_weights(save(tmp_path / "w.pth", nn.Linear(2, 2)))
    with pytest.raises(DataError, match="a list, expected a state dict"):
        read_weights(save(tmp_path / "w.pth", [1, 2]))


def test_a_run_record_is_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "run.h5").write_bytes(encode(import_model(Importing(arch="cnn4"))))
    with pytest.raises(DataError, match="an EdgeTrain run, expected weights alone"):
        read_weights(tmp_path / "run.h5")


# ------------------------------------------------------------------------------------------------ user models, settings


def test_without_weights_the_seed_decides() -> None:
    one, same, other = (import_model(Importing(arch="cnn4", seed=seed)).model for seed in (1, 1, 2))
    assert one.form == "batchnorm"
    assert all(np.array_equal(one.tensors[name], same.tensors[name]) for name in one.tensors)
    assert not np.array_equal(one.tensors["blocks.00.conv.weight"], other.tensors["blocks.00.conv.weight"])
    with pytest.raises(UsageError, match="no weights of a classifier"):
        import_model(Importing(arch="cnn4", classifier="keep"))


@pytest.mark.parametrize("bias", [True, False])
def test_a_users_classifier(user_code: str, bias: bool, tmp_path: Path) -> None:
    module = randomise(Classifier(bias=bias))
    weights = read_weights(save(tmp_path / "w.pth", module.state_dict()))
    common: dict[str, Any] = {"arch": user_code, "arch_args": {"bias": bias}, "input": input_from_text("3x16x16")}
    kept, dropped, whole = (
        import_model(Importing(**common, classifier=what), weights).model for what in ("keep", "drop", "features")
    )
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = module(x)
    features = deploy(kept).features(x.numpy())
    assert kept.head is not None
    with torch.no_grad():
        exact = module.double()(x.double())
    classified = features @ kept.head.weight.T + kept.head.bias
    for found in (classified, deploy(whole).features(x.numpy())):
        no_worse(found, expected, exact, longest_sum(deploy(kept).graph))
    np.testing.assert_array_equal(deploy(dropped).features(x.numpy()), features)
    assert dropped.head is whole.head is None
    assert "fc.weight" in whole.tensors
    assert "fc.weight" not in dropped.tensors


def test_a_user_model_needs_its_input(user_code: str) -> None:
    with pytest.raises(UsageError, match="state it with --input"):
        import_model(Importing(arch=user_code))


def test_scaling_is_the_default_or_stated() -> None:
    spec = import_model(Importing(arch="cnn4")).model.input
    assert (spec.scale, spec.offset) == ((2 / 255,), (-1.0,))
    spec = import_model(Importing(arch="cnn4", scale=(0.5,), offset=(0.25,))).model.input
    assert (spec.scale, spec.offset) == ((0.5,), (0.25,))
    with pytest.raises(UsageError, match="2 values, expected 1 or 1"):
        import_model(Importing(arch="cnn4", scale=(1.0, 2.0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier": "burn"}, "keep, drop, features"),
        ({"classes": ("a",)}, "--classifier keep"),
        ({"classes": ("a", "a"), "classifier": "keep"}, "a name twice"),
        ({"input": input_from_text("3")}, "user models only"),
    ],
)
def test_settings_check_themselves(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Importing(arch="cnn4", **settings)


def test_texts_of_the_command_line(tmp_path: Path) -> None:
    assert input_from_text("900").kind == "features"
    assert input_from_text("49x40@16000").shape == (1, 49, 40)
    assert (input_from_text("9x128").kind, input_from_text("9x128").shape) == ("signal", (9, 128))
    for text in ("3x", "axb", "", "3x32x32x2", "49x40@"):
        with pytest.raises(UsageError, match="--input"):
            input_from_text(text)
    for pairs in (["mix"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(UsageError, match="--arg"):
            arguments(pairs)
    with pytest.raises(UsageError, match="size twice"):
        arguments(["size=3"], 4)
    with pytest.raises(UsageError, match="--scale"):
        numbers("1,b", "--scale")
    (tmp_path / "classes.txt").write_text("cat\ndog \n")
    assert class_list(tmp_path / "classes.txt") == ("cat", "dog")
    for content, message in ((b"", "no names"), (b"a\n\nb\n", "an empty line"), (b"\xff\xfe", "not UTF-8")):
        (tmp_path / "classes.txt").write_bytes(content)
        with pytest.raises(DataError, match=message):
            class_list(tmp_path / "classes.txt")


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    ("arch", "file", "dim"),
    [
        ("mcunet-5fps", "mcunet-5fps", 160),
        ("mobilenetv2-w0.35", "mbv2-w0.35", 112),
        ("proxyless-w0.3", "proxyless-w0.3", 96),
    ],
)
def test_imagenet_weights(arch: str, file: str, dim: int) -> None:
    path = real(f"weights/{file}.h5")
    run = import_model(Importing(arch=arch, classifier="keep"), read_weights(path))
    assert run.model.form == "deploy"
    assert run.model.head is not None
    assert run.model.head.weight.shape == (1000, dim)
    features = deploy(run.model).features(np.zeros((1, 3, 128, 128), np.float32))
    assert features.shape == (1, dim)


def test_the_official_proxyless_state_dict_is_mapped_in_order() -> None:
    path = real("weights/proxyless-w0.3-r176_imagenet.pth")
    settings = Importing(arch="proxyless-w0.3", arch_args={"mix": True, "size": 176}, classifier="keep")
    model = import_model(settings, read_weights(path)).model
    theirs = torch.load(path, weights_only=True)["state_dict"]
    for ours, name in {
        "stem.weight": "first_conv.conv.weight",
        "blocks.00.depthwise_bn.running_var": "blocks.0.mobile_inverted_conv.depth_conv.bn.running_var",
        "blocks.01.expand.weight": "blocks.1.mobile_inverted_conv.inverted_bottleneck.conv.weight",
        "blocks.19.project.weight": "blocks.21.mobile_inverted_conv.point_linear.conv.weight",
        "mix_bn.bias": "feature_mix_layer.bn.bias",
    }.items():
        np.testing.assert_array_equal(model.tensors[ours], theirs[name])
    assert model.head is not None
    assert model.head.weight.shape == (1000, 384)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.ones(3, 3).to_sparse(), "sparse"),
        (lambda: torch.ones(3, 3, dtype=torch.complex64), "complex"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_hold_something_else_are_named(value: Callable[[], Tensor], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"first.weight": torch.ones(2), "odd.weight": value()}, path)
    with pytest.raises(DataError, match=f"odd.weight: a {kind} tensor, expected plain real numbers"):
        read_weights(path)


def test_numbers_of_numpy_in_a_state_dict_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"weight": torch.ones(2), "epoch": np.float64(3)}, path)
    with pytest.raises(DataError, match=r"not a plain state dict|a float64, expected a tensor"):
        read_weights(path)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_recurrent_state_dict_comes_back_under_its_own_names(
    kind: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "\n".join([
        "from torch import nn", "class Net(nn.Module):", "    def __init__(self):", "        super().__init__()",
        f"        self.rnn = nn.{kind.__name__}(5, 6, num_layers=2, bidirectional=True, batch_first=True)",
        "        self.fc = nn.Linear(12, 3)", "    def forward(self, x):",
        "        return self.fc(self.rnn(x)[0].mean(1))",
    ])  # fmt: skip
    name = f"recurrent_{kind.__name__.lower()}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    from importlib import import_module

    net = randomise(import_module(name).Net())
    torch.save(net.state_dict(), tmp_path / "w.pth")
    settings = Importing(arch=f"{name}:Net", input=input_from_text("7x5"), classifier="keep")
    model = import_model(settings, read_weights(tmp_path / "w.pth"))
    from stages.exporting import state_dict as written

    found, _ = written(model.model)
    expected = net.state_dict()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], value.numpy()) for key, value in expected.items())
    changed = dict(model.model.tensors)
    key = next(key for key in changed if key.endswith("l0.weight"))
    changed[key] = changed[key] + np.float32(1)
    from dataclasses import replace

    other, _ = written(replace(model.model, tensors=changed))
    moved = [name for name in expected if not np.array_equal(other[name], expected[name].numpy())]
    assert moved == [f"rnn.{what}_l0" for what in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
