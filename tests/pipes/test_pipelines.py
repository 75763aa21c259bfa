"""Pipelines as real processes, from a table: what a command line must return, write and say."""

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest

from stages.artifacts.records import Run
from stages.artifacts.stream import open_records
from tests.pipes.conftest import ROOT

PIPELINE = "cat run.h5 stream.h5 | edgetrain filter -q | edgetrain select -q | edgetrain train-sparse -q"

TABLE = [
    # expected exit code, command line, words on stderr
    (0, "edgetrain --help > help.txt", ""),
    (0, "edgetrain profile base.h5 --no-measure -q | edgetrain inspect --json > out.json", ""),
    (0, "edgetrain profile < base.h5 --no-measure -q > out.h5", ""),
    (2, "edgetrain filter --keep 0 < stream.h5", "keep"),
    (2, "edgetrain nonsense", "nonsense"),
    (2, "edgetrain profile base.h5 --cpus 900 -o out.h5", "--cpus"),
    (65, "head -c 900 base.h5 | edgetrain profile > out.h5", "900 of"),
    (65, "edgetrain profile < /dev/null > out.h5", "empty"),
    (65, "printf '\\xff\\xd8\\xff\\xe0 and so on, and so on' | edgetrain filter > out.h5", "JPEG"),
    (65, "edgetrain profile stream.h5 -o out.h5", "run record"),
    (65, "cat base.h5 base.h5 | edgetrain filter > out.h5", "second run record"),
    (65, "cat base.h5 stream.h5 | edgetrain train-sparse -o out.h5", "no plan"),
    (65, "yes | edgetrain filter > out.h5", "HDF5"),
    (66, "edgetrain profile nothing.h5 -o out.h5", "no such file"),
    (73, "edgetrain profile base.h5 -o no/such/place.h5", "no folder"),
    (74, "edgetrain profile base.h5 --no-measure > /dev/full", "No space"),
    (75, "edgetrain score-layers profiled.h5 --support support.h5 --memory 100B -o out.h5", "budget"),
]


@pytest.mark.parametrize(("code", "command", "words"), TABLE, ids=[row[1][:60] for row in TABLE])
def test_the_table(shell, code, command, words):
    result = shell(command)
    errors = result.stderr.decode()
    assert result.returncode == code, errors
    assert words.lower() in errors.lower()
    assert "Traceback" not in errors
    if code and "out.h5" in command and ">" not in command:
        assert not (shell.directory / "out.h5").exists()
    if code not in (0, 2):
        lines = [line for line in errors.splitlines() if line.startswith("edgetrain ")]
        assert len(lines) == 1, errors


@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
def test_the_main_pipeline_with_every_default(shell, unbuffered):
    shell = replace(shell, unbuffered=unbuffered)
    result = shell(f"{PIPELINE} > piped.h5 && {PIPELINE} -o named.h5")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stderr == b""
    piped = (shell.directory / "piped.h5").read_bytes()
    assert piped == (shell.directory / "named.h5").read_bytes(), "the same seed gives the same bytes"
    with h5py.File(io.BytesIO(piped)) as file:
        assert file["model"].attrs["version"] == 3  # 260 samples, 100 a round
        assert file["history/step"].shape == (6,)


def test_frozen_tensors_are_bit_equal_and_live_ones_moved(shell):
    assert shell(f"{PIPELINE} -o out.h5").returncode == 0
    before, after = (next(open_records(shell.directory / name)) for name in ("run.h5", "out.h5"))
    assert isinstance(before, Run)
    moved = 0
    for name, old in before.model.tensors.items():
        new = after.model.tensors[name]
        layer, part = name.rsplit(".", 1)
        live = np.zeros(len(old), bool)
        if layer in before.plan.layers:
            update = before.plan[layer]
            assert update.axis == "output"
            live[list(update.channels if part == "weight" else update.bias)] = True
        assert np.array_equal(new[~live], old[~live])
        moved += int((new[live] != old[live]).sum())
    assert moved > 0


def test_training_learns_and_the_model_can_be_used(shell):
    result = shell(
        f"""{PIPELINE} --lr 0.05 -o out.h5 &&
        edgetrain evaluate out.h5 test.h5 --json > accuracy.json &&
        edgetrain predict out.h5 test.h5 --format csv > labels.csv && wc -l < labels.csv &&
        edgetrain export out.h5 -q -o out.safetensors"""
    )
    assert result.returncode == 0, result.stderr.decode()
    import json

    accuracy = json.loads((shell.directory / "accuracy.json").read_text())["accuracy"]
    assert accuracy > 0.6  # three classes; chance is 0.33


def test_in_and_out_may_be_the_same_file(shell):
    (shell.directory / "own.h5").write_bytes((shell.directory / "base.h5").read_bytes())
    assert shell("edgetrain profile own.h5 --no-measure -q -o own.h5").returncode == 0
    assert next(open_records(shell.directory / "own.h5")).profile is not None


def test_a_failed_command_leaves_the_old_output(shell):
    (shell.directory / "out.h5").write_bytes(b"precious")
    assert shell("head -c 3000 base.h5 | edgetrain profile --no-measure -o out.h5").returncode == 65
    assert (shell.directory / "out.h5").read_bytes() == b"precious"


def test_a_reader_that_leaves_early_ends_the_writer_quietly(shell):
    result = shell("cat run.h5 stream.h5 | edgetrain filter --window 10 --keep 5 -q | head -c 100 > /dev/null")
    assert result.returncode == 141
    assert result.stderr == b""


def test_a_broken_stream_still_gives_a_model(shell):
    """Without the end mark the trainer finishes what it has, writes its model, and says where the stream broke."""
    result = shell(
        """edgetrain filter run.h5 -q < /dev/null; cat run.h5 stream.h5 | edgetrain filter -q > rounds.h5
        size=$(stat -c %s rounds.h5); head -c $((size - 200)) rounds.h5 |
        edgetrain train-sparse -q --seed 1 -o out.h5; echo $? > code"""
    )
    errors = result.stderr.decode()
    assert (shell.directory / "code").read_text().strip() == "65", errors
    assert next(open_records(shell.directory / "out.h5")).model.version == 3


def test_bad_samples_are_named(shell):
    x = np.zeros((8, 12 * 12), np.float32)
    x[5, 3] = np.nan
    with h5py.File(shell.directory / "nan.h5", "w") as file:
        file["x"], file["y"] = x.reshape(8, 12, 12), np.zeros(8, np.int64)
    result = shell("edgetrain train-sparse run.h5 nan.h5 -o out.h5")
    assert result.returncode == 65
    assert b"5" in result.stderr
    assert not (shell.directory / "out.h5").exists()


def test_edgetrain_run_writes_the_same_artifact_as_the_shell(shell):
    command = """edgetrain run 'filter -q | select --live {live} -q | train-sparse --live {live} -q -o {out}'"""
    result = shell(
        f"cat run.h5 stream.h5 | {command.format(live='one', out='forked.h5')} && "
        "cat run.h5 stream.h5 | edgetrain filter -q | edgetrain select --live two -q | "
        "edgetrain train-sparse --live two -q -o piped.h5"
    )
    assert result.returncode == 0, result.stderr.decode()
    forked, piped = ((shell.directory / name).read_bytes() for name in ("forked.h5", "piped.h5"))
    assert forked == piped


@pytest.mark.parametrize(
    ("pipeline", "code"),
    [
        ("filter | nonsense", 2),
        ("filter |", 2),
        ("filter -q | select -q | train-sparse -q -o no/such/out.h5", 73),
        ("filter -q --keep 0 | select -q", 2),
    ],
)
def test_edgetrain_run_returns_the_first_failures_code(shell, pipeline, code):
    assert shell(f"cat run.h5 stream.h5 | edgetrain run '{pipeline}' > out.h5").returncode == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_endless_stream_still_ends_in_a_model(shell, number, code):
    """The signal reaches the trainer while it waits for a stream that never ends."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    trainer = subprocess.Popen(
        [sys.executable, "-m", "edgetrain_cli", "train-sparse", "-q", "-o", "out.h5"],
        cwd=shell.directory,
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for name in ("run.h5", "stream.h5"):
        trainer.stdin.write((shell.directory / name).read_bytes())
    trainer.stdin.flush()
    time.sleep(6)
    trainer.send_signal(number)
    _, errors = trainer.communicate(timeout=30)
    assert trainer.returncode == code, errors
    assert next(open_records(shell.directory / "out.h5")).model.version >= 1


def test_hostile_files_are_refused_as_processes_too(shell):
    with h5py.File(shell.directory / "evil.h5", "w") as file:
        file["y"] = np.zeros(3, np.int64)
        file["x"] = h5py.ExternalLink("/etc/passwd", "/x")
    result = shell("edgetrain filter evil.h5 > out.h5")
    assert result.returncode == 65
    assert b"external link" in result.stderr


def test_data_that_comes_several_times_is_thinned_by_what_is_forgotten(shell):
    """cat run.h5 b.h5 b.h5 ...: three blocks a pass; a fifth of the samples is left out of each, and some return."""
    choose = "edgetrain select --strategy forgetting --period 1 --metrics rounds.jsonl"
    train = "edgetrain train-sparse --full -o out.h5"
    result = shell(f"cat run.h5 stream.h5 stream.h5 stream.h5 stream.h5 | edgetrain run '{choose} | {train}'")
    assert result.returncode == 0, result.stderr.decode()
    import json

    rows = [json.loads(line) for line in (shell.directory / "rounds.jsonl").read_text().splitlines()]
    assert [row["candidates"] for row in rows] == [100, 100, 60] * 4
    presented = np.array([row["scored"] for row in rows]).reshape(4, 3)
    assert (abs(presented.sum(1) - 0.8 * 260) <= 1).all()
    assert len(np.unique(presented, axis=0)) > 1
    assert read(shell, "out.h5").model.version == 12
    result = shell(f"cat run.h5 stream.h5 | {choose.replace(' --metrics rounds.jsonl', '')} | {train}")
    assert result.returncode == 0
    assert b"no sample came twice" in result.stderr
    result = shell(
        f"cat run.h5 stream.h5 | edgetrain run 'filter | select --strategy forgetting --buffer 20 | {train}'"
    )
    assert result.returncode == 0, result.stderr.decode()
    assert read(shell, "out.h5").model.version == 3
    result = shell("edgetrain select --strategy forgetting --remove 0.9 < stream.h5 > out.h5")
    assert result.returncode == 2
    assert b"--remove: 0.9, expected at most 0.8" in result.stderr


def read(shell, name: str) -> Run:
    record = next(open_records(shell.directory / name))
    assert isinstance(record, Run)
    return record
