"""How long each layer takes on this machine, forward and backward, for one sample.

Every operator of the graph is run by itself (`reference.apply`) and its two gradients are taken by themselves. The
time of an activation, a pooling or an addition counts with the layer before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.engines.torch.reference import apply
from stages.graphs.graph import Graph
from stages.operators import Op

WARM_UP = 2
"""Runs before the measured ones: the first allocates memory and chooses kernels."""

Seconds = NDArray[np.float64]
Clock = Callable[[], float]


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer and the operators behind it, one entry per repeat (R,)."""

    forward: Seconds
    input_gradient: Seconds
    weight_gradient: Seconds

    @property
    def backward(self) -> Seconds:
        """Both gradients."""
        return self.input_gradient + self.weight_gradient


def time_layers(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    x: Tensor,
    repeats: int,
    *,
    clock: Clock = time.perf_counter,
    on_step: Callable[[int], None] = lambda done: None,
) -> dict[str, LayerTimes]:
    """Times of every layer for the input x (N, *graph.input_shape), `repeats` runs each.

    `on_step` gets the number of operators done.
    """
    total = {op.name: LayerTimes(*(np.zeros(repeats) for _ in range(3))) for op in graph.layers}
    layer = graph.layers[0].name
    values = {graph.ops[0].name: x}
    last_reader = {source: op.name for op in graph.ops for source in op.inputs}
    for done, op in enumerate(graph.ops[1:], start=1):
        layer = op.name if op.is_layer else layer
        inputs = [values[source] for source in op.inputs]
        times = _time_operator(op, inputs, tensors, repeats, clock)
        before = total[layer]
        total[layer] = LayerTimes(
            before.forward + times.forward,
            before.input_gradient + times.input_gradient,
            before.weight_gradient + times.weight_gradient,
        )
        with torch.no_grad():
            values[op.name] = apply(op, inputs, tensors)
        values = {name: value for name, value in values.items() if last_reader.get(name) != op.name}
        on_step(done)
    return total


def repeat(run: Callable[[], object], repeats: int, clock: Clock = time.perf_counter) -> Seconds:
    """Seconds of each of `repeats` runs (R,), after a warm-up."""
    seconds = np.empty(repeats)
    for i in range(-WARM_UP, repeats):
        start = clock()
        run()
        if i >= 0:
            seconds[i] = clock() - start
    return seconds


def median_and_spread(seconds: Seconds) -> tuple[float, float]:
    """Median and interquartile range: neither is moved by a few interruptions."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return float(middle), float(high - low)


def _time_operator(
    op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor], repeats: int, clock: Clock
) -> LayerTimes:
    with torch.no_grad():
        forward = repeat(lambda: apply(op, inputs, tensors), repeats, clock)
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    input_gradient = _time_gradient(op, leaves, tensors, leaves, repeats, clock)
    weight_gradient = np.zeros(repeats)
    if op.is_layer:
        weight = tensors[f"{op.name}.weight"].detach().clone().requires_grad_()
        with_weight = {**tensors, f"{op.name}.weight": weight}
        weight_gradient = _time_gradient(op, inputs, with_weight, [weight], repeats, clock)
    return LayerTimes(forward, input_gradient, weight_gradient)


def _time_gradient(
    op: Op,
    inputs: Sequence[Tensor],
    tensors: Mapping[str, Tensor],
    wanted: Sequence[Tensor],
    repeats: int,
    clock: Clock,
) -> Seconds:
    with torch.enable_grad():
        output = apply(op, inputs, tensors)
    upstream = torch.ones_like(output)
    return repeat(lambda: torch.autograd.grad(output, wanted, upstream, retain_graph=True), repeats, clock)
