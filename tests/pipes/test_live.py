"""The live pipeline as three processes: with a fixed lag they compute what one process does, bit for bit."""

import sys

import pytest
import torch

from stages.pipeline import simulate
from tests.pipes.conftest import Shell
from tests.pipes.streaming import RATE, assert_same, new_run, pipeline, read_run, samples, write

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


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
