"""Kept values in fewer bits: packed behind the step that makes them, unpacked before the weight gradient."""

from __future__ import annotations

from stages.engines.native.builder import Builder
from stages.engines.native.program import Buffer, Step


class Packing:
    """Packs values into 8 or 16 bits; with 32 it does nothing.

    Element i of a sample becomes floor((x - least) / step + u), u drawn from [0, 1) or, to the nearest, 1/2.
    """

    def __init__(self, builder: Builder, bits: int, *, nearest: bool) -> None:
        self._builder, self._bits, self._nearest = builder, bits, nearest
        self._packed: dict[int, Buffer] = {}

    def pack(self, value: Buffer, into: list[Step]) -> None:
        """Keep the value packed; once, however many layers read it."""
        if self._bits == 32 or id(value) in self._packed:
            return
        words = 2 + -(-value.floats * self._bits // 32)
        kept = self._packed[id(value)] = self._builder.buffer(f"packed {value.name}", words)
        salt = len(self._packed)
        self._builder.emit(
            into, "pack", x=value[0], m=kept[0], n=value.floats, ci=self._bits, co=1, ldx=1, ldy=1, hi=1, wi=1, ho=1,
            wo=1, a0=salt, a1=int(self._nearest), flags=1,
        )  # fmt: skip

    def unpacked(self, value: Buffer, into: list[Step]) -> Buffer:
        """The value as weight gradients read it."""
        kept = self._packed.get(id(value))
        if kept is None:
            return value
        made = self._builder.buffer(f"unpacked {value.name}", value.floats)
        self._builder.emit(
            into, "unpack", m=kept[0], y=made[0], n=value.floats, ci=self._bits, co=1, ldx=1, ldy=1, hi=1, wi=1, ho=1,
            wo=1,
        )  # fmt: skip
        return made
