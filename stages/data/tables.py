"""Text tables: .csv, .tsv and plain text, with or without a header, read whole (names) or row by row (numbers)."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from stages.artifacts.records import Array
from stages.errors import DataError, UsageError

LABEL_NAMES = ("label", "class", "target", "y")
"""Header names taken for the class where none is stated."""


@dataclass(frozen=True)
class Form:
    """How a table is written."""

    where: str
    delimiter: str | None
    """None: the first white space of a line parts it in two (`0034309 Boeing 707`)."""
    header: tuple[str, ...] | None
    width: int

    def fields(self, line: str) -> list[str]:
        if self.delimiter is None:
            return line.split(maxsplit=1)
        return next(csv.reader([line], delimiter=self.delimiter), [])

    def position(self, column: str) -> int:
        """Place of a column that is given by name or as 1, 2, ... or -1, -2, ..."""
        if self.header is not None and column in self.header:
            return self.header.index(column)
        try:
            number = int(column)
        except ValueError:
            number = 0
        if number == 0 or abs(number) > self.width:
            known = ", ".join(self.header) if self.header else f"1 to {self.width} (no header was found)"
            raise UsageError(self.where, f"no column {column!r}", known)
        return number - 1 if number > 0 else self.width + number


@dataclass(frozen=True)
class Table:
    """A table of texts, in memory."""

    form: Form
    rows: Sequence[Sequence[str]]

    @property
    def width(self) -> int:
        return self.form.width

    def column(self, name: str) -> list[str]:
        place = self.form.position(name)
        return [row[place].strip() for row in self.rows]

    def numbers(self, name: str) -> Array:
        """A column as float64."""
        try:
            return np.array([float(text) for text in self.column(name)])
        except ValueError as error:
            raise DataError(f"{self.form.where}: column {name}", str(error), "numbers") from error


def read_table(path: Path, mentioned: Sequence[str] = ()) -> Table:
    """A whole table; `mentioned` are columns the caller will ask for, which help to tell a header from data."""
    form = table_form(path, mentioned)
    rows = [form.fields(line) for _, line in lines(path)][form.header is not None :]
    for number, row in enumerate(rows, start=1 + (form.header is not None)):
        if len(row) != form.width:
            raise DataError(f"{path}:{number}", f"{len(row)} columns", f"{form.width} as in the first line")
    if not rows:
        raise DataError(str(path), "a header and nothing below", "rows")
    return Table(form, rows)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Byte offset and text of every line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for raw in file:
            text = _text(raw, path)
            if text:
                yield offset, text
            offset += len(raw)


def _text(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig").strip("\r\n").strip(" ")
    except UnicodeDecodeError as error:
        raise DataError(str(path), "bytes that are not UTF-8 text", "a text table") from error


def table_form(path: Path, mentioned: Sequence[str] = ()) -> Form:
    """Delimiter, header and width of a table, from its first two lines."""
    head = [line for _, line in islice(lines(path), 2)]
    if not head:
        raise DataError(str(path), "an empty file", "a table")
    form = Form(str(path), _delimiter(path, head[0]), None, 0)
    first, second = form.fields(head[0]), form.fields(head[-1])
    header = tuple(text.strip() for text in first) if _is_header(first, second, mentioned, len(head)) else None
    return Form(form.where, form.delimiter, header, len(first))


def _delimiter(path: Path, line: str) -> str | None:
    counts = {mark: line.count(mark) for mark in (",", ";", "\t")}
    best = max(counts, key=lambda mark: counts[mark])
    if counts[best]:
        return best
    return None if path.suffix.lower() == ".txt" and " " in line else ","


def _is_header(first: Sequence[str], second: Sequence[str], mentioned: Sequence[str], lines_seen: int) -> bool:
    """A first line is a header if a mentioned column stands in it, or a text in it has a number or a file below."""
    names = [text.strip() for text in first]
    if any(name in names and not _is_number(name) for name in mentioned):
        return True
    below = zip(names, second, strict=False)
    return lines_seen > 1 and any(
        not _is_number(a) and (_is_number(b) or ("." in b and "." not in a)) for a, b in below
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class NumberRows:
    """The numeric columns of a table, each row read from the file when it is asked for."""

    path: Path
    form: Form
    offsets: Array
    """int64 (N,): where each row starts, in bytes."""
    places: tuple[int, ...]
    """Columns that are features."""

    def __call__(self, row: int) -> Array:
        """float32 (D,)."""
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[row]))
            fields = self.form.fields(_text(file.readline(), self.path))
        values = []
        for place in self.places:
            try:
                values.append(float(fields[place]))
            except ValueError as error:
                name = self.form.header[place] if self.form.header else str(place + 1)
                raise DataError(
                    f"{self.at(row)}, column {name}",
                    f"{fields[place]!r}",
                    "a number",
                    "name text columns with `--column` to keep them beside the features",
                ) from error
        return np.array(values, np.float32)

    def at(self, row: int) -> str:
        """Where a row is, for messages; blank lines are not counted."""
        return f"{self.path}:{row + 1 + (self.form.header is not None)}"


def number_table(
    path: Path, label: str | None, kept: Sequence[str]
) -> tuple[list[str], dict[str, list[str]], NumberRows]:
    """Classes and kept columns of a table of numbers (read at once), and its features (read on demand)."""
    form = table_form(path, [name for name in (label, *kept) if name is not None])
    place = form.position(label or _label_name(form))
    others = {name: form.position(name) for name in kept}
    classes: list[str] = []
    columns: dict[str, list[str]] = {name: [] for name in kept}
    offsets = []
    for number, (offset, line) in enumerate(lines(path)):
        if number == 0 and form.header is not None:
            continue
        fields = form.fields(line)
        if len(fields) != form.width:
            raise DataError(f"{path}:{number + 1}", f"{len(fields)} columns", f"{form.width} as in the first line")
        classes.append(fields[place].strip())
        for name, at in others.items():
            columns[name].append(fields[at].strip())
        offsets.append(offset)
    if not offsets or form.width <= 1 + len(others):
        raise DataError(str(path), f"{len(offsets)} rows of {form.width} columns", "rows of features and a class")
    features = tuple(i for i in range(form.width) if i != place and i not in others.values())
    return classes, columns, NumberRows(path, form, np.array(offsets, np.int64), features)


def _label_name(form: Form) -> str:
    for name in form.header or ():
        if name.lower() in LABEL_NAMES:
            return name
    raise UsageError(
        form.where,
        "no column is called " + " or ".join(LABEL_NAMES),
        "the column of classes",
        "state it by name or position: `--label-column -1` is the last",
    )
