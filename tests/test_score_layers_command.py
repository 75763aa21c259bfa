"""The command score-layers: what it writes where, and what enters the history."""

import json

import numpy as np
import pytest

from edgetrain_cli.commands.score_layers import score_layers
from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Block, Model, Profile, Run
from stages.cost.model import cost_table
from stages.errors import UsageError
from stages.models import registry
from stages.models.modules import state
from tests.test_scoring import GRAPH, RUN, SUPPORT, TOML


@pytest.fixture
def files(tmp_path):
    costs = cost_table(GRAPH)
    columns = {name: np.array([getattr(cost, name) for cost in costs]) for name in ("weights", "macs")}
    profiled = Run(RUN.model, Profile(tuple(cost.layer for cost in costs), columns, {}))
    (tmp_path / "run.h5").write_bytes(encode(profiled))
    (tmp_path / "support.h5").write_bytes(encode(SUPPORT))
    (tmp_path / "mine.toml").write_text(TOML)
    return {name: str(tmp_path / name) for name in ("run.h5", "support.h5", "mine.toml", "out.h5", "plan.png")}


def written(files):
    with open(files["out.h5"], "rb") as file:
        return decode(file.read())


def test_the_run_gains_scores_plan_and_a_step(files, capsys):
    score_layers(files["run.h5"], files["out.h5"], support=files["support.h5"], plot=files["plan.png"], macs="30%")
    run = written(files)
    assert run.plan.facts["budget_macs"] == int(0.3 * run.plan.facts["full_backward_macs"])
    assert run.plan.facts["budget_memory_bytes"] == 2**20
    assert run.scores.criterion == "score"
    step = run.history[-1]
    assert (step.command, step.seed) == ("score-layers", 0)
    assert step.inputs.keys() >= {"support.h5"}
    assert "plot" not in step.arguments
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"Plan greedy: {len(run.plan.updates)} of {len(GRAPH.layers)} layers train" in captured.err
    with open(files["plan.png"], "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_a_given_plan_is_read_from_its_file(files, capsys):
    score_layers(files["run.h5"], files["out.h5"], plan_file=files["mine.toml"], quiet=True)
    run = written(files)
    assert run.plan.name == "mine"
    assert run.history[-1].inputs.keys() >= {"mine.toml"}
    assert capsys.readouterr().err == ""


def test_json_goes_to_stdout_beside_a_record_in_a_file_or_alone(files, capfdbinary):
    for out in (files["out.h5"], "-"):
        score_layers(files["run.h5"], out, plan="last-3", as_json=True)
        found = json.loads(capfdbinary.readouterr().out)
        assert found["plan"]["name"] == "last-3"
        assert len(found["plan"]["updates"]) == 3
    assert written(files).plan.name == "last-3"


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(files):
    with pytest.raises(UsageError, match=r"\.png"):
        score_layers(files["run.h5"], files["out.h5"], plan="full", plot="plan.bmp")
    with pytest.raises(FileNotFoundError):
        written(files)


def test_a_transformers_blocks(tmp_path, capsys):
    arguments = {"size": 32, "depth": 4}
    module = registry.build("vit-tiny", arguments, seed=0)
    model = Model("vit-tiny", arguments, registry.input_spec("vit-tiny", arguments), "batchnorm", state(module))
    (tmp_path / "run.h5").write_bytes(encode(Run(model)))
    x = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    block = Block(x=x, layout="NHWC", y=np.arange(6) % 2)
    (tmp_path / "support.h5").write_bytes(encode(block))
    given = (str(tmp_path / "run.h5"), str(tmp_path / "out.h5"))
    found = {}
    for gradient in ("exact", "shortcut"):
        score_layers(*given, plan="blocks:0,3", gradient=gradient, quiet=True)
        found[gradient] = decode((tmp_path / "out.h5").read_bytes()).plan
    assert found["shortcut"].backward_macs < found["exact"].backward_macs  # blocks 1 and 2 are passed by
    score_layers(*given, support=str(tmp_path / "support.h5"), unit="blocks", memory="16MB", macs="60%", quiet=True)
    plan = decode((tmp_path / "out.h5").read_bytes()).plan
    assert {layer.split(".")[1] for layer in plan.layers} < {"0", "1", "2", "3"}
    assert len(plan.layers) % 6 == 0
    with pytest.raises(UsageError, match="whole blocks"):
        score_layers(*given, support=str(tmp_path / "support.h5"), unit="blocks", ratios=[0.5])
