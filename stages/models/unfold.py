"""The way back from deploy form: a state dict under the model's own names, with BatchNorm layers that change nothing.

A folded layer's weight already holds the BatchNorm after it. So that layer becomes y = x - running_mean with weight 1,
bias 0, running_var = 1 - eps, and running_mean = -(folded bias) where the layer before it has no bias of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stages.errors import UsageError
from stages.models.graph import Graph, Op
from stages.models.tracing import Traced


def unfold(module: nn.Module, traced: Traced, graph: Graph, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's state dict that computes what `graph` with `tensors` (deploy form) computes.

    Args:
        traced: the trace of `module`, BatchNorm still in.
        graph: its deploy form; a final linear layer may be missing, whose entries then keep the module's own values.

    Raises `UsageError` for a BatchNorm without weight and bias that has become a layer of its own.
    """
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    inner = {key: tensors[key] for key in tensors if key in traced.names}
    for op in traced.graph.ops:
        if op.kind == "batchnorm":
            inner |= _own_layer(op, traced, tensors) if op.name in graph.by_name else _identity(op, traced, tensors)
    for key, value in inner.items():
        if key in traced.names:
            state[traced.names[key]] = value.to(state[traced.names[key]].dtype)
    return state


def _identity(op: Op, traced: Traced, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A BatchNorm that was folded into the layer before it."""
    layer = traced.graph[op.inputs[0]]
    shift = torch.zeros(op.out_channels) if layer.bias else -tensors[f"{layer.name}.bias"]
    return _statistics(op, traced, shift) | {
        f"{op.name}.weight": torch.ones(op.out_channels),
        f"{op.name}.bias": torch.zeros(op.out_channels),
    }


def _own_layer(op: Op, traced: Traced, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A BatchNorm that became a depthwise 1x1 convolution."""
    if f"{op.name}.weight" not in traced.names:
        raise UsageError(
            op.name,
            "BatchNorm without weight and bias cannot hold what was trained",
            "affine=True",
            "export to .onnx instead",
        )
    weight, bias = tensors[f"{op.name}.weight"].flatten(), tensors[f"{op.name}.bias"]
    zero = torch.zeros(op.out_channels)
    return _statistics(op, traced, zero) | {f"{op.name}.weight": weight, f"{op.name}.bias": bias}


def _statistics(op: Op, traced: Traced, mean: Tensor) -> dict[str, Tensor]:
    variance = torch.ones(op.out_channels, dtype=torch.float64) - traced.tensors[f"{op.name}.eps"]
    return {f"{op.name}.running_mean": mean, f"{op.name}.running_var": variance.float()}
