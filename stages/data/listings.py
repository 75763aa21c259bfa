"""Which files make a data set, and the class of each: folders of classes, tables of file names, MSCOCO annotations."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.artifacts.records import Array
from stages.data import tables
from stages.data.samples import Notes, class_numbers, column_of
from stages.data.tables import Table, Writing
from stages.errors import DataError, InputMissing, UsageError, require


@dataclass(frozen=True)
class Listing:
    """Files of samples and the class of each."""

    root: Path
    files: Sequence[str]
    """Relative to `root`."""
    y: Array
    """int64 (N,): labels, -1 for none."""
    labels: Array | None
    names: tuple[str, ...] | None
    columns: Mapping[str, Array] = field(default_factory=dict)
    boxes: Array | None = None
    """float64 (N, 4): left, top, right, bottom of the part that counts, in pixels."""
    sizes: Array | None = None
    """int64 (N, 2): width and height of the pictures that the boxes were drawn in; 0 where it is not known."""
    lines: Sequence[int] | None = None
    """Line of the table for each sample."""

    def path(self, row: int) -> Path:
        """Where the file is: a name in a table is UTF-8, whatever encoding the system's own names have."""
        return self.root / os.fsdecode(self.files[row].encode("utf-8", "surrogateescape"))


SPLITS = frozenset(
    ["train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"]
)  # fmt: skip
"""Folders that are parts of a data set, not classes."""
CONTAINERS = SPLITS | frozenset(
    ["images", "image", "img", "imgs", "jpeg", "jpg", "png", "pictures", "photos", "data", "audio", "wav", "recordings"]
)
"""Folders that only hold what lies in them: where all paths begin or end with one, it is no part of a class's name."""


HOUSEKEEPING = frozenset(["__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information"])
"""Folders that systems leave behind: as good as hidden."""


@dataclass(frozen=True)
class Scan:
    """What lies in a folder and below it."""

    files: list[str]
    """Of the wanted kind, sorted, relative to the folder."""
    empty: list[str]
    """Innermost folders that hold no such file."""
    hidden: list[str]
    other: list[str]
    """Files of another kind."""
    odd: list[str]
    """Names of the wanted kind that are no files: links to nothing, pipes, loops of links."""

    def tell(self, notes: Notes) -> None:
        """Say what was left out."""
        for what, names in (
            ("left out {} hidden", self.hidden),
            ("left out {} of another kind", self.other),
            ("left out {} that are no files", self.odd),
        ):
            for name in names:
                notes.count(what, shown(name))


def scan(root: Path, suffixes: frozenset[str]) -> Scan:
    """Look through a folder; links to folders are followed, unless they lead back up.

    Raises `DataError` for a folder that cannot be read.
    """
    found = Scan([], [], [], [], [])

    def refuse(error: OSError) -> None:
        raise DataError(str(error.filename), f"cannot be listed ({error.strerror})", "a folder that may be read")

    for folder, inner, files in os.walk(root, followlinks=True, onerror=refuse):
        below = Path(folder).relative_to(root)
        hidden = [name for name in inner if name.startswith(".") or name in HOUSEKEEPING]
        found.hidden.extend((below / name).as_posix() for name in sorted(hidden))
        loops = [name for name in inner if _leads_up(Path(folder) / name, root)]
        found.odd.extend((below / name).as_posix() for name in loops)
        inner[:] = sorted(name for name in inner if name not in {*hidden, *loops})
        before = len(found.files)
        for name in sorted(files):
            _sort(found, root, (below / name).as_posix(), suffixes)
        if not inner and len(found.files) == before:
            found.empty.append(below.as_posix())
    found.files.sort()
    return found


def _sort(found: Scan, root: Path, file: str, suffixes: frozenset[str]) -> None:
    path = root / file
    if path.name.startswith("."):
        found.hidden.append(file)
    elif path.suffix.lower() not in suffixes:
        found.other.append(file)
    else:
        (found.files if path.is_file() else found.odd).append(file)


def _leads_up(folder: Path, root: Path) -> bool:
    """Whether a folder is a link to one that the way to it has passed, or that holds `root`."""
    if not folder.is_symlink():
        return False
    real, way = folder.resolve(), [folder.parent, *folder.parent.parents]
    passed = way[: way.index(root) + 1]
    return real in (*(each.resolve() for each in passed), *root.resolve().parents)


def shown(name: str) -> str:
    r"""A file's name as text that can be written anywhere: bytes that are not UTF-8 as in `caf\xe9`.

    >>> print(shown("caf\udce9/1.png"))
    caf\xe9/1.png
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def walk(root: Path, suffixes: frozenset[str]) -> list[str]:
    """Files below a folder with one of the suffixes, sorted, relative to it; hidden files and folders are left out."""
    return scan(root, suffixes).files


def by_folder(
    root: Path,
    suffixes: frozenset[str],
    pattern: str | None = None,
    *,
    skip_empty: bool = False,
    labelled: bool = True,
    notes: Notes | None = None,
) -> Listing:
    """One class per folder, named by its path below `root` (`alphabet/character`).

    A `pattern` is searched in each file's path below `root`: files without it are left out, its named group `label`
    is the class (the folder otherwise), every other named group becomes a column.

    Args:
        skip_empty: leave class folders without such files out, instead of refusing them.
        labelled: False takes files outside class folders too, without a class.
        notes: gets what was left out, and what was taken for no part of a class's name.
    """
    notes = Notes() if notes is None else notes
    found = scan(root, suffixes)
    found.tell(notes)
    if not found.files:
        raise DataError(str(root), "no file of a known kind", ", ".join(sorted(suffixes)))
    groups = [_groups(file, pattern) for file in found.files]
    kept = [(file, group) for file, group in zip(found.files, groups, strict=True) if group is not None]
    for file, group in zip(found.files, groups, strict=True):
        if group is None:
            notes.count("left out {} that --pattern does not match", shown(file))
    if not kept:
        some = f"none of {len(found.files)} paths such as {shown(found.files[0])!r} matches {pattern!r}"
        raise DataError(str(root), some, "a match")
    by_pattern = any("label" in group for _, group in kept)
    if not by_pattern and labelled:
        _check_empty(root, found, skip_empty, notes)
    if by_pattern:
        classes = [group.pop("label", "") for _, group in kept]
    else:
        classes = _folder_classes(root, [file for file, _ in kept], labelled, notes)
    columns = {name: column_of([shown(found[name]) for _, found in kept]) for name in kept[0][1]}
    return Listing(root, [file for file, _ in kept], *class_numbers([shown(name) for name in classes]), columns)


def _check_empty(root: Path, found: Scan, skip: bool, notes: Notes) -> None:
    """Class folders that hold nothing: an error, or a note where they may be skipped."""
    empty = [name for name in found.empty if name != "."]
    if empty and not skip:
        more = f" ({len(empty)} such folders)" if len(empty) > 1 else ""
        raise DataError(
            str(root / empty[0]),
            f"no file of the kind in this folder{more}",
            "samples in every class folder",
            "leave such folders out with `--on-bad skip`",
        )
    for name in empty:
        notes.count("left out {} folders without samples", shown(name))


def _folder_classes(root: Path, files: Sequence[str], labelled: bool, notes: Notes) -> list[str]:
    """The class of each file: the folders that lead to it, without those that only hold the others."""
    folders = [Path(file).parent.parts for file in files]
    loose = [file for file, parts in zip(files, folders, strict=True) if not parts]
    if loose and labelled:
        raise DataError(
            str(root / loose[0]),
            f"a file outside every class folder ({len(loose)} such files)",
            "folders named by class",
            "state how file names tell the class: `--pattern '(?P<label>[^_]+)_'`",
        )
    tops = {parts[0].lower() for parts in folders if parts}
    if len(tops) > 1 and tops <= SPLITS and labelled:
        raise DataError(
            str(root),
            "folders " + ", ".join(sorted(tops)),
            "classes, not parts of a data set",
            "name one of them, or keep the parts as a column: `--pattern '^(?P<split>[^/]+)/(?P<label>[^/]+)/'`",
        )
    return ["/".join(parts) for parts in _bare(folders, notes)]


def _bare(folders: list[tuple[str, ...]], notes: Notes) -> list[tuple[str, ...]]:
    """The paths without a first or last folder that all of several classes share and that only holds others."""
    for end, rest in ((0, slice(1, None)), (-1, slice(None, -1))):
        names = {parts[end] if len(parts) > 1 else "" for parts in folders}
        name = names.pop() if len(names) == 1 else ""
        if name.lower() in CONTAINERS and len(set(folders)) > 1:
            notes.say(f"classes are named without the folder {name!r} that all of them share")
            folders = [parts[rest] for parts in folders]
    return folders


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


def by_table(
    path: Path,
    base: Path,
    suffixes: frozenset[str],
    columns: Columns,
    writing: Writing | None = None,
    notes: Notes | None = None,
) -> Listing:
    """A table with one row per sample: its file and its class, by their columns' names.

    Files are in the column that is stated, or called so (`tables.FILE_NAMES`), or the first that holds names of files.
    Classes are in the column that is stated, or called so (`tables.LABEL_NAMES`), or the only one left. A table with
    file names alone takes the file's folder as the class. Names without a suffix get the one under which the file
    exists.

    Raises `UsageError` where more than one column may hold the classes.
    """
    table = tables.read_table(path, columns.mentioned, writing)
    form = table.form
    boxes = [table.numbers(name) for name in columns.box]
    taken = {form.position(name) for name in (*columns.box, *columns.kept)}
    file = form.position(columns.file) if columns.file else _file_place(table, suffixes, taken)
    place = form.position(columns.label) if columns.label else _label_place(table, {file, *taken}, notes)
    files = table.at(file)
    classes = [Path(name).parent.as_posix() for name in files] if place is None else table.at(place)
    kept = {name: column_of(table.column(name)) for name in columns.kept}
    found = [_with_suffix(base, name, suffixes) for name in files]
    if not any(Path(name).suffix.lower() in suffixes for name in found):
        fix = "state the column of file names with `--file-column`, the files' folder with `--base`"
        raise DataError(f"{path}: column {form.name(file)}", repr(files[0]), "names of images or recordings", fix)
    corners = np.stack(boxes, axis=1) if boxes else None
    return Listing(base, found, *class_numbers(classes), kept, corners, lines=table.lines)


def _file_place(table: Table, suffixes: frozenset[str], taken: set[int]) -> int:
    called = table.form.called(tables.FILE_NAMES, "--file-column")
    if called is not None:
        return called
    free = [i for i in range(table.width) if i not in taken]
    like = [i for i in free if Path(table.rows[0][i].strip()).suffix.lower() in suffixes]
    return (like or free or [0])[0]


def _label_place(table: Table, taken: set[int], notes: Notes | None) -> int | None:
    """The column of classes, None where there are file names alone."""
    called = table.form.called(tables.LABEL_NAMES, "--label-column")
    if called is not None and called not in taken:
        return called
    free = [i for i in range(table.width) if i not in taken]
    if len(free) > 1:
        names = ", ".join(table.form.name(place) for place in free)
        fix = "state it by name or position: `--label-column -1` is the last"
        raise UsageError(table.form.where, f"columns {names}", "one called label or class", fix)
    if free and table.form.header and notes is not None:
        notes.say(f"column {table.form.name(free[0])!r} is taken for the class")
    return free[0] if free else None


def _with_suffix(base: Path, name: str, suffixes: frozenset[str]) -> str:
    if Path(name).suffix.lower() in suffixes:
        return name
    return next((name + suffix for suffix in sorted(suffixes) if (base / (name + suffix)).exists()), name)


def by_coco(path: Path, base: Path, notes: Notes | None = None) -> Listing:
    """Every annotated object of MSCOCO's instances file is a sample: its category, cropped by its box; crowds are out.

    Also reads annotations without boxes (FGVCx Fungi): then the whole image counts. The file is held in memory.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        images = {image["id"]: image for image in content["images"]}
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        objects = [note for note in content["annotations"] if not note.get("iscrowd")]
        pictures = [images[note["image_id"]] for note in objects]
        files = [str(picture["file_name"]) for picture in pictures]
        classes = [categories[note["category_id"]] for note in objects]
        boxes = [note["bbox"] for note in objects if "bbox" in note]
        edges = np.array(boxes, np.float64).reshape(-1, 4)
        sizes = np.array([(p.get("width", 0), p.get("height", 0)) for p in pictures], np.int64).reshape(-1, 2)
    except FileNotFoundError as error:
        raise InputMissing(str(path), "there is no such file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            str(path), f"{type(error).__name__}: {error}", "MSCOCO's images, annotations, categories"
        ) from error
    if not objects or len(boxes) not in (0, len(objects)):
        raise DataError(str(path), f"{len(objects)} objects, {len(boxes)} boxes", "a box for each, or none at all")
    _tell_left_out(content, categories, classes, notes)
    corners = np.concatenate([edges[:, :2], edges[:, :2] + edges[:, 2:]], axis=1)
    return Listing(base, files, *class_numbers(classes), {}, corners if boxes else None, sizes=sizes)


def _tell_left_out(content: Any, categories: Mapping[Any, str], classes: Sequence[str], notes: Notes | None) -> None:
    """Say which annotations and categories make no sample."""
    if notes is None:
        return
    for note in content["annotations"]:
        if note.get("iscrowd"):
            notes.count("left out {} crowds", f"annotation {note.get('id', '')}")
    objects = {note["image_id"] for note in content["annotations"] if not note.get("iscrowd")}
    for image in content["images"]:
        if image["id"] not in objects:
            notes.count("left out {} images without an object", str(image["file_name"]))
    for name in sorted(set(categories.values()) - set(classes)):
        notes.count("left out {} categories without an object", name)
