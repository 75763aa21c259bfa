"""What `edgetrain pack` can read: one opener per kind of data, told apart by suffix and content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np

from stages.artifacts.codec import guess_layout
from stages.artifacts.records import LAYOUTS, Array, check_layout
from stages.data import activity, arrays, images, listings, sounds, tables
from stages.data.listings import Columns, Listing
from stages.data.samples import FileReader, Prepared, Source, class_numbers, column_of
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
    source = OPENERS[kind](paths, opening)
    if opening.shape is not None:
        source = _reshaped(source, opening.shape, opening.layout)
    if opening.image.size is None or kind in IMAGE_FILES:
        return source
    layout = source.layout
    require(layout in ("NHW", "NHWC", "NCHW"), "--size", f"samples of layout {layout}", "images", "see --shape")
    return replace(source, reader=Prepared(source.reader, lambda x: images.resize_arrays(x, layout, opening.image)))


def _check_options(kind: str, opening: Opening) -> None:
    """Refuse an option that would do nothing for this kind of data."""
    for option, (stated, kinds) in MEANT_FOR.items():
        if stated(opening) and kind not in kinds:
            raise UsageError(option, f"data of kind {kind}", "one of " + ", ".join(sorted(kinds)))


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and below it, sorted by path; for prediction, where there are no labels."""
    files = [folder / name for name in listings.walk(folder, images.SUFFIXES)]
    if not files:
        raise DataError(str(folder), "no image", "files " + ", ".join(sorted(images.SUFFIXES)))
    return files


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
    found = {kind for kind, suffixes in MEDIA_KINDS.items() if listings.walk(root, suffixes)}
    if len(found) == 1:
        return found.pop()
    fix = "state which with `--format images` or `--format sounds`" if found else ""
    raise DataError(
        str(root),
        "images and recordings" if found else "a folder without images, recordings or arrays",
        "folders of images, of .wav or .npy files, or UCI HAR, HARBOX, CIFAR as published",
        fix,
    )


def _detect_file(path: Path, opening: Opening) -> str:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        raise UsageError(str(path), "samples without labels", "a pair: `edgetrain pack x.npy y.npy`")
    if suffix in TABLES:
        if opening.base or opening.columns.file or opening.columns.box:
            return "list"
        form = tables.table_form(path)
        first = next(text for n, (_, text) in enumerate(tables.lines(path)) if n == (form.header is not None))
        media = any(Path(text.strip()).suffix.lower() in MEDIA for text in form.fields(first))
        return "list" if media or form.delimiter is None else "csv"
    if suffix not in FILES:
        known = ", ".join(sorted({*FILES, *TABLES, ".npy"}))
        raise UsageError(str(path), f"suffix {suffix!r}", known, "or a folder; `--format` overrides the suffix")
    return FILES[suffix]


STORED = frozenset({"npz", "npy", "hdf5", "csv", "npy-folder"})
"""Kinds whose samples are arrays of any meaning."""
FLAT = STORED | {"uci-har", "harbox"}
"""Kinds whose samples may be flat arrays of what has a shape."""
LISTED = frozenset({"list", "coco"})
"""Kinds that name their files."""
MEANT_FOR: dict[str, tuple[Callable[[Opening], object], frozenset[str]]] = {
    "--base": (lambda o: o.base, LISTED),
    "--pattern": (lambda o: o.pattern, frozenset({"images", "sounds"})),
    "--x-name, --y-name": (lambda o: o.x_name or o.y_name, frozenset({"npz", "hdf5"})),
    "--layout without --shape": (lambda o: o.layout and not o.shape, STORED),
    "--shape": (lambda o: o.shape, FLAT),
    "--raw": (lambda o: o.raw, frozenset({"uci-har"})),
    "--box-scale": (lambda o: o.image.box_scale != 1, LISTED),
    "--file-column, --box": (lambda o: o.columns.file or o.columns.box, frozenset({"list"})),
    "--label-column, --column": (lambda o: o.columns.label or o.columns.kept, frozenset({"list", "csv"})),
    "--colour": (lambda o: o.image.colour != "auto", LISTED | {"images"}),
    "--rate, --seconds": (lambda o: o.sound.rate_hz or o.sound.seconds, frozenset({"sounds", "list"})),
}
"""Option -> whether it is stated, and the kinds of data for which it means something."""

TABLES = frozenset({".csv", ".tsv", ".txt"})
FILES = {".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".hdf": "hdf5", ".he5": "hdf5", ".json": "coco"}
FOLDERS: dict[str, Callable[[Path], bool]] = {
    "uci-har": activity.is_uci_har,
    "harbox": activity.is_harbox,
    "cifar": arrays.is_cifar,
    "npy-folder": lambda root: any(root.glob("*.npy")),
}
MEDIA_KINDS = {"images": images.SUFFIXES, "sounds": sounds.SUFFIXES}
IMAGE_FILES = frozenset({"images", "list", "coco"})
"""Kinds whose images are resized as they are decoded."""


# -------------------------------------------------------------------------------------------------------- openers


def _images(paths: Sequence[Path], opening: Opening) -> Source:
    return _media(listings.by_folder(paths[0], images.SUFFIXES, opening.pattern), paths[0], opening)


def _sounds(paths: Sequence[Path], opening: Opening) -> Source:
    return _media(listings.by_folder(paths[0], sounds.SUFFIXES, opening.pattern), paths[0], opening)


def _list(paths: Sequence[Path], opening: Opening) -> Source:
    base = opening.base or paths[0].parent
    return _media(listings.by_table(paths[0], base, MEDIA, opening.columns), paths[0], opening)


def _coco(paths: Sequence[Path], opening: Opening) -> Source:
    return _media(listings.by_coco(paths[0], opening.base or paths[0].parent), paths[0], opening)


def _media(listing: Listing, where: Path, opening: Opening) -> Source:
    """A source of listed files: recordings where the first is one, images otherwise."""
    if Path(listing.files[0]).suffix.lower() in sounds.SUFFIXES:
        return _recordings(listing, where, opening.sound)
    form = images.resolve_colour([listing.path(row) for row in range(min(64, len(listing.files)))], opening.image)

    def decode(row: int) -> Array:
        box = None if listing.boxes is None else tuple(listing.boxes[row].tolist())
        return images.read_image(listing.path(row), form, box)

    reader = FileReader(decode, lambda row: str(listing.path(row)), "state one size for all with `--size`")
    layout = "NHW" if form.colour == "gray" else "NHWC"
    return Source(str(where), listing.y, reader, layout, listing.names, listing.columns)


def _recordings(listing: Listing, where: Path, form: sounds.SoundForm) -> Source:
    form = sounds.resolve_rate(listing.path(0), form)
    reader = FileReader(
        lambda row: sounds.read_sound(listing.path(row), form),
        lambda row: str(listing.path(row)),
        "state one length for all with `--seconds`",
    )
    return Source(str(where), listing.y, reader, "NT", listing.names, listing.columns, {"sample_rate_hz": form.rate_hz})


def _csv(paths: Sequence[Path], opening: Opening) -> Source:
    classes, kept, rows = tables.number_table(paths[0], opening.columns.label, opening.columns.kept)
    labels = column_of(classes)
    if labels.dtype.kind == "i":
        y, names = labels, None
    elif labels.dtype.kind == "f":
        y, names = arrays.labels_of(labels, None, str(paths[0]))
    else:
        y, names = class_numbers(classes)
    columns = {name: column_of(texts) for name, texts in kept.items()}
    layout = _stored_layout(opening) or "ND"
    check_layout(layout, (0, len(rows.places)), str(paths[0]))
    return Source(str(paths[0]), y, FileReader(rows, rows.at, ""), layout, names, columns)


def _npz(paths: Sequence[Path], opening: Opening) -> Source:
    x, y, columns, names = arrays.npz(paths[0], opening.x_name, opening.y_name)
    return arrays.array_source(x, y, columns, names, str(paths[0]), _stored_layout(opening))


def _npy(paths: Sequence[Path], opening: Opening) -> Source:
    if len(paths) != 2:
        raise UsageError("pack", f"{len(paths)} .npy files", "a pair: samples, then labels")
    x, y = (arrays.npy(path) for path in paths)
    return arrays.array_source(x, y, {}, None, str(paths[0]), _stored_layout(opening))


def _hdf5(paths: Sequence[Path], opening: Opening) -> Source:
    return arrays.hdf5_file(paths[0], opening.x_name, opening.y_name, _stored_layout(opening))


def _stored_layout(opening: Opening) -> str | None:
    """The layout of the samples as they lie in the file: with `shape`, the stated layout is that of the result."""
    return None if opening.shape is not None else opening.layout


OPENERS: dict[str, Callable[[Sequence[Path], Opening], Source]] = {
    "images": _images,
    "sounds": _sounds,
    "list": _list,
    "coco": _coco,
    "csv": _csv,
    "npz": _npz,
    "npy": _npy,
    "npy-folder": lambda paths, opening: arrays.npy_folder(paths[0], _stored_layout(opening)),
    "hdf5": _hdf5,
    "uci-har": lambda paths, opening: activity.uci_har(paths[0], raw=opening.raw),
    "harbox": lambda paths, opening: activity.harbox(paths[0]),
    "cifar": lambda paths, opening: arrays.cifar(paths[0]),
}


def _reshaped(source: Source, shape: tuple[int, ...], layout: str | None) -> Source:
    layout = layout or guess_layout(np.empty((0, *shape), np.uint8), "--shape")
    check_layout(layout, (0, *shape), "--shape")

    def prepare(x: Array) -> Array:
        if len(x) and prod(x.shape[1:]) != prod(shape):
            raise DataError(source.where, f"samples of {x.shape[1:]}", f"{prod(shape)} values for --shape {shape}")
        return x.reshape(-1, *shape)

    return replace(source, reader=Prepared(source.reader, prepare), layout=layout)
