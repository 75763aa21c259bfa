"""The live pipeline as three processes: with a fixed lag they compute what one process does, bit for bit."""

import json
import re
import sys

import pytest

from stages.artifacts.stream import open_records
from stages.pipeline import simulate
from tests.pipes.conftest import Shell
from tests.pipes.streaming import RATE, WIDTH, assert_same, new_run, pipeline, read_run, samples, write

RELAY = """
import os, random, sys, time
chance = random.Random(sys.argv[1])
while data := os.read(0, chance.randrange(1, 8192)):
    time.sleep(chance.choice([0, 0, 0.002, 0.05]))
    while data:
        data = data[os.write(1, data):]
"""
"""Passes bytes on in pieces of random length, after random delays."""


@pytest.fixture
def stream(tmp_path) -> Shell:
    write(tmp_path, new_run(), [samples(170)])
    (tmp_path / "relay.py").write_text(RELAY)
    return Shell(tmp_path)


def expected(lag):
    return simulate(new_run(), [samples(170)], pipeline(lag))


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_three_processes_equal_the_simulator_under_random_delays(stream, lag):
    relay = f"{sys.executable} relay.py"
    result = stream(
        f"""cat stream.h5 | {relay} {lag} | edgetrain filter --window 20 --keep 8 -q | {relay} {lag + 10} |
        edgetrain select --batch 4 --live live --lag {lag} -q | {relay} {lag + 20} |
        edgetrain train-sparse --lr {RATE} --live live -q -o out.h5"""
    )
    assert result.returncode == 0, result.stderr.decode()
    assert_same(read_run(stream.directory / "out.h5"), expected(lag))
    assert list((stream.directory / "live").iterdir()) == []


def test_forks_of_one_process_equal_the_simulator(stream):
    result = stream(
        f"""edgetrain run 'filter --window 20 --keep 8 -q | select --batch 4 -q |
        train-sparse --lr {RATE} -q -o out.h5' < stream.h5"""
    )
    assert result.returncode == 0, result.stderr.decode()
    assert_same(read_run(stream.directory / "out.h5"), expected(1))


def test_features_and_anytime_selection_through_real_pipes(stream):
    """What select hands down says so, and the trainer takes it."""
    result = stream(
        f"""edgetrain run 'filter --window 20 --keep 12 --metrics filter.jsonl -q |
        select --batch 4 --send features --until-ready --metrics select.jsonl -q |
        train-sparse --lr {RATE} --metrics train.jsonl -q -o out.h5' < stream.h5 &&
        edgetrain run 'filter --window 20 --keep 12 -q | select --send features -q' < stream.h5 > batches.h5"""
    )
    assert result.returncode == 0, result.stderr.decode()
    assert read_run(stream.directory / "out.h5").model.version == 9
    lines = {name: [json.loads(line) for line in (stream.directory / f"{name}.jsonl").read_text().splitlines()]
             for name in ("filter", "select", "train")}  # fmt: skip
    assert [len(rows) for rows in lines.values()] == [9, 9, 9]
    assert [row["seen"] for row in lines["filter"]] == [20] * 8 + [10]
    assert [row["dropped"] for row in lines["filter"]] == [8] * 8 + [0]
    assert all(4 <= row["scored"] <= row["candidates"] <= 12 for row in lines["select"])
    assert all(row["variance_gain"] > 0 for row in lines["select"])
    block = list(open_records(stream.directory / "batches.h5"))[1]
    assert block.columns["boundary0"].shape == (len(block), 1, 1, WIDTH)  # (N, H, W, C)
    assert re.fullmatch(r"\S+ \(native [0-9a-f]{8}\)", block.facts["boundary"])


def test_features_sent_train_to_the_bits_of_samples_sent_whole(stream):
    for send in ("samples", "features"):
        result = stream(
            f"""cat stream.h5 | edgetrain filter --window 20 --keep 8 -q |
            edgetrain select --batch 4 --live {send} --send {send} -q |
            edgetrain train-sparse --lr {RATE} --live {send} -q -o {send}.h5"""
        )
        assert result.returncode == 0, result.stderr.decode()
        assert_same(read_run(stream.directory / f"{send}.h5"), expected(1))


@pytest.mark.parametrize(
    ("select", "train", "found", "wanted"),
    [("torch", "auto", "torch", "native"), ("auto", "torch", "native", "torch"), ("auto", "auto", "native", "native")],
    ids=["torch's for native", "native for torch's", "another plan's"],
)
def test_features_that_the_trainer_cannot_take_are_refused_in_a_line(stream, select, train, found, wanted):
    plan = "--last-layer" if found == wanted else ""
    result = stream(
        f"""cat stream.h5 | edgetrain filter --window 20 --keep 8 -q |
        edgetrain select --send features --engine {select} -q |
        edgetrain train-sparse --engine {train} {plan} -q -o out.h5"""
    )
    assert result.returncode == 65, result.stderr.decode()
    (told,) = (line for line in result.stderr.decode().splitlines() if line.startswith("edgetrain train-sparse"))
    assert re.search(rf"stream: features of \S+ \({found}.*expected those of \S+ \({wanted}.*same engine", told), told
    assert not (stream.directory / "out.h5").exists()
