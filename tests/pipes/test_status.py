"""What streaming stages tell about their rounds."""

import json

import numpy as np

from edgetrain_cli.status import Status, round_figures
from stages.artifacts.records import Block

BLOCK = Block(
    np.zeros((4, 2), np.float32), np.array([0, 0, 1, 1]), "ND", labels=np.array([0, 1]), round=7,
    per_class={"seen": np.array([60, 40]), "missed": np.array([3, 0])},
    facts={"candidates": 30, "scored": 16, "variance": 0.5, "variance_random": 2.0},
)  # fmt: skip


class Io:
    """A stage that keeps what its line shows."""

    def __init__(self):
        self.shown, self.said = [], ()

    def did(self, *figures):
        self.said = figures

    def progress(self, label, unit):
        return lambda done, **figures: self.shown.append((done, figures))


def test_a_batch_tells_about_its_round():
    assert round_figures(BLOCK) == {
        "samples": 4, "round": 7, "candidates": 30, "scored": 16, "seen": 100, "missed": 3, "dropped": 70,
        "variance_gain": 4.0,
    }  # fmt: skip


def test_a_plain_block_tells_what_it_can():
    block = Block(np.zeros((4, 2), np.float32), np.array([0, 0, 1, 1]), "ND")
    assert round_figures(block) == {"samples": 4, "candidates": 4}


def test_the_line_and_the_file(tmp_path):
    io, metrics = Io(), tmp_path / "rounds.jsonl"
    status = Status(io, str(metrics), "training", last=True)
    status.passed(BLOCK)
    status.passed(BLOCK)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["round"] for row in rows] == [7, 7]
    assert rows[0]["seconds"] <= rows[1]["seconds"]
    done, figures = io.shown[-1]
    assert done == 2
    assert (figures["dropped"], figures["gradient noise"]) == ("70 %", "1/4 of random choice's")
    status.close()
    assert io.said[0] == "2 rounds"
    assert "dropped 70 %" in io.said


def test_watching_passes_blocks_on_and_shows_nothing_by_itself():
    io = Io()
    status = Status(io, None, "training", last=True)
    assert list(status.watch([BLOCK])) == [BLOCK]
    assert io.shown == []
    status.show(loss=1.5)
    assert io.shown[0][1]["loss"] == 1.5
