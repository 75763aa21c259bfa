"""Forward execution of a graph, or of a part of it, as fast as this machine allows and without autograd.

What makes it fast (measured: docs/decisions.md): activations fused into the layer before them, weights laid out once in
the form that oneDNN's kernels read, channels-last tensors, additions and activations in place, values dropped after
their last reader. What a convolution makes of a sample does not depend on the batch that it is computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from stages.engines.torch.reference import apply
from stages.errors import UsageError
from stages.graphs.graph import Graph, last_readers
from stages.operators import TABLE, Op
from stages.operators.reach import within_reach

Kernel = Callable[[Sequence[Tensor]], Tensor]
Watch = Callable[["Step", Sequence[Tensor], Tensor], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One operator, with the activation that is fused behind it."""

    op: Op
    activation: str
    """Kind of the activation, or empty."""
    out: str
    """Name of the value it makes: the activation's where there is one."""
    overwrite: int | None
    """Which of the inputs the result may overwrite; None where all of them are still needed."""
    drop: tuple[str, ...]
    """Values that nothing reads after this step."""


def fuse(graph: Graph, names: Collection[str], keep: Collection[str]) -> tuple[Step, ...]:
    """The steps that compute the operators `names`, in execution order; values named in `keep` survive unchanged.

    Values that come from outside (read by `names` but not in it) are never overwritten.

    Raises:
        UsageError: an operator that has no place in deploy form (a BatchNorm that is not folded, an unknown kind).
    """
    ops = [op for op in graph.ops[1:] if op.name in names]
    for op in ops:
        if op.operator.statistics:
            raise UsageError(f"operator {op.name}", f"kind {op.kind!r}", "deploy form", "fold BatchNorm first")
    behind = {op.name: reader for op in ops if (reader := _fused_activation(graph, op, names)) and op.name not in keep}
    fused_away = {reader.name for reader in behind.values()}
    left = [op for op in ops if op.name not in fused_away]
    outs = {op.name: behind.get(op.name, op).name for op in left}
    shared = {name for op in left if op.operator.alias for name in (op.name, *op.inputs)}
    own = set(outs.values()) - shared - graph.constants
    steps = []
    for op, drop in zip(left, last_readers(left, keep), strict=True):
        overwrite = next((i for i, name in enumerate(op.inputs) if _may_overwrite(graph, op, i, drop, own)), None)
        activation = behind[op.name].kind if op.name in behind else ""
        steps.append(Step(op, activation, outs[op.name], overwrite, drop))
    return tuple(steps)


def _may_overwrite(graph: Graph, op: Op, i: int, drop: Collection[str], own: Collection[str]) -> bool:
    """Whether the result may lie where input i lies: it is of its size, made here, and nothing else needs it."""
    name = op.inputs[i]
    fits = op.operator.overwrite is not None and op.in_shapes[i] == op.shape
    return fits and name in drop and name in own and op.inputs.count(name) == 1


def _fused_activation(graph: Graph, op: Op, names: Collection[str]) -> Op | None:
    """The activation that is the only reader of a layer's output and can run behind it in one kernel."""
    readers = graph.consumers[op.name]
    if not op.is_layer or len(readers) != 1 or readers[0] not in names:
        return None
    reader = graph[readers[0]]
    return reader if reader.operator.fused else None


class Program:
    """Executable form of the operators `names` of a graph in deploy form.

    `tensors` maps `<layer>.weight` and `<layer>.bias` to tensors of one device and dtype. Weights of the layers in
    `changing` are read anew at every call; the others' layouts are prepared at the first call, for its batch size:
    other sizes run as fast with them (measured), and where oneDNN wants another layout it makes it for the call.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Tensor],
        names: Collection[str],
        keep: Collection[str],
        *,
        channels_last: bool,
        changing: Collection[str] = (),
    ) -> None:
        self.steps = fuse(graph, names, keep)
        self.keep, self.channels_last = tuple(keep), channels_last
        self._tensors, self._changing = tensors, frozenset(changing)
        self._kernels: tuple[Kernel, ...] = ()

    def __call__(self, values: Mapping[str, Tensor], watch: Watch | None = None) -> dict[str, Tensor]:
        """Named values (N, ...) from outside -> the values named in `keep`.

        `watch` sees each step with its inputs and its output as soon as it has run.
        """
        held = dict(values)
        batch = next(iter(held.values())).shape[0]
        with torch.no_grad():
            for step, kernel in zip(self.steps, self._prepared(batch), strict=True):
                inputs = [held[name] for name in step.op.inputs]
                held[step.out] = output = kernel(inputs)
                if watch is not None:
                    watch(step, inputs, output)
                for name in step.drop:
                    del held[name]
        return {name: held[name] for name in self.keep}

    def _prepared(self, batch: int) -> tuple[Kernel, ...]:
        if not self._kernels:
            self._kernels = tuple(self._kernel(step, batch) for step in self.steps)
        return self._kernels

    def _kernel(self, step: Step, batch: int) -> Kernel:
        op = step.op
        if not op.is_layer:
            return _plain(op, self._tensors) if step.overwrite is None else _in_place(op, step.overwrite)
        weight, bias = self._tensors[f"{op.owner}.weight"], self._tensors[f"{op.owner}.bias"] if op.bias else None
        if self.channels_last and len(op.kernel) == 2 and not op.operator.input_first and pointwise_fits(weight):
            op, weight = within_reach(op, weight)
            ready = weight if op.owner in self._changing else packed(op, weight, batch)
            return _pointwise(op, step.activation, ready, bias)
        return _layer(step, self._tensors)


FROZEN_CHUNK = 16
"""Samples that pass frozen layers together: nothing is kept there, so more would only raise the peak of memory."""


def in_chunks(
    program: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], source: str, x: Tensor
) -> tuple[Tensor, ...]:
    """What a program keeps, in its order, for x (N, ...) as the value `source`, `FROZEN_CHUNK` samples at a time."""
    parts = [tuple(program({source: part.contiguous()}).values()) for part in torch.split(x, FROZEN_CHUNK)]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


# ------------------------------------------------------------------------------------------------------------- layouts


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """x with its elements in the program's order; its own memory where they already are.

    Strides along axes of length 1 say nothing, and arrays bring any, but torch chooses kernels by them: they become
    the usual ones.
    """
    order = (0, 2, 3, 1) if channels_last and x.ndim == 4 else tuple(range(x.ndim))
    dense = x.permute(order).contiguous()
    usual = [prod(dense.shape[axis + 1 :]) for axis in range(x.ndim)]
    if 0 not in x.shape:
        dense = dense.as_strided(dense.shape, usual)
    return dense.permute([order.index(axis) for axis in range(x.ndim)])


def channels_last_is_faster(tensor: Tensor) -> bool:
    """Whether a model with such weights runs faster in channels-last: wherever oneDNN's fused kernels do."""
    return pointwise_fits(tensor)


def pointwise_fits(weight: Tensor) -> bool:
    """Whether oneDNN's fused convolution takes this weight."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and pointwise_works()


@cache
def pointwise_works() -> bool:
    """Whether this build of torch has the fused convolution and it computes what it should.

    It is the operator that torch's own compiler emits, but not a documented function, so it is tried before use.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    op = Op("probe", "conv", (), (8, 5, 5), ((8, 5, 5),), (3, 3), (1, 1), (1, 1), (1, 1), bias=True)
    x = torch.linspace(-1, 1, 200).reshape(1, 8, 5, 5)
    weight, bias = torch.linspace(-1, 1, 576).reshape(8, 8, 3, 3), torch.ones(8)
    expected = apply(op, [x], {"probe.weight": weight, "probe.bias": bias}).clamp(0, 6)
    try:
        found = _pointwise(op, "relu6", packed(op, weight, 1), bias)([x])
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found, expected, atol=1e-4)


def packed(op: Op, weight: Tensor, batch: int) -> Tensor:
    """The weight in the layout that oneDNN's kernel for this layer and batch size wants; opaque to other operators."""
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    ready: Tensor = reorder(weight.to_mkldnn(), op.padding, op.stride, op.dilation, op.groups, [batch, *op.in_shape])
    return ready


# ------------------------------------------------------------------------------------------------------------- kernels


def _pointwise(op: Op, activation: str, weight: Tensor, bias: Tensor | None) -> Kernel:
    convolution = torch.ops.mkldnn._convolution_pointwise.default
    attribute, scalars = ("none", []) if not activation else (TABLE[activation].fused, TABLE[activation].fused_scalars)
    padding, stride, dilation = list(op.padding), list(op.stride), list(op.dilation)

    def run(inputs: Sequence[Tensor]) -> Tensor:
        output: Tensor = convolution(
            inputs[0], weight, bias, padding, stride, dilation, op.groups, attribute, list(scalars), ""
        )
        return output

    return run


def _layer(step: Step, tensors: Mapping[str, Tensor]) -> Kernel:
    op = step.op
    if not step.activation:
        return _plain(op, tensors)
    activate = TABLE[step.activation].overwrite
    assert activate is not None
    return lambda inputs: activate(op, [apply(op, inputs, tensors)], 0)


def _plain(op: Op, tensors: Mapping[str, Tensor]) -> Kernel:
    return lambda inputs: apply(op, inputs, tensors)


def _in_place(op: Op, into: int) -> Kernel:
    rule = op.operator.overwrite
    assert rule is not None
    return lambda inputs: rule(op, inputs, into)
