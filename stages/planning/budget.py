"""Budgets: how a user writes them, and the frozen value that plans are checked against."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from stages.cost.training import check_memory_model, optimizer_state
from stages.errors import UsageError, require
from stages.graphs.keeping import KEEP_BITS

Number = TypeVar("Number", int, Fraction)

_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z%]*)\s*")

MEMORY_UNITS = {"": 1, "B": 1, "KB": 2**10, "KIB": 2**10, "MB": 2**20, "MIB": 2**20, "GB": 2**30, "GIB": 2**30}
"""Multiples of 1024 whichever way they are written, as in the papers."""
MAC_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
LATENCY_UNITS = {"US": Fraction(1, 10**6), "MS": Fraction(1, 1000), "S": Fraction(1)}


def parse_memory(text: str, where: str = "memory budget") -> int:
    """Bytes from `1MB`, `512KiB`, `900kB`, `1048576`: MB and MiB alike are 2^20 bytes. `where` is named in errors.

    >>> parse_memory("1MB"), parse_memory("0.5 KiB")
    (1048576, 512)

    Raises:
        UsageError: not a positive number with a unit of memory.
    """
    number, unit = _split(text, where, MEMORY_UNITS, "1MB, 512KiB or a number of bytes")
    return _positive(int(number * MEMORY_UNITS[unit]), where, text)


def parse_macs(text: str, full_macs: int) -> int:
    """Multiply-accumulates from `6.5M` or `15%`, a share of `full_macs`; fractions of a MAC are cut off.

    >>> parse_macs("6.5M", 44_907_008), parse_macs("15%", 44_907_008)
    (6500000, 6736051)

    Raises:
        UsageError: not a positive number, or with another unit.
    """
    expected = "a share such as 15% or a number such as 6.5M"
    number, unit = _split(text, "MAC budget", {**MAC_UNITS, "%": 1}, expected)
    count = number * full_macs / 100 if unit == "%" else number * MAC_UNITS[unit]
    return _positive(int(count), "MAC budget", text)


def parse_latency(text: str) -> float:
    """Seconds from `200ms`, `1.5s` or `800us`.

    >>> parse_latency("200ms")
    0.2

    Raises:
        UsageError: not a positive number with a unit of time.
    """
    number, unit = _split(text, "latency budget", LATENCY_UNITS, "a time such as 200ms or 1.5s")
    return float(_positive(number * LATENCY_UNITS[unit], "latency budget", text))


def _split(text: str, where: str, units: Container[str], expected: str) -> tuple[Fraction, str]:
    match = _NUMBER.fullmatch(text)
    if match is None or match[2].upper() not in units:
        raise UsageError(where, repr(text), expected)
    return Fraction(match[1]), match[2].upper()


def _positive(value: Number, where: str, text: str) -> Number:
    require(value > 0, where, repr(text), "more than 0")
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What one training step may cost; None means no limit. The accounting is part of the budget.

    Raises:
        UsageError: a limit that is not positive, a batch or workers below 1, an unknown memory model or optimiser.
    """

    memory_bytes: int | None = None
    backward_macs: int | None = None
    """Per sample."""
    latency_s: float | None = None
    """Per sample, forward and backward."""
    memory_model: str = "paper"
    batch: int = 1
    """Samples whose activations are kept at once."""
    optimizer: str = "adam"
    workers: int = 1
    """Threads of the native engine, which memory model `arena` counts."""
    keep_bits: int = 32
    """In which inputs of live layers are kept: 32, 16 or 8."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "backward_macs", "latency_s"):
            limit = getattr(self, name)
            require(limit is None or limit > 0, "budget", f"{name}={limit}", "more than 0")
        for name in ("batch", "workers"):
            require(getattr(self, name) > 0, "budget", f"{name}={getattr(self, name)}", "at least 1")
        require(self.keep_bits in KEEP_BITS, "--keep-bits", f"{self.keep_bits}", "32, 16 or 8")
        check_memory_model(self.memory_model)
        optimizer_state(self.optimizer)

    @property
    def limits(self) -> tuple[int | None, int | None, int | None]:
        """Memory (bytes), backward MACs and latency (nanoseconds), each None where there is no limit."""
        latency_ns = None if self.latency_s is None else int(self.latency_s * 1e9)
        return self.memory_bytes, self.backward_macs, latency_ns

    def __str__(self) -> str:
        parts = []
        if self.memory_bytes is not None:
            parts.append(f"{format_bytes(self.memory_bytes)} of memory (model {self.memory_model})")
        if self.backward_macs is not None:
            parts.append(f"{self.backward_macs:,} backward MACs")
        if self.latency_s is not None:
            parts.append(f"{self.latency_s * 1000:g} ms")
        return " and ".join(parts) or "no budget"


def format_bytes(count: int) -> str:
    """Bytes exactly, and in binary units beside it where that says more.

    >>> format_bytes(900), format_bytes(1_495_040)
    ('900 bytes', '1,495,040 bytes (1.43 MB)')
    """
    for unit, size in (("MB", 2**20), ("KB", 2**10)):
        if count >= size:
            return f"{count:,} bytes ({count / size:.2f} {unit})"
    return f"{count:,} bytes"
