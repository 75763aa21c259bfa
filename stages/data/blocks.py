"""Blocks as values: joined, cut to another length, checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from stages.artifacts.records import Array, Block, InputSpec, Preparation, Samples
from stages.errors import DataError


def finite_rows(x: Array) -> Array:
    """bool (N,): samples without NaN and infinity.

    >>> finite_rows(np.array([[1.0, 2.0], [np.nan, 0.0]], np.float32))
    array([ True, False])
    """
    if x.dtype.kind != "f":
        return np.ones(len(x), bool)
    return np.asarray(np.isfinite(x).reshape(len(x), -1).all(axis=1))


def check_labels(y: Array, named: Collection[int], where: str) -> None:
    """Raise `DataError` for a label below -1 (no label), or one without a name where classes have names."""
    y = np.asarray(y)
    unnamed = ~np.isin(y, [*named, -1]) if named else np.zeros(len(y), bool)
    for wrong, expected in (
        (y < -1, "a class label >= 0"),
        (unnamed, f"one of the {len(named or ())} that have names"),
    ):
        if wrong.any():
            bad = int(y[np.flatnonzero(wrong)[0]])
            found = f"label {bad} (of {int(wrong.sum())} such samples)"
            raise DataError(where, found, expected, f"leave such samples out with `--where 'class!={bad}'`")


class Joined:
    """The samples of several blocks on disk, one after another: read when they are asked for, as those of one are."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self._starts[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        """Samples by a slice, or by ascending distinct rows as HDF5 takes them."""
        if not isinstance(index, slice):
            rows = np.asarray(index)
            inside = [rows[(rows >= start) & (rows < stop)] - start for start, stop in pairwise(self._starts)]
            wanted: list[Any] = [rows if len(rows) else slice(0, 0) for rows in inside]
        else:
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            wanted = [
                slice(max(start - first, 0), max(min(stop, last) - first, 0)) for first, last in pairwise(self._starts)
            ]
        return np.concatenate([part[rows] for part, rows in zip(self._parts, wanted, strict=True)])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype)


def join_blocks(blocks: Sequence[Block], *, by_name: bool = False, in_memory: bool = True, where: str = "") -> Block:
    """All samples in one block, in memory; or, where all of them lie on disk, left there.

    Columns and facts that all blocks have (facts: with one value) are kept; what counts per class or belongs to one
    round is not. Labels and names must agree; with `by_name` every class is renumbered to its name's place in the
    sorted names of all.

    Raises:
        DataError: no block, different shapes or dtypes or layouts, one label with two names, one name with two labels.
    """
    if not blocks:
        raise DataError(where, "no blocks", "at least one")
    blocks = _renumbered(blocks, where) if by_name else blocks
    _check_alike(blocks, where)
    first = blocks[0]
    labels, names = classes_of(blocks, where)
    on_disk = not in_memory and not any(isinstance(block.x, np.ndarray) for block in blocks)
    common = [name for name in first.columns if all(name in block.columns for block in blocks)]
    return Block(
        x=Joined([block.x for block in blocks])
        if on_disk
        else np.concatenate([np.asarray(block.x[:]) for block in blocks]),
        y=np.concatenate([block.y for block in blocks]),
        layout=first.layout,
        columns={name: np.concatenate([block.columns[name] for block in blocks]) for name in common},
        labels=labels,
        names=names,
        facts={name: value for name, value in first.facts.items() if agreed(blocks, name)},
        prepared=preparation_of(blocks, where),
    )


def rebatch(blocks: Iterable[Block], size: int) -> Iterator[Block]:
    """The same samples in blocks of exactly `size` (the last may be shorter), holding less than `size` over."""
    rest: list[Block] = []
    for piece in (piece for block in blocks for piece in block.slices(size)):
        rest.append(piece)
        if sum(map(len, rest)) >= size:
            full, rest = _cut(rest, size)
            yield full
    if sum(map(len, rest)):
        yield _cut(rest, size)[0]


def _cut(blocks: list[Block], size: int) -> tuple[Block, list[Block]]:
    """The first `size` samples as one block, and what remains."""
    taken: list[Block] = []
    missing = size
    for i, block in enumerate(blocks):
        taken.append(block.take(slice(0, missing)))
        missing -= len(taken[-1])
        if missing == 0:
            left = block.take(slice(len(taken[-1]), None))
            return _stacked(taken), [left, *blocks[i + 1 :]] if len(left) else blocks[i + 1 :]
    return _stacked(taken), []


def _stacked(blocks: list[Block]) -> Block:
    """Consecutive pieces of one stream: everything but samples and columns is the first one's."""
    first = blocks[0]
    if len(blocks) == 1:
        return first
    return replace(
        first,
        x=np.concatenate([np.asarray(block.x) for block in blocks]),
        y=np.concatenate([block.y for block in blocks]),
        columns={name: np.concatenate([block.columns[name] for block in blocks]) for name in first.columns},
    )


def _check_alike(blocks: Sequence[Block], where: str) -> None:
    first = blocks[0]
    for number, block in enumerate(blocks):
        for what, found, expected in (
            ("layout", block.layout, first.layout),
            ("dtype", np.dtype(block.x.dtype), np.dtype(first.x.dtype)),
            ("sample shape", tuple(block.x.shape[1:]), tuple(first.x.shape[1:])),
        ):
            if found != expected:
                raise DataError(
                    f"{where}[{number}]",
                    f"{what} {found}",
                    f"{expected} as in the first block",
                    "pack all of them to one form",
                )


def preparation_of(blocks: Sequence[Block], where: str) -> Preparation | None:
    """How the samples of all blocks were prepared; None unless all say the same.

    Raises `DataError` where two did different things to the same kind of file.
    """
    known = [(number, block.prepared) for number, block in enumerate(blocks) if block.prepared is not None]
    for number, prepared in known:
        check_prepared(prepared, known[0][1], f"{where}[{number}]", "the first block")
    return known[0][1] if len({block.prepared for block in blocks}) == 1 and known else None


def check_prepared(
    mine: Preparation | None, other: Preparation | None, where: str, whose: str, spec: InputSpec | None = None
) -> None:
    """Raise `DataError` where samples were prepared in another way than those of `whose`, for a model of this input."""
    grey = spec is not None and spec.kind == "image" and spec.shape[0] == 1
    differ = mine.conflict(other, grey=grey) if mine is not None and other is not None else None
    if differ is not None:
        raise DataError(where, differ[0], f"{differ[1]}, as in {whose}", "pack both with the same options")


def classes_of(blocks: Sequence[Block], where: str) -> tuple[Array | None, tuple[str, ...] | None]:
    """Labels and names of all blocks together; nameless blocks may only have labels that others name.

    Raises `DataError` for one label with two names, or one name with two labels.
    """
    named = _named(blocks, where)
    labels = np.unique(np.concatenate([block.y for block in blocks]))
    labels = labels[labels >= 0]
    if named:
        missing = [int(label) for label in labels if int(label) not in named]
        if missing:
            raise DataError(where, f"label {missing[0]} has no name", "names for all classes or for none")
        return np.array(sorted(named), np.int64), tuple(named[label] for label in sorted(named))
    if all(block.labels is None for block in blocks):
        return None, None
    listed = [block.labels for block in blocks if block.labels is not None]
    return np.unique(np.concatenate([labels, *listed])), None


def _named(blocks: Sequence[Block], where: str) -> dict[int, str]:
    name_of: dict[int, str] = {}
    label_of: dict[str, int] = {}
    for number, block in enumerate(blocks):
        if block.labels is None or block.names is None:
            continue
        for label, name in zip(block.labels.tolist(), block.names, strict=True):
            known, at = name_of.setdefault(label, name), label_of.setdefault(name, label)
            if (known, at) != (name, label):
                found = f"label {label} is {name!r}"
                expected = f"label {label} to be {known!r}" if known != name else f"{name!r} to be label {at}"
                raise DataError(f"{where}[{number}]", found, expected, "renumber the classes with `join --by-name`")
    return name_of


def _renumbered(blocks: Sequence[Block], where: str) -> list[Block]:
    names = sorted({name for block in blocks for name in block.names or ()})
    number = {name: i for i, name in enumerate(names)}
    renumbered = []
    for i, block in enumerate(blocks):
        if block.names is None or block.labels is None:
            raise DataError(f"{where}[{i}]", "a block without class names", "names, to renumber classes by")
        new = np.array([number[name] for name in block.names], np.int64)
        order = np.argsort(new)
        y = np.full(len(block), -1, np.int64)
        y[block.y >= 0] = new[np.searchsorted(block.labels, block.y[block.y >= 0])]
        renumbered.append(replace(block, y=y, labels=new[order], names=tuple(block.names[j] for j in order)))
    return renumbered


def agreed(blocks: Sequence[Block], name: str) -> bool:
    """Whether a fact is the same in all blocks."""
    values = [block.facts.get(name) for block in blocks]
    return all(np.array_equal(np.asarray(value), np.asarray(values[0])) for value in values)
