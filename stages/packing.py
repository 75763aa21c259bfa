"""Pack: any source of labelled samples -> a stream of blocks, chosen, ordered and converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.artifacts.records import Array, Block
from stages.data.blocks import check_labels, finite_rows, rebatch
from stages.data.conversion import FULL_SCALE, convert, noisy_labels, share_of, with_noise
from stages.data.samples import OnBad, Source
from stages.errors import DataError, InputMissing, UsageError, require

OWN_NAMES = frozenset(["x", "y", "index", "score", "weight", "seen", "classes", "labels", "round", "end", "layout"])
"""What a block calls its own datasets and attributes."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A sample is taken if its column has one of the values, or, negated, none of them."""

    column: str
    values: tuple[str, ...]
    negated: bool = False

    @classmethod
    def parse(cls, text: str) -> Condition:
        """From `split=1`, `speaker=theo,lucas` or `drawer!=20`."""
        column, found, values = text.partition("=")
        negated = column.endswith("!")
        column = column.removesuffix("!").strip()
        require(bool(found and column and values), "--where", repr(text), "COLUMN=VALUE[,VALUE...] or COLUMN!=VALUE")
        return cls(column, tuple(value.strip() for value in values.split(",")), negated)

    def matches(self, source: Source) -> Array:
        """bool (N,)."""
        column = column_or_label(source, self.column, "--where")
        if column.dtype.kind == "S":
            chosen = np.isin(column, [value.encode() for value in self.values])
        else:
            chosen = np.isin(column, [self._number(value) for value in self.values])
        return ~chosen if self.negated else chosen

    def _number(self, value: str) -> float:
        try:
            return float(value)
        except ValueError as error:
            raise UsageError("--where", f"{self.column}={value}", "a number, as that column holds numbers") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """Which samples, in which order, in which form."""

    block_length: int = 256
    where: tuple[Condition, ...] = ()
    classes: tuple[str, ...] = ()
    """Only these classes, by name, or by label where there are no names."""
    skip_per_class: int = 0
    per_class: int | None = None
    """Of each class's samples (in an order that depends on the seed alone) leave out the first `skip_per_class`, then
    take this many: calls with one seed and different shares never take the same sample."""
    limit: int | None = None
    shuffle: bool = True
    drift: str | None = None
    """`class` or a column: one value after another, ascending; within each, shuffled or in order."""
    dtype: str | None = None
    scale: float = 1.0
    """Factor on every value, before the conversion to `dtype`."""
    invert: bool = False
    """uint8 only: 255 - value (ink on paper -> light on dark)."""
    label_noise: float = 0.0
    """Share of samples whose label is replaced by another class, drawn uniformly."""
    feature_noise: float = 0.0
    """Share of samples that get Gaussian noise."""
    noise_std: float = 0.2
    """Its standard deviation; 1 is the full scale of x (255 for uint8, 32768 for int16, 1 for float32)."""

    def __post_init__(self) -> None:
        for name, low in (("block_length", 1), ("skip_per_class", 0), ("per_class", 1), ("limit", 1)):
            value = getattr(self, name)
            require(value is None or value >= low, _option(name), str(value), f"at least {low}")
        for name in ("label_noise", "feature_noise"):
            require(0 <= getattr(self, name) <= 1, _option(name), str(getattr(self, name)), "a share from 0 to 1")
        require(self.dtype is None or self.dtype in FULL_SCALE, "--dtype", repr(self.dtype), ", ".join(FULL_SCALE))
        require(np.isfinite(self.scale) and self.scale != 0, "--scale", str(self.scale), "a factor other than 0")
        require(self.noise_std > 0, "--noise-std", str(self.noise_std), "a positive standard deviation")


def _column_name(name: str) -> str:
    """The name under which a source's column is packed; a block's own names are taken, and `/` parts HDF5's groups."""
    return f"{name}_column" if name in OWN_NAMES else name.replace("/", "_")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


class BadSamples:
    """What to do about bad samples: `fail` at the first, or `skip` and count them."""

    def __init__(self, policy: str = "fail") -> None:
        require(policy in ("fail", "skip"), "--on-bad", repr(policy), "fail or skip")
        self._skip = policy == "skip"
        self.count = 0
        self.first: DataError | None = None

    def __call__(self, error: DataError) -> None:
        if not self._skip:
            raise error
        self.count += 1
        self.first = self.first or error


def class_list(text: str | None) -> tuple[str, ...]:
    """Class names from `a,b,c`, or from the lines of a file: `@names.txt`."""
    if text is None:
        return ()
    if text.startswith("@"):
        try:
            names = Path(text[1:]).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputMissing(text[1:], f"cannot be read ({error})", "a file with a class name per line") from error
    else:
        names = text.split(",")
    return tuple(name.strip() for name in names if name.strip())


def pack(
    source: Source,
    packing: Packing,
    rng: np.random.Generator,
    *,
    rows: Array | None = None,
    on_bad: OnBad | None = None,
    on_step: Callable[[int], None] = lambda done: None,
) -> Iterator[Block]:
    """The chosen samples of `source` as blocks of `block_length`; column `index` is the position in the stream.

    Memory is bounded by a few spans of samples (64 MiB of a file, or one block) and 8 bytes per sample of the source,
    plus what its labels, columns and file names take.

    Args:
        rows: which samples in which order, if `choose` has been called already.
        on_bad: what to do about a sample that cannot be decoded or holds NaN or infinity; raises unless given.
        on_step: called with the number of samples read so far.

    Raises:
        DataError: no sample is left, a bad sample (by `on_bad`), a label that cannot be.
    """
    rows = choose(source, packing, rng) if rows is None else rows
    columns = {_column_name(name): values[rows] for name, values in source.columns.items() if name != "index"}
    y = source.y[rows]
    if packing.label_noise:
        columns["true_label"] = y
        y = noisy_labels(y, packing.label_noise, rng)
    if packing.feature_noise:
        columns["noisy"] = share_of(len(rows), packing.feature_noise, rng)
    labels = np.unique(source.y[rows])
    names = None if source.names is None else tuple(source.names[label] for label in labels)
    pieces = _pieces(source, packing, rows, rng, columns.get("noisy"), on_bad or BadSamples(), on_step)
    stream = (
        Block(
            x=x,
            y=y[at],
            layout=source.layout,
            columns={"index": np.arange(start, start + len(x)), **{name: c[at] for name, c in columns.items()}},
            labels=None if names is None else labels,
            names=names,
            facts={name: fact for name, fact in source.facts.items() if name not in OWN_NAMES},
        )
        for start, at, x in pieces
    )
    yield from rebatch(stream, packing.block_length)


# --------------------------------------------------------------------------------------------------- choice and order


def choose(source: Source, packing: Packing, rng: np.random.Generator) -> Array:
    """Rows of the source that are packed, in the order of the stream: int64 (M,)."""
    taken = np.ones(len(source), bool)
    for condition in packing.where:
        taken &= condition.matches(source)
    if packing.classes:
        taken &= np.isin(source.y, class_labels(source, packing.classes))
    rows = np.flatnonzero(taken)
    if len(rows):
        check_labels(source.y[rows], None if source.names is None else len(source.names), source.where)
    if packing.per_class is not None or packing.skip_per_class:
        rows = _share_of_each_class(source, rows, packing, rng)
    if not len(rows):
        raise DataError(
            source.where,
            f"no sample is left of {len(source)}",
            "at least one",
            "loosen --where, --classes or --skip-per-class",
        )
    return _ordered(source, rows, packing, rng)[: packing.limit]


def class_labels(source: Source, classes: Sequence[str]) -> Array:
    """Labels of classes that are given by name (by number where the source has no names)."""
    known = (
        {name: i for i, name in enumerate(source.names)}
        if source.names is not None
        else {str(label): int(label) for label in np.unique(source.y)}
    )
    for name in classes:
        if name not in known:
            some = ", ".join(list(known)[:8])
            raise UsageError("--classes", repr(name), f"one of the {len(known)} classes ({some}, ...)")
    return np.array([known[name] for name in classes], np.int64)


def column_or_label(source: Source, name: str, option: str) -> Array:
    """A column of the source, or `class` or `label`: the labels."""
    if name in source.columns:
        return source.columns[name]
    if name in ("class", "label"):
        return source.y
    raise UsageError(option, f"no column {name!r}", ", ".join(["class", *sorted(source.columns)]))


def _share_of_each_class(source: Source, rows: Array, packing: Packing, rng: np.random.Generator) -> Array:
    shares = []
    for label in np.unique(source.y[rows]):
        members = rng.permutation(rows[source.y[rows] == label])[packing.skip_per_class :]
        if packing.per_class is not None and len(members) < packing.per_class:
            name = source.names[label] if source.names is not None else label
            raise DataError(
                f"{source.where}: class {name}",
                f"{len(members)} samples",
                f"{packing.per_class}",
                "lower --per-class, or leave the class out with --classes",
            )
        shares.append(members[: packing.per_class])
    return np.sort(np.concatenate(shares)) if shares else rows


def _ordered(source: Source, rows: Array, packing: Packing, rng: np.random.Generator) -> Array:
    rows = rng.permutation(rows) if packing.shuffle else rows
    if packing.drift is None:
        return rows
    column = column_or_label(source, packing.drift, "--drift")[rows]
    return rows[np.argsort(column, kind="stable")]


# ---------------------------------------------------------------------------------------------------- reading and form


def _pieces(
    source: Source,
    packing: Packing,
    rows: Array,
    rng: np.random.Generator,
    noisy: Array | None,
    on_bad: OnBad,
    on_step: Callable[[int], None],
) -> Iterator[tuple[int, Array, Array]]:
    """Spans of the stream: position of the first sample, which of `rows` these are, and x in its final form."""
    span = max(packing.block_length, source.reader.span)
    start = 0
    for begin in range(0, len(rows), span):
        end = min(begin + span, len(rows))
        x, good = _usable(source, rows[begin:end], on_bad)
        x = convert(x, dtype=packing.dtype, scale=packing.scale, invert=packing.invert, where=source.where)
        at = begin + good
        if noisy is not None:
            x = with_noise(x, noisy[at], packing.noise_std, rng)
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
    for row in rows[good[~finite]]:
        where = f"{source.where}: sample {row}"
        on_bad(DataError(where, "NaN or infinity", "finite values", "or leave such samples out with `--on-bad skip`"))
    return x[finite], good[finite]
