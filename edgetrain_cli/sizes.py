"""Sizes as people write them."""

from __future__ import annotations

from stages.errors import UsageError

_UNITS = {
    "": 1,
    "B": 1,
    "K": 2**10,
    "KB": 2**10,
    "KIB": 2**10,
    "M": 2**20,
    "MB": 2**20,
    "MIB": 2**20,
    "G": 2**30,
    "GB": 2**30,
    "GIB": 2**30,
}


def size_bytes(text: str, option: str) -> int:
    """Bytes from `1GiB`, `512 KB`, `1000`; K, M and G are powers of 1024 as in the papers.

    >>> size_bytes("1.5MB", "--memory")
    1572864
    """
    number = text.strip().rstrip("BIKMGbikmg ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        value = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 < value < 2**62:
        raise UsageError(option, repr(text), "a size such as 1MB, 512KiB or 65536")
    return int(value)
