"""Convolutions and linear layers as steps: the parts of their weights, frozen and live, and where each lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import LayerUpdate
from stages.engines.native.builder import Builder, Lot, geometry, is_plain, map_of, padded, panels, taps
from stages.engines.native.channels import Run, live_first
from stages.engines.native.matrices import over_rows, settle, target_of, to_rows
from stages.engines.native.program import (
    ACCUMULATE,
    ACTIVATIONS,
    CHUNK,
    GRADIENT,
    PANEL,
    Buffer,
    Parameter,
    Ref,
    Step,
    Tensors,
)
from stages.graphs.units import Unit
from stages.operators import Op

Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Part:
    """A block of a layer's weight: input channels i0..i1 of the value it reads, output channels o0..o1 of its own."""

    i0: int
    i1: int
    o0: int
    o1: int
    lot: Lot | None
    """What trains with it; None for the frozen."""
    weight: Ref

    @property
    def live(self) -> bool:
        return self.lot is not None

    @property
    def gradient(self) -> Ref:
        return replace(self.weight, space=GRADIENT)


def on_tokens(op: Op) -> bool:
    """Whether a layer's channels are not the first axis of what it reads, or that value lies in its own order."""
    return len(op.shape) > 3 or op.channel_axis % len(op.shape) != 0


class Layer:
    """A layer's weights and biases in the image, made once for its forward and backward steps.

    On tokens it runs on rows (`matrices`), whose last axis has what trains side by side: an order of its own.
    """

    def __init__(self, builder: Builder, op: Op, update: LayerUpdate | None) -> None:
        self.builder, self.op, self.update, self.lots = builder, op, update, builder.lots(update)
        self.by_input = update is not None and update.axis == "input" and not op.is_depthwise
        self.tokens = on_tokens(op)
        channels = builder.channels
        self.order_in = self._first_live(op.in_channels, inputs=True)
        self.order_out = self._first_live(op.out_channels, inputs=False)
        """The last axis of the rows, where that is not its own order."""
        self.rows, self.columns = channels.of[op.name], channels.of[op.inputs[0]]
        if self.tokens:
            self.rows = np.arange(op.out_channels) if self.order_out is None else self.order_out
            self.columns = np.arange(op.in_channels) if self.order_in is None else self.order_in
        self.x_rows: Buffer | None = None
        """What `forward` read, as rows."""
        self._g_rows: tuple[Buffer, Buffer] | None = None
        self.parts = [self._part(*block) for block in self._blocks()]
        self.bias = self._bias() if op.bias else None
        self.live_bias = self._live_bias()
        if update is not None:
            builder.program.parameters += self._parameters(update)

    @property
    def words(self) -> dict[str, int | Ref]:
        """Its geometry: a map's, or as many rows as there are tokens."""
        if not self.tokens:
            return geometry(self.op)
        rows = prod(self.op.shape[:-1])
        once: dict[str, int | Ref] = dict.fromkeys(("hi", "ho", "kh", "kw", "sh", "sw", "dh", "dw"), 1)
        return once | {"wi": rows, "wo": rows, "ph": 0, "pw": 0}

    @property
    def in_pixels(self) -> int:
        """Of the map, or the rows, that it reads."""
        return prod(self.op.in_shape[:-1]) if self.tokens else map_of(self.op.in_shape).pixels

    def read_again(self, x: Buffer, into: list[Step]) -> None:
        """Take x, made again, for what `forward` read."""
        if self.tokens:
            self.x_rows = to_rows(
                self.builder, x, self.op.in_shape, into, order=self.order_in, name=f"rows of {x.name}"
            )

    def saves(self, x: Buffer, into: list[Step]) -> tuple[Buffer, int] | None:
        """What of its input the weight gradient needs, see `saves`."""
        return saves(self, x, into)

    def input_gradient(self, g: Buffer, add: Buffer | None, dx: Buffer, into: list[Step]) -> None:
        """dx = add + the gradient of its input."""
        input_gradient(self, g, add, dx, into)

    def live_gradients(self, kept: tuple[Buffer, int] | None, g: Buffer, into: list[Step]) -> None:
        """Adds to the gradients of what trains of it."""
        live_gradients(self, kept, g, into)

    def rows_of_gradient(self, g: Buffer, into: list[Step]) -> Buffer:
        """The gradient of its output as its steps read it, made once."""
        if not self.tokens:
            return g
        if self._g_rows is None or self._g_rows[0] is not g:
            made = to_rows(self.builder, g, self.op.shape, into, order=self.order_out, name=f"rows of {g.name}")
            self._g_rows = g, made
        return self._g_rows[1]

    def _first_live(self, count: int, *, inputs: bool) -> NDArray[np.int64] | None:
        """Channels of a token in an order that has the live ones first; None where there is nothing to move."""
        update = self.update
        if not self.tokens or update is None or (self.by_input != inputs and not self.op.is_depthwise):
            return None
        return live_first([channel for lot in self.lots for channel in lot.update.channels], count)

    def _runs(self, *, inputs: bool) -> Sequence[Run]:
        """The channels of what it reads or writes as runs of one lot, and of frozen ones."""
        lots = [lot.update.channels for lot in self.lots]
        if not self.tokens:
            return self.builder.channels.runs(self.op.inputs[0] if inputs else self.op.name, lots)
        count = self.op.in_channels if inputs else self.op.out_channels
        ends = list(accumulate(map(len, lots), initial=0))
        runs = [*((low, high, lot) for lot, (low, high) in enumerate(pairwise(ends))), (ends[-1], count, -1)]
        return [run for run in runs if run[0] < run[1]]

    # ------------------------------------------------------------------------------------------------------ weights

    def _blocks(self) -> list[tuple[int, int, int, int, int]]:
        op = self.op
        inside, outside = op.in_channels // op.groups, op.out_channels // op.groups
        if op.is_depthwise:
            return [(low, high, low, high, on) for low, high, on in self._runs(inputs=False)]
        runs = self._runs(inputs=self.by_input)
        blocks = []
        for group in range(op.groups):
            i0, i1, o0, o1 = group * inside, (group + 1) * inside, group * outside, (group + 1) * outside
            for low, high, on in _clipped(runs, i0, i1) if self.by_input else _clipped(runs, o0, o1):
                blocks.append((low, high, o0, o1, on) if self.by_input else (i0, i1, low, high, on))
        return blocks

    def _part(self, i0: int, i1: int, o0: int, o1: int, which: int) -> Part:
        def cut(weight: Array) -> Array:
            return self._packed(weight, i0, i1, o0, o1, 0)

        name, taken = f"{self.op.name}.weight", prod(self.op.kernel)
        floats = taken * (o1 - o0) if self.op.is_depthwise else taken * (i1 - i0) * padded(o1 - o0)
        if which < 0:
            return Part(i0, i1, o0, o1, None, self.builder.constant(lambda tensors: cut(tensors[name]), floats))
        lot = self.lots[which]
        weight = self.builder.live(lambda tensors: cut(tensors[name]), floats, {lot.turn: padded(floats)})
        return Part(i0, i1, o0, o1, lot, weight)

    def _places(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where among the live values each weight lies, -1 for the frozen; `ids` numbers the whole weight."""
        places = np.full(ids.size, -1, np.int64)
        for part in self.parts:
            if part.live:
                packed = self._packed(ids, part.i0, part.i1, part.o0, part.o1, -1).reshape(-1)
                mine: NDArray[np.bool_] = np.greater_equal(packed, 0)
                places[packed[mine].astype(np.int64)] = part.weight.offset + np.flatnonzero(mine)
        return places

    def _packed(self, weight: Array, i0: int, i1: int, o0: int, o1: int, fill: int) -> Array:
        """A block of the whole weight in the kernels' layout."""
        op = self.op
        kernel = (1, 1, *op.kernel)[-2:]
        if op.is_depthwise:
            return taps(weight.reshape(op.out_channels, 1, *kernel)[self.rows[o0:o1]])
        first = o0 // (op.out_channels // op.groups) * (op.in_channels // op.groups)
        whole = weight.reshape(op.out_channels, op.in_channels // op.groups, *kernel)
        return panels(whole[np.ix_(self.rows[o0:o1], self.columns[i0:i1] - first)], fill)

    # ------------------------------------------------------------------------------------------------------- biases

    def _bias(self) -> Ref:
        name, rows, count = f"{self.op.name}.bias", self.rows, self.op.out_channels
        return self.builder.constant(lambda tensors: tensors[name][rows], padded(count) + 16)

    def _live_bias(self) -> tuple[Ref, Ref] | None:
        """The live biases and their places among the layer's output channels."""
        if self.update is None or not self.update.bias:
            return None
        name, chosen = f"{self.op.name}.bias", self.bias_channels
        counts = {lot.turn: len(lot.update.bias) for lot in self.lots}
        values = self.builder.live(lambda tensors: tensors[name][chosen], len(chosen), counts)
        return values, self.builder.indices(np.argsort(self.rows)[chosen])

    @property
    def bias_channels(self) -> NDArray[np.int64]:
        """The channels whose bias trains, those of a lot side by side."""
        return np.array([channel for lot in self.lots for channel in lot.update.bias], np.int64)

    def merged_bias(self, into: list[Step]) -> Ref | None:
        """The layer's bias, the live entries put among the frozen ones by a step."""
        if self.bias is None or self.live_bias is None or self.update is None:
            return self.bias
        values, index = self.live_bias
        count = self.op.out_channels
        merged = self.builder.buffer(f"bias {self.op.name}", padded(count) + 16)
        self.builder.emit(
            into, "merge", w=self.bias, b=values, m=index, y=merged[0], ci=1, co=count + 16, ldx=1, ldy=1,
            n=len(self.update.bias), hi=1, wi=1, ho=1, wo=1,
        )  # fmt: skip
        return merged[0]

    def _parameters(self, update: LayerUpdate) -> list[Parameter]:
        name, found = self.op.name, []
        if update.channels:
            whole = np.arange(self.op.weights).reshape(self.op.weight_shape)
            ids = live_window(self.op, update, whole)
            found.append(Parameter(f"{name}.weight", self._places(whole)[ids], ids))
        if self.live_bias is not None:
            order = np.argsort(self.bias_channels)
            found.append(Parameter(f"{name}.bias", self.live_bias[0].offset + order, self.bias_channels[order]))
        return found


def live_window(op: Op, update: LayerUpdate, weight: NDArray[np.int64]) -> NDArray[np.int64]:
    """The live slice of a whole weight: (live, in / groups, *kernel), or (live, out / groups, *kernel) by input."""
    channels = np.array(update.channels, np.int64)
    if update.axis == "output" or op.is_depthwise:
        return weight[channels]
    out, inside, *kernel = op.weight_shape
    by_group = weight.reshape(op.groups, out // op.groups, inside, *kernel)
    return by_group[channels // inside, :, channels % inside]


def _clipped(runs: Sequence[Run], low: int, high: int) -> list[Run]:
    return [(max(a, low), min(b, high), lot) for a, b, lot in runs if a < high and b > low]


# ------------------------------------------------------------------------------------------------------------- forward


def forward(layer: Layer, unit: Unit, x: Buffer, y: Buffer, residual: Buffer | None, into: list[Step]) -> None:
    """The steps of one layer with what is fused behind it, on whole maps."""
    bias = layer.merged_bias(into)
    if layer.tokens:
        _forward_on_rows(layer, unit, x, y, residual, bias, into)
        return
    _parts_forward(layer, unit, x, y, residual, bias, into)


def _forward_on_rows(
    layer: Layer, unit: Unit, x: Buffer, y: Buffer, residual: Buffer | None, bias: Ref | None, into: list[Step]
) -> None:
    """The same on rows; what is added comes in where they are brought back."""
    op, builder = layer.op, layer.builder
    layer.x_rows = to_rows(builder, x, op.in_shape, into, order=layer.order_in, name=f"rows of {x.name}")
    target = target_of(builder, y, op.shape, order=layer.order_out)
    straight = target is y
    _parts_forward(layer, unit, layer.x_rows, target, residual if straight else None, bias, into)
    if straight:
        return
    settle(builder, target, y, residual, op.shape, into, order=layer.order_out)
    if unit.act2:
        size = map_of(op.shape)
        words = over_rows(size.pixels, size.channels)
        builder.emit(into, "unary", **words, act=ACTIVATIONS[unit.act2], x=y[0], y=y[0])


def _parts_forward(
    layer: Layer, unit: Unit, x: Buffer, y: Buffer, residual: Buffer | None, bias: Ref | None, into: list[Step]
) -> None:
    op, builder = layer.op, layer.builder
    words = _sizes(layer)
    if op.is_depthwise:
        for part in layer.parts:
            builder.emit(
                into, "depthwise", **words, x=x[part.i0], y=y[part.o0], w=part.weight, b=moved(bias, part.o0),
                ci=part.i1 - part.i0, co=part.o1 - part.o0, act=ACTIVATIONS[unit.act],
            )  # fmt: skip
        return
    parts = joined(layer)
    for number, part in enumerate(parts):
        begins = number == 0 or parts[number - 1].o0 != part.o0
        ends = number + 1 == len(parts) or parts[number + 1].o0 != part.o0
        last: dict[str, int | Ref] = {"act": ACTIVATIONS[unit.act]} if ends else {}
        if ends and not (layer.tokens and residual is None):
            last["act2"] = ACTIVATIONS[unit.act2]
        if ends and residual is not None:
            last |= {"r": residual[part.o0], "ldr": op.out_channels}
        builder.emit(
            into, "conv", **words, **last, x=x[part.i0], y=y[part.o0], w=part.weight, n=int(is_plain(op)),
            b=moved(bias, part.o0) if begins else None, flags=0 if begins else ACCUMULATE,
            ci=part.i1 - part.i0, co=part.o1 - part.o0,
        )  # fmt: skip


def joined(layer: Layer) -> list[Part]:
    """A dense layer's parts for what makes no difference between lots: those whose panels follow each other as one."""
    found: list[Part] = []
    for part in layer.parts:
        last = found[-1] if found else None
        if last is not None and _follows(layer, part, last):
            found[-1] = replace(last, o1=part.o1)
        else:
            found.append(part)
    return found


def _follows(layer: Layer, part: Part, last: Part) -> bool:
    rows = last.o1 - last.o0
    end = last.weight.offset + prod(layer.op.kernel) * (last.i1 - last.i0) * rows
    beside = (part.i0, part.i1, part.o0) == (last.i0, last.i1, last.o1)
    return beside and rows % PANEL == 0 and (part.weight.space, part.weight.offset) == (last.weight.space, end)


def _sizes(layer: Layer) -> dict[str, int | Ref]:
    return layer.words | {"ldx": layer.op.in_channels, "ldy": layer.op.out_channels}


def moved(ref: Ref | None, by: int) -> Ref | None:
    """The same reference so many floats further."""
    return None if ref is None else replace(ref, offset=ref.offset + by)


# ------------------------------------------------------------------------------------------------------------ backward


def saves(layer: Layer, x: Buffer, into: list[Step]) -> tuple[Buffer, int] | None:
    """What of its input the weight gradient needs: the buffer that holds it and its floats a pixel; a step copies the
    live channels where they are a part."""
    op, update = layer.op, layer.update
    if update is None or not update.channels:
        return None
    x = layer.x_rows or x
    if (update.axis == "output" and not op.is_depthwise) or update.ratio == 1:
        return x, op.in_channels
    pixels, runs = layer.in_pixels, [part for part in _distinct(layer) if part.live]
    count = len(update.channels)
    kept = layer.builder.buffer(f"slice {op.name}", pixels * count)
    at = 0
    for part in runs:
        layer.builder.emit(
            into, "copy", x=x[part.i0], y=kept[at], ci=part.i1 - part.i0, co=part.i1 - part.i0, ldx=op.in_channels,
            ldy=count, hi=1, wi=pixels, ho=1, wo=pixels, flags=1,
        )  # fmt: skip
        at += part.i1 - part.i0
    return kept, count


def _distinct(layer: Layer) -> list[Part]:
    """The parts, one for each range of input channels, in their order."""
    return sorted({(part.i0, part.i1): part for part in layer.parts}.values(), key=lambda part: part.i0)


def live_gradients(layer: Layer, kept: tuple[Buffer, int] | None, g: Buffer, into: list[Step]) -> None:
    """Steps that add to the gradients of the layer's live weights and biases, from that of its output."""
    op, builder = layer.op, layer.builder
    g = layer.rows_of_gradient(g, into)
    if kept is not None:
        buffer, apart = kept
        offsets = _offsets(layer, buffer, apart)
        for part in layer.parts:
            if part.lot is not None:
                builder.emit(
                    into, "depthwise_dw" if op.is_depthwise else "conv_dw", **layer.words, x=buffer[offsets[part.i0]],
                    r=g[part.o0], y=part.gradient, ldx=apart, ldy=op.out_channels, ci=part.i1 - part.i0,
                    co=part.o1 - part.o0, flags=part.lot.flags,
                )  # fmt: skip
    if layer.live_bias is not None:
        values, index = layer.live_bias
        pixels, at = prod(op.shape) // op.out_channels, 0
        for lot in layer.lots:
            if count := len(lot.update.bias):
                builder.emit(
                    into, "bias_dw", x=g[0], y=replace(values, space=GRADIENT, offset=values.offset + at),
                    m=moved(index, at), n=count, ci=1, co=op.out_channels, ldx=1, ldy=op.out_channels, hi=1, wi=pixels,
                    ho=1, wo=pixels, flags=lot.flags,
                )  # fmt: skip
            at += count


def _offsets(layer: Layer, buffer: Buffer, apart: int) -> Mapping[int, int]:
    """Where each part's first input channel lies in what was kept."""
    if apart == layer.op.in_channels:
        return {part.i0: part.i0 for part in layer.parts}
    found, at = {}, 0
    for part in _distinct(layer):
        if part.live:
            found[part.i0] = at
            at += part.i1 - part.i0
    return found


def input_gradient(layer: Layer, g: Buffer, add: Buffer | None, dx: Buffer, into: list[Step]) -> None:
    """Steps for dx = add + the gradient of the layer's input."""
    op, builder, wanted, more_of = layer.op, layer.builder, dx, add
    g = layer.rows_of_gradient(g, into)
    if layer.tokens:
        dx = target_of(builder, wanted, op.in_shape, order=layer.order_in)
        add = add if dx is wanted else None
    _parts_backward(layer, g, add, dx, into)
    if dx is not wanted:
        settle(builder, dx, wanted, more_of, op.in_shape, into, order=layer.order_in)


def _parts_backward(layer: Layer, g: Buffer, add: Buffer | None, dx: Buffer, into: list[Step]) -> None:
    op, builder = layer.op, layer.builder
    words = layer.words | {"ldx": op.in_channels, "ldy": op.out_channels, "ldr": op.in_channels}
    if op.is_depthwise:
        for part in layer.parts:
            builder.emit(
                into, "depthwise_dx", **words, x=g[part.o0], y=dx[part.i0], w=part.weight,
                r=None if add is None else add[part.i0], ci=part.i1 - part.i0, co=part.o1 - part.o0,
            )  # fmt: skip
        return
    scratch = builder.buffer(f"scratch {op.name}", CHUNK * op.out_channels)
    begun: set[int] = set()
    for part in joined(layer):
        more = dx if part.i0 in begun else add
        begun.add(part.i0)
        builder.emit(
            into, "conv_dx", **words, x=g[part.o0], y=dx[part.i0], w=part.weight, b=scratch[0],
            r=None if more is None else more[part.i0], n=int(is_plain(op)), ci=part.i1 - part.i0,
            co=part.o1 - part.o0,
        )  # fmt: skip


def macs_of(op: Op) -> int:
    """Multiplications of one forward pass."""
    return op.weights * prod(op.shape[1:])


__all__ = ["Layer", "Part", "Tensors", "forward", "input_gradient", "live_gradients", "live_window", "saves"]
