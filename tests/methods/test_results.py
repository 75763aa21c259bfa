import math
from dataclasses import replace

import pytest

from stages.errors import DataError, OutputError, UsageError
from stages.methods.results import Row, header_line, merge_results, read_results, results_file, row_line, summarise

ROW = Row("birds", 0, "none", 0.5, 5, 25, 50, 0.0, 0, 0, 0, 0, 0)


def rows(dataset, **accuracies):
    """One row per method and task from lists of accuracies."""
    return [
        replace(ROW, dataset=dataset, task=task, method=method, accuracy=value)
        for method, values in accuracies.items()
        for task, value in enumerate(values)
    ]


def test_means_and_paired_differences_by_hand():
    none, full = summarise(rows("birds", none=[0.2, 0.4], full=[0.5, 0.9]), "none")
    assert (none.accuracy, none.difference, none.tasks) == (pytest.approx(0.3), 0.0, 2)
    assert full.accuracy == pytest.approx(0.7)
    assert full.difference == pytest.approx(0.4)
    # differences 0.3 and 0.5: s = 0.1414, t(0.975, 1) = 12.706, / sqrt(2)
    assert full.difference_half_width == pytest.approx(12.7062 * 0.1, rel=1e-5)
    assert full.half_width == pytest.approx(12.7062 * 0.2, rel=1e-5)


def test_pairing_is_by_task_not_by_order():
    table = rows("birds", none=[0.1, 0.9], full=[0.2, 1.0])
    (_, full) = summarise([table[0], table[1], table[3], table[2]], "none")
    assert full.difference_half_width == pytest.approx(0.0, abs=1e-12)


def test_the_average_gives_every_data_set_equal_weight():
    many = rows("birds", none=[0.2] * 9, full=[0.4] * 9) + rows("signs", none=[0.6, 0.8], full=[0.6, 0.8])
    average = summarise(many, "none")[-2:]
    assert [each.dataset for each in average] == ["average", "average"]
    assert [each.accuracy for each in average] == pytest.approx([0.45, 0.55])
    assert [each.tasks for each in average] == [11, 11]
    # standard errors add in squares: the first set's are 0
    assert average[0].half_width == pytest.approx(12.7062 * 0.1 / 2, rel=1e-5)


def test_a_single_task_has_no_interval():
    (only,) = summarise(rows("birds", none=[0.5]), "none")
    assert math.isnan(only.half_width)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "no rows"),
        (rows("birds", none=[0.1]) * 2, "twice"),
        (rows("birds", none=[0.1, 0.2], full=[0.3]), "full lacks 1 of the 2 tasks"),
    ],
    ids=["empty", "twice", "incomplete"],
)
def test_incomplete_results_are_refused(table, message):
    with pytest.raises(DataError, match=message):
        summarise(table, "none")


def test_an_unknown_reference_is_refused():
    with pytest.raises(UsageError, match="'full'"):
        summarise(rows("birds", none=[0.5]), "full")


def test_lines_survive_the_round_trip():
    text = header_line({"seed": 1}) + row_line(ROW) + row_line(replace(ROW, task=1, accuracy=1 / 3))
    header, back = read_results(text, "a")
    assert header["seed"] == 1
    assert back == [ROW, replace(ROW, task=1, accuracy=1 / 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a:1: no JSON object"),
        ("{}\n", "no header"),
        (header_line({}) + "{}\n", "a:2: not a row"),
        (header_line({}) + row_line(ROW).replace("0.5", '"x"'), "a:2: not a row"),
        (header_line({}) + row_line(ROW)[:40], "a:2: no JSON object"),
    ],
    ids=["empty", "no header", "no row", "wrong type", "cut off"],
)
def test_files_that_are_no_results(text, message):
    with pytest.raises(DataError, match=message):
        read_results(text, "a")


def test_shards_of_different_evaluations_do_not_merge():
    parts = [("a", {"seed": 1}, [ROW]), ("b", {"seed": 2}, [ROW])]
    with pytest.raises(DataError, match="seed 2, expected 1 as in a"):
        merge_results(parts)


def test_methods_that_were_measured_apart_stand_side_by_side():
    one, other = rows("birds", none=[0.2, 0.4]), rows("birds", full=[0.5, 0.9])
    joined = merge_results(
        [("a", {"seed": 1, "methods": ["none"]}, one), ("b", {"seed": 1, "methods": ["full"]}, other)]
    )
    assert summarise(joined, "none")[1].difference == pytest.approx(0.4)


def test_earlier_results_stay_until_there_is_a_first_new_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    with results_file(path, {"seed": 0}) as (known, add):
        assert known == []
        assert not path.exists()
        add(ROW)
    before = path.read_text()
    with pytest.raises(DataError), results_file(path, {"seed": 1}):
        raise DataError("samples", "too few")
    assert path.read_text() == before
    with results_file(path, {"seed": 1}) as (_, add):
        add(replace(ROW, method="b"))
    header, rows = read_results(path.read_text(), "rows")
    assert (header["seed"], [each.method for each in rows]) == (1, ["b"])
    with results_file(path, {"seed": 1}, resume=True) as (known, add):
        assert [each.method for each in known] == ["b"]
        add(replace(ROW, method="b", task=1))
    assert len(read_results(path.read_text(), "rows")[1]) == 2
    with pytest.raises(OutputError), results_file(tmp_path / "none" / "rows.jsonl", {}):
        pass
