"""A backbone of which only a plan trains, executed by the C library: arrays in, arrays out, no torch.

Samples go through one by one, each worker in an arena of its own. Gradients are summed over lots of `LOT` samples and
the lots' sums in their order, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import LayerUpdate
from stages.engines.native.library import Sizes, aligned, aligned_bytes, check, inspect, library
from stages.engines.native.lowering import Turns, lower
from stages.engines.native.paging import Pager
from stages.engines.native.program import Lowering, encode
from stages.engines.paging import PageFile
from stages.engines.parameter import Boundary, Floats, Parameter, Place
from stages.errors import DataError
from stages.graphs.graph import Graph

LOT = 4
"""Samples whose gradients are summed before they join the others', and that a worker takes at a time: few, so that a
support set of 25 occupies two workers alike."""


def lot_of(number: int, samples: int) -> range:
    """The samples of a lot.

    >>> lot_of(1, 11), lot_of(2, 11)
    (range(4, 8), range(8, 11))
    """
    return range(number * LOT, min((number + 1) * LOT, samples))


class Worker:
    """One arena with a context of the library."""

    def __init__(self, image: NDArray[np.uint8], sizes: Sizes, live: Floats, *, width: int, same_bits: bool) -> None:
        self.arena = aligned(sizes.arena_bytes, np.uint8)
        self.gradient = aligned(sizes.live + sizes.sums)
        self._context = aligned(sizes.context_bytes, np.uint8)
        self._keep_alive = image, live
        self._library = library(same_bits)
        handle = ctypes.c_void_p()
        code = self._library.et_open(
            ctypes.byref(handle), image.ctypes.data, image.nbytes, self._context.ctypes.data, self._context.nbytes,
            self.arena.ctypes.data, self.arena.nbytes, live.ctypes.data, self.gradient.ctypes.data, width,
        )  # fmt: skip
        check(code, "native engine", same_bits)
        self.handle = handle
        self.pager: Pager | None = None

    def page_by(self, file: PageFile) -> None:
        """Page values to this file."""
        self.pager = Pager(file)
        self._library.et_set_pager(self.handle, ctypes.cast(self.pager.call, ctypes.c_void_p), None)

    def begin(self, sample: int) -> None:
        """A sample's passes begin, or go on."""
        if self.pager is not None:
            self.pager.sample = sample

    def end(self) -> None:
        """A pass has ended. Raises `TransferError` where a value could not be paged."""
        if self.pager is not None:
            self.pager.check()


class NativeNet:
    """A graph in deploy form with its tensors, of which only what `updates` name trains.

    Args:
        graph: in deploy form.
        tensors: `<layer>.weight` and `<layer>.bias`, float32 in PyTorch's shapes; copied where they train.
        threads: workers, each with an arena; None takes one for each processor that this process may use.
        same_bits: round products and sums one by one, so that every machine gives the same bits; slower.
        width: floats of a vector (1, 4, 8, 16); 0 for the widest that the processor has.
        turns: plans that make up `updates` together and train one at a time (`turn`), the first of them at first.
        keep_bits: in which inputs of live layers are kept: 32, 16 or 8.
        nearest: round to them to the nearest, not by chance.
        how: what of all that the backward pass needs is paged or made again (`lower`).
        page_dir: where a file for what is paged lies; empty for the system's folder of such files.

    Raises:
        NotCovered: an operator has no kernel.
        DataError: the updates do not fit the graph.
        PartMissing: the library was not built on this machine.
        OutputError: there is no room for what is paged.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Floats],
        updates: Sequence[LayerUpdate],
        *,
        threads: int | None = None,
        same_bits: bool = False,
        width: int = 0,
        lowering: Lowering | None = None,
        turns: Turns = (),
        keep_bits: int = 32,
        nearest: bool = False,
        how: Mapping[str, str] | None = None,
        page_dir: str = "",
    ) -> None:
        self.graph = graph
        if lowering is None:
            lowering = lower(graph, updates, turns, keep_bits=keep_bits, nearest=nearest, how=how)
        self.lowering = lowering
        self._draws = any(step.kind == "pack" for step in lowering.suffix) and not nearest
        self._seed = self._calls = 0
        self._tensors = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
        self.image = aligned_bytes(encode(self.lowering, self._tensors))
        self.sizes = inspect(self.image, same_bits)
        self._library = library(same_bits)
        self.live: Floats = aligned(self.sizes.live)
        self.gradient: Floats = aligned(self.sizes.live)
        """Sums of the live values' gradients, in the engine's layout: where `live` has the values."""
        self._turns = _turns(self.live, self.gradient, self.lowering)
        self._moving = self._turns[0]
        count = available_processors() if threads is None else max(1, threads)
        self._workers = [
            Worker(self.image, self.sizes, self.live, width=width, same_bits=same_bits) for _ in range(count)
        ]
        self._pool = ThreadPoolExecutor(len(self._workers)) if len(self._workers) > 1 else None
        self.turn(0)
        self._pages = PageFile(page_dir, lowering.page_floats) if lowering.page_floats else None
        if self._pages is not None:
            for worker in self._workers:
                worker.page_by(self._pages)
        self._library.et_reset(self._workers[0].handle)
        self._kept = np.empty((0, self.sizes.kept_bytes), np.uint8)
        self._in_arena: NDArray[np.uint8] | None = None
        """What stands for what the last forward pass left in the arena, until something else runs there."""
        self._scale: Floats | None = None
        self._offset: Floats | None = None

    # -------------------------------------------------------------------------------------------------- execution

    @property
    def boundary(self) -> tuple[str, ...]:
        """The operators whose outputs `prefix` gives, in its order."""
        return tuple(buffer.name for buffer in self.lowering.boundary)

    @property
    def layout(self) -> str:
        """How they lie there: the order of channels is the plan's."""
        return f"native {self.lowering.plan_mark:08x}"

    def prepare_bytes(self, scale: Sequence[float], offset: Sequence[float]) -> None:
        """Let `prefix` take images as bytes (N, H, W, C): value * scale[c] + offset[c] is computed on the way in."""
        channels = self.graph.input_shape[0]
        self._scale = np.resize(np.asarray(scale, np.float32), channels)
        self._offset = np.resize(np.asarray(offset, np.float32), channels)

    def prefix(self, x: NDArray[Any]) -> Boundary:
        """Model input (N, *input) float32, or bytes (N, H, W, C) after `prepare_bytes` -> what enters the trained part.

        It never changes while training. Raises `DataError` for an input of another shape.
        """
        x, kind = self._input(x)
        flat = np.empty((len(x), self.sizes.boundary), np.float32)
        self._read_as(kind)
        call, source, target = self._library.et_prefix, _rows(x), _rows(flat)
        self._each(lambda worker, i: call(worker.handle, source[i], target[i]), len(x))
        return self._split(flat)

    def suffix(self, boundary: Boundary) -> Floats:
        """What `prefix` gave -> features (N, D), nothing kept."""
        flat = self._joined(boundary)
        features = np.empty((len(flat), self.sizes.features), np.float32)
        call, source, target = self._library.et_suffix, _rows(flat), _rows(features)
        self._each(lambda worker, i: call(worker.handle, source[i], target[i]), len(flat))
        return features

    def features(self, x: NDArray[Any]) -> Floats:
        """Model input (N, *input) -> features (N, D)."""
        x, kind = self._input(x)
        self._read_as(kind)
        features = np.empty((len(x), self.sizes.features), np.float32)
        prefix, suffix, source, target = self._library.et_prefix, self._library.et_suffix, _rows(x), _rows(features)

        def one(worker: Worker, sample: int) -> None:  # what lies between stays in the arena
            prefix(worker.handle, source[sample], None)
            suffix(worker.handle, None, target[sample])

        self._each(one, len(x))
        return features

    def forward(self, boundary: Boundary) -> tuple[Floats, NDArray[np.uint8]]:
        """What `prefix` gave -> features (N, D) and what the backward pass needs, (N, bytes).

        The latter is the net's own, and good until the next call: fresh memory for every step costs more time than
        filling it. Of a single sample it stays in the arena, (1, 0), and is lost with whatever runs next.
        """
        if not self.lowering.parameters:
            return self.suffix(boundary), self._kept[:0]
        flat = self._joined(boundary)
        features = np.empty((len(flat), self.sizes.features), np.float32)
        seed = self._seeds()
        self._make_room(len(flat))
        if len(flat) == 1:
            run = self._library.et_forward

            def alone(worker: Worker, sample: int) -> None:
                seed(worker, sample)
                worker.begin(sample)
                run(worker.handle, flat.ctypes.data, features.ctypes.data)
                worker.end()

            self._each(alone, 1)
            self._in_arena = np.empty((1, 0), np.uint8)
            return features, self._in_arena
        if len(self._kept) < len(flat):
            self._kept = np.empty((len(flat), self.sizes.kept_bytes), np.uint8)
        kept = self._kept[: len(flat)]
        call, keep, source, target, keeps = (
            self._library.et_forward, self._library.et_keep, _rows(flat), _rows(features), _rows(kept)
        )  # fmt: skip

        def one(worker: Worker, sample: int) -> None:
            seed(worker, sample)
            worker.begin(sample)
            call(worker.handle, source[sample], target[sample])
            worker.end()
            keep(worker.handle, keeps[sample])

        self._each(one, len(flat))
        return features, kept

    def backward(self, kept: NDArray[np.uint8], gradient: Floats) -> None:
        """Add to `gradient` of the net, from what `forward` kept and the gradient at the features (N, D).

        Raises `RuntimeError` where a single sample's was lost.
        """
        if not self.lowering.parameters:
            return
        gradient = np.ascontiguousarray(gradient, np.float32)
        if kept.shape[1] < self.sizes.kept_bytes:
            if kept is not self._in_arena:
                raise RuntimeError("a single sample's backward pass must come right behind its forward pass")
            back = self._library.et_backward

            def alone(worker: Worker, sample: int) -> None:
                worker.begin(sample)
                back(worker.handle, gradient.ctypes.data)
                worker.end()

            self._summed(alone, 1)
            return
        call, restore, source, keeps = (
            self._library.et_backward, self._library.et_restore, _rows(gradient), _rows(kept)
        )  # fmt: skip

        def one(worker: Worker, sample: int) -> None:
            restore(worker.handle, keeps[sample])
            worker.begin(sample)
            call(worker.handle, source[sample])
            worker.end()

        self._summed(one, len(gradient))

    def again(self, boundary: Boundary, gradient: Floats) -> None:
        """`forward` and `backward` in one, sample by sample: nothing is kept for more than one of them."""
        flat = self._joined(boundary)
        gradient = np.ascontiguousarray(gradient, np.float32)
        waste = np.empty((len(self._workers), self.sizes.features), np.float32)
        wastes = dict(zip(self._workers, _rows(waste), strict=True))
        forward, backward, source, pulls = (
            self._library.et_forward, self._library.et_backward, _rows(flat), _rows(gradient)
        )  # fmt: skip

        seed = self._seeds()
        self._make_room(len(flat))

        def one(worker: Worker, sample: int) -> None:
            seed(worker, sample)
            worker.begin(sample)
            forward(worker.handle, source[sample], wastes[worker])
            backward(worker.handle, pulls[sample])
            worker.end()

        self._summed(one, len(gradient))

    def _make_room(self, samples: int) -> None:
        """For what so many samples page."""
        if self._pages is not None:
            self._pages.grow(samples)

    def draw(self, seed: int) -> None:
        """What the following forward passes round by, where they round stochastically."""
        self._seed, self._calls = seed, 0

    def _seeds(self) -> Callable[[Worker, int], None]:
        """What tells a worker before each sample of a forward pass what to round by."""
        if not self._draws:
            return lambda worker, sample: None
        base = self._seed * 0x9E3779B1 + self._calls * 0xC2B2AE3D
        self._calls += 1
        call = self._library.et_set_seed

        def tell(worker: Worker, sample: int) -> None:
            call(worker.handle, (base + sample * 0x85EBCA77) & 0xFFFFFFFF)

        return tell

    def _read_as(self, kind: int) -> None:
        """Tell the workers how samples lie in memory."""
        scale = None if self._scale is None else self._scale.ctypes.data
        offset = None if self._offset is None else self._offset.ctypes.data
        for worker in self._workers:
            check(self._library.et_set_input(worker.handle, kind, scale, offset), "native engine")

    def _input(self, x: NDArray[Any]) -> tuple[NDArray[Any], int]:
        if x.dtype == np.uint8 and self._scale is not None:
            channels, *sizes = self.graph.input_shape
            if x.shape[1:] != (*sizes, channels):
                raise DataError("model input", f"bytes {x.shape}", f"(N, {', '.join(map(str, (*sizes, channels)))})")
            return np.ascontiguousarray(x), 2
        self.graph.check_input(x.shape)
        return np.ascontiguousarray(x, np.float32), 0

    def _split(self, flat: Floats) -> Boundary:
        values, at = [], 0
        for shape in self.lowering.boundary_shapes:
            count = int(np.prod(shape))
            values.append(flat[:, at : at + count].reshape(len(flat), *shape))
            at += count
        return tuple(values)

    def _joined(self, boundary: Boundary) -> Floats:
        shapes = tuple(value.shape[1:] for value in boundary)
        if shapes != tuple(self.lowering.boundary_shapes):
            raise DataError("boundary", f"{shapes}", f"{tuple(self.lowering.boundary_shapes)}", "run `prefix` again")
        if len(boundary) == 1:
            return np.ascontiguousarray(boundary[0], np.float32).reshape(len(boundary[0]), self.sizes.boundary)
        if (flat := self._split_from(boundary)) is not None:
            return flat
        parts = [value.reshape(len(value), int(np.prod(value.shape[1:]))) for value in boundary]  # of no samples too
        return np.concatenate(parts, 1, dtype=np.float32)

    def _split_from(self, boundary: Boundary) -> Floats | None:
        """The array that `_split` took these values from, where they are such: it need not be made again."""
        flat = boundary[0].base
        if not isinstance(flat, np.ndarray) or flat.shape != (len(boundary[0]), self.sizes.boundary):
            return None
        places = [(value.ctypes.data, value.strides) for value in self._split(flat)]
        same = [(value.ctypes.data, value.strides) for value in boundary] == places and flat.dtype == np.float32
        return flat if same else None

    # ---------------------------------------------------------------------------------------------------- workers

    def _each(self, one: Callable[[Worker, int], None], samples: int) -> None:
        """Every sample on any worker."""

        def work(worker: Worker, lot: int) -> None:
            for sample in lot_of(lot, samples):
                one(worker, sample)

        self._share(work, samples)

    def _summed(self, one: Callable[[Worker, int], None], samples: int) -> None:
        """Every sample on any worker; the lots' gradients added in their order, each as soon as its turn comes."""
        added = [Event() for _ in range(-(-samples // LOT))]

        def work(worker: Worker, lot: int) -> None:
            try:
                worker.gradient[:] = 0
                for sample in lot_of(lot, samples):
                    one(worker, sample)
                if lot:
                    added[lot - 1].wait()
                with np.errstate(over="ignore", invalid="ignore"):  # a step that diverges is found by its numbers
                    self.gradient += worker.gradient
            finally:
                added[lot].set()

        self._share(work, samples)

    def _share(self, work: Callable[[Worker, int], None], samples: int) -> None:
        """Give each worker that is free the next lot: one whose processor is busy elsewhere gets fewer."""
        self._in_arena = None
        lots = iter(range(-(-samples // LOT)))

        def some_of(worker: Worker) -> None:
            for lot in lots:  # one iterator for all: the interpreter's lock gives each number once
                work(worker, lot)

        if self._pool is None or samples <= LOT:
            some_of(self._workers[0])
        else:
            list(self._pool.map(some_of, self._workers))

    # ----------------------------------------------------------------------------------------------------- values

    def parameters(self) -> list[Parameter]:
        """All live values as one, in the engine's order, or in runs that take turns; empty where nothing trains."""
        return list({id(parameter): parameter for turn in self._turns for parameter in turn}.values())

    def turn(self, number: int) -> list[Parameter]:
        """Train what of the plan has this turn, from 0 on, and nothing else; these parameters."""
        code = len(self._turns) > 1 and number + 1
        for worker in self._workers:
            check(self._library.et_set_turn(worker.handle, code), "native engine")
        self._moving = self._turns[number]
        return list(self._moving)

    def places(self) -> list[Place]:
        """Where every live tensor's values lie in the parameters."""
        found = []
        for parameter in self.parameters():
            first = (parameter.value.ctypes.data - self.live.ctypes.data) // self.live.itemsize
            for each in self.lowering.parameters:
                at = each.place.reshape(-1) - first
                inside = np.flatnonzero((at >= 0) & (at < parameter.value.size))
                if inside.size:
                    found.append(Place(parameter, each.name, at[inside], each.ids.reshape(-1)[inside]))
        return found

    def gradients(self) -> dict[str, Floats]:
        """The gradients of the live slices by name, in the shapes of `live_tensors`."""
        return {each.name: self.gradient[each.place] for each in self.lowering.parameters}

    def clear_gradients(self) -> None:
        """Set all gradients to 0."""
        self.gradient[:] = 0

    def live_tensors(self) -> dict[str, Floats]:
        """Copies of the live slices by name: `<layer>.weight` (live, ...), `<layer>.bias` (live,)."""
        return {each.name: self.live[each.place] for each in self.lowering.parameters}

    def load_live(self, tensors: Mapping[str, Floats]) -> None:
        """Set the live slices to what `live_tensors` of a net with the same plan gave.

        Raises `DataError` when names or shapes differ.
        """
        mine = {each.name: each for each in self.lowering.parameters}
        if tensors.keys() != mine.keys():
            raise DataError("live slices", f"of {sorted(tensors)}", f"{sorted(mine)}", "use those of the same plan")
        for name, each in mine.items():
            if tensors[name].shape != each.place.shape:
                raise DataError(f"live slice {name}", f"{tensors[name].shape}", f"{each.place.shape}")
        for name, each in mine.items():
            self.live[each.place] = tensors[name]

    def load_whole(self, tensors: Mapping[str, Floats]) -> None:
        """Set the live slices to those of whole tensors by name, as `changed_tensors` gives them."""
        for each in self.lowering.parameters:
            self.live[each.place] = np.asarray(tensors[each.name]).reshape(-1)[each.ids]

    def changed_tensors(self) -> dict[str, Floats]:
        """The whole tensors that hold live values, by name; frozen values bit-equal to the backbone's."""
        found = {}
        for each in self.lowering.parameters:
            whole = self._tensors[each.name].copy()
            whole.reshape(-1)[each.ids] = self.live[each.place]
            found[each.name] = whole
        return found

    def tensors(self) -> dict[str, Floats]:
        """The whole backbone's tensors with the live values merged in."""
        return {**self._tensors, **self.changed_tensors()}


def _turns(live: Floats, gradient: Floats, lowering: Lowering) -> list[list[Parameter]]:
    """For each turn what moves in it: views of the live values; one of all where nothing takes turns."""
    if not lowering.parameters:
        return [[]]
    numbers = sorted({turn for turn, _, count in lowering.spans if count} - {0})
    if not numbers:
        return [[Parameter(live, gradient)]]
    views: dict[int, list[Parameter]] = {}
    for turn, at, count in _joined_spans(lowering.spans):
        views.setdefault(turn, []).append(Parameter(live[at : at + count], gradient[at : at + count]))
    return [views.get(0, []) + views.get(number, []) for number in range(1, numbers[-1] + 1)]


def _joined_spans(spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(turn, first, floats), those of one turn that follow each other as one."""
    found: list[tuple[int, int, int]] = []
    for turn, at, count in spans:
        if found and found[-1][0] == turn and sum(found[-1][1:]) == at:
            turn, at, count = turn, found[-1][1], found[-1][2] + count
            found.pop()
        if count:
            found.append((turn, at, count))
    return found


def _rows(array: NDArray[Any]) -> range:
    """The address of each sample's row."""
    start, step = array.ctypes.data, array.strides[0]
    return range(start, start + step * len(array), step) if step else range(start, start + len(array))


def available_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))
