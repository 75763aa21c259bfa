"""Forward execution of a graph, or of a part of it, as fast as this machine allows and without autograd.

What makes it fast (measured: docs/decisions.md): activations fused into the layer before them, weights laid out once in
the form that oneDNN's kernels read, channels-last tensors, additions and activations in place, values dropped after
their last reader. What a convolution makes of a sample does not depend on the batch that it is computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.errors import UsageError
from stages.models.execute import RULES, apply
from stages.models.graph import Graph, Op
from stages.models.reach import within_reach

Kernel = Callable[[Sequence[Tensor]], Tensor]
Watch = Callable[["Step", Sequence[Tensor], Tensor], None]

ACTIVATIONS = ("relu", "relu6")


@dataclass(frozen=True, slots=True)
class Step:
    """One operator, with the activation that is fused behind it."""

    op: Op
    activation: str
    """`relu`, `relu6` or empty."""
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
    ops = [op for op in graph.ops if op.name in names and op.kind != "input"]
    for op in ops:
        if op.kind not in RULES or op.kind == "batchnorm":
            raise UsageError(f"operator {op.name}", f"kind {op.kind!r}", "deploy form", "fold BatchNorm first")
    behind = {op.name: reader for op in ops if (reader := _fused_activation(graph, op, names)) and op.name not in keep}
    fused_away = {reader.name for reader in behind.values()}
    left = [op for op in ops if op.name not in fused_away]
    outs = {op.name: behind.get(op.name, op).name for op in left}
    last_reader = {source: op.name for op in left for source in op.inputs}
    views = {name for op in left if op.kind == "flatten" for name in (op.name, *op.inputs)}
    own = set(outs.values()) - views
    steps = []
    for op in left:
        drop = tuple(name for name in dict.fromkeys(op.inputs) if last_reader[name] == op.name and name not in keep)
        overwrite = next((i for i, name in enumerate(op.inputs) if name in drop and name in own), None)
        activation = behind[op.name].kind if op.name in behind else ""
        steps.append(Step(op, activation, outs[op.name], overwrite, drop))
    return tuple(steps)


def _fused_activation(graph: Graph, op: Op, names: Collection[str]) -> Op | None:
    """The activation that is the only reader of a layer's output."""
    readers = graph.consumers[op.name]
    if not op.is_layer or len(readers) != 1 or readers[0] not in names:
        return None
    reader = graph[readers[0]]
    return reader if reader.kind in ACTIVATIONS else None


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
            return IN_PLACE[op.kind](step) if step.overwrite is not None and op.kind in IN_PLACE else _plain(op)
        weight, bias = self._tensors[f"{op.name}.weight"], self._tensors[f"{op.name}.bias"] if op.bias else None
        if self.channels_last and len(op.kernel) == 2 and pointwise_fits(weight):
            op, weight = within_reach(op, weight)
            ready = weight if op.name in self._changing else packed(op, weight, batch)
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
    """x with its elements in the program's order; the tensor itself where they already are."""
    return x.contiguous(memory_format=torch.channels_last if channels_last and x.ndim == 4 else torch.contiguous_format)


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
    op = Op("probe", "conv", (), (8, 5, 5), (8, 5, 5), (3, 3), (1, 1), (1, 1), (1, 1), bias=True)
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

_FUSED = {"": ("none", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0])}
_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": torch.relu_,
    "relu6": lambda x: x.clamp_(0, 6),
}


def _pointwise(op: Op, activation: str, weight: Tensor, bias: Tensor | None) -> Kernel:
    convolution = torch.ops.mkldnn._convolution_pointwise.default
    attribute, scalars = _FUSED[activation]
    padding, stride, dilation = list(op.padding), list(op.stride), list(op.dilation)

    def run(inputs: Sequence[Tensor]) -> Tensor:
        output: Tensor = convolution(
            inputs[0], weight, bias, padding, stride, dilation, op.groups, attribute, scalars, ""
        )
        return output

    return run


def _layer(step: Step, tensors: Mapping[str, Tensor]) -> Kernel:
    op, activate = step.op, _ACTIVATE[step.activation]
    return lambda inputs: activate(apply(op, inputs, tensors))


def _plain(op: Op) -> Kernel:
    return partial(_apply, op)


def _apply(op: Op, inputs: Sequence[Tensor]) -> Tensor:
    return apply(op, inputs, {})


def _add_into(step: Step) -> Kernel:
    into = step.overwrite or 0
    return lambda inputs: inputs[into].add_(inputs[1 - into])


IN_PLACE: dict[str, Callable[[Step], Kernel]] = {
    "relu": lambda step: lambda inputs: F.relu_(inputs[0]),
    "relu6": lambda step: lambda inputs: inputs[0].clamp_(0, 6),
    "add": _add_into,
}
"""Kinds that can overwrite an input which nothing else needs."""
