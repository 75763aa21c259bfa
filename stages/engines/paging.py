"""A file for values that lie outside of memory between the forward and the backward pass.

It has no name: it is gone when the process ends, however it ends.
"""

from __future__ import annotations

import os
from tempfile import TemporaryFile, gettempdir
from typing import Any
from weakref import finalize

import numpy as np

from stages.errors import OutputError


class PageFile:
    """Room for so many floats of each of some samples, in a file of a folder ('' for the system's own).

    Raises:
        OutputError: the folder cannot be written, or has not the room.
    """

    def __init__(self, folder: str, floats: int) -> None:
        self.folder, self.floats, self._samples = folder or gettempdir(), floats, 0
        try:
            file = TemporaryFile(dir=self.folder, prefix="edgetrain-pages-")  # noqa: SIM115 - closed with this object
        except OSError as error:
            raise self._trouble(error, 1) from error
        self._number = file.fileno()
        finalize(self, file.close)
        self.grow(1)

    def grow(self, samples: int) -> None:
        """Make room for so many samples."""
        if samples > self._samples:
            try:
                os.posix_fallocate(self._number, 0, 4 * self.floats * samples)
            except OSError as error:
                raise self._trouble(error, samples) from error
            self._samples = samples

    def move(self, sample: int, place: int, values: np.ndarray[Any, Any], *, back: bool) -> None:
        """Write values (n,) to a sample's place, or read them back into the array."""
        at, data = 4 * (sample * self.floats + place), values.data.cast("B")
        while data:
            if back:
                done = os.preadv(self._number, [data], at)
            else:
                done = os.pwrite(self._number, data, at)
            if not done:
                raise OSError(0, "the page file is too short")
            data, at = data[done:], at + done

    def _trouble(self, error: OSError, samples: int) -> OutputError:
        expected = f"a folder with room for {4 * self.floats * samples:,} bytes"
        return OutputError(f"--page-dir {self.folder}", str(error.strerror), expected, "name another folder")
