"""The examples that are quick enough to run with the tests do run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(arguments: list[str], directory: Path) -> str:
    environment = dict(os.environ, PYTHONPATH=str(EXAMPLES.parent), OMP_NUM_THREADS="1")
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=directory, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_library_is_usable_without_the_command_line(tmp_path):
    printed = run([sys.executable, str(EXAMPLES / "library.py")], tmp_path)
    accuracy = float(printed.split(" updates: ")[1].split(" %")[0])
    assert accuracy > 60  # three classes; chance is 33


def test_the_demos_data_are_the_real_digits(tmp_path):
    import numpy as np

    run([sys.executable, str(EXAMPLES / "make_data.py"), str(tmp_path)], tmp_path)
    with np.load(tmp_path / "digits.npz") as made:
        assert made["x"].shape == (1797, 8, 8)
        assert sorted(set(made["y"].tolist())) == list(range(10))


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_sound(script, tmp_path):
    run(["bash", "-n", str(script)], tmp_path)
    assert script.read_text().startswith("#!/usr/bin/env bash")


def test_there_are_scripts():
    assert len(list(EXAMPLES.rglob("*.sh"))) >= 2
