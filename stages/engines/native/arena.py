"""Where the buffers of a program lie in one arena: lifetimes become offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stages.engines.native.program import Buffer

LINE = 16
"""Floats of a cache line; every buffer begins at one."""


@dataclass(eq=False)
class Slot:
    """Buffers that lie in each other's place, one after the other in time."""

    members: list[Buffer]
    floats: int
    first: int
    last: int
    at: int = -1


def slots_of(buffers: Iterable[Buffer]) -> list[Slot]:
    """One slot for each buffer and those that lie over it."""
    slots: dict[int, Slot] = {}
    for buffer in sorted(buffers, key=lambda buffer: buffer.first):
        size = -(-buffer.floats // LINE) * LINE
        if buffer.over is None:
            slots[id(buffer)] = Slot([buffer], size, buffer.first, buffer.last)
            continue
        slot = slots[id(buffer)] = slots[id(buffer.over)]
        slot.members.append(buffer)
        slot.floats, slot.last = max(slot.floats, size), max(slot.last, buffer.last)
    return list({id(slot): slot for slot in slots.values()}.values())


ORDERS: Sequence[Callable[[Slot], tuple[int, ...]]] = (
    lambda slot: (-slot.floats,),
    lambda slot: (slot.first, -slot.floats),
    lambda slot: (-slot.floats * (slot.last - slot.first + 1),),
    lambda slot: (slot.first - slot.last, -slot.floats),
    lambda slot: (-slot.last, -slot.floats),
)
"""In which order slots get the lowest place that is free for as long as they live; the best of these is kept."""


def place(buffers: Sequence[Buffer], *, separate: bool = False) -> int:
    """Give every buffer its offset; the floats of the whole arena. `separate`: no two share anything (for tests)."""
    if separate:
        return _side_by_side(buffers)
    slots = slots_of(buffers)
    best: tuple[int, list[int]] | None = None
    for order in ORDERS:
        top = _fill(sorted(slots, key=order))
        if best is None or top < best[0]:
            best = top, [slot.at for slot in slots]
    if best is None:
        return 0
    for slot, at in zip(slots, best[1], strict=True):
        for buffer in slot.members:
            buffer.at = at
    return best[0]


def _side_by_side(buffers: Sequence[Buffer]) -> int:
    at = 0
    for buffer in buffers:
        buffer.at = at
        at += -(-buffer.floats // LINE) * LINE
    return at


def _fill(slots: Sequence[Slot]) -> int:
    """First fit in this order; the top."""
    placed: list[Slot] = []
    for slot in slots:
        at = 0
        for other in sorted(placed, key=lambda other: other.at):
            if other.first > slot.last or slot.first > other.last:
                continue
            if at + slot.floats <= other.at:
                break
            at = max(at, other.at + other.floats)
        slot.at = at
        placed.append(slot)
    return max((slot.at + slot.floats for slot in slots), default=0)


def bound(buffers: Sequence[Buffer]) -> int:
    """The most floats that live at one step: no placement needs fewer."""
    slots = slots_of(buffers)
    times = {slot.first for slot in slots}
    return max((sum(s.floats for s in slots if s.first <= time <= s.last) for time in times), default=0)
