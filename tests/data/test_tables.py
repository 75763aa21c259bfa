"""Text tables: delimiter, header, columns, and rows of numbers read on demand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.samples import Notes
from stages.data.tables import Writing, number_table, read_table, table_form
from stages.errors import DataError, UsageError


def write(tmp_path: Path, text: str, name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text", "mentioned", "delimiter", "header"),
    [
        ("t.csv", "1,2\n3,4\n", (), ",", None),
        ("t.csv", "a,b\n3,4\n", (), ",", ("a", "b")),
        ("t.csv", "0,1,label\n5,6,7\n", (), ",", ("0", "1", "label")),
        ("t.csv", "5.1,setosa\n4.9,virginica\n", (), ",", None),
        ("t.csv", "file;class\na.png;cat\n", (), ";", ("file", "class")),
        ("t.csv", "a;b\nc;d\n", (), ";", None),
        ("t.csv", "a;b\nc;d\n", ("b",), ";", ("a", "b")),
        ("t.tsv", "x\ty\n1\t2\n", (), "\t", ("x", "y")),
        ("t.txt", "0001 Boeing 707\n0002 A340\n", (), None, None),
        ("t.csv", "\ufeffx,y\r\n1,2\r\n", (), ",", ("x", "y")),
        ("t.csv", "x,y\n", (), ",", None),
        ("t.csv", "name,label\n", (), ",", ("name", "label")),
        ("t.csv", "n,y\np,y\n", (), ",", None),
        ("t.csv", ",a,b\n0,1,2\n", (), ",", ("", "a", "b")),
        ("t.csv", "5.1,,a\n4.9,3.0,b\n", (), ",", None),
        ("t.csv", "a;b\n1,5;2,5\n", (), ";", ("a", "b")),
        ("t.csv", "a|b\n1|2\n", (), "|", ("a", "b")),
        ("t.csv", "a,b\r1,2\r", (), ",", ("a", "b")),
        ("t.txt", "1.0  2.0 0\n 2.5 3.0 1\n", (), " ", None),
        ("t.txt", "a b label\n1 2 0\n", (), " ", ("a", "b", "label")),
    ],
)
def test_form(
    tmp_path: Path, name: str, text: str, mentioned: tuple[str, ...], delimiter: str, header: tuple[str, ...] | None
) -> None:
    form = table_form(write(tmp_path, text, name), mentioned)
    assert (form.delimiter, form.header) == (delimiter, header)


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("0,1,2\n1.5,2.5,0\n", "--header"),
        ("5.1,?,0\n4.9,3.0,1\n", "--header"),
        ("1,5;2,5\n2,5;3,5\n", "--delimiter"),
    ],
)
def test_what_can_be_read_in_two_ways_is_asked(tmp_path: Path, text: str, option: str) -> None:
    with pytest.raises(UsageError, match=option):
        table_form(write(tmp_path, text))


def test_what_is_stated_is_not_asked(tmp_path: Path) -> None:
    counted = write(tmp_path, "0,1,2\n1.5,2.5,0\n")
    assert table_form(counted, (), Writing(header="yes")).header == ("0", "1", "2")
    assert table_form(counted, (), Writing(header="no")).header is None
    _, _, rows = number_table(counted, "-1", [], Writing(header="yes"))
    assert rows(0).tolist() == [1.5, 2.5]
    commas = write(tmp_path, "1,5;2,5;7\n2,5;3,5;8\n", "c.csv")
    classes, _, rows = number_table(commas, "-1", [], Writing(delimiter=";", decimal=",", header="no"))
    assert (classes, rows(1).tolist()) == (["7", "8"], [2.5, 3.5])
    _, _, rows = number_table(commas, "-1", [], Writing(delimiter=";"))
    with pytest.raises(DataError, match="--decimal ,"):
        rows(0)


def test_index_columns_are_left_out_and_ids_kept_beside(tmp_path: Path) -> None:
    notes = Notes()
    path = write(tmp_path, ",a,b,label\n0,1,2,0\n1,3,4,1\n2,5,6,1\n")
    classes, kept, rows = number_table(path, None, [], notes=notes)
    assert (classes, kept, rows(2).tolist()) == (["0", "1", "1"], {}, [5.0, 6.0])
    assert notes.lines() == ["column 1, without a name, counts the rows and is left out"]
    _, kept, rows = number_table(write(tmp_path, "id,a,label\n907,1,0\n33,2,1\n"), None, [], notes=notes)
    assert (kept, rows(0).tolist()) == ({"id": ["907", "33"]}, [1.0])
    assert "'id' is kept beside the features" in notes.lines()[1]
    with pytest.raises(DataError, match="column 1: no name"):
        number_table(write(tmp_path, ",a,label\n5,1,0\n9,2,1\n"), None, [])


def test_columns_between_white_space_and_an_empty_last_one(tmp_path: Path) -> None:
    classes, _, rows = number_table(write(tmp_path, "1.0  2.0 0\n 2.5 3.0 1\n", "t.txt"), "-1", [])
    assert (classes, rows(1).tolist()) == (["0", "1"], [2.5, 3.0])
    notes = Notes()
    _, _, rows = number_table(write(tmp_path, "a,label,\n1,x,\n2,y,\n"), None, [], notes=notes)
    assert rows(1).tolist() == [2.0]
    assert notes.lines() == ["column 3, without a name, is empty and left out"]


def test_rows_over_several_lines_and_ends_of_every_kind(tmp_path: Path) -> None:
    text = 'name,label,a\n"x, y",cat,1\n"two\nlines",dog,2\n\nz,cat,x\n'
    for end in ("\n", "\r\n", "\r"):
        classes, kept, rows = number_table(write(tmp_path, text.replace("\n", end)), None, ["name"])
        assert classes == ["cat", "dog", "cat"]
        assert kept["name"][:2] == ["x, y", f"two{end}lines"]
        assert [rows(i).tolist() for i in (1, 0)] == [[2.0], [1.0]]
        with pytest.raises(DataError, match=r"t\.csv:6, column a: 'x'"):
            rows(2)


def test_fields_that_are_too_long_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.csv:2: no table there"):
        read_table(write(tmp_path, "a,b\n1," + "x" * 200_000 + "\n"))


def test_columns_by_name_and_by_position_from_both_ends(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, 'id,text,n\n1,"a, b",2.5\n\n2,c,3\n'))
    assert table.column("text") == ["a, b", "c"]
    assert table.column("1") == table.column("-3") == ["1", "2"]
    assert table.numbers("-1").tolist() == [2.5, 3.0]
    for wrong in ("0", "4", "-4", "none"):
        with pytest.raises(UsageError, match=f"no column '{wrong}', expected id, text, n"):
            table.column(wrong)


def test_ragged_empty_and_binary_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":3: 3 columns, expected 2"):
        read_table(write(tmp_path, "a,b\n1,2\n1,2,3\n"))
    with pytest.raises(DataError, match="empty file"):
        read_table(write(tmp_path, "\n\n"))
    path = tmp_path / "b.csv"
    path.write_bytes(b"\xff\xd8\xff\xe0\n1,2\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_table(path)


def test_numbers_with_the_class_found_by_its_name(tmp_path: Path) -> None:
    classes, kept, rows = number_table(write(tmp_path, "f0,user,f1,Label\n1,ann,2,a\n3,bob,4,b\n"), None, ["user"])
    assert classes == ["a", "b"]
    assert kept == {"user": ["ann", "bob"]}
    assert rows(1).tolist() == [3.0, 4.0]
    assert rows(0).tolist() == [1.0, 2.0]
    assert rows(0).dtype == np.float32


def test_numbers_without_a_header(tmp_path: Path) -> None:
    classes, _, rows = number_table(write(tmp_path, "7,0.5,1e3\n8,-2,3\n"), "1", [])
    assert classes == ["7", "8"]
    assert rows(0).tolist() == [0.5, 1000.0]
    with pytest.raises(UsageError, match="--label-column -1"):
        number_table(write(tmp_path, "7,0.5\n8,-2\n"), None, [])


def test_a_text_among_the_features_is_named_by_line_and_column(tmp_path: Path) -> None:
    _, _, rows = number_table(write(tmp_path, "f,g,y\n1,2,0\n1,red,0\n"), None, [])
    rows(0)
    with pytest.raises(DataError, match=r"t\.csv:3, column g: 'red', expected a number.*--column"):
        rows(1)


@pytest.mark.parametrize("text", ["y\n1\n", "f,y\n1,0\n1\n"])
def test_tables_without_features_or_with_short_rows(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError):
        number_table(write(tmp_path, text), "y", [])


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=2, max_size=20))
def test_rows_in_any_order_are_the_rows_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, x: list[list[float]]
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.csv"
    path.write_text("".join(",".join(repr(v) for v in row) + ",0\n" for row in x))
    _, _, rows = number_table(path, "-1", [])
    for i in reversed(range(len(x))):
        assert np.array_equal(rows(i), np.array(x[i], np.float32))
