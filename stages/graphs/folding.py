"""Deploy form: BatchNorm folded into the weights before it, as a model runs on the device.

A BatchNorm directly after a convolution or linear layer that nothing else reads is folded into it. Any other BatchNorm
(pre-activation networks, after an addition, on feature vectors) becomes a `scale` of the same name, which computes
exactly the same and is a layer like others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from stages.artifacts.records import Array
from stages.graphs.graph import Graph
from stages.operators import Op


def fold(graph: Graph, tensors: Mapping[str, Array]) -> tuple[Graph, dict[str, Array]]:
    """Graph and tensors without BatchNorm, the same function in evaluation mode.

    With s = gamma / sqrt(running_var + eps): weight' = s * weight, bias' = beta + s * (bias - running_mean), in
    float64, returned in the tensors' own dtype.
    """
    renamed: dict[str, str] = {}
    ops: dict[str, Op] = {}
    folded = {key: value for key, value in tensors.items() if not graph[key.rpartition(".")[0]].operator.statistics}
    for op in graph.ops:
        op = replace(op, inputs=tuple(renamed.get(name, name) for name in op.inputs))
        if not op.operator.statistics:
            ops[op.name] = op
            continue
        scale, shift = affine(op, tensors)
        target = folds_into(graph, graph[op.name])
        if target:
            ops[target] = replace(ops[target], bias=True)
            folded |= _scaled(graph[target], folded, scale, shift)
            renamed[op.name] = target
        else:
            ops[op.name] = replace(op, kind="scale", args=(("axis", _axis(op)),), bias=True)
            if not op.shares:
                dtype = tensors[f"{op.name}.running_mean"].dtype
                folded |= {f"{op.name}.weight": scale.astype(dtype), f"{op.name}.bias": shift.astype(dtype)}
    return Graph(tuple(ops.values()), graph.blocks), folded


def _axis(op: Op) -> int:
    axis: int = op["axis"]
    return axis


def affine(op: Op, tensors: Mapping[str, Array]) -> tuple[Array, Array]:
    """A BatchNorm in evaluation mode as x * scale + shift, float64 (C,)."""
    gamma, beta, mean, var = (
        tensors[f"{op.owner}.{what}"].astype(np.float64) for what in ("weight", "bias", "running_mean", "running_var")
    )
    with np.errstate(invalid="ignore", divide="ignore"):  # deploy refuses weights that are not finite
        scale = gamma / np.sqrt(var + op["eps"])
    return scale, beta - scale * mean


def folds_into(graph: Graph, op: Op) -> str:
    """The layer that a BatchNorm can be merged into; empty where there is none.

    Nothing else reads that layer's output, neither is used twice, and both count the same axis as channels.
    """
    layer = graph[op.inputs[0]]
    alone = len(graph.consumers[layer.name]) == 1 and len(graph.uses(layer.owner)) == 1 == len(graph.uses(op.owner))
    mixes = layer.is_layer and layer.operator.candidate
    same = mixes and layer.channel_axis % len(layer.shape) == _axis(op) % len(op.shape)
    return layer.name if alone and same else ""


def _scaled(layer: Op, tensors: Mapping[str, Array], scale: Array, shift: Array) -> dict[str, Array]:
    weight, bias = tensors[f"{layer.name}.weight"], tensors.get(f"{layer.name}.bias")
    wide = weight.astype(np.float64)
    if layer.operator.input_first:  # (in, out / groups, ...): output channels lie along the second axis, by group
        grouped = wide.reshape(layer.groups, -1, *wide.shape[1:])
        factor = scale.reshape(layer.groups, 1, -1, *(1,) * (wide.ndim - 2))
        wide = (grouped * factor).reshape(wide.shape)
    else:
        wide = wide * scale.reshape(-1, *(1,) * (wide.ndim - 1))
    moved = shift if bias is None else shift + scale * bias.astype(np.float64)
    return {f"{layer.name}.weight": wide.astype(weight.dtype), f"{layer.name}.bias": moved.astype(weight.dtype)}
