"""From a source of samples to blocks: in which order, in which form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from stages.artifacts.records import Array, Block, Preparation
from stages.data.blocks import finite_rows, rebatch
from stages.data.conversion import FULL_SCALE, convert, with_noise
from stages.data.samples import OnBad, Source
from stages.errors import DataError, require

OWN_NAMES = frozenset(
    ["x", "y", "source", "index", "score", "weight", "seen", "classes", "labels", "round", "end", "layout", "prepared"]
)
"""What a block calls its own datasets and attributes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What is done to values."""

    dtype: str | None = None
    """uint8, int16 or float32; None keeps uint8 and int16 as they are and makes float32 of anything else."""
    scale: float = 1.0
    """Factor on every value, before the conversion to `dtype`."""
    invert: bool = False
    """uint8 only: 255 - value (ink on paper -> light on dark)."""

    def __post_init__(self) -> None:
        require(self.dtype is None or self.dtype in FULL_SCALE, "--dtype", repr(self.dtype), ", ".join(FULL_SCALE))
        require(np.isfinite(self.scale) and self.scale != 0, "--scale", str(self.scale), "a factor other than 0")

    @classmethod
    def of(cls, prepared: Preparation) -> Form:
        """The form of samples that were prepared so."""
        return cls(dtype=prepared.dtype or None, scale=prepared.scale, invert=prepared.invert)

    def added_to(self, prepared: Preparation | None) -> Preparation:
        """How samples were prepared, with this form on top of what was done before."""
        before = prepared or Preparation(of="arrays")
        return replace(
            before,
            dtype=self.dtype or before.dtype,
            scale=self.scale * before.scale,
            invert=self.invert != before.invert,
        )


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on some samples."""

    marked: Array
    """(N,): not 0 where a sample gets it."""
    std: float
    rng: np.random.Generator


def stop(error: DataError) -> None:
    """What to do about a bad sample: nothing goes on."""
    raise error


def read_blocks(
    source: Source,
    rows: Array,
    form: Form,
    *,
    block_length: int = 256,
    y: Array | None = None,
    columns: Mapping[str, Array] | None = None,
    noise: Noise | None = None,
    on_bad: OnBad = stop,
    on_step: Callable[[int], None] = lambda done: None,
) -> Iterator[Block]:
    """The samples of `source` at `rows`, in that order; column `index` is the position in the stream.

    Memory is bounded by a few spans of samples (64 MiB of a file, or one block).

    Args:
        y: labels instead of the source's own, one per row.
        columns: further columns, one value per row.
        on_bad: what to do about a sample that cannot be decoded or holds NaN or infinity.
        on_step: called with the number of samples read so far.

    Raises:
        DataError: no sample is left, or a bad sample (by `on_bad`).
    """
    y = source.y[rows] if y is None else y
    columns = {**_own_columns(source, rows), **(columns or {})}
    labels = np.unique(source.y[rows])
    labels = labels[labels >= 0]
    names = tuple(source.name_of[label] for label in labels.tolist()) if source.names is not None else None
    pieces = _pieces(source, rows, form, block_length, noise, on_bad, on_step)
    stream = (
        Block(
            x=x,
            y=y[at],
            layout=source.layout,
            columns={"index": np.arange(start, start + len(x)), **{name: c[at] for name, c in columns.items()}},
            labels=None if names is None else labels,
            names=names,
            facts={name: fact for name, fact in source.facts.items() if name not in OWN_NAMES},
            prepared=form.added_to(source.prepared),
        )
        for start, at, x in pieces
    )
    yield from rebatch(stream, block_length)


def _own_columns(source: Source, rows: Array) -> dict[str, Array]:
    """The source's columns under names that a block has free: `/` parts HDF5's groups."""
    named = {f"{n}_column" if n in OWN_NAMES else n.replace("/", "_"): v for n, v in source.columns.items()}
    named.pop("index_column", None)
    return {name: values[rows] for name, values in named.items()} | (
        {} if source.files is None else {"source": source.files[rows]}
    )


def _pieces(
    source: Source,
    rows: Array,
    form: Form,
    block_length: int,
    noise: Noise | None,
    on_bad: OnBad,
    on_step: Callable[[int], None],
) -> Iterator[tuple[int, Array, Array]]:
    """Spans of the stream: position of the first sample, which of `rows` these are, and x in its final form."""
    span = max(block_length, source.reader.span)
    start = 0
    for begin in range(0, len(rows), span):
        end = min(begin + span, len(rows))
        x, good = _usable(source, rows[begin:end], on_bad)
        x = convert(x, dtype=form.dtype, scale=form.scale, invert=form.invert, where=source.where)
        at = begin + good
        if noise is not None:
            x = with_noise(x, noise.marked[at], noise.std, noise.rng)
        if len(x):
            yield start, at, x
        start += len(x)
        on_step(end)
    if start == 0:
        raise DataError(source.where, f"all {len(rows)} samples are bad", "some that can be used")


def _usable(source: Source, rows: Array, on_bad: OnBad) -> tuple[Array, Array]:
    """The samples of `rows` that can be read and are finite, and their positions in `rows`."""
    x, good = source.reader.read(rows, on_bad)
    finite = finite_rows(x)
    if finite.all():
        return x, good
    for row in rows[good[~finite]].tolist():
        found, fix = "NaN or infinity", "or leave such samples out with `--on-bad skip`"
        on_bad(DataError(source.place(row), found, "finite values", fix))
    return x[finite], good[finite]
