"""The C library's allocator, told to keep what one training step frees for the next."""

from __future__ import annotations

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 28
"""Free memory at the heap's end above which it goes back to the system."""
HEAP_BYTES = 1 << 25
"""Requests below this are served from the heap; the most that glibc accepts."""


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
