"""Back-propagation through the end of a graph that keeps as little as possible between forward and backward.

Only the outputs of the inspected layers and what enters the inspected part are kept; everything between them (ReLU,
additions, pooling, ...) has no weights, costs next to nothing, and is computed again on the way back. For the last six
blocks of MCUNet, MobileNetV2-w0.35 and ProxylessNAS-w0.3 at 128x128 that is 475, 420 and 290 KB per sample (TinyTrain's
Table 11, which keeps inputs and one bit per ReLU output, has 479, 433 and 299 KB with the mix layer); stock autograd
keeps 876, 790 and 536 KB for the same gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.engines.torch.reference import apply
from stages.graphs.graph import Graph, last_readers
from stages.operators import Op
from stages.operators.op import Flow, Kept

Tensors = Mapping[str, Tensor]


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
            gradients: tuple[Tensor, ...] = (_input_gradient(op, tensors, g),)
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


def _input_gradient(op: Op, tensors: Tensors, gradient: Tensor) -> Tensor:
    """A layer is linear in its input: no value is needed for it."""
    rule = op.operator.pull
    assert rule is not None
    return rule(op, tensors)(Kept({}, None, None, None), Flow(gradient, fresh=False))[0].gradient


def _pull(op: Op, tensors: Tensors, inputs: list[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Vector-Jacobian product of one operator without weights."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(apply(op, leaves, tensors), leaves, gradient)
