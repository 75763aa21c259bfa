"""How much memory this process may still take, and how many samples fit into it."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

from stages.measurement.need import Need

SHARE = 0.8
"""Of the room, that is planned with."""


@dataclass(frozen=True)
class Fit:
    """How many samples are in memory at once."""

    samples: int
    sample_bytes: int
    """What each takes."""
    free_bytes: int | None
    """What there is; None where the kernel does not say."""
    other_bytes: int = 0
    """What is held beside them, however few."""

    @property
    def bytes(self) -> int:
        """All that is held."""
        return self.samples * self.sample_bytes + self.other_bytes

    @property
    def tight(self) -> bool:
        """Whether not even this many are sure to fit."""
        return self.free_bytes is not None and self.bytes > self.free_bytes

    def __str__(self) -> str:
        need = _size(self.bytes)
        free = "" if self.free_bytes is None else f" ({_size(self.free_bytes)} free)"
        samples = "1 sample" if self.samples == 1 else f"{self.samples} samples"
        return f"holds up to {need}{free}, {samples} at once"


def _size(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.3g} GiB"


def fit(need: Need, most: int, *, other_bytes: int = 0, wanted: int | None = None, machine: Path = Path("/")) -> Fit:
    """The samples that are in memory at once: as many as are wanted, or as fit, at least 1 and at most `most`.

    Args:
        need: what the engine takes.
        other_bytes: what is held besides, however few samples there are: a task's inputs.
        wanted: a number that somebody has chosen, 0 for `most`; None takes what fits.
        machine: where the kernel's files are found.
    """
    each, other, free = max(1, need.sample), need.fixed + other_bytes, room(machine)
    if wanted is not None:
        samples = min(wanted, most) if wanted else most
    elif free is None:
        samples = most
    else:
        samples = max(1, min(most, int((SHARE * free - other) // each)))
    return Fit(samples, each, free, other)


def room(machine: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: the least of the machine's free memory, what is left of the limits of its
    control groups (versions 1 and 2), and of its address space (`ulimit -v`). None where nothing is said.
    """
    found = [_available(machine), *_groups(machine), _address_space(machine)]
    return min((each for each in found if each is not None), default=None)


def _available(machine: Path) -> int | None:
    for line in _lines(machine / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(machine: Path) -> list[int | None]:
    """What is left in each control group from the process's own up to the root."""
    left: list[int | None] = []
    for line in _lines(machine / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, limit, usage, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "
        elif "memory" in controllers.split(","):
            root, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file "
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            folder = machine / root / "/".join(parts[:depth])
            left.append(_left(folder / limit, folder / usage, folder / "memory.stat", cache))
    return left


def _left(limit: Path, usage: Path, stat: Path, cache: str) -> int | None:
    """A group's limit less what it uses; file contents in memory that can be dropped are not counted as used."""
    allowed, used = _number(limit), _number(usage)
    if allowed is None or used is None:
        return None
    dropped = sum(int(line.split()[1]) for line in _lines(stat) if line.startswith(cache))
    return max(0, allowed - used + dropped)


def _address_space(machine: Path) -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    for line in _lines(machine / "proc/self/status"):
        if line.startswith("VmSize:"):
            return max(0, limit - int(line.split()[1]) * 1024)
    return limit


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
