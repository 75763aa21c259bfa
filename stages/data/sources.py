"""What `edgetrain pack` can read: one opener per kind of data, told apart by suffix and content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np

from stages.artifacts import stream
from stages.artifacts.codec import guess_layout, text_array
from stages.artifacts.records import LAYOUTS, Array, Preparation, check_layout
from stages.data import activity, arrays, images, listings, matlab, sounds, tables
from stages.data.listings import Columns, Listing
from stages.data.samples import FileReader, Notes, Prepared, Source, classes_of_texts, column_of
from stages.errors import DataError, InputMissing, UsageError, require

MEDIA = images.SUFFIXES | sounds.SUFFIXES


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """How data is read."""

    format: str = "auto"
    base: Path | None = None
    """Folder that file names in a table or in annotations are relative to; the table's own folder otherwise."""
    pattern: str | None = None
    """Regular expression over paths: named group `label`, others become columns."""
    columns: Columns = field(default_factory=Columns)
    x_name: str | None = None
    y_name: str | None = None
    layout: str | None = None
    shape: tuple[int, ...] | None = None
    """Flat samples have this shape: H, W or H, W, C or C, H, W, with their layout also T, C or C, T."""
    raw: bool = False
    """UCI HAR: sensor signals instead of features."""
    image: images.ImageForm = field(default_factory=images.ImageForm)
    sound: sounds.SoundForm = field(default_factory=sounds.SoundForm)
    writing: tables.Writing = field(default_factory=tables.Writing)
    skip_empty: bool = False
    """Leave class folders without samples out, instead of refusing them."""
    labelled: bool = True
    """Refuse what has no place for labels; otherwise such samples get none (y = -1)."""
    one_shape: bool = True
    """Refuse pictures and recordings of another shape than the first one's."""

    def __post_init__(self) -> None:
        require(self.format in ("auto", *OPENERS), "--format", repr(self.format), "auto, " + ", ".join(OPENERS))
        require(self.layout is None or self.layout in LAYOUTS, "--layout", repr(self.layout), ", ".join(LAYOUTS))
        require(
            self.shape is None or (len(self.shape) in (2, 3) and min(self.shape) > 0),
            "--shape",
            str(self.shape),
            "HxW, HxWxC or CxHxW, or with --layout TxC or CxT",
        )


def open_source(paths: Sequence[Path], opening: Opening) -> Source:
    """The samples under one path, or in a pair x.npy y.npy.

    Raises:
        InputMissing: there is no such file or folder.
        UsageError: a kind of data nobody knows, or options that do not fit it.
        DataError: the data is not what it seems to be.
    """
    for path in paths:
        if not path.exists():
            raise InputMissing(str(path), "there is no such file or folder")
    kind = opening.format if opening.format != "auto" else detect(paths, opening)
    _check_options(kind, opening)
    notes = Notes()
    source = replace(OPENERS[kind](paths, opening, notes), notes=notes)
    if opening.shape is not None:
        source = _reshaped(source, opening.shape, opening.layout)
    if opening.image.size is not None and kind not in IMAGE_FILES:
        source = _resized(source, opening.image)
    if opening.layout is None or source.prepared is None:
        return source
    return replace(source, prepared=replace(source.prepared, layout=opening.layout))


def _resized(source: Source, form: images.ImageForm) -> Source:
    """Arrays of pictures brought to a size."""
    layout = source.layout
    require(layout in ("NHW", "NHWC", "NCHW"), "--size", f"samples of layout {layout}", "images", "see --shape")
    prepared = replace(source.prepared or Preparation(of="arrays"), size=form.size, fit=form.fit)
    reader = Prepared(source.reader, lambda x: images.resize_arrays(x, layout, form))
    return replace(source, reader=reader, prepared=prepared)


def _check_options(kind: str, opening: Opening) -> None:
    """Refuse an option that would do nothing for this kind of data."""
    for option, (stated, kinds) in MEANT_FOR.items():
        if stated(opening) and kind not in kinds:
            raise UsageError(option, f"data of kind {kind}", "one of " + ", ".join(sorted(kinds)))


# -------------------------------------------------------------------------------------------------- telling apart


def detect(paths: Sequence[Path], opening: Opening) -> str:
    """The key of `OPENERS` for these paths: by suffix, by what a folder holds, by options that only fit one kind."""
    if len(paths) == 2 and all(path.suffix == ".npy" for path in paths):
        return "npy"
    if len(paths) != 1:
        raise UsageError("pack", f"{len(paths)} sources", "one, or a pair x.npy y.npy", "pack them one by one")
    path = paths[0]
    return _detect_folder(path) if path.is_dir() else _detect_file(path, opening)


def _detect_folder(root: Path) -> str:
    for kind, fits in FOLDERS.items():
        if fits(root):
            return kind
    found = {kind: listings.walk(root, suffixes) for kind, suffixes in MEDIA_KINDS.items()}
    kinds = [kind for kind, files in found.items() if files]
    arrays_too = sorted(path.name for path in root.glob("*.npy") if not path.name.startswith("."))
    classes = {Path(file).parent for files in found.values() for file in files} - {Path()}
    if arrays_too and len(classes) > 1 and len(kinds) == 1:
        return kinds[0]  # class folders, and beside them an array such as their mean
    kinds += ["npy-folder"] if arrays_too else []
    if len(kinds) == 1:
        return kinds[0]
    several = " and ".join(SHOWN_KINDS[kind] for kind in kinds)
    raise DataError(
        str(root),
        several or "a folder without images, recordings or arrays",
        "folders of images, of .wav or .npy files, or UCI HAR, HARBOX, CIFAR as published",
        "state which with " + " or ".join(f"`--format {kind}`" for kind in kinds) if kinds else "",
    )


SHOWN_KINDS = {"images": "images", "sounds": "recordings", "npy-folder": "arrays"}


def _detect_file(path: Path, opening: Opening) -> str:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        raise UsageError(str(path), "samples without labels", "a pair: `edgetrain pack x.npy y.npy`")
    if suffix in TABLES:
        if opening.base or opening.columns.file or opening.columns.box:
            return "list"
        form = tables.table_form(path, opening.columns.mentioned, opening.writing)
        first = next(islice(tables.rows(path, form.delimiter), form.header is not None, None), None)
        media = first is not None and any(Path(text.strip()).suffix.lower() in MEDIA for text in first.fields)
        return "list" if media or form.delimiter is None else "csv"
    if suffix not in FILES:
        known = ", ".join(sorted({*FILES, *TABLES, ".npy"}))
        raise UsageError(str(path), f"suffix {suffix!r}", known, "or a folder; `--format` overrides the suffix")
    return FILES[suffix]


STORED = frozenset({"npz", "npy", "hdf5", "csv", "npy-folder", "matlab"})
"""Kinds whose samples are arrays of any meaning."""
FLAT = STORED | {"uci-har", "harbox"}
"""Kinds whose samples may be flat arrays of what has a shape."""
LISTED = frozenset({"list", "coco"})
"""Kinds that name their files."""
MEANT_FOR: dict[str, tuple[Callable[[Opening], object], frozenset[str]]] = {
    "--base": (lambda o: o.base, LISTED),
    "--pattern": (lambda o: o.pattern, frozenset({"images", "sounds"})),
    "--x-name, --y-name": (lambda o: o.x_name or o.y_name, frozenset({"npz", "hdf5", "matlab"})),
    "--layout without --shape": (lambda o: o.layout and not o.shape, STORED),
    "--shape": (lambda o: o.shape, FLAT),
    "--raw": (lambda o: o.raw, frozenset({"uci-har"})),
    "--box-scale": (lambda o: o.image.box_scale != 1, LISTED),
    "--boxes": (lambda o: o.image.boxes != "auto", LISTED),
    "--delimiter, --header": (
        lambda o: o.writing.delimiter or o.writing.header != "auto" or o.writing.decimal != ".",
        frozenset({"list", "csv"}),
    ),
    "--file-column, --box": (lambda o: o.columns.file or o.columns.box, frozenset({"list"})),
    "--label-column, --column": (lambda o: o.columns.label or o.columns.kept, frozenset({"list", "csv"})),
    "--colour": (lambda o: o.image.colour != "auto", LISTED | {"images"}),
    "--rate, --seconds": (lambda o: o.sound.rate_hz or o.sound.seconds, frozenset({"sounds", "list"})),
}
"""Option -> whether it is stated, and the kinds of data for which it means something."""

TABLES = frozenset({".csv", ".tsv", ".txt"})
FILES = {**dict.fromkeys(sorted(stream.SUFFIXES), "hdf5"), ".npz": "npz", ".json": "coco", ".mat": "matlab"}
FOLDERS: dict[str, Callable[[Path], bool]] = {
    "uci-har": activity.is_uci_har,
    "harbox": activity.is_harbox,
    "cifar": arrays.is_cifar,
}
MEDIA_KINDS = {"images": images.SUFFIXES, "sounds": sounds.SUFFIXES}
IMAGE_FILES = frozenset({"images", "list", "coco"})
"""Kinds whose images are resized as they are decoded."""


# -------------------------------------------------------------------------------------------------------- openers


def _images(paths: Sequence[Path], opening: Opening, notes: Notes) -> Source:
    return _media(_by_folder(paths[0], images.SUFFIXES, opening, notes), paths[0], opening, notes)


def _sounds(paths: Sequence[Path], opening: Opening, notes: Notes) -> Source:
    return _media(_by_folder(paths[0], sounds.SUFFIXES, opening, notes), paths[0], opening, notes)


def _by_folder(path: Path, suffixes: frozenset[str], opening: Opening, notes: Notes) -> Listing:
    """The files of a folder; of a single file that one alone, without a class."""
    if not path.is_dir():
        return Listing(path.parent, [path.name], np.array([-1]), None, None)
    return listings.by_folder(
        path, suffixes, opening.pattern, skip_empty=opening.skip_empty, labelled=opening.labelled, notes=notes
    )


def _list(paths: Sequence[Path], opening: Opening, notes: Notes) -> Source:
    base = opening.base or paths[0].parent
    listing = listings.by_table(paths[0], base, MEDIA, opening.columns, opening.writing, notes)
    return _media(listing, paths[0], opening, notes)


def _coco(paths: Sequence[Path], opening: Opening, notes: Notes) -> Source:
    return _media(listings.by_coco(paths[0], opening.base or paths[0].parent, notes), paths[0], opening, notes)


def _media(listing: Listing, where: Path, opening: Opening, notes: Notes) -> Source:
    """A source of listed files: recordings where the first is one, images otherwise."""
    if Path(listing.files[0]).suffix.lower() in sounds.SUFFIXES:
        return _recordings(listing, where, opening, notes)
    some = dict.fromkeys(listing.path(row) for row in range(min(1024, len(listing.files))))
    form = images.resolve_colour(list(some)[:64], opening.image)

    def decode(row: int) -> Array:
        box = None if listing.boxes is None else tuple(listing.boxes[row].tolist())
        drawn = None if listing.sizes is None else tuple(listing.sizes[row].tolist())
        return images.read_image(listing.path(row), form, box, drawn, notes)

    prepared = Preparation(of="pictures", size=form.size, fit=form.fit, colour=form.colour)
    layout = "NHW" if form.colour == "gray" else "NHWC"
    fix = "state one size for all with `--size`"
    return _listed(listing, where, decode, layout, prepared, fix if opening.one_shape else None)


def _recordings(listing: Listing, where: Path, opening: Opening, notes: Notes) -> Source:
    form = sounds.resolve_rate([listing.path(row) for row in range(min(64, len(listing.files)))], opening.sound)
    prepared = Preparation(of="recordings", sample_rate_hz=form.rate_hz or 0, seconds=form.seconds or 0.0)
    fix = "state one length for all with `--seconds`"
    return _listed(
        listing,
        where,
        lambda row: sounds.read_sound(listing.path(row), form, notes),
        "NT",
        prepared,
        fix if opening.one_shape else None,
    )


def _listed(
    listing: Listing,
    where: Path,
    decode: Callable[[int], Array],
    layout: str,
    prepared: Preparation,
    fix: str | None,
) -> Source:
    def at(row: int) -> str:
        return str(listing.path(row)) if listing.lines is None else f"{where}:{listing.lines[row]}"

    return Source(
        str(where),
        listing.y,
        FileReader(decode, lambda row: listings.shown(str(listing.path(row))), fix),
        layout,
        listing.names,
        listing.columns,
        labels=listing.labels,
        prepared=prepared,
        files=text_array([listings.shown(name) for name in listing.files]),
        at=at,
    )


def _csv(paths: Sequence[Path], opening: Opening, notes: Notes) -> Source:
    columns = opening.columns
    classes, kept, rows = tables.number_table(
        paths[0], columns.label, columns.kept, opening.writing, labelled=opening.labelled, notes=notes
    )
    y, labels, names = classes_of_texts(classes, str(paths[0]))
    layout = _stored_layout(opening) or "ND"
    check_layout(layout, (0, len(rows.places)), str(paths[0]))
    beside = {name: column_of(texts) for name, texts in kept.items()}
    reader = FileReader(rows, rows.at, "")
    prepared = Preparation(of="arrays")
    return Source(str(paths[0]), y, reader, layout, names, beside, labels=labels, prepared=prepared, at=rows.at)


def _npz(paths: Sequence[Path], opening: Opening, notes: Notes) -> Source:
    found = arrays.npz(paths[0], opening.x_name, opening.y_name, labelled=opening.labelled, notes=notes)
    return arrays.array_source(found, str(paths[0]), _stored_layout(opening))


def _matlab(paths: Sequence[Path], opening: Opening, notes: Notes) -> Source:
    found = matlab.mat(paths[0], opening.x_name, opening.y_name, labelled=opening.labelled, notes=notes)
    return arrays.array_source(found, str(paths[0]), _stored_layout(opening))


def _npy(paths: Sequence[Path], opening: Opening, notes: Notes) -> Source:
    if len(paths) != 2 and (opening.labelled or len(paths) != 1):
        raise UsageError("pack", f"{len(paths)} .npy files", "a pair: samples, then labels")
    x = arrays.npy(paths[0])
    y = arrays.npy(paths[1]) if len(paths) == 2 else None
    return arrays.array_source(arrays.Found(x, y, {}, None), str(paths[0]), _stored_layout(opening))


def _hdf5(paths: Sequence[Path], opening: Opening, notes: Notes) -> Source:
    layout = _stored_layout(opening)
    return arrays.hdf5_file(paths[0], opening.x_name, opening.y_name, layout, labelled=opening.labelled, notes=notes)


def _npy_folder(paths: Sequence[Path], opening: Opening, notes: Notes) -> Source:
    listings.scan(paths[0], frozenset({".npy"})).tell(notes)
    return arrays.npy_folder(paths[0], _stored_layout(opening))


def _stored_layout(opening: Opening) -> str | None:
    """The layout of the samples as they lie in the file: with `shape`, the stated layout is that of the result."""
    return None if opening.shape is not None else opening.layout


OPENERS: dict[str, Callable[[Sequence[Path], Opening, Notes], Source]] = {
    "images": _images,
    "sounds": _sounds,
    "list": _list,
    "coco": _coco,
    "csv": _csv,
    "npz": _npz,
    "npy": _npy,
    "npy-folder": _npy_folder,
    "hdf5": _hdf5,
    "matlab": _matlab,
    "uci-har": lambda paths, opening, notes: activity.uci_har(paths[0], raw=opening.raw),
    "harbox": lambda paths, opening, notes: activity.harbox(paths[0]),
    "cifar": lambda paths, opening, notes: arrays.cifar(paths[0]),
}


def _reshaped(source: Source, shape: tuple[int, ...], layout: str | None) -> Source:
    layout = layout or guess_layout(np.empty((0, *shape), np.uint8), "--shape")
    check_layout(layout, (0, *shape), "--shape")

    def prepare(x: Array) -> Array:
        if len(x) and prod(x.shape[1:]) != prod(shape):
            raise DataError(source.where, f"samples of {x.shape[1:]}", f"{prod(shape)} values for --shape {shape}")
        return x.reshape(-1, *shape)

    prepared = replace(source.prepared or Preparation(of="arrays"), shape=shape)
    return replace(source, reader=Prepared(source.reader, prepare), layout=layout, prepared=prepared)
