"""Text tables: .csv, .tsv and plain text, with or without a header, read whole (names) or row by row (numbers).

Python's `csv` parts rows into fields; lines may end in LF, CR LF or CR alone. What cannot be told from the text itself
is asked for: `--delimiter`, `--header`, `--decimal`.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from stages.artifacts.records import Array
from stages.data.samples import Notes
from stages.errors import DataError, UsageError, require

LABEL_NAMES = ("label", "labels", "class", "classes", "class_name", "classname", "category", "target", "y")
"""Header names taken for the class where none is stated."""
FILE_NAMES = ("filename", "file_name", "file", "path", "filepath", "file_path", "image", "image_path", "img", "audio")
"""Header names taken for the file where none is stated."""
ID_NAMES = ("id", "index", "idx", "row", "row_id", "rowid")
"""Header names of numbers that count rows: kept beside the features, never among them."""
DELIMITERS = (",", ";", "\t", "|")
SPACES = " "
"""Any white space parts fields, as in the columns of numbers that numpy and Fortran write."""
LOOKED_AT = 20
"""Rows from which the delimiter is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Writing:
    """How a table is written, where its text does not tell."""

    delimiter: str | None = None
    """What parts fields: one character, or None for what fits the first rows."""
    header: str = "auto"
    """Whether the first line names columns: yes, no, or auto where the lines below tell."""
    decimal: str = "."
    """What parts a number's whole part from its fraction: a point or a comma."""

    def __post_init__(self) -> None:
        single = self.delimiter is None or len(self.delimiter) == 1
        require(single, "--delimiter", repr(self.delimiter), "one character, such as ';' or $'\\t'")
        require(self.header in ("auto", "yes", "no"), "--header", repr(self.header), "auto, yes or no")
        require(self.decimal in (".", ","), "--decimal", repr(self.decimal), "'.' or ','")
        require(self.delimiter != self.decimal or self.decimal == ".", "--decimal", "that of --delimiter", "another")

    def number(self, text: str) -> float:
        """The number that a field holds. Raises `ValueError` for anything else.

        >>> Writing(decimal=",").number("1,5")
        1.5
        """
        if "_" in text or (self.decimal == "," and "." in text):
            raise ValueError(text)
        return float(text.replace(",", ".") if self.decimal == "," else text)

    def is_number(self, text: str) -> bool:
        """Whether a field holds a number."""
        try:
            self.number(text)
        except ValueError:
            return False
        return True


@dataclass(frozen=True)
class Row:
    """One row of a table and where it lies."""

    fields: list[str]
    start: int
    stop: int
    """Bytes of the file that hold it: a quoted field may go over several lines."""
    line: int
    """Number of its last line, from 1."""


class _Lines:
    """The lines of a file as `csv` wants them, whatever ends them, and how many bytes they took."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._waiting = path, file, deque[bytes]()
        self.offset = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if not self._waiting:
            self._waiting.extend(self._file.readline().splitlines(keepends=True))
        if not self._waiting:
            raise StopIteration
        raw = self._waiting.popleft()
        encoding = "utf-8" if self.offset else "utf-8-sig"
        self.offset += len(raw)
        return _text(raw, self._path, encoding)


def _text(raw: bytes, path: Path, encoding: str = "utf-8") -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        fix = "convert it, for instance with `iconv -f CP1252 -t UTF-8`"
        raise DataError(str(path), "bytes that are not UTF-8 text", "a text table", fix) from error


def rows(path: Path, delimiter: str | None) -> Iterator[Row]:
    """Every row that is not blank; `delimiter` None parts a line in two at its first white space.

    Raises `DataError`, with the line, for what is no text or what `csv` cannot read.
    """
    with path.open("rb") as file:
        lines = _Lines(path, file)
        spaced = delimiter is None or delimiter == SPACES
        reader = (
            _parted(lines, delimiter)
            if spaced
            else csv.reader(lines, delimiter=delimiter or ",", skipinitialspace=True)
        )
        number = start = 0
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}:{number + 1}", f"no table there ({error})", "rows of fields") from error
            if fields is None:
                return
            number = number + 1 if spaced else reader.line_num  # type: ignore[attr-defined]
            if len(fields) > 1 or any(text.strip() for text in fields):
                yield Row(fields, start, lines.offset, number)
            start = lines.offset


def _parted(lines: Iterator[str], delimiter: str | None) -> Iterator[list[str]]:
    for line in lines:
        yield line.split() if delimiter == SPACES else line.strip().split(maxsplit=1)


@dataclass(frozen=True)
class Form:
    """How a table is written."""

    where: str
    delimiter: str | None
    """None: the first white space of a line parts it in two (`0034309 Boeing 707`)."""
    header: tuple[str, ...] | None
    width: int
    writing: Writing = field(default_factory=Writing)

    def position(self, column: str) -> int:
        """Place of a column that is given by name or as 1, 2, ... or -1, -2, ..."""
        if self.header is not None and column in self.header:
            if self.header.count(column) > 1:
                raise UsageError(self.where, f"two columns called {column!r}", "one", "state its position: 1 first")
            return self.header.index(column)
        try:
            number = int(column)
        except ValueError:
            number = 0
        if number == 0 or abs(number) > self.width:
            known = ", ".join(self.header) if self.header else f"1 to {self.width} (no header was found)"
            raise UsageError(self.where, f"no column {column!r}", known)
        return number - 1 if number > 0 else self.width + number

    def called(self, names: Sequence[str], option: str) -> int | None:
        """Place of the one column whose header is among `names`; None if there is none."""
        found = [i for i, name in enumerate(self.header or ()) if name.lower() in names]
        if len(found) > 1:
            several = " and ".join(repr((self.header or ())[i]) for i in found)
            raise UsageError(self.where, f"columns {several}", "one of them", f"state which with `{option}`")
        return found[0] if found else None

    def name(self, place: int) -> str:
        """A column as messages call it."""
        return self.header[place] if self.header else str(place + 1)

    def checked(self, row: Row) -> list[str]:
        """The row's fields. Raises `DataError` for more or fewer than the first line has."""
        if len(row.fields) != self.width:
            found = f"{len(row.fields)} columns"
            raise DataError(f"{self.where}:{row.line}", found, f"{self.width} as in the first line")
        return row.fields


@dataclass(frozen=True)
class Table:
    """A table of texts, in memory."""

    form: Form
    rows: Sequence[Sequence[str]]
    lines: Sequence[int]
    """Line of the file for each row, for messages."""

    @property
    def width(self) -> int:
        return self.form.width

    def column(self, name: str) -> list[str]:
        return self.at(self.form.position(name))

    def at(self, place: int) -> list[str]:
        """The column at a place from 0."""
        return [row[place].strip() for row in self.rows]

    def numbers(self, name: str) -> Array:
        """A column as float64."""
        try:
            return np.array([self.form.writing.number(text) for text in self.column(name)])
        except ValueError as error:
            raise DataError(f"{self.form.where}: column {name}", str(error), "numbers") from error


def read_table(path: Path, mentioned: Sequence[str] = (), writing: Writing | None = None) -> Table:
    """A whole table; `mentioned` are columns the caller will ask for, which help to tell a header from data."""
    form = table_form(path, mentioned, writing)
    found = list(islice(rows(path, form.delimiter), form.header is not None, None))
    if not found:
        raise DataError(str(path), "a header and nothing below", "rows")
    return Table(form, [form.checked(row) for row in found], [row.line for row in found])


# ------------------------------------------------------------------------------------------------ how it is written


def table_form(path: Path, mentioned: Sequence[str] = (), writing: Writing | None = None) -> Form:
    """Delimiter, header and width of a table, from its first rows.

    Raises `UsageError` where they can be read in more than one way.
    """
    writing = writing or Writing()
    delimiter = writing.delimiter or _delimiter(path)
    head = _first_rows(path, delimiter, 2)
    if not head:
        raise DataError(str(path), "an empty file", "a table")
    names = [text.strip() for text in head[0]]
    is_header = _is_header(str(path), names, head[1:], mentioned, writing)
    return Form(str(path), delimiter, tuple(names) if is_header else None, len(names), writing)


def _first_rows(path: Path, delimiter: str | None, count: int) -> list[list[str]]:
    with closing(rows(path, delimiter)) as found:  # type: ignore[type-var]
        return [row.fields for row in islice(found, count)]


def _delimiter(path: Path) -> str | None:
    """The one mark that parts all first rows into equally many fields.

    Raises `UsageError` where two do: `1,5;2,5;a` may be three columns with decimal commas or with semicolons in texts.
    """
    widths_by = {mark: _widths(path, mark) for mark in DELIMITERS}
    even = [mark for mark, widths in widths_by.items() if len(widths) == 1 and max(widths) > 1]
    fitting = even or [mark for mark, widths in widths_by.items() if max(widths, default=1) > 1]
    if len(even) > 1:
        several = " and ".join(map(repr, even))
        raise UsageError(str(path), f"{several} both part its rows", "one of them", "state which with `--delimiter`")
    if path.suffix.lower() == ".txt" and not even:
        head = _first_rows(path, SPACES, LOOKED_AT)
        return SPACES if len(set(map(len, head))) == 1 and all(map(_numeric, head[-1])) else None
    return max(fitting, key=lambda mark: max(widths_by[mark]), default=",")


def _widths(path: Path, mark: str) -> frozenset[int]:
    try:
        return frozenset(map(len, _first_rows(path, mark, LOOKED_AT)))
    except DataError:
        return frozenset() if mark != "," else _raise_unless_other(path)


def _raise_unless_other(path: Path) -> frozenset[int]:
    """No width where the trouble is `csv`'s; what is no text at all is an error at once."""
    with path.open("rb") as file:
        for _ in islice(_Lines(path, file), LOOKED_AT):
            pass
    return frozenset()


def _is_header(
    where: str, names: Sequence[str], below: Sequence[Sequence[str]], mentioned: Sequence[str], writing: Writing
) -> bool:
    """Whether the first row names columns: it has a name that is known or mentioned, or texts above numbers or files.

    Raises `UsageError` where it may as well be a sample: `0,1,2` above numbers, or one text among numbers.
    """
    if writing.header != "auto":
        return writing.header == "yes"
    named = {*LABEL_NAMES, *FILE_NAMES} - {"y"}  # which may as well be a sample's "yes"
    known = len(set(names)) == len(names) and any(name.lower() in named for name in names)
    if known or any(name in names and not writing.is_number(name) for name in mentioned):
        return True
    if not below:
        return False
    pairs = [(name, text.strip()) for name, text in zip(names, below[0], strict=False) if name]
    numeric = [(name, text) for name, text in pairs if _numeric(text)]
    texts = sum(not _numeric(name) for name, _ in numeric)
    files = any("." in text and "." not in name for name, text in pairs if not _numeric(text))
    counting = len(names) > 1 and list(names) == [str(i) for i in range(len(names))]  # as pandas names columns
    if counting or 0 < texts < len(numeric):
        shown = ",".join(names)[:40]
        fix = "state `--header yes` or `--header no`"
        raise UsageError(where, f"a first line {shown!r}", "one that is clearly a header or a sample", fix)
    return texts > 0 or files


def _numeric(text: str) -> bool:
    """Whether a field is a number however fractions are written."""
    return Writing().is_number(text) or Writing(decimal=",").is_number(text)


# ------------------------------------------------------------------------------------------------ tables of numbers


@dataclass(frozen=True)
class NumberRows:
    """The numeric columns of a table, each row read from the file when it is asked for."""

    path: Path
    form: Form
    spans: Array
    """int64 (N, 3): where each row starts and stops, in bytes, and its last line."""
    places: tuple[int, ...]
    """Columns that are features."""

    def __call__(self, row: int) -> Array:
        """float32 (D,)."""
        start, stop, _ = self.spans[row].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            text = _text(file.read(stop - start), self.path, "utf-8" if start else "utf-8-sig")
        mark, lines = self.form.delimiter or SPACES, text.splitlines(keepends=True)
        fields = text.split() if mark == SPACES else next(csv.reader(lines, delimiter=mark, skipinitialspace=True))
        return np.array([self._number(row, place, fields[place]) for place in self.places], np.float32)

    def _number(self, row: int, place: int, text: str) -> float:
        try:
            return self.form.writing.number(text)
        except ValueError as error:
            comma = Writing(decimal=",").is_number(text)
            fix = "state decimal commas with `--decimal ,`" if comma else (
                "name text columns with `--column` to keep them beside the features"
            )  # fmt: skip
            raise DataError(f"{self.at(row)}, column {self.form.name(place)}", repr(text), "a number", fix) from error

    def at(self, row: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}:{int(self.spans[row, 2])}"


def number_table(
    path: Path,
    label: str | None,
    kept: Sequence[str],
    writing: Writing | None = None,
    *,
    labelled: bool = True,
    notes: Notes | None = None,
) -> tuple[list[str], dict[str, list[str]], NumberRows]:
    """Classes and kept columns of a table of numbers (read at once), and its features (read on demand).

    Classes are empty texts where the table has no column of them and `labelled` does not ask for one. Columns that
    count rows are no features, which `notes` says.
    """
    notes = Notes() if notes is None else notes
    form = table_form(path, [name for name in (label, *kept) if name is not None], writing)
    place = form.position(label) if label is not None else form.called(LABEL_NAMES, "--label-column")
    if place is None and labelled:
        fix = "state it by name or position: `--label-column -1` is the last"
        raise UsageError(form.where, "no column is called label, class, target or y", "the column of classes", fix)
    others = {name: form.position(name) for name in kept} | _ids(form, kept, place, notes)
    found, spans = [], []
    for row in islice(rows(path, form.delimiter), form.header is not None, None):
        found.append([form.checked(row)[at].strip() for at in (place or 0, *_nameless(form), *others.values())])
        spans.append((row.start, row.stop, row.line))
    index = _index_columns(form, found, place, notes)
    features = tuple(i for i in range(form.width) if i != place and i not in {*others.values(), *index})
    if not spans or not features:
        raise DataError(str(path), f"{len(spans)} rows of {form.width} columns", "rows of features and a class")
    classes = [row[0] if place is not None else "" for row in found]
    first = 1 + len(_nameless(form))
    columns = {name: [row[first + i] for row in found] for i, name in enumerate(others)}
    return classes, columns, NumberRows(path, form, np.array(spans, np.int64), features)


def _ids(form: Form, kept: Sequence[str], label: int | None, notes: Notes) -> dict[str, int]:
    """Columns whose names say that they number the samples: kept beside the features."""
    taken = {form.position(name) for name in kept} | {label}
    found = {name: i for i, name in enumerate(form.header or ()) if name.lower() in ID_NAMES and i not in taken}
    for name in found:
        notes.say(f"column {name!r} is kept beside the features, not among them")
    return found


def _nameless(form: Form) -> list[int]:
    """Columns that the header leaves without a name, as pandas does with its index."""
    return [i for i, name in enumerate(form.header or ()) if not name or name.lower().startswith("unnamed:")]


def _index_columns(form: Form, found: Sequence[Sequence[str]], label: int | None, notes: Notes) -> list[int]:
    """Columns without a name that count the rows; they are left out. One that does not count is refused."""
    left_out = []
    for at, place in enumerate(_nameless(form), 1):
        if place == label:
            continue
        values = [row[at] for row in found]
        if not any(values):
            notes.say(f"column {place + 1}, without a name, is empty and left out")
            left_out.append(place)
            continue
        if values not in ([str(i + first) for i in range(len(values))] for first in (0, 1)):
            fix = "name it in the header, or keep it beside the features with `--column`"
            raise DataError(f"{form.where}: column {place + 1}", "no name", "a name for every column", fix)
        notes.say(f"column {place + 1}, without a name, counts the rows and is left out")
        left_out.append(place)
    return left_out
