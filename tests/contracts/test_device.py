"""The device half: every command that a device runs works where torch is not installed, and imports nothing large."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block, Model, Run
from stages.artifacts.stream import open_records
from stages.models import registry
from stages.models.modules import state

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("torch", "scipy.stats", "scipy.optimize")
"""225, 113 and 90 MB."""
RUN = """
import sys
sys.modules["torch"] = None  # what `import torch` finds where it is not installed
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else found(name, package)
sys.argv = ["edgetrain", *sys.argv[1:]]
try:
    from edgetrain_cli.app import main
    main()
finally:
    there = [name for name in ("torch", "scipy.stats", "scipy.optimize") if sys.modules.get(name) is not None]
    print("imported:", *there, file=sys.stderr)
"""


def edgetrain(folder: Path, *words: str, stdin: bytes = b"", code: int = 0) -> subprocess.CompletedProcess[bytes]:
    """One command as a process without torch; it must end with this code and import nothing large."""
    result = subprocess.run(
        [sys.executable, "-c", RUN, *words],
        cwd=folder,
        input=stdin,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    said = result.stderr.decode()
    assert result.returncode == code, said
    for line in said.splitlines():
        assert not line.startswith("imported: "), f"{words[0]} imported {line}"
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run record of a small CNN and blocks of little pictures in three classes."""
    folder = tmp_path_factory.mktemp("device")
    args = {"width": 16, "size": 28}
    model = Model("cnn4", args, registry.input_spec("cnn4", args), "batchnorm", state(registry.build("cnn4", args)))
    from stages.models.deploy import with_graph

    (folder / "base.h5").write_bytes(encode(Run(with_graph(model))))
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (rng.integers(0, 80, (60, 28, 28)) + 80 * y[:, None, None] // 2).astype(np.uint8)
    (folder / "support.h5").write_bytes(encode(Block(x[:15], y[:15], "NHW")))
    (folder / "stream.h5").write_bytes(encode(Block(x, y, "NHW")))
    (folder / "query.h5").write_bytes(encode(Block(x[15:30], y[15:30], "NHW")))
    return folder


def test_a_support_set_from_profile_to_export(folder):
    edgetrain(folder, "profile", "base.h5", "--repeats", "1", "-o", "run.h5")
    edgetrain(folder, "score-layers", "run.h5", "--support", "support.h5", "--memory", "64KiB", "-q", "-o", "run.h5")
    edgetrain(folder, "train-sparse", "run.h5", "support.h5", "--iterations", "2", "-q", "-o", "adapted.h5")
    shown = edgetrain(folder, "evaluate", "adapted.h5", "query.h5", "--json")
    assert json.loads(shown.stdout)["samples"] == 15
    edgetrain(folder, "predict", "adapted.h5", "query.h5", "--format", "csv", "-o", "answers.csv")
    assert len((folder / "answers.csv").read_text().splitlines()) == 16
    edgetrain(folder, "export", "adapted.h5", "-q", "-o", "adapted.safetensors")
    edgetrain(folder, "export", "adapted.h5", "-q", "-o", "adapted.onnx")
    edgetrain(folder, "inspect", "adapted.h5")
    missing = edgetrain(folder, "export", "adapted.h5", "-o", "adapted.pth", code=69)
    assert b"pip install 'edgetrain[torch]'" in missing.stderr


def test_a_stream_through_three_stages(folder):
    edgetrain(folder, "score-layers", "base.h5", "--plan", "last-3", "-q", "-o", "planned.h5")
    given = (folder / "planned.h5").read_bytes() + (folder / "stream.h5").read_bytes()
    kept = edgetrain(folder, "filter", "--window", "20", "--keep", "8", stdin=given)
    for strategy in ("titan", "camel", "ocs", "auto"):
        chosen = edgetrain(folder, "select", "--batch", "4", "--strategy", strategy, stdin=kept.stdout)
        edgetrain(folder, "train-sparse", "-q", "-o", "streamed.h5", stdin=chosen.stdout)
    live = edgetrain(folder, "select", "--batch", "4", "--importance", "live", "--send", "features", stdin=kept.stdout)
    edgetrain(folder, "train-sparse", "-q", "-o", "streamed.h5", stdin=live.stdout)
    assert next(open_records(folder / "streamed.h5")).model.version == 3
    words = "filter --window 20 --keep 8 | select --batch 4 | train-sparse -q -o forked.h5"
    edgetrain(folder, "run", words, stdin=given)
    assert next(open_records(folder / "forked.h5")).model.version == 3


def test_methods_on_tasks(folder):
    """All but the baselines that train modules of torch's."""
    methods = "none,last-layer,full,bias,tinytrain,shortcut,transductive"
    words = ("evaluate", "base.h5", "stream.h5", "--tasks", "1", "--ways", "3", "--shots", "2", "--iterations", "1")
    shown = edgetrain(folder, *words, "--lr", "0.001", "--methods", methods, "--json")
    assert len(json.loads(shown.stdout)["summary"]) == 7
    missing = edgetrain(folder, *words, "--methods", "tinytl", code=69)
    assert b"torch is not installed" in missing.stderr


def test_torch_itself_is_missed_with_one_line(folder):
    for words in (
        ("evaluate", "base.h5", "query.h5", "--support", "support.h5", "--engine", "torch"),
        ("predict", "base.h5", "query.h5", "--support", "support.h5", "--device", "cuda"),
        ("import", "--arch", "cnn4", "-o", "x.h5"),
        ("pretrain-fsl", "--arch", "cnn4", "--glyphs", "-o", "x.h5"),
    ):
        said = edgetrain(folder, *words, code=69).stderr.decode().splitlines()
        assert len([line for line in said if line.startswith("edgetrain ")]) == 1
        assert "pip install 'edgetrain[torch]'" in said[0]
    assert not (folder / "x.h5").exists()
