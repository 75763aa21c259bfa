"""The picture of rounds: what is drawn, from which numbers, and what stands in its way."""

from pathlib import Path

import numpy as np
import pytest

from edgetrain_cli.commands.inspect_artifact import inspect_artifact
from edgetrain_cli.plots.rounds import BINS, draw_rounds, plot_rounds, running_median
from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block, End
from stages.errors import DataError, PartMissing, UsageError


def row(number, *, variance=0.5, strategy="titan", batch=None, allocation=None, seen=None):
    references = {"variance_is": 1.0, "variance_random": 2.0} if variance is not None else {}
    ratios = {"to_is": variance, "to_random": variance / 2} if variance is not None else {}
    nothing = dict.fromkeys(("variance_is", "variance_random", "to_is", "to_random"))
    return {"round": number, "samples": 4, "strategy": strategy, "batch": batch, "variance": variance,
            "allocation": {"ant": 3, "bee": 1} if allocation is None else allocation, "seen": seen or {},
            **nothing, **references, **ratios}  # fmt: skip


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_variances_and_allocation_are_drawn():
    figure = draw_rounds([row(number, variance=0.5) for number in range(5)])
    variances, spread, bar = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in variances.lines}
    np.testing.assert_array_equal(drawn["this choice"], [0.5] * 5)
    np.testing.assert_array_equal(drawn["importance sampling"], [1.0] * 5)
    np.testing.assert_array_equal(drawn["random choice"], [2.0] * 5)
    assert variances.get_yscale() == "log"
    np.testing.assert_array_equal(spread.collections[0].get_array(), [[3] * 5, [1] * 5])
    assert [tick.get_text() for tick in spread.get_yticklabels()] == ["ant", "bee"]
    assert spread.get_xlabel() == "round"
    assert bar.get_ylabel() == "draws\nper round"
    assert figure.get_suptitle() == "5 rounds: titan\ngradient variance 4x below random choice, 2x below importance sampling (medians)"  # noqa: E501  # fmt: skip


def test_choices_of_auto_get_a_strip():
    rows = [row(0, strategy="stratified", batch=10, variance=None), row(1, strategy="titan", batch=20),
            row(2, strategy="stratified", batch=10, variance=None)]  # fmt: skip
    _, strip, *_ = draw_rounds(rows).axes
    assert labels(strip) == ["stratified, batch 10", "titan, batch 20"]
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in strip.patches]
    assert edges == [(-0.5, 0.5), (0.5, 1.5), (1.5, 2.5)]
    assert strip.patches[0].get_facecolor() == strip.patches[2].get_facecolor() != strip.patches[1].get_facecolor()


def test_a_filters_stream_shows_what_was_seen():
    spread, bar = draw_rounds([row(0, variance=None, strategy="quota", allocation={}, seen={"ant": 60})]).axes
    np.testing.assert_array_equal(spread.collections[0].get_array(), [[60]])
    assert bar.get_ylabel() == "samples seen\nper round"


def test_many_rounds_are_averaged_in_even_columns():
    rows = [row(number, allocation={"ant": number % 2 * 4}) for number in range(4 * BINS)]
    image = draw_rounds(rows).axes[1].collections[0]
    np.testing.assert_array_equal(image.get_array(), np.full((1, BINS), 2.0))


def test_running_medians_look_both_ways_and_leave_gaps_out():
    values = np.array([1.0, 9.0, np.nan, 2.0, 3.0])
    np.testing.assert_array_equal(running_median(values, 1), [5.0, 5.0, 5.5, 2.5, 2.5])
    assert np.isnan(running_median(np.array([np.nan]), 3)).all()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_rounds_give_the_same_bytes(suffix, tmp_path):
    rows = [row(number) for number in range(3)]
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        plot_rounds(rows, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_nothing_to_draw(tmp_path):
    with pytest.raises(DataError, match="no rounds"):
        plot_rounds([], tmp_path / "a.png")
    with pytest.raises(DataError, match="say nothing"):
        plot_rounds([row(0, variance=None, allocation={})], tmp_path / "a.png")


def test_inspect_draws_rounds(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    facts = {"strategy": "titan", "variance": 0.5, "variance_is": 1.0, "variance_random": 2.0}
    counts = {"allocation": np.array([1, 1])}
    block = Block(np.zeros((2, 3), np.float32), np.array([0, 1]), "ND", {"weight": np.ones(2, np.float32)},
                  np.arange(2), ("ant", "bee"), counts, 0, facts)  # fmt: skip
    source, picture = tmp_path / "s.h5", tmp_path / "r.png"
    source.write_bytes(encode(block) + encode(End(1)))
    inspect_artifact(str(source), rounds=True, plot=str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    inspect_artifact(str(source), plot=str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="ending in"):
        inspect_artifact(str(source), rounds=True, plot="rounds.gif")


def test_without_matplotlib_nothing_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr("edgetrain_cli.plots.picture.find_spec", lambda name: None)
    with pytest.raises(PartMissing, match="matplotlib"):
        inspect_artifact(str(tmp_path / "missing.h5"), rounds=True, plot="r.png")
