"""The tutorial's commands, copied from the page and run in an empty folder on pictures that are made here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stages.artifacts.stream import open_records

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
CORNERS = {"circle": 40, "square": 4, "triangle": 3}


def photo(corners, rng):
    """A bright shape somewhere on dark ground, with noise."""
    noise = rng.normal(40, 12, (64, 80, 3))
    picture = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    x, y, size = rng.uniform(30, 50), rng.uniform(26, 38), rng.uniform(16, 22)
    turn = int(rng.integers(-12, 13))
    colour = tuple(int(value) for value in rng.integers(150, 255, 3))
    ImageDraw.Draw(picture).regular_polygon((x, y, size), corners, rotation=turn, fill=colour)
    return picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder after all commands of the page have run in it."""
    folder, rng = tmp_path_factory.mktemp("tutorial"), np.random.default_rng(0)
    for name, corners in CORNERS.items():
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(10):
            photo(corners, rng).save(folder / "photos" / name / f"IMG_{number}.jpg")
    (folder / "mine.py").write_text(blocks("python")[0])
    commands = "\n".join(blocks("sh"))
    prelude = f'set -euo pipefail\nedgetrain() {{ "{sys.executable}" -m edgetrain_cli "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", "-c", prelude + commands], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (folder / "stderr.txt").write_text(result.stderr)
    return folder


def blocks(language):
    """The code blocks of the page in this language, those in lists too."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def test_the_page_has_commands_to_run():
    assert len(blocks("sh")) >= 8
    assert len(blocks("python")) == 1


def test_the_adapted_model_knows_the_classes_of_the_photos(folder):
    (run,) = open_records(str(folder / "mine.h5"))
    assert run.model.head.names == tuple(CORNERS)
    assert run.plan is not None
    assert run.model.input.prepared.fit == "crop"


def test_answers_are_better_than_chance(folder):
    rows = [line.split(",") for line in (folder / "answers.csv").read_text().splitlines()[1:]]
    assert len(rows) == 30
    hits = sum(row[1] in row[0] for row in rows)
    assert hits > 15  # ten would be chance


def test_adapt_says_what_it_runs(folder):
    said = [line for line in (folder / "stderr.txt").read_text().splitlines() if line.startswith("$ ")]
    assert [line.split()[2] for line in said] == [
        "pack", "pack", "profile", "score-layers", "train-sparse", "evaluate"
    ]  # fmt: skip
    assert said[4] == "$ edgetrain train-sparse run.h5 support.h5 -o mine.h5"


def test_the_methods_of_ones_own_are_in_the_history(folder):
    (run,) = open_records(str(folder / "streamed.h5"))
    asked = {step.command: step.arguments for step in run.history}
    assert asked["score-layers"]["criterion"] == "mine:cheapest"
    assert asked["filter"]["strategy"] == "mine:brightest"
    assert asked["select"]["strategy"] == "mine:longest_gradients"
    assert run.model.version == 1


def test_the_exported_files_are_there(folder):
    for name in ("mine.safetensors", "mine.onnx", "answers.csv"):
        assert (folder / name).stat().st_size > 100
