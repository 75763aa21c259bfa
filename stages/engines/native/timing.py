"""How long each layer takes in the native engine, forward and backward, for one sample on one thread.

The steps of a program that trains every layer are run one by one, many times each, on what a whole pass left in the
arena. The time of an activation, a pooling or an addition counts with the layer before it, what is kept for the
backward pass with the input gradient. In a frozen prefix steps run in chains instead, which is faster than their sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from stages.engines.native.library import aligned, aligned_bytes, inspect, library
from stages.engines.native.lowering import lower
from stages.engines.native.net import Worker
from stages.engines.native.program import GRADIENT, Ref, Step, encode
from stages.engines.parameter import Floats
from stages.engines.timing import Clock, LayerTimes, repeat
from stages.graphs.graph import Graph
from stages.graphs.updates import every_layer


def time_layers(
    graph: Graph,
    tensors: Mapping[str, Floats],
    x: Floats,
    repeats: int,
    *,
    clock: Clock = time.perf_counter,
    on_step: Callable[[int], None] = lambda done: None,
) -> dict[str, LayerTimes]:
    """Times of every layer for one sample x (1, *graph.input_shape), `repeats` runs of each step.

    `on_step` gets the share of the steps that is done, in operators.
    """
    lowering = lower(graph, every_layer(graph), chains=False)
    image = aligned_bytes(encode(lowering, tensors))
    sizes = inspect(image)
    live = aligned(sizes.live)
    worker, native = Worker(image, sizes, live, width=0, same_bits=False), library()
    x, features = np.ascontiguousarray(x, np.float32), np.empty(sizes.features, np.float32)
    gradient = np.ones(sizes.features, np.float32)
    native.et_reset(worker.handle)
    native.et_prefix(worker.handle, x.ctypes.data, None)
    native.et_forward(worker.handle, None, features.ctypes.data)
    native.et_backward(worker.handle, gradient.ctypes.data)
    total = {op.name: LayerTimes(*(np.zeros(repeats) for _ in range(3))) for op in graph.layers}
    layer_of, layer = {}, graph.layers[0].name
    for op in graph.ops:
        layer = layer_of[op.name] = op.name if op.is_layer else layer
    turn = len(lowering.prefix) + len(lowering.suffix)
    steps = (*lowering.prefix, *lowering.suffix, *lowering.backward)
    for number, step in enumerate(steps):
        seconds = repeat(partial(native.et_run, worker.handle, number, 1), repeats, clock)
        total_of_part = getattr(total[layer_of[step.op]], _part(step, back=number >= turn))
        total_of_part += seconds
        on_step((number + 1) * (len(graph.ops) - 1) // len(steps))
    return total


def _part(step: Step, *, back: bool) -> str:
    target = step.words.get("y")
    if isinstance(target, Ref) and target.space == GRADIENT:
        return "weight_gradient"
    return "input_gradient" if back or step.saves else "forward"
