"""HDF5 images of records: the only module that knows h5py.

What is written: `libver=("v110", "v110")`, no user block, fletcher32 on every dataset with elements, fixed-width text,
no times. What is read: that, and plain HDF5 of other tools (superblock 0, 1, 2 or 3) as long as it holds nothing that
can reach outside the image or hide its size: no soft or external links, no external or virtual storage, no references,
no links that share or nest an object twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from math import prod
from typing import Any, BinaryIO

import h5py
import numpy as np

from stages.artifacts.codec import from_tree, to_tree
from stages.artifacts.records import Array, Group, Record
from stages.errors import DataError, SchemaError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
HEADER_BYTES = 52
"""Enough of an image's start to know its length, in every version of the superblock."""
CHUNK_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_OBJECTS = 100_000
_END_OF_FILE = {0: (13, 24, 40), 1: (13, 28, 44), 2: (9, 12, 28), 3: (9, 12, 28)}
"""Superblock version -> offsets of: size of addresses, base address, end-of-file address."""
_FILTERS = {
    h5py.h5z.FILTER_DEFLATE,
    h5py.h5z.FILTER_SHUFFLE,
    h5py.h5z.FILTER_FLETCHER32,
    h5py.h5z.FILTER_LZF,
    h5py.h5z.FILTER_SZIP,
    h5py.h5z.FILTER_SCALEOFFSET,
    h5py.h5z.FILTER_NBIT,
}


# ------------------------------------------------------------------------------------------------------------ writing


def encode(record: Record) -> bytes:
    """The HDF5 image of a record. Equal records give equal bytes.

    Raises:
        SchemaError: the record does not fit the schema.
    """
    return encode_tree(to_tree(record))


def encode_tree(tree: Group) -> bytes:
    """The HDF5 image of any tree of numpy arrays and scalar attributes, in EdgeTrain's dialect."""
    with h5py.File(
        "image", "w", driver="core", backing_store=False, block_size=1 << 14, libver=("v110", "v110")
    ) as file:
        _write(file, tree)
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def _write(group: h5py.Group, tree: Group) -> None:
    for name, value in sorted(tree.attrs.items()):
        group.attrs[name] = _attribute(value)
    for name, array in sorted(tree.arrays.items()):
        _write_array(group, name, np.asarray(array))
    for name, child in sorted(tree.groups.items()):
        _write(group.create_group(name), child)


def _write_array(group: h5py.Group, name: str, array: Array) -> None:
    array = array.astype(np.uint8) if array.dtype == bool else array
    if array.dtype.kind not in "iufSV" or array.ndim == 0:
        raise SchemaError(
            f"{group.name}/{name}".replace("//", "/"),
            f"{array.dtype} {array.shape}",
            "an array of numbers or fixed-width text with at least one dimension",
        )
    if array.size == 0:
        group.create_dataset(name, data=array)
        return
    row_bytes = max(1, array[:1].nbytes)
    rows = min(len(array), max(1, CHUNK_BYTES // row_bytes))
    group.create_dataset(name, data=array, chunks=(rows, *array.shape[1:]), fletcher32=True)


def _attribute(value: Any) -> Any:
    if isinstance(value, str):
        return np.bytes_(value.encode() or b"\0")
    if isinstance(value, bool | np.bool_):
        return np.uint8(value)
    return value


# ------------------------------------------------------------------------------------------------------------ reading


def image_bytes(header: bytes, where: str) -> int:
    """Length of the image that starts with `header` (the superblock's end-of-file address).

    Raises:
        DataError: not HDF5, or a superblock that EdgeTrain does not read.
    """
    if header[:8] != SIGNATURE:
        raise DataError(where, _looks_like(header), "HDF5", "make blocks with `edgetrain pack`")
    version = header[8]
    if version not in _END_OF_FILE or len(header) < HEADER_BYTES:
        raise DataError(where, f"an HDF5 superblock of version {version} in {len(header)} bytes", "version 0 to 3")
    width_at, base_at, end_at = _END_OF_FILE[version]
    if header[width_at] != 8 or int.from_bytes(header[base_at : base_at + 8], "little"):
        raise DataError(where, "HDF5 with a user block or short addresses", "an image that starts at its first byte")
    return int.from_bytes(header[end_at : end_at + 8], "little")


def _looks_like(header: bytes) -> str:
    kinds = {
        b"\xff\xd8\xff": "a JPEG picture",
        b"\x89PNG": "a PNG picture",
        b"PK": "a zip archive (.npz, .pth?)",
        b"\x1f\x8b": "gzip data",
        b"\x93NUMPY": "a .npy array",
        b"RIFF": "RIFF data (.wav?)",
        b"\x80": "a pickle",
    }
    for start, kind in kinds.items():
        if header.startswith(start):
            return kind
    return f"bytes that start with {header[:8].hex(' ')}" if header else "nothing"


def decode(image: bytes | BinaryIO, where: str = "", *, lazy: bool = False, max_bytes: int | None = None) -> Record:
    """The record of one image.

    Args:
        image: the bytes, or a seekable binary file that holds exactly one image.
        where: named in errors.
        lazy: leave a block's `x` in the file, to be read slice by slice while the file stays open.
        max_bytes: refuse more than this many bytes of datasets in memory.

    Raises:
        SchemaError, DataError: hostile, corrupt or foreign content.
    """
    with _reading(where):
        file = h5py.File(BytesIO(image) if isinstance(image, bytes) else image, "r")
        tree = _load(file, where, keep_lazy={"x"} if lazy else set(), max_bytes=max_bytes)
        record = from_tree(tree, where)
    if not lazy:
        file.close()
    return record


def decode_tree(image: bytes, where: str = "") -> Group:
    """The tree of one image, whatever its kind, read into memory.

    Raises:
        SchemaError, DataError: hostile or corrupt content.
    """
    image_bytes(image[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), where)
    with _reading(where), h5py.File(BytesIO(image), "r") as file:
        return _load(file, where, keep_lazy=set(), max_bytes=None)


def read_tree(file: BinaryIO, where: str = "") -> Group:
    """Any HDF5 file as a tree whose datasets are read when they are indexed; for import and pack.

    Raises:
        DataError: not HDF5, corrupt, or with content that reaches outside the file.
    """
    image_bytes(file.read(HEADER_BYTES), where)
    file.seek(0)
    with _reading(where):
        return _load(h5py.File(file, "r"), where, keep_lazy=None, max_bytes=None)


class FileArray:
    """A dataset of an open file, read slice by slice: shape, dtype, len, indexing. Text stays bytes."""

    def __init__(self, dataset: h5py.Dataset, where: str) -> None:
        self._dataset, self._where = dataset, where

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._dataset.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self._dataset.dtype
        return dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        with _reading(self._where):
            return self._dataset[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[()], dtype)


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """HDF5's own complaints (about a dozen exception types) as one DataError."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise DataError(where, f"corrupt HDF5 ({reason[:120]})", "an undamaged file", "write it again") from error


def _load(file: h5py.File, where: str, *, keep_lazy: set[str] | None, max_bytes: int | None) -> Group:
    """The tree of a file. `keep_lazy`: root datasets to leave on disk; None leaves all of them there."""
    visitor = _Visitor(where, keep_lazy, max_bytes)
    return visitor.group(file, "", 0)


class _Visitor:
    """Walks a file once, refusing what must never be followed before anything is read."""

    def __init__(self, where: str, keep_lazy: set[str] | None, max_bytes: int | None) -> None:
        self.where, self.keep_lazy, self.max_bytes = where, keep_lazy, max_bytes
        self.visited: set[Any] = set()
        self.total_bytes = 0

    def group(self, group: h5py.Group, path: str, depth: int) -> Group:
        self._enter(group, path, depth)
        arrays: dict[str, Any] = {}
        groups: dict[str, Group] = {}
        attrs = {}
        for name in group:
            below = f"{path}/{name}"
            child = self._child(group, name, below)
            if isinstance(child, h5py.Group):
                groups[name] = self.group(child, below, depth + 1)
            elif isinstance(child, h5py.Dataset):
                self._enter(child, below, depth)
                if child.shape == ():
                    attrs[name] = _scalar(child[()])
                else:
                    arrays[name] = self._dataset(child, below)
            else:
                raise self._refuse(below, "a named datatype")
        attrs.update({name: self._attribute(group, name, path) for name in group.attrs})
        return Group(attrs, arrays, groups)

    def _enter(self, item: h5py.HLObject, path: str, depth: int) -> None:
        token = h5py.h5o.get_info(item.id).addr
        if token in self.visited:
            raise self._refuse(path, "an object linked twice")
        self.visited.add(token)
        if depth > MAX_DEPTH or len(self.visited) > MAX_OBJECTS:
            raise self._refuse(path, "nesting without end")

    def _child(self, group: h5py.Group, name: str, path: str) -> Any:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.SoftLink | h5py.ExternalLink):
            raise self._refuse(path, f"a {type(link).__name__}")
        return group[name]

    def _dataset(self, dataset: h5py.Dataset, path: str) -> Any:
        properties = dataset.id.get_create_plist()
        if dataset.is_virtual or properties.get_external_count() or dataset.shape is None:
            raise self._refuse(path, "external, virtual or empty storage")
        unknown = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())} - _FILTERS
        if unknown:
            raise self._refuse(path, f"filter {sorted(unknown)}")
        text = h5py.check_string_dtype(dataset.dtype)
        if text is None or text.length is not None:
            self._plain(dataset.dtype, path)
            lazy = self.keep_lazy is None or path.lstrip("/") in self.keep_lazy
            if lazy:
                return FileArray(dataset, f"{self.where}{path}")
        self.total_bytes += prod(dataset.shape) * dataset.dtype.itemsize
        if self.max_bytes is not None and self.total_bytes > self.max_bytes:
            raise self._refuse(
                path,
                f"{self.total_bytes} bytes of datasets",
                f"at most {self.max_bytes}",
                "raise --max-record if you trust the sender",
            )
        return dataset[()] if text is None or text.length is not None else _fixed_width(dataset[()])

    def _attribute(self, item: h5py.HLObject, name: str, path: str) -> Any:
        kind = item.attrs.get_id(name).dtype
        text = h5py.check_string_dtype(kind)
        if text is None:
            self._plain(kind, f"{path}@{name}")
        return _scalar(item.attrs[name])

    def _plain(self, dtype: np.dtype[Any], path: str) -> None:
        parts: Mapping[str, Any] = dtype.fields or {}
        for part in [dtype.base, *(field[0] for field in parts.values())]:
            if part.kind == "O" or h5py.check_ref_dtype(part) is not None:
                raise self._refuse(path, f"type {dtype}: a reference or a variable-length type")

    def _refuse(
        self,
        path: str,
        found: str,
        expected: str = "plain groups, datasets and attributes",
        fix: str = "copy the data into plain datasets",
    ) -> SchemaError:
        return SchemaError(f"{self.where}{path}", found, expected, fix)


def _fixed_width(texts: Array) -> Array:
    encoded = [text if isinstance(text, bytes) else str(text).encode() for text in texts.ravel()]
    width = max(1, *map(len, encoded)) if encoded else 1
    return np.array(encoded, f"S{width}").reshape(texts.shape)


def _scalar(value: Any) -> Any:
    """An attribute as Python sees it: text as str, numpy scalars as Python numbers, arrays as they are."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray) and value.ndim:
        return _fixed_width(value) if value.dtype.kind == "O" else value
    if isinstance(value, np.ndarray):
        return value[()]
    return value
