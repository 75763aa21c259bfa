"""Numbers as people read them: with the unit that their name says, in as many digits as count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def unit(name: str, value: Any) -> str:
    """A value written by what its name says: bytes in KiB or MiB, MACs in millions, seconds in milliseconds.

    >>> unit("input_bytes", 1536), unit("backward_macs", 22_500_000), unit("latency_s", 0.0125), unit("share", 0.5)
    ('1.5 KiB', '22.5 M MACs', '12.5 ms', '0.5')
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value) if not isinstance(value, list) else listed(value)
    if name.endswith("bytes"):
        return scaled(value, 1024, ("B", "KiB", "MiB", "GiB"))
    if name.endswith("macs"):
        return scaled(value, 1000, ("MACs", "k MACs", "M MACs", "G MACs"))
    if name.endswith("_s"):
        return f"{1000 * value:.4g} ms"
    return number(value)


def scaled(value: float, step: int, names: Sequence[str]) -> str:
    """A value in the largest of these units that leaves a whole part."""
    power = 0
    while abs(value) >= step and power < len(names) - 1:
        value, power = value / step, power + 1
    return f"{value:.4g} {names[power]}"


def number(value: Any) -> str:
    """At most four digits that count; whole numbers in full."""
    if value is None:
        return ""
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def listed(values: Sequence[Any], most: int = 6) -> str:
    """The first few of a list."""
    shown = ", ".join(number(value) if isinstance(value, float) else str(value) for value in values[:most])
    return shown + (f", ... ({len(values)})" if len(values) > most else "")


def by(shape: Sequence[int]) -> str:
    """A shape."""
    return " x ".join(map(str, shape))
