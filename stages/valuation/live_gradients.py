"""Importance by the gradient of what really trains: a plan's live parameters, or the whole model as the slow oracle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.artifacts.records import Array, Head, LayerUpdate
from stages.engines.choice import make_net
from stages.engines.parameter import Floats
from stages.models.deploy import Backbone
from stages.models.heads import cross_entropy

CHUNK_VALUES = 1 << 16
"""Gradients whose products are summed together, in float64."""


def live_products(
    backbone: Backbone, updates: Sequence[LayerUpdate], head: Head, inputs: Floats, targets: Array
) -> Array:
    """Inner products of the samples' gradients over the live parameters of `updates`: float64 (n, n).

    The gradient of sample i is that of its cross-entropy; the head's own part is not in it (`LastLayer` has that in
    closed form). Samples pass one at a time behind the frozen prefix: exact, and about as costly as training on each.

    Args:
        inputs: float32 (n, *input.shape), model input.
        targets: int64 (n,), rows of the head.
    """
    net = make_net(backbone, updates)
    parameters = net.parameters()
    products = np.zeros((len(targets), len(targets)))
    if not parameters or not len(targets):
        return products
    boundary = net.prefix(inputs)
    rows = np.empty((len(targets), sum(parameter.value.size for parameter in parameters)), np.float32)
    for i, row in enumerate(rows):
        features, kept = net.forward(tuple(value[i : i + 1] for value in boundary))
        net.backward(kept, cross_entropy(head, features, targets[i : i + 1])[1])
        np.concatenate([parameter.gradient.reshape(-1) for parameter in parameters], out=row)
        for parameter in parameters:
            parameter.gradient[...] = 0
    for start in range(0, rows.shape[1], CHUNK_VALUES):
        some = rows[:, start : start + CHUNK_VALUES].astype(np.float64)
        products += some @ some.T
    return products
