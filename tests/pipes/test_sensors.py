"""Windows of sensor values through every stage, as real processes: a table of numbers in, a trained model out."""

import json

import numpy as np
import pytest

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block
from stages.artifacts.stream import open_records
from tests.pipes.conftest import Shell

CHANNELS, STEPS = 3, 32
PACK = f"edgetrain pack windows.csv --shape {STEPS}x{CHANNELS} --layout NTC -q"


@pytest.fixture(scope="module")
def sensors(tmp_path_factory) -> Shell:
    """A table with a row per window, time first: three activities, each a rhythm of its own on three axes."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("sensors")
    y = np.arange(240) % 3
    phase = rng.uniform(0, 2 * np.pi, (240, 1, CHANNELS))
    waves = np.sin(np.arange(STEPS)[None, :, None] * np.array([0.2, 0.6, 1.4])[y][:, None, None] + phase)
    x = waves + rng.normal(0, 0.3, waves.shape)
    names = np.array(["still", "walk", "run"])
    head = ",".join([*(f"v{i}" for i in range(STEPS * CHANNELS)), "label"])
    rows = [
        ",".join([*(f"{v:.4f}" for v in row), names[label]]) for row, label in zip(x.reshape(240, -1), y, strict=True)
    ]
    (folder / "windows.csv").write_text("\n".join([head, *rows[:180]]) + "\n")
    named = {"labels": np.arange(3), "names": tuple(names)}
    for file, part in (("support.h5", slice(15)), ("test.h5", slice(180, None))):
        (folder / file).write_bytes(encode(Block(x[part].astype(np.float32), y[part], "NTC", **named)))
    shell = Shell(folder)
    result = shell(
        f"""{PACK} --in-order -o stream.h5 &&
        edgetrain import --arch cnn1d-w8 --arg channels={CHANNELS} --arg length={STEPS} -q |
        edgetrain profile --no-measure -q -o base.h5 &&
        edgetrain score-layers base.h5 --support support.h5 --memory 40KB --macs 50% -q -o run.h5"""
    )
    assert result.returncode == 0, result.stderr.decode()
    return shell


def test_a_stream_of_windows_trains_the_planned_layers(sensors):
    result = sensors(
        """edgetrain train-sparse run.h5 support.h5 -q -o adapted.h5 &&
        cat adapted.h5 stream.h5 |
            edgetrain run 'filter --window 30 -q | select -q | train-sparse --lr 0.05 -q -o out.h5' &&
        edgetrain evaluate out.h5 test.h5 --json"""
    )
    assert result.returncode == 0, result.stderr.decode()
    before, after = (next(open_records(sensors.directory / name)).model for name in ("adapted.h5", "out.h5"))
    assert (before.input.kind, before.input.shape) == ("signal", (CHANNELS, STEPS))
    changed = {name.rpartition(".")[0] for name, old in before.tensors.items() if (after.tensors[name] != old).any()}
    assert changed == set(next(open_records(sensors.directory / "run.h5")).plan.layers)
    assert json.loads(result.stdout)["accuracy"] > 0.6  # chance is 1/3


def test_windows_of_another_shape_are_refused(sensors):
    result = sensors(
        "edgetrain pack windows.csv --shape 3x32 --layout NTC -q | edgetrain train-sparse run.h5 - -q -o no.h5"
    )
    assert result.returncode == 65
    assert b"32 channels of 3 values in layout NTC, expected 3 of 32" in result.stderr
