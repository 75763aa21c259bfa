"""Arrays that others saved: .npz, .npy, HDF5, a folder of .npy files, CIFAR's binary files."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from stages.artifacts import hdf5
from stages.artifacts.codec import guess_layout, text_array, text_tuple
from stages.artifacts.records import Array, Block, Group, Preparation, Run, Samples, check_layout
from stages.artifacts.stream import SharedFile, open_records
from stages.data.blocks import agreed, classes_of, preparation_of
from stages.data.samples import ArrayReader, Chain, Classes, Notes, Source, class_numbers
from stages.errors import DataError, InputMissing

X_NAMES = ("x", "X", "images", "data", "features", "x_train", "X_train", "train_images")
Y_NAMES = ("y", "Y", "labels", "targets", "label", "y_train", "Y_train", "train_labels")
"""Names under which samples and labels are looked for, in this order."""
CLASS_NAMES = "classes"
"""Name of the array that names the labels 0, 1, ..."""


@dataclass(frozen=True)
class Found:
    """Which of several named arrays are what."""

    x: Samples
    y: Array | None
    columns: dict[str, Array]
    """As long as the samples, one dimension."""
    names: tuple[str, ...] | None
    pictures: bool = False
    """The samples' name says that they are pictures."""


def npz(
    path: Path, x_name: str | None, y_name: str | None, *, labelled: bool = True, notes: Notes | None = None
) -> Found:
    """Samples, labels, columns and class names of a .npz archive, whose arrays are read into memory."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array instead of an archive")
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise InputMissing(str(path), "there is no such file") from error
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(str(path), _reason(error), "a .npz archive of plain arrays") from error
    return from_names(arrays, str(path), x_name, y_name, labelled=labelled, notes=notes)


def npy(path: Path) -> Array:
    """An array that stays on disk until it is indexed."""
    try:
        return cast(Array, np.load(path, mmap_mode="r", allow_pickle=False))
    except FileNotFoundError as error:
        raise InputMissing(str(path), "there is no such file") from error
    except (ValueError, OSError, EOFError) as error:
        raise DataError(str(path), _reason(error), "a .npy file of a plain array") from error


def _reason(error: Exception) -> str:
    """Why numpy could not read a file, without its advice to allow pickles."""
    text = " ".join(str(error).split())
    return "pickled or no numpy data" if "pickle" in text else f"cannot be read ({text or type(error).__name__})"


def from_names(
    arrays: Mapping[str, Any],
    where: str,
    x_name: str | None,
    y_name: str | None,
    *,
    labelled: bool = True,
    notes: Notes | None = None,
) -> Found:
    """Which of several named arrays are samples, labels, columns and class names; `notes` gets those that are nothing.

    Names may lead through groups (`train/x`); labels and columns are then looked for in the samples' group.

    Raises `DataError` where no array, or more than one, may be the samples.
    """
    x_name = x_name or _one_of(X_NAMES, arrays, where, "--x-name")
    group = x_name.rpartition("/")[0]
    beside = {name.removeprefix(f"{group}/"): array for name, array in arrays.items() if name.startswith(f"{group}/")}
    beside = beside if group else {name: array for name, array in arrays.items() if "/" not in name}
    y_name = y_name or next((name for name in Y_NAMES if name in beside), None)
    x = _named(arrays, x_name, where, "--x-name")
    y = None if y_name is None else np.asarray(_named({**arrays, **beside}, y_name, where, "--y-name"))
    if y is None and labelled:
        _named(arrays, "y", where, "--y-name")
    names = beside.get(CLASS_NAMES)
    rest = {name: array for name, array in beside.items() if name not in (y_name, CLASS_NAMES)}
    rest.pop(x_name.rpartition("/")[2], None)
    columns = {name: _column(array) for name, array in rest.items() if tuple(array.shape) == (len(x),)}
    columns = {name: column for name, column in columns.items() if column.dtype.kind in "biufS"}
    if notes is not None:
        mine = {id(array) for array in (x, arrays.get(y_name or ""), *beside.values())}
        for name in sorted(rest.keys() - columns.keys()):
            notes.count("left out {} arrays that are not one value per sample", name)
        for name in sorted(name for name, array in arrays.items() if id(array) not in mine and name != x_name):
            notes.count("left out {} arrays of other groups", name)
    names = None if names is None else _names(names)
    return Found(x, y, columns, names, x_name.rpartition("/")[2] in ("images", "train_images"))


def _named(arrays: Mapping[str, Any], name: str, where: str, option: str) -> Any:
    if name not in arrays:
        there = "arrays " + (", ".join(sorted(arrays)[:12]) or "none")
        raise DataError(where, there, f"one called {name}", f"name it with `{option}`")
    return arrays[name]


def _one_of(names: Sequence[str], arrays: Mapping[str, Any], where: str, option: str) -> str:
    """The first of the names that is there; else the one array of such a name in a group."""
    found = next((name for name in names if name in arrays), None)
    if found is not None:
        return found
    deep = [name for name in arrays if name.rpartition("/")[2] in names]
    if len(deep) > 1:
        raise DataError(where, "arrays " + ", ".join(sorted(deep)[:6]), "one of them", f"name it with `{option}`")
    return deep[0] if deep else names[0]


def _column(array: Any) -> Array:
    column = np.asarray(array)
    return text_array(column.tolist()) if column.dtype.kind == "U" else column


def _names(classes: Any) -> tuple[str, ...] | None:
    values = np.asarray(classes)
    if values.dtype.kind == "S":
        return text_tuple(values)
    return tuple(str(name) for name in values) if values.dtype.kind == "U" else None


def labels_of(y: Array, names: tuple[str, ...] | None, where: str) -> Classes:
    """Labels as int64 (N,): integers as they are, whole numbers of float type, texts by their names; NaN, "" are -1."""
    y = y.reshape(-1) if y.ndim == 2 and 1 in y.shape else y
    if y.ndim == 1 and y.dtype.kind in "SU":
        return class_numbers(text_tuple(y) if y.dtype.kind == "S" else [str(text) for text in y])
    if y.ndim == 1 and y.dtype.kind == "f":
        y = np.where(np.isnan(y), -1, y)
    if y.ndim != 1 or y.dtype.kind not in "biuf" or not np.array_equal(y, np.trunc(y)):
        raise DataError(f"{where}: labels", f"{y.dtype} {y.shape}", "whole numbers or names, one per sample")
    return Classes(y.astype(np.int64), None, names)


def hdf5_file(
    path: Path,
    x_name: str | None,
    y_name: str | None,
    layout: str | None,
    *,
    labelled: bool = True,
    notes: Notes | None = None,
) -> Source:
    """EdgeTrain's own blocks (a stream of them is one source), or any HDF5 file with samples and labels."""
    file = _opened(path)
    header = file.read(hdf5.HEADER_BYTES)
    file.seek(0)
    one_image = len(header) == hdf5.HEADER_BYTES and hdf5.image_bytes(header, str(path)) >= path.stat().st_size
    if one_image:
        tree = hdf5.read_tree(file, str(path))
        if "edgetrain" not in tree.attrs:
            _refuse_frames(tree, str(path))
            found = from_names(flat_arrays(tree), str(path), x_name, y_name, labelled=labelled, notes=notes)
            source = array_source(found, str(path), layout, tree.attrs)
            return replace(source, notes=source.notes if notes is None else notes)
    file.close()
    return _blocks(path, notes)


def flat_arrays(tree: Group, path: str = "") -> dict[str, Any]:
    """Every array of a tree by the way to it: `x`, `train/x`."""
    found = {f"{path}{name}": array for name, array in tree.arrays.items()}
    for name, group in tree.groups.items():
        found |= flat_arrays(group, f"{path}{name}/")
    return found


def _refuse_frames(tree: Group, where: str) -> None:
    """Raise `DataError` for pandas' stores: their columns lie in blocks whose meaning is pickled beside them."""
    for name, group in tree.groups.items():
        if "pandas_type" in group.attrs:
            fix = f"save it with pandas: `read_hdf(FILE, {name!r}).to_csv('table.csv', index=False)`"
            raise DataError(f"{where}/{name}", "a table that pandas stored", "arrays of samples and labels", fix)


def _opened(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, SharedFile(path))
    except FileNotFoundError as error:
        raise InputMissing(str(path), "there is no such file") from error


def _blocks(path: Path, notes: Notes | None) -> Source:
    records = list(open_records(path))
    blocks = [record for record in records if isinstance(record, Block)]
    if notes is not None and any(isinstance(record, Run) for record in records):
        notes.say("left out the run record that the stream begins with")
    if not blocks:
        raise DataError(str(path), "no sample blocks", "samples")
    layouts = {block.layout for block in blocks}
    if len(layouts) > 1:
        raise DataError(str(path), f"blocks of layouts {sorted(layouts)}", "one layout")
    labels, names = classes_of(blocks, str(path))
    everywhere = set.intersection(*(set(block.columns) for block in blocks))
    for name in sorted({name for block in blocks for name in block.columns} - everywhere):
        if notes is not None:
            notes.count("left out {} columns that some blocks lack", name)
    columns = {n: np.concatenate([b.columns[n] for b in blocks]) for n in blocks[0].columns if n in everywhere}
    return Source(
        str(path),
        np.concatenate([block.y for block in blocks]),
        ArrayReader(Chain([block.x for block in blocks], str(path))),
        layouts.pop(),
        names,
        columns,
        {name: value for name, value in blocks[0].facts.items() if agreed(blocks, name)},
        labels=labels if names is not None else None,
        prepared=preparation_of(blocks, str(path)),
        files=columns.pop("source", None),
    )


def array_source(found: Found, where: str, layout: str | None, facts: Mapping[str, Any] | None = None) -> Source:
    """A source of arrays, whose shapes are checked; the layout is guessed where it cannot be anything else."""
    x = found.x
    if x.dtype.kind not in "biuf" or len(x.shape) < 2:
        raise DataError(f"{where}: samples", f"{x.dtype} {tuple(x.shape)}", "numbers (N, ...)")
    y = np.full(len(x), -1, np.int64) if found.y is None else found.y
    y, labels, names = labels_of(y, found.names, where)
    if len(y) != len(x):
        raise DataError(where, f"{len(x)} samples and {len(y)} labels", "as many")
    layout = layout or ("NHW" if found.pictures and len(x.shape) == len("NHW") else guess_layout(x, where))
    check_layout(layout, x.shape, where)
    facts = dict(facts or {})
    rate = facts.pop("sample_rate_hz", 0)
    prepared = Preparation(of="arrays", sample_rate_hz=int(rate) if isinstance(rate, int | float | np.number) else 0)
    return Source(where, y, ArrayReader(x), layout, names, found.columns, facts, labels=labels, prepared=prepared)


def npy_folder(root: Path, layout: str | None) -> Source:
    """One .npy per class, named by it (Quick, Draw!'s numpy bitmaps); the arrays stay on disk."""
    files = sorted(path for path in root.glob("*.npy") if not path.name.startswith("."))
    arrays = [npy(path) for path in files]
    for path, array in zip(files, arrays, strict=True):
        if not array.ndim or not len(array):
            raise DataError(str(path), f"an array {array.shape}", "samples of the class that the file's name is")
    lengths = [len(array) for array in arrays]
    y = np.array([path.stem for path in files]).repeat(lengths)
    source = array_source(Found(Chain(arrays, str(root)), y, {}, None), str(root), layout)
    return replace(source, files=text_array([path.name for path in files]).repeat(lengths))


def is_cifar(root: Path) -> bool:
    """Whether the folder is the binary version of CIFAR-10 or -100."""
    return any((root / name).is_file() for name in ("batches.meta.txt", "fine_label_names.txt"))


def cifar(root: Path) -> Source:
    """CIFAR-10 or -100, binary version (Krizhevsky 2009): label bytes, then 3 x 32 x 32; `split` is 0 train, 1 test."""
    ten = (root / "batches.meta.txt").is_file()
    label_bytes, names_file = (1, "batches.meta.txt") if ten else (2, "fine_label_names.txt")
    record_bytes = label_bytes + 3 * 32 * 32
    names = tuple((root / names_file).read_text("utf-8").split())
    files = sorted(root.glob("*.bin"))
    parts = [_records_of(path, record_bytes) for path in files]
    if not parts:
        raise DataError(str(root), "no .bin file", "CIFAR's binary version")
    x = Chain([part[:, label_bytes:].reshape(-1, 3, 32, 32) for part in parts], str(root))
    y = np.concatenate([part[:, label_bytes - 1] for part in parts])
    split = np.repeat([int("test" in path.name) for path in files], [len(part) for part in parts])
    source = array_source(Found(x, y, {"split": split}, names), str(root), "NCHW")
    return replace(source, files=text_array([path.name for path in files]).repeat([len(part) for part in parts]))


def _records_of(path: Path, record_bytes: int) -> Array:
    size = path.stat().st_size
    if not size or size % record_bytes:
        raise DataError(str(path), f"{size} bytes", f"a positive multiple of {record_bytes}")
    return np.memmap(path, np.uint8, "r").reshape(-1, record_bytes)
