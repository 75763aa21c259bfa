"""How long each layer takes in torch, forward and backward.

Every operator of the graph is run by itself (`reference.apply`) and its two gradients are taken by themselves. The
time of an activation, a pooling or an addition counts with the layer before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from stages.artifacts.records import Array
from stages.engines.parameter import Floats
from stages.engines.timing import Clock, LayerTimes, Seconds, repeat
from stages.engines.torch.reference import apply
from stages.graphs.graph import Graph
from stages.operators import Op


def time_layers(
    graph: Graph,
    tensors: Mapping[str, Array],
    x: Floats,
    repeats: int,
    *,
    clock: Clock = time.perf_counter,
    on_step: Callable[[int], None] = lambda done: None,
) -> dict[str, LayerTimes]:
    """Times of every layer for the input x (N, *graph.input_shape), `repeats` runs each.

    `on_step` gets the number of operators done.
    """
    held = {name: torch.from_numpy(value) for name, value in tensors.items()}
    total = {op.name: LayerTimes(*(np.zeros(repeats) for _ in range(3))) for op in graph.layers}
    layer = graph.layers[0].name
    values = {graph.ops[0].name: torch.from_numpy(x)}
    last_reader = {source: op.name for op in graph.ops for source in op.inputs}
    for done, op in enumerate(graph.ops[1:], start=1):
        layer = op.name if op.is_layer else layer
        inputs = [values[source] for source in op.inputs]
        times = _time_operator(op, inputs, held, repeats, clock)
        before = total[layer]
        total[layer] = LayerTimes(
            before.forward + times.forward,
            before.input_gradient + times.input_gradient,
            before.weight_gradient + times.weight_gradient,
        )
        with torch.no_grad():
            values[op.name] = apply(op, inputs, held)
        values = {name: value for name, value in values.items() if last_reader.get(name) != op.name}
        on_step(done)
    return total


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
    if not output.requires_grad:  # a constant, or whole numbers
        return np.zeros(repeats)
    upstream = torch.ones_like(output)
    return repeat(
        lambda: torch.autograd.grad(output, wanted, upstream, retain_graph=True, allow_unused=True), repeats, clock
    )
