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

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.engines.choice import Inspector
from stages.errors import DataError
from stages.graphs.graph import Graph
from stages.operators import Op

Array = NDArray[Any]
SampleLoss = Callable[[Array, Array], tuple[Array, Array]]
"""Features (n, D) and targets (n,) -> each sample's own loss (n,) and its gradient at its own features (n, D)."""


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


def inspected_layers(graph: Graph, window: Collection[str]) -> tuple[Op, ...]:
    """The layers of the window and those computed from their output, in execution order."""
    behind = graph.downstream(graph.computed_by(window))
    return tuple(op for op in graph.layers if not behind.isdisjoint(use.name for use in graph.uses(op.name)))


def fisher_pass(
    inspector: Inspector,
    batches: Iterable[tuple[Array, Array]],
    loss: SampleLoss,
    *,
    on_step: Callable[[int], None] = lambda done: None,
) -> Fisher:
    """One pass over the samples: batches of inputs (n, *input) and targets (n,) -> Fisher per channel.

    `on_step` gets the number of samples done. Raises `DataError` where there is no sample or a loss is not finite.
    """
    layers = inspected_layers(inspector.graph, inspector.window)
    output = {op.name: np.zeros(op.out_channels) for op in layers}
    input = {op.name: np.zeros(op.in_channels) for op in layers}
    samples, total = 0, 0.0
    for x, y in batches:
        losses, gradient = loss(inspector.features(x), y)
        value = float(losses.sum(dtype=np.float64))
        if not (np.isfinite(value) and np.isfinite(gradient).all()):
            raise DataError(
                "support", f"a loss of {value}", "finite losses", "check the samples and the model's weights"
            )
        for name, (at_output, at_input) in inspector.sums(gradient).items():
            output[name] += _squares(at_output)
            input[name] += _squares(at_input)
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


def _squares(sums: Array) -> NDArray[np.float64]:
    """(n, C) -> the samples' squares summed, float64 (C,)."""
    found: NDArray[np.float64] = np.square(sums, dtype=np.float64).sum(0)
    return found
