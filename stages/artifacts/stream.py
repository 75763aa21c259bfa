"""Streams of records: HDF5 images back to back, from pipes (bounded, in memory) and regular files (sliced lazily)."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from stages.artifacts import hdf5
from stages.artifacts.memory_file import SeekableFile
from stages.artifacts.records import Record
from stages.errors import DataError, InputMissing, StreamBroken

DEFAULT_MAX_RECORD_BYTES = 1 << 30
SUFFIXES = frozenset({".h5", ".hdf5", ".hdf", ".he5"})
"""How names of HDF5 files end."""
_PIECE_BYTES = 1 << 22
_NOTHING = memoryview(b"")


def records(file: BinaryIO, where: str, *, max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES) -> Iterator[Record]:
    """The records of a stream, in order, each read only when it is asked for.

    A regular file is opened lazily: a block's `x` stays on disk and is read in slices (`Block.slices`). From a pipe an
    image is read whole, at most `max_record_bytes` of it.

    Raises:
        DataError: not a stream of records, an image longer than allowed, an empty stream.
        StreamBroken: the stream ends inside an image.
    """
    if not is_regular(file):
        pipe = _Pipe(file, where, max_record_bytes)
        while pipe.more():
            yield pipe.read()
        return
    for number, window in enumerate(_windows(file, where)):
        yield hdf5.decode(window, _place(where, number), lazy=True, max_bytes=max_record_bytes)


def open_records(path: str | Path, *, max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES) -> Iterator[Record]:
    """The records of a named file.

    Raises:
        InputMissing: no such file, or it cannot be opened.
    """
    try:
        file = cast(BinaryIO, SharedFile(path))
    except OSError as error:
        raise InputMissing(str(path), error.strerror or "cannot be opened", "a file of records") from error
    return records(file, os.path.basename(path), max_record_bytes=max_record_bytes)


def is_stream(path: Path) -> bool:
    """Whether a path is read as records back to back: a pipe, a device, or a file that begins as HDF5 does.

    Raises `InputMissing` where there is nothing of that name.
    """
    if not path.exists():
        raise InputMissing(str(path), "there is no such file or folder")
    if not path.is_file():
        return not path.is_dir()
    with path.open("rb") as file:
        start = file.read(len(hdf5.SIGNATURE))
    return start == hdf5.SIGNATURE or path.suffix.lower() in {"", *SUFFIXES}  # so that what is damaged is named as such


def is_regular(file: BinaryIO) -> bool:
    """Whether the file can be sliced: a regular file on disk, or bytes in memory."""
    if isinstance(file, io.BytesIO):
        return True
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (OSError, AttributeError, io.UnsupportedOperation):
        return False


class _Pipe:
    """Records of a file that can only be read once. Nothing of a record is held here when it has been handed over."""

    def __init__(self, file: BinaryIO, where: str, max_record_bytes: int) -> None:
        self._file, self._where, self._max_record_bytes = file, where, max_record_bytes
        self._number, self._header = 0, _NOTHING

    def more(self) -> bool:
        """Whether another record begins; waits for it or for the end of the stream."""
        self._header = _read(self._file, hdf5.HEADER_BYTES)
        if not self._header and self._number == 0:
            raise _empty(self._where)
        return bool(self._header)

    def read(self) -> Record:
        """The record that has begun."""
        place = _place(self._where, self._number)
        self._number += 1
        return hdf5.decode(self._image(self._header, place), place, max_bytes=self._max_record_bytes)

    def _image(self, header: memoryview, place: str) -> memoryview:
        length = hdf5.image_bytes(bytes(header).ljust(hdf5.HEADER_BYTES, b"\0"), place)
        if len(header) < hdf5.HEADER_BYTES:
            raise StreamBroken(place, f"{len(header)} bytes", "a whole record", "the producer stopped early")
        if length > self._max_record_bytes:
            raise DataError(
                place,
                f"a record of {length} bytes",
                f"at most {self._max_record_bytes} from a pipe",
                "raise --max-record, or pack with a smaller --block-length",
            )
        image = _read(self._file, length, header)
        if len(image) != length:
            raise StreamBroken(place, f"{len(image)} of {length} bytes", "a whole record", "the producer stopped early")
        return image


def _place(where: str, number: int) -> str:
    return where if number == 0 else f"{where}[{number}]"


def _read(file: BinaryIO, wanted: int, start: memoryview = _NOTHING) -> memoryview:
    """`wanted` bytes that begin with `start`, fewer if the stream ends; memory is used as they arrive."""
    image = np.empty(max(wanted, len(start)), np.uint8).data
    filled = len(start)
    image[:filled] = start
    readinto = cast(io.BufferedReader, file).readinto
    while filled < wanted and (count := readinto(image[filled : filled + _PIECE_BYTES])):
        filled += count
    return image[:filled]


def _windows(file: BinaryIO, where: str) -> Iterator[BinaryIO]:
    start, end = file.tell(), file.seek(0, os.SEEK_END)
    if start == end:
        raise _empty(where)
    number = 0
    while start < end:
        place = _place(where, number)
        file.seek(start)
        header = file.read(hdf5.HEADER_BYTES)
        length = hdf5.image_bytes(header.ljust(hdf5.HEADER_BYTES, b"\0"), place)
        if start + length > end:
            raise StreamBroken(place, f"{end - start} of {length} bytes", "a whole record", "the file is cut off")
        yield Window(file, start, length)  # type: ignore[misc]
        start += max(length, hdf5.HEADER_BYTES)
        number += 1


def _empty(where: str) -> DataError:
    return DataError(where, "an empty stream", "HDF5 records", "the producer wrote nothing")


class SharedFile(io.FileIO):
    """A file that closes with the last lazy block that reads from it."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, "rb")

    def __del__(self) -> None:
        self.close()


class Window(SeekableFile):
    """A part of a seekable file as a file of its own; several windows may share the file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__(length)
        self._file, self._start = file, start

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count
