"""Importance by the gradient of what really trains: a plan's live parameters, or the whole model as the slow oracle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.artifacts.records import Array, Head, LayerUpdate
from stages.engines.torch.net import Boundary, SparseNet
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.models.heads import logits


def every_layer(graph: Graph) -> tuple[LayerUpdate, ...]:
    """Updates that make all weights and biases of the backbone live."""
    return tuple(
        LayerUpdate(
            op.name,
            "output",
            tuple(range(op.out_channels)),
            op.out_channels,
            bias=tuple(range(op.out_channels)) if op.bias else (),
        )
        for op in graph.layers
    )


def live_products(
    backbone: Backbone, updates: Sequence[LayerUpdate], head: Head, inputs: Tensor, targets: Array
) -> Array:
    """Inner products of the samples' gradients over the live parameters of `updates`: float64 (n, n).

    The gradient of sample i is that of its cross-entropy; the head's own part is not in it (`LastLayer` has that in
    closed form). Samples pass one at a time behind the frozen prefix: exact, and about as costly as training on each.

    Args:
        inputs: float32 (n, *input.shape), model input.
        targets: int64 (n,), rows of the head.
    """
    net = SparseNet(backbone, updates)
    parameters = net.parameters()
    products = np.zeros((len(targets), len(targets)))
    if not parameters or not len(targets):
        return products
    boundary = net.prefix(inputs)
    rows = [
        _gradient(net, parameters, head, tuple(value[i : i + 1] for value in boundary), target)
        for i, target in enumerate(targets.tolist())
    ]
    for gradients in zip(*rows, strict=True):
        stacked = torch.stack(gradients).flatten(1).double().numpy()
        products += stacked @ stacked.T
    return products


def _gradient(
    net: SparseNet, parameters: Sequence[torch.nn.Parameter], head: Head, boundary: Boundary, target: int
) -> tuple[Tensor, ...]:
    loss = F.cross_entropy(logits(head, net.suffix(boundary)), torch.tensor([target]))
    return torch.autograd.grad(loss, parameters)
