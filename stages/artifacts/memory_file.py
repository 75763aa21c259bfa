"""A file in memory that hands its bytes over without copying them."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np


class SeekableFile(io.RawIOBase):
    """A binary file of a known length, and where in it the next byte is read."""

    def __init__(self, length: int) -> None:
        self._length, self._at = length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at


class MemoryFile(SeekableFile):
    """A file over memory, as HDF5 reads and writes it; nothing but its caller copies.

    Args:
        content: what it holds at first; immutable bytes are for reading only.
        room: to write: bytes to set aside, into which `content` is copied; memory is used as they fill.
    """

    def __init__(self, content: bytes | memoryview = b"", *, room: int = 0) -> None:
        super().__init__(len(content))
        self._memory = memoryview(content)
        self._reserve(room)

    def view(self) -> memoryview:
        """What the file holds now; to be taken when the last byte is written."""
        return self._memory[: self._length]

    def writable(self) -> bool:
        return not self._memory.readonly

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        buffer[:count] = self._memory[self._at : self._at + count]
        self._at += count
        return count

    def write(self, data: Any) -> int:
        count, end = len(data), self._at + len(data)
        if not count:
            return 0
        if self._at > self._length or end > len(self._memory):
            self.truncate(max(self._length, end))
        self._memory[self._at : end] = data
        self._at, self._length = end, max(self._length, end)
        return count

    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        self._reserve(size)
        if size > self._length:
            self._memory[self._length : size] = bytes(size - self._length)
        self._length = size
        return size

    def _reserve(self, size: int) -> None:
        if size > len(self._memory):
            memory = np.empty(max(size, 2 * len(self._memory)), np.uint8).data
            memory[: self._length] = self.view()
            self._memory = memory
