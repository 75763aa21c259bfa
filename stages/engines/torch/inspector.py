"""torch's Fisher pass: per sample and channel, value times gradient at the layers' outputs and inputs.

Back-propagation through the end of a graph that keeps as little as possible between forward and backward: only the
outputs of the inspected layers and what enters the inspected part. Everything between them (ReLU, additions, pooling,
...) has no weights, costs next to nothing, and is computed again on the way back. For the last six blocks of MCUNet,
MobileNetV2-w0.35 and ProxylessNAS-w0.3 at 128x128 that is 475, 420 and 290 KB per sample (TinyTrain's Table 11, which
keeps inputs and one bit per ReLU output, has 479, 433 and 299 KB with the mix layer); stock autograd keeps 876, 790 and
536 KB for the same gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.engines.torch.reference import apply
from stages.errors import DataError
from stages.graphs.graph import Graph, last_readers
from stages.operators import Op
from stages.operators.op import ELEMENT_BYTES, Flow, Kept

Array = NDArray[Any]
Tensors = Mapping[str, Tensor]


class Inspector:
    """A graph in deploy form whose layers are inspected, run by torch: arrays in, arrays out.

    Args:
        graph: in deploy form.
        tensors: `<operator>.<what>`; the pass computes in their precision.
        window: the layers to inspect, and with them every layer computed from their output.
    """

    def __init__(
        self, graph: Graph, tensors: Mapping[str, Array], window: Collection[str], *, device: str = "cpu"
    ) -> None:
        self.graph, self.window = graph, frozenset(window)
        self._device = torch.device(device)
        self._tensors = {name: self._tensor(value) for name, value in tensors.items()}
        self._keep = frozenset(kept_names(graph, self.window))
        self._kept: Tensors = {}
        self._features = torch.empty(0, graph.feature_dim)

    def features(self, x: Array) -> Array:
        """Model input (n, *input) -> features (n, D); what `sums` needs of these samples is held until then.

        Raises `DataError` for an input of another shape.
        """
        self.graph.check_input(x.shape)
        self._features, self._kept = forward(self.graph, self._tensors, self._tensor(x), self._keep)
        return self._features.cpu().numpy()

    def sums(self, gradient: Array) -> dict[str, tuple[Array, Array]]:
        """Gradients of the samples' own losses at the features (n, D) -> for each layer, per sample and channel, the
        sum over positions of value times gradient: at its output (n, C_out) and at its input (n, C_in).

        Once for the samples that `features` took last. Raises `DataError` for gradients of another shape.
        """
        if gradient.shape != self._features.shape:
            raise DataError(
                "gradient at the features", f"shape {gradient.shape}", f"{tuple(self._features.shape)}",
                "call `features` first",
            )  # fmt: skip
        kept, self._kept = self._kept, {}
        pulled = self._tensor(gradient).to(self._features.dtype)
        self._features = self._features[:0]
        return channel_sums(backward(self.graph, self._tensors, kept, self.window, pulled))

    def _tensor(self, value: Array) -> Tensor:
        return torch.from_numpy(np.require(value, requirements="W")).to(self._device)


def fisher_bytes(graph: Graph, window: Iterable[str], batch: int) -> int:
    """Bytes kept between the forward and the backward pass of so many samples, float32.

    The outputs of the inspected layers, and each value that enters the inspected part.
    """
    names = kept_names(graph, frozenset(window))
    return ELEMENT_BYTES * batch * sum(graph[name].elements for name in names)


# ------------------------------------------------------------------------------------------------------------- the tape


@dataclass(frozen=True)
class LayerGradient:
    """What one layer saw in one micro-batch: values and loss gradients at its two ends, each (n, C, ...)."""

    op: Op
    input: Tensor
    input_gradient: Tensor
    """Through this layer alone: where others read the same tensor, their part is not in it."""
    output: Tensor
    output_gradient: Tensor


def kept_names(graph: Graph, window: frozenset[str]) -> tuple[str, ...]:
    """Names of the values kept for the way back from the features to the layers of `window`, in execution order."""
    suffix = graph.made_with(graph.downstream(graph.computed_by(window)))
    entering = set(graph.boundary(suffix))
    return tuple(op.name for op in graph.ops if op.name in entering or (op.name in suffix and op.is_layer))


def forward(graph: Graph, tensors: Tensors, x: Tensor, keep: frozenset[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the whole graph without autograd: input (n, ...) -> features (n, D), and the values named in `keep`.

    Any other value is dropped as soon as its last reader has run.
    """
    values = {graph.ops[0].name: x}
    with torch.no_grad():
        for op, dropped in zip(graph.ops[1:], last_readers(graph.ops[1:], keep | {graph.output}), strict=True):
            values[op.name] = apply(op, [values[source] for source in op.inputs], tensors)
            for source in dropped:
                del values[source]
    return values[graph.output], {name: values[name] for name in keep}


def backward(
    graph: Graph, tensors: Tensors, kept: Tensors, window: frozenset[str], gradient: Tensor
) -> Iterator[LayerGradient]:
    """From the loss gradient at the features (n, D) back to the layers of `window`, last layer first.

    `kept` is what `forward` returned for `kept_names(graph, window)`. Weights get no gradient.
    """
    suffix = graph.downstream(graph.computed_by(window))
    pending = {graph.output: gradient}
    for op in reversed(graph.ops):
        if op.name not in suffix or op.name not in pending:
            continue
        g = pending.pop(op.name)
        inputs = _values(graph, tensors, kept, op.inputs)
        if op.is_layer:
            gradients: tuple[Tensor, ...] = (_input_gradient(op, tensors, inputs[0], g),)
            yield LayerGradient(op, inputs[0], gradients[0], kept[op.name], g)
        else:
            gradients = _pull(op, tensors, inputs, g)
        for source, part in zip(op.inputs, gradients, strict=True):
            if source in suffix:
                pending[source] = pending[source] + part if source in pending else part


def _values(graph: Graph, tensors: Tensors, kept: Tensors, names: Sequence[str]) -> list[Tensor]:
    """Kept values, or values computed again from kept ones: only operators without weights lie between."""
    values, missing = dict(kept), graph.upstream_until(names, kept.keys())
    with torch.no_grad():
        for op in missing:
            values[op.name] = apply(op, [values[source] for source in op.inputs], tensors)
    return [values[name] for name in names]


def _input_gradient(op: Op, tensors: Tensors, x: Tensor, gradient: Tensor) -> Tensor:
    """Most layers are linear in their input and need no value for it; a recurrent one reads it again."""
    rule = op.operator.pull
    assert rule is not None
    return rule(op, tensors)(Kept({0: x}, None, None, None), Flow(gradient, fresh=False))[0].gradient


def _pull(op: Op, tensors: Tensors, inputs: list[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Vector-Jacobian product of one operator without weights."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(
            apply(op, leaves, tensors), leaves, gradient, allow_unused=True, materialize_grads=True
        )


# ---------------------------------------------------------------------------------------------------------------- sums


def channel_sums(seen: Iterable[LayerGradient]) -> dict[str, tuple[Array, Array]]:
    """Per layer sum_d a g at its output and its input, (n, C); of all its calls where there are several."""
    found: dict[str, tuple[Array, Array]] = {}
    for one in seen:
        output = _sums(one.op, one.output, one.output_gradient)
        input = _sums(one.op, one.input, one.input_gradient)
        before = found.get(one.op.owner)
        found[one.op.owner] = (output, input) if before is None else (before[0] + output, before[1] + input)
    return found


def _sums(op: Op, values: Tensor, gradients: Tensor) -> Array:
    """sum_d a g per sample and channel: two (n, ...) -> (n, C)."""
    products = values * gradients
    if products.ndim > 2:
        axis = op.channel_axis % (products.ndim - 1) + 1
        products = products.movedim(axis, 1).flatten(2).sum(2)
    found: Array = products.numpy()
    return found
