"""HDF5 images of records: the only module that knows h5py.

What is written: `libver=("v110", "v110")`, no user block, fletcher32 on every dataset with elements, fixed-width text,
no times. What is read: that, and plain HDF5 of other tools (superblock 0, 1, 2 or 3) as long as it holds nothing that
can reach outside the image or hide its size: no soft or external links, no external or virtual storage, no references,
no links that share or nest an object twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import count
from math import ceil, prod
from typing import Any, BinaryIO

import h5py
import numpy as np

from stages.artifacts.codec import from_tree, to_tree
from stages.artifacts.memory_file import MemoryFile
from stages.artifacts.records import Array, Group, Record
from stages.errors import DataError, SchemaError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
HEADER_BYTES = 52
"""Enough of an image's start to know its length, in every version of the superblock."""
CHUNK_BYTES = 1 << 18
"""Of datasets: chunks that stay in a processor's cache are written in half the time of those of 1 MiB."""
COPIED_BYTES = 1 << 22
"""Records up to here are built and read in HDF5's own memory. Handing parts of them over costs more than the copy."""
_HEADERS_BYTES = 1 << 20
"""Set aside for what a large image holds beside its arrays: the index of its chunks takes 20 bytes for each."""
MAX_DEPTH = 16
MAX_OBJECTS = 100_000
_END_OF_FILE = {0: (13, 24, 40), 1: (13, 28, 44), 2: (9, 12, 28), 3: (9, 12, 28)}
"""Superblock version -> offsets of: size of addresses, base address, end-of-file address."""
_numbers = count()
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


def encode(record: Record) -> bytes | memoryview:
    """The HDF5 image of a record. Equal records give equal bytes.

    Raises:
        SchemaError: the record does not fit the schema.
    """
    return encode_tree(to_tree(record))


def encode_tree(tree: Group) -> bytes | memoryview:
    """The HDF5 image of any tree of numpy arrays and scalar attributes, in EdgeTrain's dialect."""
    content = _content_bytes(tree)
    if content <= COPIED_BYTES:
        file = _created(_core(), tree)
        try:
            return bytes(file.get_file_image())
        finally:
            file.close()
    memory = MemoryFile(room=content + _HEADERS_BYTES)
    _created(_through(memory), tree).close()
    return memory.view()


def _content_bytes(tree: Group) -> int:
    """Of all arrays; those on disk stay there."""
    own: int = sum(prod(array.shape) * array.dtype.itemsize for array in tree.arrays.values())
    return own + sum(_content_bytes(child) for child in tree.groups.values())


def _created(access: h5py.h5p.PropFAID, tree: Group) -> h5py.h5f.FileID:
    """An open file that holds the tree."""
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    file = h5py.h5f.create(_new_name(), h5py.h5f.ACC_TRUNC, creation, access)
    try:
        _write(h5py.h5g.open(file, b"/"), tree, "")
        h5py.h5f.flush(file)
    except BaseException:
        file.close()
        raise
    return file


def _new_name() -> bytes:
    """A name of its own for a file in memory: HDF5 takes two open ones of one name for the same file."""
    return b"image %d" % next(_numbers)


def _core() -> h5py.h5p.PropFAID:
    """Properties of a file in HDF5's memory."""
    access = _closing()
    access.set_fapl_core(block_size=1 << 14, backing_store=False)
    return access


def _through(file: MemoryFile) -> h5py.h5p.PropFAID:
    """Properties of a file that HDF5 reads and writes through an object."""
    access = _closing()
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, file)
    return access


def _closing() -> h5py.h5p.PropFAID:
    """Properties of a file that closes with all that was opened in it."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    return access


def _write(group: h5py.h5g.GroupID, tree: Group, path: str) -> None:
    """Write a tree below an open group; the low-level calls take half the time of `create_dataset`."""
    for name, value in sorted(tree.attrs.items()):
        array = _attribute_array(value)
        kind = _stored_type(array.dtype)
        h5py.h5a.create(group, name.encode(), kind, _space(array.shape)).write(array, mtype=kind)
    for name, array in sorted(tree.arrays.items()):
        _write_array(group, name, np.asarray(array), f"{path}/{name}")
    for name, child in sorted(tree.groups.items()):
        _write(h5py.h5g.create(group, name.encode(), gcpl=_group_properties()), child, f"{path}/{name}")


def _write_array(group: h5py.h5g.GroupID, name: str, array: Array, path: str) -> None:
    array = array.astype(np.uint8) if array.dtype == bool else array
    if array.dtype.kind not in "iufSV" or array.ndim == 0:
        expected = "an array of numbers or fixed-width text with at least one dimension"
        raise SchemaError(path, f"{array.dtype} {array.shape}", expected)
    array = np.ascontiguousarray(array)
    chunk = None
    if array.size:
        chunks = ceil(array.nbytes / CHUNK_BYTES)
        chunk = (ceil(len(array) / chunks), *array.shape[1:])  # even ones: the last is stored whole
    kind = _stored_type(array.dtype)
    dataset = h5py.h5d.create(group, name.encode(), kind, _space(array.shape), _dataset_properties(chunk))
    if array.size:
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, array, mtype=kind)


# HDF5 makes types, spaces and properties slowly, and a stream's records need the same ones again and again.


@lru_cache
def _stored_type(dtype: np.dtype[Any]) -> h5py.h5t.TypeID:
    kind = h5py.h5t.py_create(dtype, logical=True)
    if dtype.kind == "S":
        kind = kind.copy()
        kind.set_cset(h5py.h5t.CSET_UTF8)
    return kind


@lru_cache
def _space(shape: tuple[int, ...]) -> h5py.h5s.SpaceID:
    return h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)


@lru_cache
def _dataset_properties(chunk: tuple[int, ...] | None) -> h5py.h5p.PropDCID:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    if chunk is not None:
        properties.set_chunk(chunk)
        properties.set_fletcher32()
    return properties


@cache
def _group_properties() -> h5py.h5p.PropGCID:
    properties = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    properties.set_obj_track_times(False)
    return properties


def _attribute_array(value: Any) -> Array:
    if isinstance(value, str):
        return np.array(value.encode() or b"\0")
    if isinstance(value, bool | np.bool_):
        return np.array(np.uint8(value))
    return np.asarray(value)


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


def decode(
    image: bytes | memoryview | BinaryIO, where: str = "", *, lazy: bool = False, max_bytes: int | None = None
) -> Record:
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
        file = _opened(image)
        tree = _load(file, where, keep_lazy={"x"} if lazy else set(), max_bytes=max_bytes)
        record = from_tree(tree, where)
    if not lazy:
        file.close()
    return record


def _opened(image: bytes | memoryview | BinaryIO) -> h5py.h5f.FileID:
    """A file to read from."""
    if isinstance(image, bytes | memoryview) and len(image) <= COPIED_BYTES:
        access = _core()
        access.set_file_image(image)
        return h5py.h5f.open(_new_name(), h5py.h5f.ACC_RDONLY, access)
    return h5py.File(MemoryFile(image) if isinstance(image, bytes | memoryview) else image, "r").id


def decode_tree(image: bytes | memoryview, where: str = "") -> Group:
    """The tree of one image, whatever its kind, read into memory.

    Raises:
        SchemaError, DataError: hostile or corrupt content.
    """
    image_bytes(bytes(image[:HEADER_BYTES]).ljust(HEADER_BYTES, b"\0"), where)
    with _reading(where):
        file = _opened(image)
        tree = _load(file, where, keep_lazy=set(), max_bytes=None)
        file.close()
    return tree


def read_tree(file: BinaryIO, where: str = "", *, user_block: bool = False) -> Group:
    """Any HDF5 file as a tree whose datasets are read when they are indexed; for import and pack.

    `user_block` allows bytes of another program's before the HDF5 (MATLAB's).

    Raises:
        DataError: not HDF5, corrupt, or with content that reaches outside the file.
    """
    if not user_block:
        image_bytes(file.read(HEADER_BYTES), where)
    file.seek(0)
    with _reading(where):
        return _load(h5py.File(file, "r").id, where, keep_lazy=None, max_bytes=None)


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
            values = self._dataset[index]
        return values.astype(values.dtype.newbyteorder("="), copy=False) if isinstance(values, np.ndarray) else values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[()], dtype)


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """HDF5's own complaints (about a dozen exception types) as one DataError."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, TypeError):
            fix = "copy the data into plain datasets"
            raise DataError(where, f"a type that is not read ({reason[:120]})", "numbers and text", fix) from error
        raise DataError(where, f"corrupt HDF5 ({reason[:120]})", "an undamaged file", "write it again") from error


def _load(file: h5py.h5f.FileID, where: str, *, keep_lazy: set[str] | None, max_bytes: int | None) -> Group:
    """The tree of a file. `keep_lazy`: root datasets to leave on disk; None leaves all of them there."""
    visitor = _Visitor(where, keep_lazy, max_bytes)
    return visitor.group(h5py.h5g.open(file, b"/"), "", 0)


class _Visitor:
    """Walks a file once, refusing what must never be followed before anything is read."""

    def __init__(self, where: str, keep_lazy: set[str] | None, max_bytes: int | None) -> None:
        self.where, self.keep_lazy, self.max_bytes = where, keep_lazy, max_bytes
        self.visited: set[Any] = set()
        self.total_bytes = 0

    def group(self, group: h5py.h5g.GroupID, path: str, depth: int) -> Group:
        self._enter(group, path, depth)
        arrays: dict[str, Any] = {}
        groups: dict[str, Group] = {}
        attrs = self._attributes(group, path)
        links: list[tuple[bytes, int]] = []
        group.links.iterate(lambda key, link: links.append((key, link.type)), info=True)
        for key, link in links:
            name = key.decode(errors="replace")
            below = f"{path}/{name}"
            if link != h5py.h5l.TYPE_HARD:
                raise self._refuse(below, "a soft or external link")
            child = h5py.h5o.open(group, key)
            if isinstance(child, h5py.h5g.GroupID):
                groups[name] = self.group(child, below, depth + 1)
            elif isinstance(child, h5py.h5d.DatasetID):
                self._enter(child, below, depth)
                if child.get_space().get_simple_extent_type() == h5py.h5s.NULL:
                    continue
                if child.shape == ():
                    attrs[name] = _scalar(h5py.Dataset(child)[()])
                else:
                    arrays[name] = self._dataset(child, below)
            else:
                raise self._refuse(below, "a named datatype")
        return Group(attrs, arrays, groups)

    def _enter(self, item: h5py.h5g.GroupID | h5py.h5d.DatasetID, path: str, depth: int) -> None:
        token = h5py.h5o.get_info(item).addr
        if token in self.visited:
            raise self._refuse(path, "an object linked twice")
        self.visited.add(token)
        if depth > MAX_DEPTH or len(self.visited) > MAX_OBJECTS:
            raise self._refuse(path, "nesting without end")

    def _dataset(self, dataset: h5py.h5d.DatasetID, path: str) -> Any:
        properties, shape, dtype = dataset.get_create_plist(), dataset.shape, dataset.dtype
        virtual = properties.get_layout() == h5py.h5d.VIRTUAL
        if virtual or properties.get_external_count() or shape is None:
            raise self._refuse(path, "external, virtual or empty storage")
        unknown = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())} - _FILTERS
        if unknown:
            raise self._refuse(path, f"filter {sorted(unknown)}")
        ragged_text = _is_ragged_text(dtype)
        if not ragged_text:
            self._plain(dtype, path)
            if self.keep_lazy is None or path.lstrip("/") in self.keep_lazy:
                return FileArray(h5py.Dataset(dataset), f"{self.where}{path}")
        self.total_bytes += prod(shape) * dtype.itemsize
        if self.max_bytes is not None and self.total_bytes > self.max_bytes:
            found = f"{self.total_bytes} bytes of datasets"
            raise self._refuse(path, found, f"at most {self.max_bytes}", "raise --max-record if you trust the sender")
        if ragged_text:
            return _fixed_width(h5py.Dataset(dataset)[()])
        values = np.empty(shape, dtype.newbyteorder("="))
        if values.size:
            native = dataset.get_type() if dtype == values.dtype else None
            dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values, mtype=native)
        return values

    def _attributes(self, group: h5py.h5g.GroupID, path: str) -> dict[str, Any]:
        values = {}
        keys: list[bytes] = []
        h5py.h5a.iterate(group, lambda key, *_: keys.append(key))  # to open by index takes four times as long
        for key in keys:
            attribute = h5py.h5a.open(group, key)
            if attribute.get_space().get_simple_extent_type() == h5py.h5s.NULL:
                continue  # an attribute that says nothing: pandas and netCDF write such
            kind = attribute.get_type()
            name, dtype = key.decode(errors="replace"), kind.dtype
            if _is_ragged_text(dtype):
                values[name] = _scalar(h5py.Group(group).attrs[name])
                continue
            self._plain(dtype, f"{path}@{name}")
            array = np.empty(attribute.shape, dtype)
            attribute.read(array, mtype=kind)
            values[name] = _scalar(array[()] if array.ndim == 0 else array)
        return values

    def _plain(self, dtype: np.dtype[Any], path: str) -> None:
        if dtype.kind in "iufS":
            return
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


def _is_ragged_text(dtype: np.dtype[Any]) -> bool:
    text = h5py.check_string_dtype(dtype) if dtype.kind == "O" else None
    return text is not None and text.length is None


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
