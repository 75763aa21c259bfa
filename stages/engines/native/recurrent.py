"""Recurrent layers: for each step of time the product with the hidden state, and a cell.

What the inputs add to the gates is one product over all steps; the hidden state's part cannot be. Hidden units lie with
the live ones first, in every gate; a plan that trains some of them so has two blocks of weights per gate. Back through
time the cells give the gradients at the gates, step by step; those of weights and inputs are single products again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import LayerUpdate
from stages.engines.native.builder import Builder, Lot, padded, panels
from stages.engines.native.channels import live_first
from stages.engines.native.matrices import settle, target_of, to_rows
from stages.engines.native.program import CHUNK, GRADIENT, Buffer, Integers, Parameter, Ref, Step, Tensors
from stages.operators import Op
from stages.operators.recurrent import GATES

Array = NDArray[np.generic]

KEPT = {"gru": 4, "lstm": 6}
"""Floats per unit and step that a cell keeps for its gradient."""
CELL = 4
"""Which of them is the cell of an LSTM."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows o0..o1 of the weights, gate behind gate."""

    o0: int
    o1: int
    live: bool
    inputs: Ref
    hidden: Ref
    biases: tuple[Ref, ...]
    """At the inputs' addition and at the hidden state's, or none."""


@dataclass(frozen=True, slots=True)
class Through:
    """Gradients that came back through time, (T, gates, H) each."""

    of: Buffer
    """The gradient of the output that they come from."""
    at_inputs: Buffer
    at_hidden: Buffer


class Recurrent:
    """A GRU or LSTM layer (T, D) -> (T, H) in the image, made once for its forward and backward steps."""

    def __init__(self, builder: Builder, op: Op, update: LayerUpdate | None) -> None:
        self.builder, self.op, self.update = builder, op, update
        lots = builder.lots(update)
        self._lot = lots[0] if len(lots) == 1 else Lot(0, update) if update else None  # units never train apart
        self.gates, self.units = GATES[op.kind], int(op["hidden"])
        self.steps, self.size = op.in_shape
        live = update.channels if update else ()
        self._moved = live_first(live, self.units)
        self._order: Integers = np.arange(self.units) if self._moved is None else self._moved
        self._blocks = [self._block(*rows) for rows in self._rows_of_blocks(len(live))]
        self._through: Through | None = None
        if live:
            builder.program.parameters.append(self._parameter(live))

    @property
    def _flags(self) -> int:
        return 0 if self._lot is None else self._lot.flags

    @property
    def width(self) -> int:
        """Floats of all gates of a step."""
        return self.gates * self.units

    # ------------------------------------------------------------------------------------------------------ weights

    def _rows_of_blocks(self, live: int) -> list[tuple[int, int, bool]]:
        if live in (0, self.units):
            return [(0, self.width, live > 0)]
        starts = range(0, self.width, self.units)
        cuts = [((at, at + live, True), (at + live, at + self.units, False)) for at in starts]
        return [block for pair in cuts for block in pair]

    def _by_rows(self, weight: Array) -> Array:
        """(H, columns, gates) -> (gates * H, columns), the units in their order, the hidden state's columns too."""
        rows = weight.transpose(2, 0, 1)[:, self._order].reshape(self.width, -1)
        end = self.size + self.units
        return np.concatenate([rows[:, : self.size], rows[:, self.size + self._order], rows[:, end:]], 1)

    def _parts(self, weight: Array, o0: int, o1: int, fill: int = 0) -> list[Array]:
        """A block as the kernels have it: the inputs' part, the hidden state's, and each bias."""
        rows, end = self._by_rows(weight)[o0:o1], self.size + self.units
        parts = [panels(part[:, :, None, None], fill) for part in (rows[:, : self.size], rows[:, self.size : end])]
        return parts + [rows[:, column] for column in range(end, rows.shape[1])]

    def _block(self, o0: int, o1: int, live: bool) -> Block:
        name = f"{self.op.name}.weight"
        floats = [self.size * padded(o1 - o0), self.units * padded(o1 - o0)] + [padded(o1 - o0)] * 2

        def place(which: int) -> Ref:
            def part(tensors: Tensors) -> Array:
                return self._parts(tensors[name], o0, o1)[which]

            if not live or self._lot is None:
                return self.builder.constant(part, floats[which])
            return self.builder.live(part, floats[which], {self._lot.turn: padded(floats[which])})

        biases = tuple(place(which) for which in (2, 3)) if self.op["biased"] else ()
        return Block(o0, o1, live, place(0), place(1), biases)

    def _parameter(self, live: Sequence[int]) -> Parameter:
        whole = np.arange(self.op.weights).reshape(self.op.weight_shape)
        places = np.full(self.op.weights, -1, np.int64)
        for block in self._blocks:
            if block.live:
                refs = (block.inputs, block.hidden, *block.biases)
                for ref, part in zip(refs, self._parts(whole, block.o0, block.o1, -1), strict=True):
                    packed = part.reshape(-1).astype(np.int64)
                    mine = np.flatnonzero(packed >= 0)
                    places[packed[mine]] = ref.offset + mine
        ids = whole[np.array(live)]
        return Parameter(f"{self.op.name}.weight", places[ids], ids)

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(self, x: Buffer, y: Buffer, into: list[Step], *, keep: bool) -> None:
        """From states of zeros; with `keep`, what `gradients` needs stays for every step."""
        op, builder, units = self.op, self.builder, self.units
        self.x_rows = to_rows(builder, x, op.in_shape, into, name=f"rows of {x.name}")
        added = builder.buffer(f"gates {op.name}", self.steps * self.width)
        told = builder.buffer(f"gates by the state of {op.name}", self.width)
        self.states = builder.buffer(f"states {op.name}", (self.steps + 1) * units)
        self.kept = builder.buffer(f"cells {op.name}", (self.steps if keep else 1) * KEPT[op.kind] * units)
        for block in self._blocks:
            self._product(self.x_rows[0], self.size, added[block.o0], block, 0, self.steps, into)
        zeros = self._before(self._times[0])
        builder.emit(into, "fill", **_row(units), y=zeros)
        cell = zeros
        for t in self._times:
            for block in self._blocks:
                self._product(self._before(t), units, told[block.o0], block, 1, 1, into)
            kept = self.kept[(t if keep else 0) * KEPT[op.kind] * units]
            builder.emit(
                into, op.kind, **_row(units), x=added[t * self.width], r=told[0],
                w=self._before(t) if op.kind == "gru" else cell, y=self._after(t), m=kept,
            )  # fmt: skip
            cell = replace(kept, offset=kept.offset + CELL * units)
        settle(builder, self.states, y, None, op.shape, into, order=self._moved, at=self._after(0).offset)

    @property
    def _times(self) -> range:
        """Steps in the order in which they run."""
        return range(self.steps)[:: -1 if self.op["reverse"] else 1]

    def _before(self, t: int) -> Ref:
        """The state before a step; that before the first is zeros."""
        return self.states[(t + 1 if self.op["reverse"] else t) * self.units]

    def _after(self, t: int) -> Ref:
        return self.states[(t if self.op["reverse"] else t + 1) * self.units]

    def _product(self, x: Ref, depth: int, y: Ref, block: Block, which: int, rows: int, into: list[Step]) -> None:
        """y (rows) = x (rows of `depth`) times the block's weights of inputs (0) or hidden state (1), and bias."""
        self.builder.emit(
            into, "conv", hi=1, wi=rows, ho=1, wo=rows, n=1, ci=depth, co=block.o1 - block.o0, ldx=depth,
            ldy=self.width, x=x, y=y, w=(block.inputs, block.hidden)[which],
            b=block.biases[which] if block.biases else None,
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------- backward

    def read_again(self, x: Buffer, into: list[Step]) -> None:
        """Take x, made again, for what `forward` read."""
        self.x_rows = to_rows(self.builder, x, self.op.in_shape, into, name=f"rows of {x.name}")

    def saves(self, x: Buffer, into: list[Step]) -> None:
        """Nothing beside what `forward` keeps."""

    def _back(self, g: Buffer, into: list[Step]) -> Through:
        """Back-propagation through time, once for each gradient of the output."""
        if self._through is not None and self._through.of is g:
            return self._through
        op, builder, units = self.op, self.builder, self.units
        rows = to_rows(builder, g, op.shape, into, order=self._moved, name=f"rows of {g.name}")
        at_inputs = builder.buffer(f"gradient gates {op.name}", self.steps * self.width)
        at_hidden = at_inputs
        if op.kind == "gru":
            at_hidden = builder.buffer(f"gradient gates by the state of {op.name}", self.steps * self.width)
        state = builder.buffer(f"gradient state {op.name}", units)
        beside = builder.buffer(f"gradient cell {op.name}", units)
        times = self._times[::-1]
        for number, t in enumerate(times):
            self._cell_back(
                t, rows[t * units] if number == 0 else state[0], number > 0, at_inputs, at_hidden, beside, into
            )
            if number + 1 == self.steps:
                break
            add = rows[times[number + 1] * units]
            for block in self._blocks:
                source = at_hidden[t * self.width + block.o0]
                self._product_back(source, state[0], block, block.hidden, units, 1, add, into)
                add = state[0]
            if op.kind == "gru":
                builder.emit(into, "add", **_row(units), ldr=units, x=state[0], r=beside[0], y=state[0])
        self._through = Through(g, at_inputs, at_hidden)
        return self._through

    def _cell_back(
        self, t: int, g: Ref, later: bool, at_inputs: Buffer, at_hidden: Buffer, beside: Buffer, into: list[Step]
    ) -> None:
        """The gradients at a step's gates; `beside` passes on to the step before it."""
        per_step = KEPT[self.op.kind] * self.units
        kept, at = self.kept[t * per_step], t * self.width
        if self.op.kind == "gru":
            self.builder.emit(
                into, "gru_dx", **_row(self.units), x=kept, w=self._before(t), r=g, y=at_inputs[at], b=at_hidden[at],
                m=beside[0],
            )  # fmt: skip
            return
        first = t == self._times[0]
        before = t + 1 if self.op["reverse"] else t - 1
        cell = self._before(t) if first else self.kept[before * per_step + CELL * self.units]
        self.builder.emit(
            into, "lstm_dx", **_row(self.units), x=kept, w=cell, r=g, y=at_inputs[at], m=beside[0], n=int(later)
        )

    def _product_back(
        self, g: Ref, dx: Ref, block: Block, weight: Ref, depth: int, rows: int, add: Ref | None, into: list[Step]
    ) -> None:
        """dx (rows of `depth`) = add + g (rows of gates) times the block's weights."""
        columns = block.o1 - block.o0
        scratch = self.builder.buffer(f"scratch {self.op.name}", CHUNK * columns)
        self.builder.emit(
            into, "conv_dx", hi=1, wi=rows, ho=1, wo=rows, n=1, ci=depth, co=columns, ldx=depth, ldy=self.width,
            ldr=depth, x=g, y=dx, w=weight, b=scratch[0], r=add,
        )  # fmt: skip

    def input_gradient(self, g: Buffer, add: Buffer | None, dx: Buffer, into: list[Step]) -> None:
        """dx = add + the gradient of its input."""
        through, shape = self._back(g, into), self.op.in_shape
        made = target_of(self.builder, dx, shape)
        more = add[0] if add is not None and made is dx else None
        for block in self._blocks:
            source = through.at_inputs[block.o0]
            self._product_back(source, made[0], block, block.inputs, self.size, self.steps, more, into)
            more = made[0]
        if made is not dx:
            settle(self.builder, made, dx, add, shape, into)

    def live_gradients(self, kept: tuple[Buffer, int] | None, g: Buffer, into: list[Step]) -> None:
        """Adds to the gradients of the live units' weights and biases."""
        through, before = self._back(g, into), self.states[self.units if self.op["reverse"] else 0]
        for block in self._blocks:
            if not block.live:
                continue
            sources = (through.at_inputs[block.o0], through.at_hidden[block.o0])
            self._weight_gradient(self.x_rows[0], self.size, sources[0], block, block.inputs, into)
            self._weight_gradient(before, self.units, sources[1], block, block.hidden, into)
            count = block.o1 - block.o0
            for source, bias in zip(sources, block.biases, strict=False):
                self.builder.emit(
                    into, "bias_dw", x=source, y=replace(bias, space=GRADIENT), n=count, ci=1, co=count, ldx=1,
                    m=self.builder.indices(np.arange(count)), ldy=self.width, hi=1, wi=self.steps, ho=1, wo=self.steps,
                    flags=self._flags,
                )  # fmt: skip

    def _weight_gradient(self, x: Ref, depth: int, g: Ref, block: Block, weight: Ref, into: list[Step]) -> None:
        self.builder.emit(
            into, "conv_dw", hi=1, wi=self.steps, ho=1, wo=self.steps, kh=1, kw=1, ci=depth, co=block.o1 - block.o0,
            ldx=depth, ldy=self.width, x=x, r=g, y=replace(weight, space=GRADIENT), flags=self._flags,
        )  # fmt: skip


def _row(width: int) -> dict[str, int | Ref]:
    """The words of a step on one row."""
    return {"hi": 1, "wi": 1, "ho": 1, "wo": 1, "ci": width, "co": width, "ldx": width, "ldy": width}
