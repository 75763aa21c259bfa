"""How a command sets up the libraries below it: numpy's BLAS without threads, an allocator that keeps what is freed."""

from __future__ import annotations

import importlib
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 28
"""Free memory at the heap's end above which it goes back to the system."""
HEAP_BYTES = 1 << 25
"""Requests below this are served from the heap; the most that glibc accepts."""


def import_numpy() -> None:
    """numpy, whose BLAS starts no threads: products are small here, and threads spin while they wait for the next.

    Whatever else reads the variable, PyTorch's BLAS on Arm or a process started from here, finds it as it was.
    """
    variable = "OPENBLAS_NUM_THREADS"
    if variable in os.environ:
        return
    os.environ[variable] = "1"
    try:
        importlib.import_module("numpy")
    finally:
        del os.environ[variable]


def keep_freed_memory() -> None:
    """Keep freed memory for the next step instead of handing it back to the system, where the C library is glibc.

    A step frees its activations and the next one asks for them again. By default it depends on chance, on what lies at
    the heap's end, whether every step then gets fresh pages, which the system has to clear first. The peak stays.
    """
    import ctypes  # not for a list of commands

    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_TRIM_THRESHOLD, KEPT_BYTES)
        set_option(_MMAP_THRESHOLD, HEAP_BYTES)
