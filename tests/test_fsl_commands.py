"""The commands pretrain-fsl and evaluate: bytes that repeat, restarts, shards, lists of tasks, refusals."""

import json

import pytest

from edgetrain_cli.commands.evaluate import evaluate
from edgetrain_cli.commands.pretrain_fsl import pretrain_fsl
from stages.artifacts.hdf5 import decode, encode
from stages.errors import DataError, UsageError
from tests.test_pretraining import squares

TRAINING = {
    "arch": "cnn4-w4", "size": 16, "epochs": 2, "steps": 2, "ways": 3, "shots": 2, "queries": 2, "validation_tasks": 2,
    "validation_ways": 2, "validation_shots": 2, "validation_queries": 2, "quiet": True,
}  # fmt: skip
TASKS = {
    "tasks": 4, "ways": 3, "shots": 3, "queries": 2, "methods": "none,last-layer", "iterations": 1, "lr": 0.01,
    "measure": False, "quiet": True,
}  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.h5").write_bytes(encode(squares()))
    return tmp_path


def pretrain(out, **options):
    pretrain_fsl(["data.h5"], out, **{**TRAINING, **options})


def test_the_same_seed_writes_the_same_bytes_also_after_a_restart(files):
    pretrain("a.h5")
    pretrain("b.h5", checkpoint="state.h5", metrics="rows.jsonl")
    pretrain("c.h5", resume="state.h5")
    images = [(files / name).read_bytes() for name in ("a.h5", "b.h5", "c.h5")]
    assert images[0] == images[1] == images[2]
    step = decode(images[0]).history[-1]
    assert (step.command, step.seed, list(step.inputs)) == ("pretrain-fsl", 0, ["data.h5"])
    assert {"device", "rank", "processes", "checkpoint", "resume"}.isdisjoint(step.arguments)
    rows = [json.loads(line) for line in (files / "rows.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]


def test_a_run_record_can_be_trained_further(files):
    pretrain("a.h5", validation_tasks=0)
    pretrain("b.h5", init="a.h5", arch=None, validation_tasks=0)
    first, second = (decode((files / name).read_bytes()) for name in ("a.h5", "b.h5"))
    assert [step.command for step in second.history] == ["pretrain-fsl"] * 2
    # with --init the statistics stay, and the rate is P>M>F's
    name = "blocks.00.conv_bn.running_var"
    assert (second.model.tensors[name] == first.model.tensors[name]).all()
    assert max(second.metrics["pretrain-fsl"]["learning_rate"]) <= 5e-5


def test_what_pretraining_refuses(files):
    with pytest.raises(UsageError, match="no data set"):
        pretrain_fsl(None, "a.h5", arch="cnn4")
    with pytest.raises(UsageError, match="--arch: missing"):
        pretrain("a.h5", arch=None)
    with pytest.raises(DataError, match="class 0: 6 samples"):
        pretrain("a.h5", repeat=False, queries=9, validation_tasks=0)
    with pytest.raises(UsageError, match="--simulate-bits: '3', expected 3/6"):
        pretrain("a.h5", simulate_bits="3")
    assert not (files / "a.h5").exists()


def test_simulated_bits_are_said_to_be_a_count(files, capsys):
    pretrain("a.h5", simulate_bits="3/6", quiet=False)
    assert "1.46% of float32's, a count" in capsys.readouterr().err


@pytest.fixture
def base(files):
    pretrain("base.h5")
    return files


def result(capfd, *arguments, **options):
    evaluate(*arguments, as_json=True, **{"quiet": True, **options})
    return json.loads(capfd.readouterr().out)


def test_shards_and_lists_of_tasks_give_the_whole(base, capfd):
    whole = result(capfd, "base.h5", ["data.h5"], **{**TASKS, "write_tasks": "tasks.h5", "rows": "whole.jsonl"})
    for i in range(2):
        evaluate("base.h5", ["data.h5"], **{**TASKS, "shard": f"{i}/2", "rows": f"shard{i}.jsonl"})
    capfd.readouterr()
    assert result(capfd, "shard0.jsonl", ["shard1.jsonl"], merge=True) == whole
    again = result(capfd, "base.h5", ["data.h5"], **{**TASKS, "read_tasks": "tasks.h5", "rows": "again.jsonl"})
    assert again == whole
    assert (base / "again.jsonl").read_text() == (base / "whole.jsonl").read_text()
    assert [each["method"] for each in whole["summary"]] == ["none", "last-layer"]
    assert whole["against"] == "last-layer"


def test_an_evaluation_that_was_cut_short_goes_on(base, capfd):
    """Rows that are there stay as they are, half a line is done again, and the table is the whole one's."""
    whole = result(capfd, "base.h5", ["data.h5"], rows="whole.jsonl", **TASKS)
    lines = (base / "whole.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 9
    (base / "cut.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    assert result(capfd, "base.h5", ["data.h5"], rows="cut.jsonl", resume=True, **TASKS) == whole
    assert (base / "cut.jsonl").read_text() == "".join(lines)
    marked = lines[1].replace('"ways": 3', '"ways": 333')
    (base / "cut.jsonl").write_text(lines[0] + marked)
    result(capfd, "base.h5", ["data.h5"], rows="cut.jsonl", resume=True, **TASKS)
    assert (base / "cut.jsonl").read_text() == "".join([lines[0], marked, *lines[2:]]), (
        "what was done is not done again"
    )


@pytest.mark.parametrize("left", [None, "", '{"edge'], ids=["no file", "an empty file", "half a header"])
def test_an_evaluation_that_had_not_begun_begins(base, capfd, left):
    if left is not None:
        (base / "cut.jsonl").write_text(left)
    result(capfd, "base.h5", ["data.h5"], rows="cut.jsonl", resume=True, **TASKS)
    assert len((base / "cut.jsonl").read_text().splitlines()) == 9


def test_another_evaluations_results_are_left_alone(base, capfd):
    result(capfd, "base.h5", ["data.h5"], rows="rows.jsonl", **TASKS)
    before = (base / "rows.jsonl").read_text()
    for options in ({"seed": 1}, {"tasks": 5}, {"methods": "none"}, {"iterations": 2}):
        with pytest.raises(DataError, match="results of another evaluation"):
            evaluate("base.h5", ["data.h5"], **{**TASKS, "rows": "rows.jsonl", "resume": True, **options})
    assert (base / "rows.jsonl").read_text() == before
    for options in ({"rows": "base.h5", "resume": True, **TASKS}, {"merge": True}):  # not even text
        with pytest.raises(DataError, match="no JSON object"):
            evaluate("base.h5", ["data.h5"], **options)


def test_the_picture_is_drawn(base, capfd):
    pytest.importorskip("matplotlib")
    evaluate("base.h5", ["data.h5"], plot="points.png", **TASKS)
    assert (base / "points.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy over tasks" in capfd.readouterr().out


def test_accuracy_with_a_support(base, capfd):
    found = result(capfd, "base.h5", ["data.h5"], support="data.h5")
    assert found["samples"] == 60
    assert found["low"] <= found["accuracy"] <= found["high"]
    assert sum(each["samples"] for each in found["classes"]) == 60
    evaluate("base.h5", ["data.h5"], "table.txt", support="data.h5", quiet=True)
    assert (base / "table.txt").read_text().count("\n") > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": True, "tasks": 2}, "--merge"),
        ({"tasks": 2, "support": "data.h5"}, "--support"),
        ({"tasks": 2, "shard": "1"}, "--shard"),
        ({"tasks": 2, "resume": True}, "--resume"),
        ({"plot": "a.png"}, "--plot"),
        ({"tasks": 2, "plot": "a.txt"}, "--plot"),
    ],
    ids=str,
)
def test_what_evaluation_refuses(base, options, message):
    with pytest.raises(UsageError, match=message):
        evaluate("base.h5", ["data.h5"], quiet=True, **options)
