"""`import --drop-tokens`: a run that every later stage computes with, by the commands themselves."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from edgetrain_cli.commands.evaluate import evaluate
from edgetrain_cli.commands.export import export
from edgetrain_cli.commands.import_weights import import_weights
from edgetrain_cli.commands.predict import predict
from edgetrain_cli.commands.profile import profile
from edgetrain_cli.commands.score_layers import score_layers
from edgetrain_cli.commands.train_sparse import train_sparse
from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.history import model_hash
from stages.artifacts.records import Block, Run
from stages.engines.torch import reference
from stages.errors import UsageError
from stages.exporting import export as exported
from stages.models.deploy import deploy
from stages.models.heads import probabilities
from stages.models.inputs import adapt
from stages.operators import Op

SMALL: dict[str, Any] = {"size": 64, "arg": ["depth=3"]}
"""16 patches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, the same with drops, and samples of two classes."""
    folder = tmp_path_factory.mktemp("drops")
    import_weights(None, arch="vit-tiny", out=str(folder / "base.h5"), quiet=True, **SMALL)
    drop(folder, fuse=True)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    x[4:] //= 4
    block = Block(x, np.arange(8) // 4, "NHWC", labels=np.arange(2), names=("a", "b"))
    (folder / "samples.h5").write_bytes(encode(block))
    return folder


def drop(folder: Path, name: str = "short.h5", blocks: str = "0,1", source: str = "base.h5", **more: Any) -> None:
    import_weights(str(folder / source), out=str(folder / name), drop_tokens=blocks, quiet=True, **more)


def run(folder: Path, name: str) -> Run:
    found = decode((folder / name).read_bytes())
    assert isinstance(found, Run)
    return found


def drops(found: Run) -> list[Op]:
    return [op for op in deploy(found.model).graph.ops if op.kind == "drop_tokens"]


def test_the_run_has_another_model_with_the_same_weights(folder: Path) -> None:
    base, short = run(folder, "base.h5"), run(folder, "short.h5")
    assert model_hash(base) != model_hash(short)
    assert [(op.in_shape[0], op.shape[0], op["fuse"]) for op in drops(short)] == [(17, 10, True), (10, 7, True)]
    assert all(np.array_equal(short.model.tensors[name], value) for name, value in base.model.tensors.items())
    step = short.history[-1]
    assert (step.command, step.arguments["drop_tokens"], step.arguments["fuse"]) == ("import", "0,1", True)
    assert step.inputs.keys() >= {"base.h5"}


def test_one_that_keeps_all_is_the_model_as_it_was(folder: Path) -> None:
    drop(folder, "same.h5", keep_tokens=1.0)
    assert model_hash(run(folder, "same.h5")) == model_hash(run(folder, "base.h5"))


def test_stages_compute_with_the_drops(folder: Path) -> None:
    """Plan, training, evaluation and predictions, as the commands pass runs on."""
    at = {name: str(folder / name) for name in ("short.h5", "planned.h5", "adapted.h5", "samples.h5", "profiled.h5")}
    profile(at["short.h5"], at["profiled.h5"], repeats=1, quiet=True)
    score_layers(at["short.h5"], at["planned.h5"], plan="last-3", quiet=True)
    train_sparse(at["planned.h5"], at["samples.h5"], out=at["adapted.h5"], updates=2, quiet=True)
    adapted = run(folder, "adapted.h5")
    assert len(drops(adapted)) == 2
    evaluate(at["adapted.h5"], [at["samples.h5"]], str(folder / "result.txt"), quiet=True)
    assert re.search(r"^all +8 ", (folder / "result.txt").read_text(), re.MULTILINE)
    predict(at["adapted.h5"], at["samples.h5"], str(folder / "found.csv"), quiet=True)
    with open(folder / "found.csv", newline="") as file:
        given = np.array([[float(row["p(a)"]), float(row["p(b)"])] for row in csv.DictReader(file)])
    model = adapted.model
    assert model.head is not None
    block = decode((folder / "samples.h5").read_bytes())
    assert isinstance(block, Block)
    backbone = deploy(model)
    expected = probabilities(model.head, backbone.features(adapt(block.x, block.layout, model.input)))
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="drops tokens already"):
        drop(folder, "twice.h5", source="adapted.h5")


def test_what_was_measured_of_the_old_model_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score_layers(str(folder / "base.h5"), str(folder / "scored.h5"), plan="last-3", quiet=True)
    import_weights(str(folder / "scored.h5"), out=str(folder / "x.h5"), drop_tokens="1")
    assert "those of the model without drops" in capsys.readouterr().err
    assert run(folder, "x.h5").plan is None


@pytest.mark.parametrize("fuse", [False, True])
def test_onnx_computes_the_same(folder: Path, fuse: bool) -> None:
    drop(folder, "y.h5", fuse=fuse)
    model = run(folder, "y.h5").model
    data = exported(model, "onnx").data
    backbone = deploy(model)
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tensors = {name: torch.from_numpy(value) for name, value in backbone.tensors.items()}
    expected = reference.run(backbone.graph, tensors, x)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found = session.run(["features"], {"input": x.numpy()})[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_state_dict_says_that_it_holds_no_drops(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(str(folder / "short.h5"), str(folder / "out.pth"))
    assert "drops no tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop_tokens": "0,x"}, "numbers of blocks joined by commas"),
        ({"drop_tokens": "2"}, "only the class token leaves the last one"),
        ({"drop_tokens": "0", "keep_tokens": 0.0}, "a share above 0 and at most 1"),
        ({"drop_tokens": "0", "keep_tokens": 1.5}, "a share above 0 and at most 1"),
        ({"keep_tokens": 0.5}, "--drop-tokens 3,6,9 with it"),
        ({"fuse": True}, "--drop-tokens 3,6,9 with it"),
        ({"drop_tokens": "0", "arch": "vit-tiny"}, "import it first"),
        ({"drop_tokens": "0", "weights": None}, "without a run"),
    ],
)
def test_bad_arguments_are_one_line(folder: Path, arguments: dict[str, Any], message: str) -> None:
    given = {"weights": str(folder / "base.h5"), "out": str(folder / "z.h5"), "quiet": True} | arguments
    with pytest.raises(UsageError, match=message) as caught:
        import_weights(**given)
    assert "\n" not in str(caught.value)
