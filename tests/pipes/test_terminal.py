"""What a person sees: commands in a real terminal of 80 columns, and streams that are closed, full or not there."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.pipes.conftest import ROOT, Shell
from tests.terminal import screen, watch

COLUMNS = 80


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three pictures in class folders whose names rich would take for markup."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, name in enumerate(["cats [big]", "[red]dogs", "birds & co"]):
        (folder / "photos" / name).mkdir(parents=True)
        for each in range(3):
            picture = rng.integers(80 * number, 80 * number + 60, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(picture).save(folder / "photos" / name / f"{each}.png")
    return folder


def wide(seen):
    return [line for line in seen.screen if len(line) > COLUMNS]


def test_the_screen_is_what_stands_there_in_the_end():
    assert screen("one\r\x1b[Ktwo\r\nthree\x1b[1m!\x1b[0m\r\n") == ["two", "three!", ""]


def test_a_profile_typed_at_a_terminal_is_a_table(made, tmp_path):
    seen = watch(["profile", str(made / "run.h5"), "--no-measure"], tmp_path)
    assert seen.code == 0
    assert wide(seen) == []
    text = "\n".join(seen.screen)
    assert "blocks.00.conv" in text
    assert "backward pass if all trains" in text
    assert "…" not in text
    assert "\x89HDF" not in seen.raw


@pytest.mark.parametrize("command", ["inspect run.h5", "inspect stream.h5", "score-layers run.h5 --plan last-2"])
def test_tables_fit_a_terminal_of_80_columns(made, command):
    seen = watch(command.split(), made)
    assert seen.code == 0
    assert wide(seen) == []
    assert "_bytes" not in seen.raw  # words and units, no raw keys
    assert "_macs" not in seen.raw


def test_names_with_brackets_stay_and_a_closing_line_says_what_was_done(made, photos):
    packed = watch(["pack", "photos", "--size", "16", "-o", "p.h5"], photos)
    assert packed.code == 0
    (line,) = [line for line in packed.screen if line]
    assert line.startswith("edgetrain pack: 9 samples, ")
    assert line.endswith(" KiB to p.h5")
    trained = watch(["train-sparse", str(made / "run.h5"), "p.h5", "--iterations", "2", "--lr", "0.01", "-o", "a.h5"],
                    photos)  # fmt: skip
    assert trained.code == 0
    last = [line for line in trained.screen if line][-1]
    assert "2 iterations on 9 samples, loss " in last
    assert not any("%|" in line for line in trained.screen), "a bar was left behind"
    for command in (["evaluate", "a.h5", "p.h5"], ["predict", "a.h5", "photos"], ["inspect", "p.h5"]):
        seen = watch(command, photos)
        assert seen.code == 0
        assert all(name in seen.raw for name in ("cats [big]", "[red]dogs", "birds & co"))
        assert wide(seen) == []


@pytest.mark.parametrize("viewer", ["tail -n 1", "cat"])
def test_records_are_not_sprayed_over_a_terminal_through_a_viewer(made, viewer):
    seen = watch(f"set -o pipefail; edgetrain join stream.h5 | {viewer}", made, shell=True)
    assert seen.code == 2
    assert f"a terminal behind `{viewer.split()[0]}`" in seen.raw
    assert "HDF\r" not in seen.raw


def test_records_go_through_a_pipe_to_a_program_that_reads_them(made):
    result = Shell(made)("edgetrain join -q stream.h5 | tail -c 100 | wc -c")
    assert result.stdout.strip() == b"100"


def test_a_misspelt_command_and_the_usage_of_one_without_input(tmp_path):
    seen = watch(["proflie", "x.h5"], tmp_path)
    assert seen.code == 2
    assert "Did you mean 'profile'?" in seen.raw
    usage = watch(["filter"], tmp_path)
    assert usage.code == 2
    assert usage.screen[0] == "Usage: edgetrain filter [OPTIONS] [IN]"
    assert wide(usage) == []


def test_a_closed_stdout_is_an_error_and_no_file_is_hurt(made):
    result = Shell(made)("edgetrain inspect stream.h5 >&-")
    assert result.returncode == 74
    assert b"stdout: closed" in result.stderr


@pytest.mark.parametrize("columns", ["", "wide", "40"])
def test_whatever_columns_says_tables_are_written(made, columns):
    result = Shell(made)(f"COLUMNS='{columns}' edgetrain inspect stream.h5")
    assert result.returncode == 0
    assert b"samples" in result.stdout


def test_select_fails_where_filter_failed(made):
    for command in ("edgetrain filter missing.h5 | edgetrain select > s.h5",
                    "cat run.h5 | edgetrain select --strategy random > s.h5"):  # fmt: skip
        result = Shell(made)(f"set +o pipefail; {command}")
        assert result.returncode == 65, result.stderr
    result = Shell(made)("edgetrain run 'filter missing.h5 | select --strategy random' > s.h5")
    assert result.returncode == 66


def test_a_recipe_ends_where_a_step_fails(made, tmp_path):
    (tmp_path / "photos" / "one").mkdir(parents=True)
    arguments = [sys.executable, "-m", "edgetrain_cli", "adapt", str(made / "base.h5"), "photos", "-o", "mine.h5"]
    result = subprocess.run(arguments, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
                            capture_output=True, text=True, check=False)  # fmt: skip
    assert result.returncode in (65, 66)
    assert result.stderr.count("$ edgetrain") == 1
    assert not (tmp_path / "mine.h5").exists()
