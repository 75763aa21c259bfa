"""What every source of samples offers: labels and columns at once, the samples themselves only when asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from stages.artifacts.codec import text_array
from stages.artifacts.records import Array, Preparation, Samples
from stages.errors import DataError

OnBad: TypeAlias = Callable[[DataError], None]
"""What to do about a sample that cannot be used: raise the error, or count it and go on without the sample."""

SLAB_BYTES = 1 << 20
DIGITS = 19
"""Names of fewer digits fit an int64."""
AHEAD_BYTES = 64 << 20
"""How much of a file may be in memory at once so that a shuffled order does not decompress each chunk many times."""


EXAMPLES = 3
"""How many names a note gives."""


class Notes:
    """What a person should hear of their data: what was guessed, what was left out. Filled while it is opened and read.

    >>> notes = Notes()
    >>> for name in ("a.txt", "b.txt"): notes.count("left out {} files of another kind", name)
    >>> notes.lines()
    ['left out 2 files of another kind: a.txt, b.txt']
    """

    def __init__(self) -> None:
        self._said: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def say(self, text: str) -> None:
        """A line, once."""
        self._said.setdefault(text, [])

    def count(self, what: str, name: str) -> None:
        """One more of `what`, a text with `{}` for their number; the first few names are given."""
        examples = self._said.setdefault(what, [])
        self._counts[what] = self._counts.get(what, 0) + 1
        if len(examples) < EXAMPLES:
            examples.append(name)

    def lines(self) -> list[str]:
        """Each as a line, in the order in which they came up."""
        return [self._line(text, examples) for text, examples in self._said.items()]

    def _line(self, text: str, examples: list[str]) -> str:
        if text not in self._counts:
            return text
        number = self._counts[text]
        return text.format(number) + ": " + ", ".join(examples) + (", ..." if number > len(examples) else "")


class Reader(Protocol):
    """Reads samples by position."""

    @property
    def span(self) -> int:
        """How many samples are worth reading at once."""

    def read(self, rows: Array, on_bad: OnBad) -> tuple[Array, Array]:
        """The readable samples of `rows` (int64, any order), and the positions in `rows` that they come from."""


@dataclass(frozen=True)
class Source:
    """Labelled samples in files."""

    where: str
    """Named in errors."""
    y: Array
    """int64 (N,): class labels, or -1 for none; positions in `names` unless `labels` says otherwise."""
    reader: Reader
    layout: str
    names: tuple[str, ...] | None = None
    columns: Mapping[str, Array] = field(default_factory=dict)
    """Per sample: numbers, or fixed-width text."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    labels: Array | None = None
    """int64 (C,), ascending: the labels that `names` names; None: 0, 1, ..."""
    prepared: Preparation | None = None
    """How the samples came from their files."""
    files: Array | None = None
    """Text (N,): the file that each sample came from."""
    notes: Notes = field(default_factory=Notes)
    at: Callable[[int], str] | None = None
    """Where a sample lies, for messages."""

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if len(values) != len(self.y):
                raise DataError(f"{self.where}: column {name}", f"{len(values)} values", f"{len(self.y)} as labels")

    def __len__(self) -> int:
        return len(self.y)

    def place(self, row: int) -> str:
        """Where a sample lies."""
        return f"{self.where}: sample {row}" if self.at is None else self.at(row)

    @property
    def name_of(self) -> dict[int, str]:
        """Name of each class label; empty where classes have none."""
        labels = range(len(self.names or ())) if self.labels is None else self.labels.tolist()
        return dict(zip(labels, self.names or (), strict=True))


class ArrayReader:
    """Samples that lie in one array, in memory or in a file."""

    def __init__(self, x: Samples) -> None:
        self._x = x

    @property
    def span(self) -> int:
        return max(1, AHEAD_BYTES // _row_bytes(self._x))

    def read(self, rows: Array, on_bad: OnBad) -> tuple[Array, Array]:
        return gather(self._x, rows), np.arange(len(rows))


class Prepared:
    """What another reader reads, brought to a form."""

    def __init__(self, reader: Reader, prepare: Callable[[Array], Array]) -> None:
        self._reader, self._prepare = reader, prepare

    @property
    def span(self) -> int:
        return self._reader.span

    def read(self, rows: Array, on_bad: OnBad) -> tuple[Array, Array]:
        x, good = self._reader.read(rows, on_bad)
        return self._prepare(x), good


class FileReader:
    """Samples that are decoded one at a time; `decode` raises `DataError` for one that cannot be."""

    span = 1

    def __init__(self, decode: Callable[[int], Array], where: Callable[[int], str], fix: str | None) -> None:
        """`fix` says what to do about a sample of another shape than the first; None takes those too, one at a time."""
        self._decode, self._where, self._fix = decode, where, fix
        self._shape: tuple[int, ...] | None = None

    def read(self, rows: Array, on_bad: OnBad) -> tuple[Array, Array]:
        samples, good = [], []
        for position, row in enumerate(rows):
            try:
                samples.append(self._one(int(row)))
                good.append(position)
            except DataError as error:
                on_bad(error)
        x = np.stack(samples) if samples else np.zeros((0, *(self._shape or ())), np.float32)
        return x, np.array(good, np.int64)

    def _one(self, row: int) -> Array:
        sample = self._decode(row)
        self._shape = self._shape or sample.shape
        if sample.shape != self._shape and self._fix is not None:
            raise DataError(self._where(row), f"shape {sample.shape}", f"{self._shape} as the first", self._fix)
        return sample


class Chain:
    """Several arrays one after another, as one; `x[start:stop]` reads only the parts it needs."""

    def __init__(self, parts: Sequence[Samples], where: str) -> None:
        kinds = {(tuple(part.shape[1:]), np.dtype(part.dtype).str) for part in parts}
        if len(kinds) != 1:
            raise DataError(where, f"samples of {sorted(kinds)}", "one shape and dtype", "pack them one by one")
        self._parts = tuple(parts)
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self._starts[-1]), *self._parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._parts[0].dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any, /) -> Any:
        start, stop, step = index.indices(len(self))
        pieces = [
            part[max(0, start - first) : max(0, stop - first)]
            for part, first in zip(self._parts, self._starts[:-1], strict=True)
            if first < stop and start < first + len(part)
        ]
        return np.concatenate(pieces)[::step] if pieces else np.zeros((0, *self.shape[1:]), self.dtype)


def gather(x: Samples, rows: Array) -> Array:
    """`x[rows]` for rows in any order and with repeats; files are read in ascending slabs, each at most once."""
    if isinstance(x, np.ndarray):
        return np.asarray(x[rows])
    out = np.empty((len(rows), *x.shape[1:]), x.dtype)
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    slab = max(1, SLAB_BYTES // _row_bytes(x))
    edges = np.flatnonzero(np.diff(ascending // slab)) + 1
    for part in np.split(np.arange(len(rows)), edges) if len(rows) else ():
        first, last = int(ascending[part[0]]), int(ascending[part[-1]])
        out[order[part]] = np.asarray(x[first : last + 1])[ascending[part] - first]
    return out


class Classes(NamedTuple):
    """Samples' classes as labels and names."""

    y: Array
    """int64 (N,): label of each sample, -1 where it has none."""
    labels: Array | None
    """int64 (C,), ascending: what `names` names; None where they are not named."""
    names: tuple[str, ...] | None


def class_numbers(classes: Sequence[str]) -> Classes:
    """Class names -> labels: names that are numbers are those numbers, others count in sorted order; "" is no class.

    So `2` is class 2 whether it was a folder's name or a number in an array.

    >>> class_numbers(["dog", "cat", "dog"])[0], class_numbers(["2", "10", ""])
    (array([1, 0, 1]), Classes(y=array([ 2, 10, -1]), labels=array([ 2, 10]), names=('2', '10')))
    """
    names = sorted({name for name in classes if name})
    number = {name: i for i, name in enumerate(names)}
    if all(name.isascii() and name.isdigit() and len(name) < DIGITS for name in names):
        own = {name: int(name) for name in names}
        number = own if len(set(own.values())) == len(names) else number
    names.sort(key=number.__getitem__)
    y = np.array([number[name] if name else -1 for name in classes], np.int64)
    return Classes(y, np.array([number[name] for name in names], np.int64), tuple(names))


def classes_of_texts(texts: Sequence[str], where: str) -> Classes:
    """Classes as a table writes them: whole numbers stay nameless numbers, "" is none, anything else is a name."""
    column = column_of([text for text in texts if text])
    if column.dtype.kind == "S":
        return class_numbers(texts)
    if not np.array_equal(column, np.trunc(column)):
        raise DataError(f"{where}: labels", "numbers with fractions", "whole numbers or names, one per sample")
    y = np.full(len(texts), -1, np.int64)
    y[np.array([bool(text) for text in texts], bool)] = column.astype(np.int64)
    return Classes(y, None, None)


def column_of(texts: Sequence[str]) -> Array:
    """A column as int64 where every text is an integer, float64 where all are numbers, fixed-width text otherwise.

    `007`, `1e5`, and `1.10` beside `1.1` are names, not numbers, and so is every other text of their column.

    >>> column_of(["1", "2"]), column_of(["1", "0.5"]), column_of(["1", "007"])
    (array([1, 2]), array([1. , 0.5]), array([b'1', b'007'], dtype='|S3'))
    """
    if all(_INTEGER.fullmatch(text) for text in texts):
        return np.array([int(text) for text in texts], np.int64)
    if all(_DECIMAL.fullmatch(text) for text in texts) and len({float(t) for t in texts}) == len(set(texts)):
        return np.array([float(text) for text in texts], np.float64)
    return text_array(texts)


_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?")


def _row_bytes(x: Samples) -> int:
    return max(1, prod(x.shape[1:]) * np.dtype(x.dtype).itemsize)
