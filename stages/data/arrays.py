"""Arrays that others saved: .npz, .npy, HDF5, a folder of .npy files, CIFAR's binary files."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from stages.artifacts import hdf5
from stages.artifacts.codec import guess_layout, text_array, text_tuple
from stages.artifacts.records import Array, Block, Samples, check_layout
from stages.artifacts.stream import SharedFile, open_records
from stages.data.samples import ArrayReader, Chain, Source, class_numbers
from stages.errors import DataError, InputMissing

X_NAMES = ("x", "X", "images", "data", "features", "x_train", "X_train", "train_images")
Y_NAMES = ("y", "Y", "labels", "targets", "label", "y_train", "Y_train", "train_labels")
"""Names under which samples and labels are looked for, in this order."""


def npz(
    path: Path, x_name: str | None, y_name: str | None
) -> tuple[Samples, Array, dict[str, Array], tuple[str, ...] | None]:
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
    return from_names(arrays, str(path), x_name, y_name)


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
    arrays: Mapping[str, Any], where: str, x_name: str | None, y_name: str | None
) -> tuple[Samples, Array, dict[str, Array], tuple[str, ...] | None]:
    """Which of several named arrays are samples, labels, columns (as long as labels, one dimension) and class names."""
    x_name = x_name or next((name for name in X_NAMES if name in arrays), "x")
    y_name = y_name or next((name for name in Y_NAMES if name in arrays), "y")
    for name, option in ((x_name, "--x-name"), (y_name, "--y-name")):
        if name not in arrays:
            raise DataError(
                where,
                "arrays " + (", ".join(sorted(arrays)) or "none"),
                f"one called {name}",
                f"name it with `{option}`",
            )
    x, y = arrays[x_name], np.asarray(arrays[y_name])
    names = arrays.get("classes")
    others = {name: array for name, array in arrays.items() if name not in (x_name, y_name, "classes")}
    columns = {name: np.asarray(array) for name, array in others.items() if tuple(array.shape) == (len(x),)}
    columns = {
        name: text_array(column.tolist()) if column.dtype.kind == "U" else column for name, column in columns.items()
    }
    columns = {name: column for name, column in columns.items() if column.dtype.kind in "biufS"}
    return x, y, columns, None if names is None else _names(names)


def _names(classes: Any) -> tuple[str, ...] | None:
    values = np.asarray(classes)
    if values.dtype.kind == "S":
        return text_tuple(values)
    return tuple(str(name) for name in values) if values.dtype.kind == "U" else None


def labels_of(y: Array, names: tuple[str, ...] | None, where: str) -> tuple[Array, tuple[str, ...] | None]:
    """Labels as int64 (N,): integers as they are, whole numbers of float type, texts as places in the sorted names."""
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim == 1 and y.dtype.kind in "SU":
        texts = text_tuple(y) if y.dtype.kind == "S" else tuple(str(text) for text in y)
        return class_numbers(texts)
    if y.ndim != 1 or y.dtype.kind not in "biuf" or not np.array_equal(y, np.trunc(y)):
        raise DataError(f"{where}: labels", f"{y.dtype} {y.shape}", "whole numbers or names, one per sample")
    return y.astype(np.int64), names


def hdf5_file(path: Path, x_name: str | None, y_name: str | None, layout: str | None) -> Source:
    """EdgeTrain's own blocks (a stream of them is one source), or any HDF5 file with samples and labels."""
    file = _opened(path)
    header = file.read(hdf5.HEADER_BYTES)
    file.seek(0)
    one_image = len(header) == hdf5.HEADER_BYTES and hdf5.image_bytes(header, str(path)) >= path.stat().st_size
    if one_image:
        tree = hdf5.read_tree(file, str(path))
        if "edgetrain" not in tree.attrs:
            x, y, columns, names = from_names(tree.arrays, str(path), x_name, y_name)
            return array_source(x, y, columns, names, str(path), layout, tree.attrs)
    file.close()
    return _blocks(path)


def _opened(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, SharedFile(path))
    except FileNotFoundError as error:
        raise InputMissing(str(path), "there is no such file") from error


def _blocks(path: Path) -> Source:
    blocks = [record for record in open_records(path) if isinstance(record, Block)]
    if not blocks:
        raise DataError(str(path), "no sample blocks", "samples")
    layouts = {block.layout for block in blocks}
    if len(layouts) > 1:
        raise DataError(str(path), f"blocks of layouts {sorted(layouts)}", "one layout")
    named = {
        label: name
        for block in blocks
        for label, name in zip(() if block.labels is None else block.labels.tolist(), block.names or (), strict=False)
    }
    top = 1 + max(named, default=-1)
    common = [name for name in blocks[0].columns if all(name in block.columns for block in blocks)]
    return Source(
        str(path),
        np.concatenate([block.y for block in blocks]),
        ArrayReader(Chain([block.x for block in blocks], str(path))),
        layouts.pop(),
        tuple(named.get(label, str(label)) for label in range(top)) if named else None,
        {name: np.concatenate([block.columns[name] for block in blocks]) for name in common},
        blocks[0].facts,
    )


def array_source(
    x: Samples,
    y: Array,
    columns: Mapping[str, Array],
    names: tuple[str, ...] | None,
    where: str,
    layout: str | None,
    facts: Mapping[str, Any] | None = None,
) -> Source:
    """A source of arrays, whose shapes are checked; the layout is guessed where it cannot be anything else."""
    if x.dtype.kind not in "biuf" or len(x.shape) < 2:
        raise DataError(f"{where}: samples", f"{x.dtype} {tuple(x.shape)}", "numbers (N, ...)")
    labels, names = labels_of(np.asarray(y), names, where)
    if len(labels) != len(x):
        raise DataError(where, f"{len(x)} samples and {len(labels)} labels", "as many")
    layout = layout or guess_layout(x, where)
    check_layout(layout, x.shape, where)
    return Source(where, labels, ArrayReader(x), layout, names, columns, facts or {})


def npy_folder(root: Path, layout: str | None) -> Source:
    """One .npy per class, named by it (Quick, Draw!'s numpy bitmaps); the arrays stay on disk."""
    files = sorted(path for path in root.glob("*.npy") if not path.name.startswith("."))
    arrays = [npy(path) for path in files]
    y = np.repeat(np.arange(len(files)), [len(array) for array in arrays])
    return array_source(Chain(arrays, str(root)), y, {}, tuple(path.stem for path in files), str(root), layout)


def is_cifar(root: Path) -> bool:
    """Whether the folder is the binary version of CIFAR-10 or -100."""
    return any((root / name).is_file() for name in ("batches.meta.txt", "fine_label_names.txt"))


def cifar(root: Path) -> Source:
    """CIFAR-10 or -100, binary version (Krizhevsky 2009): label bytes, then 3 x 32 x 32; `split` is 0 train, 1 test."""
    ten = (root / "batches.meta.txt").is_file()
    label_bytes, names_file = (1, "batches.meta.txt") if ten else (2, "fine_label_names.txt")
    record_bytes = label_bytes + 3 * 32 * 32
    names = tuple((root / names_file).read_text().split())
    files = sorted(root.glob("*.bin"))
    parts = [_records_of(path, record_bytes) for path in files]
    if not parts:
        raise DataError(str(root), "no .bin file", "CIFAR's binary version")
    x = Chain([part[:, label_bytes:].reshape(-1, 3, 32, 32) for part in parts], str(root))
    y = np.concatenate([part[:, label_bytes - 1] for part in parts])
    split = np.repeat([int("test" in path.name) for path in files], [len(part) for part in parts])
    return array_source(x, y, {"split": split}, names, str(root), "NCHW")


def _records_of(path: Path, record_bytes: int) -> Array:
    size = path.stat().st_size
    if not size or size % record_bytes:
        raise DataError(str(path), f"{size} bytes", f"a positive multiple of {record_bytes}")
    return np.memmap(path, np.uint8, "r").reshape(-1, record_bytes)
