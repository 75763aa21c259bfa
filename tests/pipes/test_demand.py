"""`filter --pace demand` as a process: a slow reader never stalls the sensor, and every sample is accounted for."""

import json
import sys

from tests.pipes.conftest import ROOT, Shell
from tests.pipes.streaming import new_run, samples, write

SLOW = """
import json, sys, time
from stages.artifacts.stream import records
rounds = []
for record in records(sys.stdin.buffer, "stdin"):
    if hasattr(record, "rounds"):
        break
    counts = {name: values.tolist() for name, values in record.per_class.items()}
    rounds.append({"kept": len(record), "weight": float(record.columns["weight"].sum()), **counts})
    time.sleep(0.4)
print(json.dumps({"rounds": rounds, "end": record.rounds}))
"""


def test_a_slow_reader_never_stalls_the_sensor(tmp_path):
    write(tmp_path, new_run(), [samples(60)])
    (tmp_path / "slow.py").write_text(SLOW)
    result = Shell(tmp_path)(
        f"{sys.executable} {ROOT}/examples/sensor.py stream.h5 --rate 60 --seconds 3 | "
        f"edgetrain filter --pace demand --window 5 --keep 5 --metrics filter.jsonl -q | {sys.executable} slow.py"
    )
    errors = result.stderr.decode()
    assert result.returncode == 0, errors
    assert errors == "sensor: 181 samples, 0 stalls\n"
    told = json.loads(result.stdout)
    rounds = told["rounds"]
    assert told["end"] == len(rounds) > 1
    assert sum(sum(one["seen"]) for one in rounds) == 181
    assert all(sum(one["seen"]) - sum(one["dropped"]) == one["kept"] for one in rounds)
    assert len({sum(one["seen"]) for one in rounds}) > 1, "rounds are as long as the reader makes them"
    assert sum(sum(one["missed"]) for one in rounds) == 0
    lines = [json.loads(line) for line in (tmp_path / "filter.jsonl").read_text().splitlines()]
    assert [line["seen"] for line in lines] == [sum(one["seen"]) for one in rounds]


def test_demand_needs_a_pipe(tmp_path):
    write(tmp_path, new_run(), [samples(60)])
    result = Shell(tmp_path)("edgetrain filter --pace demand stream.h5 -o out.h5")
    assert result.returncode == 2
    assert b"pipe" in result.stderr
