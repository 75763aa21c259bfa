"""What a lowering is built with: buffers, constants, live values and steps, and the plan of the arena at the end."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import LayerUpdate
from stages.engines.native import arena
from stages.engines.native.channels import Channels, Map, map_of
from stages.engines.native.program import (
    ARENA,
    CONSTANT,
    GRADIENT,
    LIVE,
    TURN_SHIFT,
    Buffer,
    Lowering,
    Parameter,
    Recipe,
    Ref,
    Step,
    Tensors,
)
from stages.engines.native.program import PANEL as LANES
from stages.graphs.graph import Graph
from stages.operators import Op


def geometry(op: Op) -> dict[str, int | Ref]:
    """The words of a windowed operator: sizes, kernel, stride, padding, dilation."""
    before, after = map_of(op.in_shape), map_of(op.shape)

    def axes(values: Sequence[int], default: int) -> tuple[int, int]:
        padded = (default, default, *values)[-2:]
        return padded[0], padded[1]

    (kh, kw), (sh, sw) = axes(op.kernel, 1), axes(op.stride, 1)
    (ph, pw), (dh, dw) = axes(op.padding, 0), axes(op.dilation, 1)
    return {
        "hi": before.height, "wi": before.width, "ho": after.height, "wo": after.width,
        "kh": kh, "kw": kw, "sh": sh, "sw": sw, "ph": ph, "pw": pw, "dh": dh, "dw": dw,
    }  # fmt: skip


def is_plain(op: Op) -> bool:
    """Whether a layer is one matrix applied at every position of its input."""
    return op.kind == "linear" or (prod(op.kernel) == 1 and set(op.stride) == {1} and not any(op.padding))


def padded(count: int) -> int:
    """Up to a whole panel."""
    return -(-count // LANES) * LANES


def panels(weight: NDArray[np.generic], fill: float = 0) -> NDArray[np.generic]:
    """(out, in, kh, kw) -> [panel][kh][kw][in][16], what is over filled."""
    out, inside, kh, kw = weight.shape
    whole = np.full((padded(out), inside, kh, kw), fill, weight.dtype)
    whole[:out] = weight
    return whole.reshape(-1, LANES, inside, kh, kw).transpose(0, 3, 4, 2, 1)


def taps(weight: NDArray[np.generic]) -> NDArray[np.generic]:
    """(channels, 1, kh, kw) -> [tap][channel]."""
    return weight.reshape(len(weight), -1).T


@dataclass(frozen=True, slots=True)
class Lot:
    """What trains of a layer at the same time."""

    turn: int
    """0: always; else in the turn of that number."""
    update: LayerUpdate

    @property
    def flags(self) -> int:
        """Of the steps that add to its gradient."""
        return self.turn << TURN_SHIFT


class Builder:
    """Collects a program; `finish` plans its arena."""

    def __init__(self, graph: Graph, channels: Channels, turns: Sequence[Sequence[LayerUpdate]] = ()) -> None:
        """`turns`: what of the plan trains in turn, if not all of it always."""
        shape = map_of(graph.input_shape)
        self.graph, self.channels = graph, channels
        self._turns: dict[str, list[Lot]] = {}
        for number, updates in enumerate(turns, start=1):
            for update in updates:
                if update.trains:
                    self._turns.setdefault(update.layer, []).append(Lot(number, update))
        self.owner = ""
        """The operator whose steps are being made."""
        self.program = Lowering((shape.channels, shape.height, shape.width), graph.feature_dim)
        self._wishes: list[tuple[Buffer, Buffer, bool]] = []
        self.program.zeros = max([op.in_channels for op in graph.ops if op.kind == "conv"], default=0)
        self.program.constant_floats = padded(self.program.zeros)

    # ------------------------------------------------------------------------------------------------ places to put

    def buffer(self, name: str, floats: int, *, over: Buffer | None = None, chained: bool = False) -> Buffer:
        """A new buffer. It may take the place of `over` if that is not read after the step that first writes it (and
        not otherwise read by that step, `chained` aside, whose maker knows that no row is overwritten too early)."""
        made = Buffer(name, floats)
        self.program.buffers.append(made)
        if over is not None:
            self.wish(made, over, chained=chained)
        return made

    def wish(self, made: Buffer, over: Buffer, *, chained: bool = False) -> None:
        """Let `made` take the place of `over` if that harms nobody."""
        self._wishes.append((made, over, chained))

    def constant(self, recipe: Recipe, floats: int) -> Ref:
        """Words of the image that never change."""
        at = self.program.constant_floats
        self.program.constants.append((at, recipe))
        self.program.constant_floats += padded(floats)
        return Ref(CONSTANT, at)

    def indices(self, numbers: Sequence[int] | NDArray[np.int64]) -> Ref:
        """Whole numbers as constants."""
        values = np.asarray(numbers, np.int32)
        return self.constant(lambda tensors: values, len(values))

    def lots(self, update: LayerUpdate | None) -> Sequence[Lot]:
        """What trains of a layer at the same time: all of it always, or its channels in turn."""
        return () if update is None else self._turns.get(update.layer, (Lot(0, update),))

    def live(self, recipe: Recipe, floats: int, turns: Mapping[int, int]) -> Ref:
        """Values that train, so many for each turn; their gradients lie at the same offset of the gradients."""
        at = self.program.live_floats
        self.program.live.append((at, recipe))
        self.program.live_floats += padded(floats)
        for turn, count in turns.items():
            self.program.spans.append((turn, at, count))
            at += count
        return Ref(LIVE, self.program.live_floats - padded(floats))

    def sums(self, floats: int) -> Ref:
        """A place behind the live values' gradients for what the backward pass sums up."""
        at = self.program.live_floats + self.program.sum_floats
        self.program.sum_floats += padded(floats)
        return Ref(GRADIENT, at)

    # -------------------------------------------------------------------------------------------------------- steps

    def emit(self, into: list[Step], kind: str, **words: int | Ref | None) -> Step:
        """Append a step; words of None are left out."""
        step = Step(kind, {name: word for name, word in words.items() if word is not None}, self.owner)
        into.append(step)
        return step

    # --------------------------------------------------------------------------------------------------------- plan

    def set_times(self) -> int:
        """Number the steps (those of a chain have one number) and set every buffer's lifetime; when backward begins."""
        for buffer in self.program.buffers:
            buffer.first = buffer.last = -1
            buffer.over = None
        program, time, chained = self.program, -1, 0
        turn = 0
        for part in (program.prefix, program.suffix, program.backward):
            turn = time + 1 if part is program.backward else turn
            for step in part:
                time += 0 if chained else 1
                chained = int(step.words["n"]) if step.kind == "chain" else max(0, chained - 1)  # type: ignore[arg-type]
                step.time = time
                for ref in step.refs():
                    if ref.buffer is not None:
                        ref.buffer.use(time)
        return turn

    def grant(self) -> None:
        """Let buffers lie over others where that harms nobody."""
        taken: set[int] = set()
        uses: dict[tuple[int, int], int] = {}
        for step in (*self.program.prefix, *self.program.suffix, *self.program.backward):
            for ref in step.refs():
                if ref.buffer is not None:
                    uses[id(ref.buffer), step.time] = uses.get((id(ref.buffer), step.time), 0) + 1
        for made, over, chained in self._wishes:
            alone = chained or uses.get((id(over), made.first)) == 1
            if over.last == made.first and over.first < made.first and alone and id(over) not in taken:
                made.over = over
                taken.add(id(over))

    def finish(self, *, separate: bool) -> Lowering:
        """Plan the arena."""
        turn = self.set_times()
        program = self.program
        program.buffers = [buffer for buffer in program.buffers if buffer.first >= 0]
        if not separate:
            self.grant()
        program.arena_floats = arena.place(program.buffers, separate=separate)
        program.bound_floats = arena.bound(program.buffers)
        if program.backward:
            program.kept = [buffer for buffer in program.buffers if buffer.first < turn <= buffer.last]
        return program


def mark_of(graph: Graph, parameters: Sequence[Parameter], spans: Sequence[tuple[int, int, int]] = ()) -> int:
    """A number that tells plans and graphs apart: of images and of the live values that are loaded into them.

    Turns count too: they have an order of channels of their own.
    """
    mark = zlib.crc32(repr(graph.ops).encode())
    for parameter in parameters:
        mark = zlib.crc32(parameter.name.encode(), mark)
        mark = zlib.crc32(np.ascontiguousarray(parameter.ids, "<i8").tobytes(), mark)
    if any(turn for turn, _, _ in spans):
        mark = zlib.crc32(repr(list(spans)).encode(), mark)
    return mark


__all__ = ["ARENA", "GRADIENT", "Builder", "Map", "Tensors", "geometry", "is_plain", "map_of", "padded", "replace"]
