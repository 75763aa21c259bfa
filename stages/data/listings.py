"""Which files make a data set, and the class of each: folders of classes, tables of file names, MSCOCO annotations."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stages.artifacts.records import Array
from stages.data import tables
from stages.data.samples import class_numbers, column_of
from stages.errors import DataError, InputMissing, UsageError, require


@dataclass(frozen=True)
class Listing:
    """Files of samples; `y` counts into `names`."""

    root: Path
    files: Sequence[str]
    """Relative to `root`."""
    y: Array
    names: tuple[str, ...]
    columns: Mapping[str, Array] = field(default_factory=dict)
    boxes: Array | None = None
    """float64 (N, 4): left, top, right, bottom of the part that counts, in pixels."""

    def path(self, row: int) -> Path:
        return self.root / self.files[row]


def walk(root: Path, suffixes: frozenset[str]) -> list[str]:
    """Files below a folder with one of the suffixes, sorted, relative to it; hidden files and folders are left out."""
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        below = Path(folder).relative_to(root)
        found += [
            (below / name).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    return sorted(found)


def by_folder(root: Path, suffixes: frozenset[str], pattern: str | None = None) -> Listing:
    """One class per folder, named by its path below `root` (`alphabet/character`).

    A `pattern` is searched in each file's path below `root`: files without it are left out, its named group `label`
    is the class (the folder otherwise), every other named group becomes a column.
    """
    files = walk(root, suffixes)
    if not files:
        raise DataError(str(root), "no file of a known kind", ", ".join(sorted(suffixes)))
    groups = [_groups(file, pattern) for file in files]
    kept = [(file, found) for file, found in zip(files, groups, strict=True) if found is not None]
    if not kept:
        raise DataError(str(root), f"none of {len(files)} paths such as {files[0]!r} matches {pattern!r}", "a match")
    classes = [found.pop("label", "") or Path(file).parent.as_posix() for file, found in kept]
    if "." in classes:
        loose = kept[classes.index(".")][0]
        raise DataError(
            str(root / loose),
            "a file outside every class folder",
            "folders named by class",
            "state how file names tell the class: `--pattern '(?P<label>[^_]+)_'`",
        )
    y, names = class_numbers(classes)
    columns = {name: column_of([found[name] for _, found in kept]) for name in kept[0][1]}
    return Listing(root, [file for file, _ in kept], y, names, columns)


def _groups(file: str, pattern: str | None) -> dict[str, str] | None:
    """Named groups of the pattern in the path; None where it does not match."""
    if pattern is None:
        return {}
    try:
        match = re.search(pattern, file)
    except re.error as error:
        raise UsageError("--pattern", f"{pattern!r} ({error})", "a regular expression") from error
    return None if match is None else {name: text or "" for name, text in match.groupdict().items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns of a table mean what: by name, or by position (1 is the first, -1 the last)."""

    file: str | None = None
    label: str | None = None
    box: tuple[str, ...] = ()
    """left, top, right, bottom in pixels."""
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(len(self.box) in (0, 4), "--box", f"{len(self.box)} columns", "four: left, top, right, bottom")

    @property
    def mentioned(self) -> tuple[str, ...]:
        return tuple(name for name in (self.file, self.label, *self.box, *self.kept) if name is not None)


def by_table(path: Path, base: Path, suffixes: frozenset[str], columns: Columns) -> Listing:
    """A table with one row per sample: file name (first column unless stated) and class (second column).

    A table with the file name alone takes the file's folder as the class. Names without a suffix get the one under
    which the file exists.
    """
    table = tables.read_table(path, columns.mentioned)
    files = table.column(columns.file or "1")
    if columns.label is None and table.width == 1:
        classes = [Path(name).parent.as_posix() for name in files]
    else:
        classes = table.column(columns.label or "2")
    y, names = class_numbers(classes)
    boxes = [table.numbers(name) for name in columns.box]
    kept = {name: column_of(table.column(name)) for name in columns.kept}
    found = [_with_suffix(base, name, suffixes) for name in files]
    return Listing(base, found, y, names, kept, np.stack(boxes, axis=1) if boxes else None)


def _with_suffix(base: Path, name: str, suffixes: frozenset[str]) -> str:
    if Path(name).suffix.lower() in suffixes:
        return name
    return next((name + suffix for suffix in sorted(suffixes) if (base / (name + suffix)).exists()), name)


def by_coco(path: Path, base: Path) -> Listing:
    """Every annotated object of MSCOCO's instances file is a sample: its category, cropped by its box; crowds are out.

    Also reads annotations without boxes (FGVCx Fungi): then the whole image counts. The file is held in memory.
    """
    try:
        content = json.loads(path.read_text())
        images = {image["id"]: str(image["file_name"]) for image in content["images"]}
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        objects = [note for note in content["annotations"] if not note.get("iscrowd")]
        files = [images[note["image_id"]] for note in objects]
        classes = [categories[note["category_id"]] for note in objects]
        boxes = [note["bbox"] for note in objects if "bbox" in note]
        edges = np.array(boxes, np.float64).reshape(-1, 4)
    except FileNotFoundError as error:
        raise InputMissing(str(path), "there is no such file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            str(path), f"{type(error).__name__}: {error}", "MSCOCO's images, annotations, categories"
        ) from error
    if not objects or len(boxes) not in (0, len(objects)):
        raise DataError(str(path), f"{len(objects)} objects, {len(boxes)} boxes", "a box for each, or none at all")
    y, names = class_numbers(classes)
    corners = np.concatenate([edges[:, :2], edges[:, :2] + edges[:, 2:]], axis=1)
    return Listing(base, files, y, names, {}, corners if boxes else None)
