"""The native engine's Fisher pass: per sample and channel, value times gradient at the layers' outputs and inputs.

    sum_d a_d g_d                              (what `stages.importance.fisher` squares; its page has the definitions)

A sum over a channel's positions of value times gradient is the gradient of a gain on that channel, so the sums lie
behind the gradients of live values, and no other step than those of training is needed. ReLU and ReLU6 stay fused
behind a layer: where they pass a gradient they pass the value too, and elsewhere the gradient is 0, so their output
stands for the layer's; which positions they pass is seen from it as well, and no bits are kept.

Nothing is kept of a sample but what enters the inspected part: the rest is computed again before its way back. For the
last sample of each worker not even that, because its arena still holds everything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.engines.native import layers
from stages.engines.native.library import aligned, aligned_bytes, inspect, library
from stages.engines.native.lowering import Lowerer, check_covered
from stages.engines.native.matrices import over_rows, to_rows
from stages.engines.native.net import Worker, available_processors
from stages.engines.native.program import ACTIVATIONS, Buffer, Floats, Lowering, Ref, encode
from stages.engines.native.rules import Node, flat, plus
from stages.errors import DataError
from stages.graphs.graph import Graph
from stages.graphs.units import Unit


@dataclass(frozen=True)
class Inspection:
    """A program that runs a graph and inspects some of its layers."""

    lowering: Lowering
    places: Mapping[str, tuple[slice, slice]]
    """Layer -> where among a sample's sums those at its output (C_out) and at its input (C_in) lie."""


def lower_inspection(graph: Graph, window: Collection[str], *, separate: bool = False) -> Inspection:
    """The program that inspects the layers `window` and every layer computed from their output.

    Layers that the output does not hear of are left out. `separate` gives every buffer a place of its own (for tests).
    Raises `NotCovered` where an operator has no kernel.
    """
    check_covered(graph)
    lowerer = _Inspecting(graph, (), start=frozenset(window))
    return Inspection(lowerer.run(separate=separate), lowerer.places)


def fisher_bytes(graph: Graph, window: Collection[str], batch: int, *, workers: int = 1) -> int:
    """Bytes that an `Inspector` holds for so many samples at once, beside the image and the samples themselves."""
    program = lower_inspection(graph, window).lowering
    boundary = sum(buffer.floats for buffer in program.boundary)
    return 4 * (
        workers * (program.arena_floats + program.sum_floats + program.features)
        + max(0, batch - workers) * boundary
        + batch * (program.features + program.sum_floats)
    )


class _Inspecting(Lowerer):
    """Forward as for training, with the layers' outputs made as they are; on the way back two sums per layer."""

    residuals = False

    def __init__(self, graph: Graph, updates: tuple[()], *, start: frozenset[str]) -> None:
        super().__init__(graph, updates, start=start)
        self.places: dict[str, tuple[slice, slice]] = {}

    def bits_of(self, unit: Unit) -> str:
        """A layer's own output tells where its activation passes gradients."""
        return "" if unit.op.is_layer else super().bits_of(unit)

    def pull(
        self,
        node: Node,
        g: Buffer,
        pending: dict[str, Buffer],
        bits: dict[str, Buffer],
        slices: dict[str, tuple[Buffer, int]],
    ) -> None:
        """Backward through one unit; a layer's input gradient is made apart from what other readers gave."""
        if node.layer is None:
            return super().pull(node, g, pending, bits, slices)
        op, builder, into = node.op, self.builder, self.builder.program.backward
        if node.unit.act:
            passed = builder.buffer(f"gradient before {node.unit.out}", g.floats, over=g)
            act = ACTIVATIONS[node.unit.act]
            builder.emit(into, "unary_dx", **flat(op.shape), act=act, x=node.y[0], w=g[0], y=passed[0])
            g = passed
        at_output = self._sums(node, op.shape, node.y, g)
        own = builder.buffer(f"gradient {op.inputs[0]} by {op.name}", prod(op.in_shape))
        node.layer.input_gradient(g, None, own, into)
        self.places[op.name] = at_output, self._sums(node, op.in_shape, node.inputs[0], own)
        name = op.inputs[0]
        if name in self.flow:
            pending[name] = plus(builder, name, op.in_shape, own, pending.get(name), into)
        return None

    def _sums(self, node: Node, shape: tuple[int, ...], values: Buffer, gradient: Buffer) -> slice:
        """Sum value times gradient over all positions; where among the sums the channels lie."""
        builder, into, sizes = self.builder, self.builder.program.backward, flat(shape)
        if layers.on_tokens(node.op):
            values, gradient = (to_rows(builder, each, shape, into) for each in (values, gradient))
            sizes = over_rows(prod(shape[:-1]), shape[-1])
        channels = shape[node.op.channel_axis]
        place: Ref = builder.sums(channels)
        builder.emit(into, "dot", **(sizes | {"ldr": sizes["ldx"]}), x=values[0], r=gradient[0], y=place)
        return slice(place.offset, place.offset + channels)


class Inspector:
    """A graph in deploy form whose layers are inspected, executed by the C library: arrays in, arrays out.

    Args:
        graph: in deploy form.
        tensors: `<layer>.weight` and `<layer>.bias`, float32 in PyTorch's shapes.
        window: the layers to inspect, and with them every layer computed from their output.
        threads: workers, each with an arena (None: one for each processor that this process may use); so many samples
            at once need nothing else.
        same_bits, width: as of `net.NativeNet`.

    Raises:
        NotCovered: an operator has no kernel.
        PartMissing: the library was not built on this machine.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Floats],
        window: Collection[str],
        *,
        threads: int | None = None,
        same_bits: bool = False,
        width: int = 0,
        inspection: Inspection | None = None,
    ) -> None:
        self.graph, self.window = graph, frozenset(window)
        self._inspection = lower_inspection(graph, self.window) if inspection is None else inspection
        self.image = aligned_bytes(encode(self._inspection.lowering, tensors))
        self.sizes = inspect(self.image, same_bits)
        self._library = library(same_bits)
        nothing = aligned(0)
        count = available_processors() if threads is None else max(1, threads)
        self._workers = [
            Worker(self.image, self.sizes, nothing, width=width, same_bits=same_bits) for _ in range(count)
        ]
        self._pool = ThreadPoolExecutor(len(self._workers)) if len(self._workers) > 1 else None
        self._samples = 0
        self._boundary = np.empty((0, self.sizes.boundary), np.float32)
        self._again = np.empty((len(self._workers), self.sizes.features), np.float32)

    def features(self, x: NDArray[Any]) -> Floats:
        """Model input (n, *input) float32 -> features (n, D); what `sums` needs of these samples is held until then.

        Raises `DataError` for an input of another shape.
        """
        self.graph.check_input(x.shape)
        x, workers = np.ascontiguousarray(x, np.float32), len(self._workers)
        self._samples = len(x)
        self._boundary = np.empty((max(0, len(x) - workers), self.sizes.boundary), np.float32)
        features = np.empty((len(x), self.sizes.features), np.float32)

        def share(number: int) -> None:
            worker = self._workers[number].handle
            for i in range(number, len(x), workers):
                if i < len(self._boundary):
                    self._library.et_prefix(worker, _at(x, i), _at(self._boundary, i))
                    self._library.et_suffix(worker, None, _at(features, i))
                else:  # the last of this worker's: its arena keeps it
                    self._library.et_prefix(worker, _at(x, i), None)
                    self._library.et_forward(worker, None, _at(features, i))

        self._run(share)
        return features

    def sums(self, gradient: Floats) -> dict[str, tuple[Floats, Floats]]:
        """Gradients of the samples' own losses at the features (n, D) -> for each layer, per sample and channel, the
        sum over positions of value times gradient: at its output (n, C_out) and at its input (n, C_in).

        Once for the samples that `features` took last. Raises `DataError` for gradients of another shape.
        """
        if gradient.shape != (self._samples, self.sizes.features):
            raise DataError(
                "gradient at the features", f"shape {gradient.shape}", f"({self._samples}, {self.sizes.features})",
                "call `features` first",
            )  # fmt: skip
        gradient, workers, self._samples = np.ascontiguousarray(gradient, np.float32), len(self._workers), 0
        rows = np.empty((len(gradient), self.sizes.sums), np.float32)

        def share(number: int) -> None:
            worker = self._workers[number]
            for i in reversed(range(number, len(gradient), workers)):
                if i < len(self._boundary):
                    self._library.et_forward(worker.handle, _at(self._boundary, i), _at(self._again, number))
                self._library.et_backward(worker.handle, _at(gradient, i))
                rows[i] = worker.gradient

        self._run(share)
        return {
            layer: (rows[:, at_output], rows[:, at_input])
            for layer, (at_output, at_input) in self._inspection.places.items()
        }

    def _run(self, share: Callable[[int], None]) -> None:
        """Every worker's share of the samples."""
        if self._pool is None:
            share(0)
        else:
            list(self._pool.map(share, range(len(self._workers))))


def _at(rows: NDArray[Any], number: int) -> int:
    """The address of a row."""
    return int(rows.ctypes.data) + number * rows.strides[0]
