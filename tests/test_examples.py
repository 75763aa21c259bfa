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


def test_titans_comparison_runs_from_trials_to_page(tmp_path):
    chosen = [
        "--modality",
        "activity",
        "--order",
        "iid",
        "noisy-y",
        "--methods",
        "random",
        "auto to 30",
        "quota + c-is",
    ]
    small = [
        "--rounds",
        "26",
        "--seeds",
        "1",
        "--elsewhere-seeds",
        "1",
        "--rates",
        "0.05",
        "--jobs",
        "1",
        "--out",
        "trials",
        "--page",
        "page.md",
    ]
    script = str(EXAMPLES / "reproduce" / "titan.py")
    run([sys.executable, script, *chosen, *small], tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert "156 rounds looked at; c-is above is in 0, c-is above random in 0" in page  # of all six trials
    assert page.count("| quota + c-is | 0.05 |") == 2
    assert "## activity, noisy-y" in page
    assert "`auto to 30` took " in page
    assert len(list(tmp_path.rglob("*-checked.json"))) == 6


def test_costs_to_an_accuracy_are_those_of_the_first_smoothed_point_there():
    reproduce = str(EXAMPLES / "reproduce")
    sys.path.insert(0, reproduce)
    try:
        import titan_page
    finally:
        sys.path.remove(reproduce)

    def result(*accuracies, update=1.0):
        curve = [{"round": 10 * at, "accuracy": value, "filter": 0.1 * at, "select": 0.4 * at, "update": update * at}
                 for at, value in enumerate(accuracies, start=1)]  # fmt: skip
        return {"curve": curve}

    reference = result(0.1, 0.2, 0.3, 0.6, 0.6, 0.6)
    assert titan_page.final(reference) == pytest.approx(0.6)
    assert titan_page.second_half(result(0.9, 0.9, 0.1, 0.2, 0.6)) == pytest.approx(0.3)
    fast, slow = result(0.6, 0.6, 0.6, 0.6, 0.6, 0.6, update=2.0), result(*[0.1] * 6)
    assert titan_page.cost_to([reference], [reference], "rounds") == "1.00"
    assert titan_page.cost_to([fast], [reference], "rounds") == "0.50"
    assert titan_page.cost_to([fast], [reference], "seconds") == "0.83"  # 3 x 2.5 over 6 x 1.5
    assert titan_page.cost_to([fast], [reference], "pipelined seconds") == "1.00"  # 3 x 2 over 6 x 1
    between = result(0.1, 0.2, 0.3, 0.9, 0.9, 0.9)  # means 0.2, 0.467, 0.7, 0.9: 0.6 lies between the second and third
    assert titan_page.cost_to([between], [reference], "rounds") == f"{(4 + 0.4 / 0.7) / 6:.2f}"
    assert titan_page.cost_to([slow], [reference], "rounds") == "never"
    assert titan_page.cost_to([fast, slow], [reference] * 2, "rounds") == "> (1 of 2) 0.75"
    assert titan_page.cost_to([fast] * 3, [reference] * 3, "rounds") == "0.50 (0.50-0.50)"
    assert titan_page.relative([reference], [fast], [0.6], "rounds") == "2.00"
    rivals = {"random": [reference], "stratified": [fast], "all": [slow], "is": [fast]}
    assert titan_page.quickest(rivals, [0.6], "rounds") == "stratified"
    assert titan_page.quickest(rivals, [0.6], "seconds") == "stratified"
    assert titan_page.quickest({"random": [slow, fast], "all": [reference] * 2}, [0.6] * 2, "rounds") == "all"


def test_forgettings_comparison_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGETRAIN_DATA", str(tmp_path / "nothing"))
    page = run([sys.executable, str(EXAMPLES / "reproduce" / "forgetting.py"), "--quick"], tmp_path)
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in page.splitlines() if line.count("|") == 7}
    assert rows["everything"][3:5] == ["1.00", "1.00"]
    assert [rows[name][3] for name in ("forgetting", "a fixed random 80 %")] == ["0.80", "0.80"]
    assert "samples of glyphs" in page


def test_transformers_comparison_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGETRAIN_DATA", str(tmp_path / "nothing"))
    page = run([sys.executable, str(EXAMPLES / "reproduce" / "vit.py"), "--quick"], tmp_path)
    assert "| everything | 1.00 |" in page
    assert "paired tasks of glyphs" in page


def test_tinytrains_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from stages.artifacts.files import atomic_write
    from stages.artifacts.hdf5 import encode
    from stages.importing import Importing, import_model

    monkeypatch.setenv("EDGETRAIN_DATA", str(tmp_path / "nothing"))
    kept = tmp_path / "cnn4-w32" / "32-pixels-seed-0.h5"  # as if meta-training were done
    kept.parent.mkdir()
    atomic_write(kept, encode(import_model(Importing(arch="cnn4-w32", arch_args={"size": 32}), None)))
    script = [sys.executable, str(EXAMPLES / "reproduce" / "tinytrain_accuracy.py"), "--out", str(tmp_path)]
    small = ["--tasks", "1", "--jobs", "1"]
    run([*script, *small, "--methods", "none,tinytrain"], tmp_path)
    before = (kept.parent / "none.jsonl").stat().st_mtime_ns
    run([*script, *small, "--methods", "none,last-layer,tinytrain:rule=l2"], tmp_path)
    assert (kept.parent / "none.jsonl").stat().st_mtime_ns == before
    page = (tmp_path / "tinytrain_accuracy.md").read_text()
    methods, ablations = page.split("Ablations")
    assert [methods.count(f"| average | {name} | 2 |") for name in ("none", "last-layer", "tinytrain")] == [1, 1, 1]
    assert "rule=l2" not in methods
    assert "| tinytrain:rule=l2 |" in ablations
    assert (tmp_path / "tinytrain_accuracy-cnn4-w32.png").is_file()
