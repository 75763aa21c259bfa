"""Fisher potential of channels: how much the loss would change if a channel were taken away.

    Delta_o = 1/(2N) sum_n ( sum_d a_nd g_nd )^2          (TinyTrain Eq. 2, arXiv:2307.09988; P_i = sum_o Delta_o)

after Fisher pruning (arXiv:1801.05787) and BlockSwap. `a` is the layer's output (BatchNorm folded, before the
activation function) at channel o and position d, `g` the gradient of sample n's own loss there: the square stands
outside the sum over positions, and the gradient is per sample, so neither the batch nor the micro-batch size changes
the result. Where the paper leaves the tensor and the reduction open, these are EdgeTrain's choices.

The same formula at a layer's input ranks input channels. There `g` is the gradient through this layer alone, so that
a channel of a residual sum is judged by this layer's use of it. Hence, for weights W and bias b,
sum_d a g = <W[:, c], dL/dW[:, c]> at input channel c, and <W[o], dL/dW[o]> + b[o] dL/db[o] at output channel o.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.errors import DataError
from stages.graphs.graph import Graph
from stages.importance.tape import LayerGradient, backward, forward, kept_names
from stages.models.deploy import Backbone
from stages.operators import Op
from stages.operators.op import ELEMENT_BYTES

SampleLoss = Callable[[Tensor, Tensor], Tensor]
"""Features (n, D) and targets (n,) -> each sample's own loss (n,)."""


@dataclass(frozen=True)
class Fisher:
    """Fisher potential per channel of the inspected layers, in execution order."""

    output: Mapping[str, NDArray[np.float64]]
    """Layer -> (C_out,)."""
    input: Mapping[str, NDArray[np.float64]]
    """Layer -> (C_in,)."""
    samples: int
    loss: float
    """Mean loss over the samples: what the plan is meant to bring down."""

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.output)


def fisher_bytes(graph: Graph, window: Iterable[str], micro_batch: int) -> int:
    """Bytes kept between the forward and the backward pass of one micro-batch, float32.

    The outputs of the inspected layers, and each value that enters the inspected part.
    """
    names = kept_names(graph, frozenset(window))
    return ELEMENT_BYTES * micro_batch * sum(graph[name].elements for name in names)


def fisher_pass(
    backbone: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: SampleLoss,
    window: Iterable[str],
    *,
    on_step: Callable[[int], None] = lambda done: None,
) -> Fisher:
    """One pass over the samples: micro-batches of inputs (n, ...) and targets (n,) -> Fisher per channel.

    `window` names the layers to inspect (and with them every layer computed from their output). `on_step` gets the
    number of samples done. Raises `DataError` where there is no sample or a loss is not finite.
    """
    inspected = frozenset(window)
    graph, tensors = backbone.graph, backbone.tensors
    keep = frozenset(kept_names(graph, inspected))
    behind = graph.downstream(graph.computed_by(inspected))
    layers = [op for op in graph.layers if not behind.isdisjoint(use.name for use in graph.uses(op.name))]
    output = {op.name: np.zeros(op.out_channels) for op in layers}
    input = {op.name: np.zeros(op.in_channels) for op in layers}
    samples, total = 0, 0.0
    for x, y in batches:
        features, kept = forward(graph, tensors, x, keep)
        value, gradient = _features_gradient(loss, features, y)
        for name, (at_output, at_input) in _sums(backward(graph, tensors, kept, inspected, gradient)).items():
            output[name] += at_output.square().sum(0).numpy()
            input[name] += at_input.square().sum(0).numpy()
        samples, total = samples + len(x), total + value
        on_step(samples)
    if samples == 0:
        raise DataError("support", "no samples", "at least one")
    half = 1 / (2 * samples)
    return Fisher(
        {name: sums * half for name, sums in output.items()},
        {name: sums * half for name, sums in input.items()},
        samples,
        total / samples,
    )


def _features_gradient(loss: SampleLoss, features: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Summed loss, and each sample's own loss gradient at its features (n, D)."""
    leaf = features.detach().requires_grad_()
    with torch.enable_grad():
        losses = loss(leaf, targets)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    value = float(losses.detach().double().sum())
    if not (np.isfinite(value) and bool(torch.isfinite(gradient).all())):
        raise DataError("support", f"a loss of {value}", "finite losses", "check the samples and the model's weights")
    return value, gradient


def _sums(seen: Iterable[LayerGradient]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer sum_d a g at its output and its input, float64 (n, C); of all its calls where there are several."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for one in seen:
        output = _channel_sums(one.op, one.output, one.output_gradient)
        input = _channel_sums(one.op, one.input, one.input_gradient)
        before = found.get(one.op.owner)
        found[one.op.owner] = (output, input) if before is None else (before[0] + output, before[1] + input)
    return found


def _channel_sums(op: Op, values: Tensor, gradients: Tensor) -> Tensor:
    """sum_d a g per sample and channel: two (n, ...) -> float64 (n, C)."""
    products = values * gradients
    axis = op.channel_axis % (products.ndim - 1) + 1
    return products.movedim(axis, 1).flatten(2).sum(2).double() if products.ndim > 2 else products.double()
