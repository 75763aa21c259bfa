"""Where the buffers of a program lie in one arena: lifetimes become offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
"""In which order slots get the lowest place that is free for as long as they live; the best that is found is kept."""


LIFTS = 16
"""How often the slot that ends highest is put first in an order, and the order tried again."""


def place(buffers: Sequence[Buffer], *, separate: bool = False) -> int:
    """Give every buffer its offset; the floats of the whole arena. `separate`: no two share anything (for tests)."""
    if separate:
        return _side_by_side(buffers)
    slots = slots_of(buffers)
    best: tuple[int, list[int]] | None = None
    for top in _tries(slots):
        if best is None or top < best[0]:
            best = top, [slot.at for slot in slots]
    if best is None:
        return 0
    for slot, at in zip(slots, best[1], strict=True):
        for buffer in slot.members:
            buffer.at = at
    return best[0]


def _tries(slots: Sequence[Slot]) -> Iterator[int]:
    """The top of one placement after the other, until one is as low as can be."""
    least = _least(slots)
    for order in ORDERS:
        ordered = sorted(slots, key=order)
        for _ in range(LIFTS):
            top = _fill(ordered)
            yield top
            if top == least:
                return
            highest = next(i for i, slot in enumerate(ordered) if slot.at + slot.floats == top)
            ordered.insert(0, ordered.pop(highest))


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
    return _least(slots_of(buffers))


def _least(slots: Sequence[Slot]) -> int:
    times = {slot.first for slot in slots}
    return max((sum(s.floats for s in slots if s.first <= time <= s.last) for time in times), default=0)
