"""What the C library calls to page values of a sample: into a file, and back."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from stages.engines.paging import PageFile
from stages.errors import TransferError

CALL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.POINTER(ctypes.c_float), ctypes.c_size_t
)


class Pager:
    """What one worker calls; `sample` says whose values it pages."""

    def __init__(self, file: PageFile) -> None:
        self._file, self.sample = file, 0
        self._error: OSError | None = None
        self.call = CALL(self._page)

    def _page(self, user: Any, back: int, place: int, values: Any, count: int) -> int:
        try:
            array = np.ctypeslib.as_array(values, (count,))
            self._file.move(self.sample, place, array, back=bool(back))
        except OSError as error:
            self._error = error
            return 1
        return 0

    def check(self) -> None:
        """Raise `TransferError` where a value could not be paged."""
        if self._error is not None:
            error, self._error = self._error, None
            where = f"--page-dir {self._file.folder}"
            raise TransferError(where, error.strerror or str(error), "a file that can be written and read")
