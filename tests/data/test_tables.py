"""Text tables: delimiter, header, columns, and rows of numbers read on demand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.tables import number_table, read_table, table_form
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
    ],
)
def test_form(
    tmp_path: Path, name: str, text: str, mentioned: tuple[str, ...], delimiter: str, header: tuple[str, ...] | None
) -> None:
    form = table_form(write(tmp_path, text, name), mentioned)
    assert (form.delimiter, form.header) == (delimiter, header)


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
