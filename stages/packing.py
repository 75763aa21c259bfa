"""Pack: any source of labelled samples -> a stream of blocks, chosen, ordered and converted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stages.artifacts.codec import text_array
from stages.artifacts.records import Array, Block
from stages.data.blocks import check_labels
from stages.data.conversion import noisy_labels, share_of
from stages.data.reading import Form, Noise, read_blocks
from stages.data.samples import OnBad, Source
from stages.errors import DataError, InputMissing, UsageError, require


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
        """bool (N,). Raises `UsageError` for a value that no sample has: it would silently choose nothing."""
        column = column_or_label(source, self.column, "--where")
        text = column.dtype.kind == "S"
        wanted = [value.encode() if text else self._number(value) for value in self.values]
        for value, shown in zip(wanted, self.values, strict=True):
            if not (column == value).any() and len(column) and shown != "-1":
                there = ", ".join(v.decode(errors="replace") if text else f"{v:g}" for v in np.unique(column)[:8])
                raise UsageError("--where", f"no sample with {self.column}={shown}", f"values such as {there}")
        chosen = np.isin(column, wanted)
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
    """Of each class's samples, in an order that depends on the seed and the whole source alone, leave out the first
    `skip_per_class`, then take this many: calls with one seed and different shares never take the same sample,
    whatever else chooses among them."""
    unlabelled: bool = False
    """Keep samples that have no label yet, as y = -1, instead of refusing them."""
    limit: int | None = None
    shuffle: bool = True
    drift: str | None = None
    """`class` or a column: one value after another, ascending; within each, shuffled or in order."""
    form: Form = field(default_factory=Form)
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
        require(self.noise_std > 0, "--noise-std", str(self.noise_std), "a positive standard deviation")
        by_class = self.per_class is not None or self.skip_per_class or self.label_noise
        found = "together with --per-class, --skip-per-class or --label-noise"
        require(not (self.unlabelled and by_class), "--unlabelled", found, "one of them")


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
            names = Path(text[1:]).read_text("utf-8").splitlines()
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
    bad = on_bad or BadSamples()
    y, columns, noise = source.y[rows], {}, None
    if packing.label_noise:
        columns["true_label"] = y
        y = noisy_labels(y, packing.label_noise, rng)
    if packing.feature_noise:
        columns["noisy"] = share_of(len(rows), packing.feature_noise, rng)
        noise = Noise(columns["noisy"], packing.noise_std, rng)
    left: dict[int, int] = dict(zip(*(part.tolist() for part in np.unique(y, return_counts=True)), strict=True))
    blocks = read_blocks(
        source,
        rows,
        packing.form,
        block_length=packing.block_length,
        y=y,
        columns=columns,
        noise=noise,
        on_bad=bad,
        on_step=on_step,
    )
    met: set[int] = set()
    for block in blocks:
        met |= set(np.unique(block.y).tolist())
        yield block
    _check_emptied(source, left, met)


def _check_emptied(source: Source, wanted: Mapping[int, int], met: Collection[int]) -> None:
    """Raise `DataError` for a class of whose samples none could be used: it must not vanish unheard."""
    gone = [label for label in wanted if label not in met]
    if gone:
        found = f"none of the {wanted[gone[0]]} samples of class {source.name_of.get(gone[0], gone[0])} can be used"
        raise DataError(source.where, found, "some of every class", "mend them, or leave the class out with --classes")


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
        check_labels(source.y[rows], source.name_of, source.where)
    if not packing.unlabelled:
        _check_all_labelled(source, rows)
    if packing.per_class is not None or packing.skip_per_class:
        rows = _share_of_each_class(source, taken, packing, rng)
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
        {name: label for label, name in source.name_of.items()}
        if source.names is not None
        else {str(label): int(label) for label in np.unique(source.y)}
    )
    for name in classes:
        if name not in known:
            some = ", ".join(list(known)[:8])
            raise UsageError("--classes", repr(name), f"one of the {len(known)} classes ({some}, ...)")
    return np.array([known[name] for name in classes], np.int64)


def column_or_label(source: Source, name: str, option: str) -> Array:
    """A column of the source, or `class` or `label`: names where classes have them, else labels."""
    if name in source.columns:
        return source.columns[name]
    if name == "source" and source.files is not None:
        return source.files
    if name in ("class", "label"):
        return source.y if source.names is None else text_array([_class_of(source, label) for label in source.y])
    raise UsageError(option, f"no column {name!r}", ", ".join(["class", *sorted(source.columns)]))


def _class_of(source: Source, label: int) -> str:
    return source.name_of.get(label, str(label))


def _check_all_labelled(source: Source, rows: Array) -> None:
    """Raise `DataError` for samples without a label, naming the first."""
    without = rows[source.y[rows] < 0]
    if len(without):
        found = f"no label ({len(without)} such samples)"
        fix = "label them, leave them out with `--where 'class!=-1'`, or keep them with `--unlabelled`"
        raise DataError(source.place(int(without[0])), found, "a class for every sample", fix)


def _share_of_each_class(source: Source, taken: Array, packing: Packing, rng: np.random.Generator) -> Array:
    """The samples of the wanted share of each class that are `taken` (bool (N,)).

    Shares are parts of whole classes, whatever is taken: else two shares of differently chosen samples would overlap.
    """
    shares = []
    for label in np.unique(source.y[source.y >= 0]):
        order = rng.permutation(np.flatnonzero(source.y == label))
        share = order[packing.skip_per_class :][: packing.per_class]
        members = share[taken[share]]
        if packing.per_class is not None and taken[order].any() and len(members) < packing.per_class:
            raise _too_few(source, int(label), len(order), len(members), packing)
        shares.append(members)
    return np.sort(np.concatenate(shares)) if shares else np.zeros(0, np.int64)


def _too_few(source: Source, label: int, size: int, left: int, packing: Packing) -> DataError:
    where = f"{source.where}: class {source.name_of.get(label, label)}"
    if size - packing.skip_per_class < (packing.per_class or 0):
        fix = "lower --per-class, or leave the class out with --classes"
        return DataError(where, f"{max(0, size - packing.skip_per_class)} samples", f"{packing.per_class}", fix)
    found = f"--where leaves {left} of the {packing.per_class} samples of its share"
    fix = "pack what --where chooses into a file first, and take shares of that"
    return DataError(where, found, "all: shares are parts of whole classes, so that they are disjoint", fix)


def _ordered(source: Source, rows: Array, packing: Packing, rng: np.random.Generator) -> Array:
    rows = rng.permutation(rows) if packing.shuffle else rows
    if packing.drift is None:
        return rows
    column = column_or_label(source, packing.drift, "--drift")[rows]
    return rows[np.argsort(column, kind="stable")]
