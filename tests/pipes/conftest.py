"""A small run record and a small stream, made with the commands themselves, and a shell to run pipelines in."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PRELUDE = f'set -o pipefail\nedgetrain() {{ "{sys.executable}" -m edgetrain_cli "$@"; }}\n'


@dataclass(frozen=True)
class Shell:
    """bash with `edgetrain` as a command, in a directory of its own."""

    directory: Path
    unbuffered: bool = False

    def __call__(self, command: str, *, timeout_s: float = 120, stdin: bytes | None = None):
        environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", COLUMNS="120", NO_COLOR="1")
        environment.pop("PYTHONUNBUFFERED", None)
        environment.pop("EDGETRAIN_LIVE", None)
        if self.unbuffered:
            environment["PYTHONUNBUFFERED"] = "1"
        source = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
        return subprocess.run(
            ["bash", "-c", PRELUDE + command],
            cwd=self.directory,
            env=environment,
            capture_output=True,
            timeout=timeout_s,
            **source,
        )


def samples(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of three classes that a small network can tell apart: bright rows at different heights, with noise."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count)
    x = rng.integers(0, 60, (count, 12, 12))
    for i, label in enumerate(y):
        x[i, 4 * label : 4 * label + 3] += 150
    return x.astype(np.uint8), y


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A directory with base.h5 (imported), run.h5 (profiled and planned), stream.h5, support.h5 and test.h5."""
    directory = tmp_path_factory.mktemp("pipes")
    for name, count, seed in (("stream", 260, 0), ("support", 24, 1), ("test", 60, 2)):
        x, y = samples(count, seed)
        np.savez(directory / f"{name}.npz", x=x, y=y)
    result = Shell(directory)(
        """set -e
        for name in stream support test; do edgetrain pack $name.npz --block-length 100 -q -o $name.h5; done
        edgetrain import --arch cnn4 --arg width=8 --size 16 -q -o base.h5
        edgetrain profile base.h5 --no-measure -q -o profiled.h5
        edgetrain score-layers profiled.h5 --support support.h5 --memory 64KB --macs 60% -q -o run.h5
        """
    )
    assert result.returncode == 0, result.stderr.decode()
    return directory


@pytest.fixture
def shell(made, tmp_path) -> Shell:
    """A shell in a fresh directory that holds links to the artifacts of `made`."""
    for file in made.glob("*.h5"):
        (tmp_path / file.name).symlink_to(file)
    return Shell(tmp_path)
