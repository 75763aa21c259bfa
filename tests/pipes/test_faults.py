"""What goes wrong in a live pipeline: killed stages, broken versions, a full disk, a source that falls silent."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from stages.artifacts.history import model_hash
from stages.artifacts.live import LiveDirectory
from tests.pipes.conftest import ROOT, Shell
from tests.pipes.streaming import new_run, read_run, samples, write

RUN = "edgetrain run 'filter --window 20 --keep 8 -q | select --live live -q | train-sparse --live live -q {more}'"


@pytest.fixture
def stream(tmp_path) -> Shell:
    write(tmp_path, new_run(), [samples(170)])
    return Shell(tmp_path)


def environment():
    return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def test_every_fault_ends_the_rest_and_the_run_goes_on_bit_equal():
    """The benchmark that does it hundreds of times, once per fault: it checks every claim and fails by itself."""
    command = [sys.executable, "examples/bench/faults.py", "--quick", "--rounds", "12", "--limit", "20"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()
    told = json.loads(result.stdout)
    assert len(told["trials"]) == sum(told["trials"].values()) >= 12
    assert told["failures"] == []


def test_a_full_disk_in_the_live_directory_still_gives_a_model(stream):
    """The limit of a file's size stands for the full disk; the output is a pipe, which has none."""
    result = stream(f"(ulimit -f 2; {RUN.format(more='')} < stream.h5) | cat > out.h5")
    assert result.returncode == 74
    assert b"1.h5" in result.stderr
    assert read_run(stream.directory / "out.h5").model.version == 1
    assert list((stream.directory / "live").iterdir()) == [], "no half version is left"


@pytest.mark.parametrize("command", ["filter", "select"])
def test_a_stage_that_waits_for_input_ends_when_its_reader_leaves(command, stream):
    """The source neither writes nor closes, so nothing but the watch on the output can end the stage."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edgetrain_cli", command, "-q"],
        cwd=stream.directory, env=environment() | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        process.stdin.write((stream.directory / "run.h5").read_bytes())
        process.stdin.flush()
        assert process.stdout.read(8) == b"\x89HDF\r\n\x1a\n", "the run record is forwarded at once"
        process.stdout.close()
        assert process.wait(timeout=20) in (141, -signal.SIGPIPE)
        assert process.stderr.read() == b"", "quietly"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["garbage", "half", "another run's"])
def test_a_bad_version_is_refused_by_name(tmp_path, kind):
    from stages.errors import DataError

    directory = LiveDirectory(tmp_path, model_hash(new_run()))
    tensors = {name: tensor for name, tensor in new_run().model.tensors.items() if "weight" in name}
    directory.publish(1, tensors, None, keep=2)
    file = tmp_path / "1.h5"
    whole = file.read_bytes()
    if kind == "garbage":
        file.write_bytes(b"\0" * 500)
    elif kind == "half":
        file.write_bytes(whole[: len(whole) // 2])
    else:
        directory = LiveDirectory(tmp_path, "0" * 64)
    with pytest.raises(DataError, match=r"1\.h5"):
        directory.wait(1, lambda: None)
    with pytest.raises(DataError, match=r"1\.h5"):
        directory.newest()


def test_a_corrupt_version_ends_the_pipeline_with_its_name(stream):
    """The trainer is not there yet; somebody else has put a file in its place."""
    (stream.directory / "live").mkdir()
    (stream.directory / "live" / "1.h5").write_bytes(b"not a version")
    result = stream("edgetrain run 'filter --window 20 --keep 8 -q | select --live live -q' < stream.h5 > out.h5")
    assert result.returncode == 65
    assert b"1.h5" in result.stderr
    assert b"Traceback" not in result.stderr


def test_a_silent_source_can_be_ended_and_leaves_a_model(stream):
    """The signal goes to `edgetrain run`, which passes it on; the trainer writes what it has."""
    words = ["filter --window 20 --keep 8 -q | select -q | train-sparse -q --metrics rows.jsonl -o out.h5"]
    pipeline = subprocess.Popen(
        [sys.executable, "-m", "edgetrain_cli", "run", *words], cwd=stream.directory, env=environment(),
        stdin=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    pipeline.stdin.write((stream.directory / "stream.h5").read_bytes())
    pipeline.stdin.flush()
    rows = stream.directory / "rows.jsonl"
    deadline_s = time.monotonic() + 60
    while not (rows.exists() and rows.read_text().count("\n") == 8) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    pipeline.send_signal(signal.SIGTERM)
    _, errors = pipeline.communicate(timeout=30)
    assert pipeline.returncode == 143, errors
    assert read_run(stream.directory / "out.h5").model.version == 8


def test_versions_that_are_gone(tmp_path):
    """Beyond what is kept the wait ends with a message, or on resuming at the version that the trainer begins with."""
    from stages.errors import DataError

    directory = LiveDirectory(tmp_path, "run")
    for number in (5, 6):
        directory.publish(number, {}, None, keep=2)
    with pytest.raises(DataError, match=r"4\.h5: gone"):
        directory.wait(4, lambda: None)
    assert directory.wait(4, lambda: None, first=5).number == 5
    assert directory.wait(6, lambda: None).number == 6


def test_what_a_killed_trainer_left_is_cleared_away(tmp_path):
    directory = LiveDirectory(tmp_path, "run")
    directory.publish(1, {}, None, keep=2)
    (tmp_path / ".2.h5.4711.tmp").write_bytes(b"half")
    directory.prepare(keep_up_to=1)
    assert [file.name for file in tmp_path.iterdir()] == ["1.h5"]
