"""`select --strategy auto` between real processes: it learns what updates cost, and can be replayed."""

import json

import pytest

from tests.pipes.conftest import Shell
from tests.pipes.streaming import RATE, assert_same, new_run, read_run, samples, write


@pytest.fixture
def stream(tmp_path) -> Shell:
    write(tmp_path, new_run(), [samples(300)])
    return Shell(tmp_path)


def pipeline(name: str, more: str = "") -> str:
    select = f"select --strategy auto --batch 3 --max-batch 8 --metrics {name}.jsonl {more}"
    return f"""edgetrain run 'filter --window 20 --keep 8 -q | {select} |
        train-sparse --lr {RATE} -q -o {name}.h5' < stream.h5"""


def test_what_auto_chose_is_told_recorded_and_replayed(stream):
    first = stream(pipeline("first"))
    assert first.returncode == 0, first.stderr.decode()
    assert b"round 0: " in first.stderr
    assert b"cost per progress of others" in first.stderr
    rows = [json.loads(line) for line in (stream.directory / "first.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(15))
    assert {row["auto_unit"] for row in rows[5:]} == {"seconds"}  # the trainer has said what updates take
    assert all(row["auto_update_cost"] > 0 for row in rows)

    again = stream(pipeline("again", "--replay first.jsonl"))
    assert again.returncode == 0, again.stderr.decode()
    assert b"(replayed)" in again.stderr
    assert_same(read_run(stream.directory / "again.h5"), read_run(stream.directory / "first.h5"))
    decided = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    repeated = [json.loads(line) for line in (stream.directory / "again.jsonl").read_text().splitlines()]
    assert [{name: value for name, value in row.items() if name != "seconds"} for row in repeated] == decided


def test_a_replay_needs_the_record_of_such_a_run(stream):
    (stream.directory / "other.jsonl").write_text('{"round": 0, "candidates": 8}\n')
    (stream.directory / "none.jsonl").write_text("not JSON\n")
    head = "edgetrain filter --window 20 --keep 8 -q < stream.h5 | edgetrain select --strategy"
    for options, code, words in [
        ("auto --replay other.jsonl", 65, b"a line without 'strategy'"),
        ("auto --replay none.jsonl", 65, b"not lines of JSON"),
        ("auto --replay missing.jsonl", 66, b"no such file"),
        ("titan --replay other.jsonl", 2, b"--strategy auto"),
    ]:
        result = stream(f"{head} {options} > out.h5")
        assert result.returncode == code, (options, result.stderr.decode())
        assert words in result.stderr
