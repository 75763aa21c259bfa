"""The plain interpreter of a `Graph`: stock torch operators, one after the other, kernels cut to what meets the map.

It is differentiable where the tensors require gradients, so it also serves as the dense oracle of the sparse engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.models.graph import Graph, Op
from stages.models.reach import within_reach

Rule = Callable[[Op, Sequence[Tensor], Mapping[str, Tensor]], Tensor]


def run(graph: Graph, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Output of the last operator for x (N, *graph.input_shape).

    Outputs are dropped after their last use. Raises `DataError` for an input of another shape.
    """
    graph.check_input(x.shape)
    waiting = {name: len(readers) for name, readers in graph.consumers.items()}
    values = {graph.ops[0].name: x}
    for op in graph.ops[1:]:
        values[op.name] = apply(op, [values[name] for name in op.inputs], tensors)
        for name in op.inputs:
            waiting[name] -= 1
            if not waiting[name]:
                del values[name]
    return values[graph.ops[-1].name]


def apply(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """One operator on its inputs (N, *shape); its tensors are `tensors[f"{op.name}.weight"]` and so on."""
    return RULES[op.kind](op, inputs, tensors)


def _conv(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    bias = tensors[f"{op.name}.bias"] if op.bias else None
    op, weight = within_reach(op, tensors[f"{op.name}.weight"])
    if len(op.kernel) == 1:
        return F.conv1d(inputs[0], weight, bias, op.stride, op.padding, op.dilation, op.groups)
    return F.conv2d(inputs[0], weight, bias, op.stride, op.padding, op.dilation, op.groups)


def _linear(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    return F.linear(inputs[0], tensors[f"{op.name}.weight"], tensors[f"{op.name}.bias"] if op.bias else None)


def _batchnorm(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    def get(what: str) -> Tensor:
        return tensors[f"{op.name}.{what}"]

    return F.batch_norm(
        inputs[0], get("running_mean"), get("running_var"), get("weight"), get("bias"), eps=get("eps").item()
    )


def _max_pool(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    pool = F.max_pool1d if len(op.kernel) == 1 else F.max_pool2d
    return pool(inputs[0], op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)


def _avg_pool(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    pool = F.avg_pool1d if len(op.kernel) == 1 else F.avg_pool2d
    return pool(inputs[0], op.kernel, op.stride, op.padding, op.ceil_mode, op.count_include_pad)


RULES: dict[str, Rule] = {
    "input": lambda op, inputs, tensors: inputs[0],
    "conv": _conv,
    "linear": _linear,
    "batchnorm": _batchnorm,
    "relu": lambda op, inputs, tensors: F.relu(inputs[0]),
    "relu6": lambda op, inputs, tensors: F.relu6(inputs[0]),
    "add": lambda op, inputs, tensors: inputs[0] + inputs[1],
    "concat": lambda op, inputs, tensors: torch.cat(list(inputs), 1),
    "flatten": lambda op, inputs, tensors: inputs[0].flatten(1),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "global_pool": lambda op, inputs, tensors: inputs[0].mean(tuple(range(2, inputs[0].dim()))),
}
"""One rule per kind of `graph.KINDS`; `global_pool` is the mean over all positions, (N, C, ...) -> (N, C)."""
