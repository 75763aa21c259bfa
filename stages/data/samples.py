"""What every source of samples offers: labels and columns at once, the samples themselves only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol, TypeAlias

import numpy as np

from stages.artifacts.codec import text_array
from stages.artifacts.records import Array, Samples
from stages.errors import DataError

OnBad: TypeAlias = Callable[[DataError], None]
"""What to do about a sample that cannot be used: raise the error, or count it and go on without the sample."""

SLAB_BYTES = 1 << 20
AHEAD_BYTES = 64 << 20
"""How much of a file may be in memory at once so that a shuffled order does not decompress each chunk many times."""


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
    """int64 (N,): class labels; positions in `names` where there are names."""
    reader: Reader
    layout: str
    names: tuple[str, ...] | None = None
    columns: Mapping[str, Array] = field(default_factory=dict)
    """Per sample: numbers, or fixed-width text."""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if len(values) != len(self.y):
                raise DataError(f"{self.where}: column {name}", f"{len(values)} values", f"{len(self.y)} as labels")

    def __len__(self) -> int:
        return len(self.y)


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

    def __init__(self, decode: Callable[[int], Array], where: Callable[[int], str], fix: str) -> None:
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
        if sample.shape != self._shape:
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


def class_numbers(classes: Sequence[str]) -> tuple[Array, tuple[str, ...]]:
    """Class names -> label of each sample (its name's place in the sorted names), and the names.

    >>> class_numbers(["dog", "cat", "dog"])
    (array([1, 0, 1]), ('cat', 'dog'))
    """
    names = tuple(sorted(set(classes)))
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[name] for name in classes], np.int64), names


def column_of(texts: Sequence[str]) -> Array:
    """A column as int64 where every text is an integer, float64 where all are numbers, fixed-width text otherwise.

    >>> column_of(["1", "2"]), column_of(["1", "0.5"]), column_of(["1", "b"])
    (array([1, 2]), array([1. , 0.5]), array([b'1', b'b'], dtype='|S1'))
    """
    for dtype in (np.int64, np.float64):
        try:
            return np.array([dtype(text) for text in texts], dtype)
        except ValueError:
            continue
        except OverflowError:
            break
    return text_array(texts)


def _row_bytes(x: Samples) -> int:
    return max(1, prod(x.shape[1:]) * np.dtype(x.dtype).itemsize)
