"""Which frozen operators run together, row by row: rings of a few rows instead of whole maps between them.

Each row is computed once, so a chain costs no arithmetic; it saves memory, and on large maps time. On small maps rows
are too short for the kernels. The cut with the smallest arena is taken and, among those that fit into what the trained
part needs anyway, the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stages.engines.native.builder import geometry, map_of
from stages.engines.native.layers import macs_of
from stages.engines.native.program import MOST_STAGES
from stages.engines.native.rules import lowered
from stages.graphs.graph import Graph
from stages.graphs.units import Unit
from stages.operators import Op

SHORT_ROW = 8
"""Pixels that a kernel's tile takes at once."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Units first..last of the prefix; alone, a unit runs on whole maps."""

    first: int
    last: int
    over: bool
    """Its output takes the place of its input."""


class Cuts:
    """The best way to cut a prefix into chains."""

    def __init__(self, graph: Graph, units: Sequence[Unit], keep: Sequence[str], floor: int) -> None:
        """`keep`: values that are read behind the prefix. `floor`: floats that the arena has anyway."""
        self.graph, self.units, self.floor = graph, units, floor
        self.windows = [_window(unit.op) for unit in units]
        self.made = {unit.out: number for number, unit in enumerate(units)}
        self.last_use = dict.fromkeys(self.made, -1) | dict.fromkeys(keep, len(units))
        self.readers: dict[str, int] = dict.fromkeys(self.made, 0)
        for number, unit in enumerate(units):
            for name in sources(unit):
                self.last_use[name] = max(self.last_use[name], number)
                self.readers[name] += 1

    def best(self) -> list[Chain]:
        """Chains in order that cover all units."""
        done: list[tuple[tuple[int, float], list[Chain]]] = [((self.floor, 0.0), [])]
        for last in range(len(self.units)):
            options = []
            for first in range(last, max(-1, last - MOST_STAGES), -1):
                if first < last and not self._joins(first + 1, last):
                    break
                cost, chain = self._cost(first, last)
                (peak, time), before = done[first]
                options.append(((max(peak, cost[0]), time + cost[1]), [*before, chain]))
            done.append(min(options, key=lambda option: option[0]))
        return done[-1][1]

    def _joins(self, number: int, last: int) -> bool:
        """Whether unit `number` may read its rows from a ring of the unit before it."""
        unit, before = self.units[number], self.units[number - 1]
        if not (is_rows(unit) and is_rows(before) and unit.op.inputs[:1] == (before.out,)):
            return False
        if map_of(before.op.shape).height == 1 or self.readers[before.out] != 1:
            return False
        return self.last_use[before.out] == number and (not unit.residual or number == last)

    def _cost(self, first: int, last: int) -> tuple[tuple[int, float], Chain]:
        """(floats while it runs, rough processor cycles beyond what any cut takes)."""
        head, tail = self.units[first], self.units[last]
        source = head.op.inputs[0] if head.op.inputs else None
        y = map_of(self.graph[tail.out].shape).floats
        x = map_of(head.op.in_shape).floats if source else 0
        over = self._may_overwrite(first, last)
        own = max(x, y) if over else x + y
        rings = sum(ring_rows(self.units[k], self.units[k + 1]) * _row(self.units[k].op) for k in range(first, last))
        alive = sum(
            map_of(self.graph[name].shape).floats
            for name, made in self.made.items()
            if made < first and self.last_use[name] >= first and name != source
        )
        time = (x + y) / 4.0
        if first < last:
            time += sum(_short_rows(unit.op) for unit in self.units[first : last + 1])
        return (own + rings + alive, time), Chain(first, last, over)

    def _may_overwrite(self, first: int, last: int) -> bool:
        """Whether the chain's output rows only ever fall on input rows that nothing reads any more."""
        head, tail = self.units[first], self.units[last]
        if first == last or not head.op.inputs:
            return False
        source = head.op.inputs[0]
        if self.last_use[source] > last or any(source in sources(u)[1:] for u in self.units[first:last]):
            return False
        x, y = map_of(head.op.in_shape), map_of(self.graph[tail.out].shape)
        x_row, y_row = x.width * x.channels, y.width * y.channels
        if tail.residual == source and x_row != y_row:
            return False
        for row in range(y.height):
            free = self._free_rows(first, last, row)
            free = min(free, row + 1) if tail.residual == source else free
            if (row + 1) * y_row > free * x_row:
                return False
        return True

    def _free_rows(self, first: int, last: int, row: int) -> int:
        """Rows of the chain's input that are read no more once output row `row` is about to be written."""
        made = row + 1
        for unit in reversed(self.windows[first + 1 : last + 1]):
            made = max(0, min(unit.height, (made - 1) * unit.step - unit.pad + unit.reach))
        head = self.windows[first]
        return head.height if made >= head.out_height else max(0, made * head.step - head.pad)


class _Window(NamedTuple):
    """How a unit's output rows lie over its input rows."""

    height: int
    out_height: int
    step: int
    pad: int
    reach: int
    """Input rows between the first and the last that an output row reads, both counted."""


def _window(op: Op) -> _Window:
    words = geometry(op)
    rows, step, pad, apart = (int(words[name]) for name in ("kh", "sh", "ph", "dh"))  # type: ignore[arg-type]
    return _Window(map_of(op.in_shape).height, map_of(op.shape).height, step, pad, (rows - 1) * apart + 1)


def sources(unit: Unit) -> tuple[str, ...]:
    """Values that a unit reads."""
    return (*unit.op.inputs, unit.residual) if unit.residual else unit.op.inputs


def is_rows(unit: Unit) -> bool:
    """Whether a unit is one step that can run row by row."""
    return lowered(unit.op).rows and (unit.op.groups == 1 or unit.op.is_depthwise)


def ring_rows(unit: Unit, reader: Unit) -> int:
    """Rows of a unit's output that its reader needs at once."""
    words = geometry(reader.op)
    window = (int(words["kh"]) - 1) * int(words["dh"]) + 1  # type: ignore[arg-type]
    return min(map_of(unit.op.shape).height, window)


def _row(op: Op) -> int:
    size = map_of(op.shape)
    return size.width * size.channels


def _short_rows(op: Op) -> float:
    """Cycles lost because a dense layer's rows do not fill the kernel's tiles."""
    if not op.is_layer or op.is_depthwise:
        return 0.0
    width = map_of(op.shape).width
    return macs_of(op) / 16 * (-(-width // SHORT_ROW) * SHORT_ROW / width - 1)
