"""The trained part of a backbone as one autograd function that keeps as little as possible for the backward pass.

Kept, all through `save_for_backward` (so `torch.autograd.graph.saved_tensors_hooks` sees each tensor):

* one bit per output of a ReLU or ReLU6, one byte per output of a max-pool;
* a live layer's input: whole where output channels are live (once, however many layers share it), the live channels
  where input channels are live or the layer is depthwise;
* for frozen layers, additions, concatenations, averages: nothing.

Gradients flow back to the earliest live layers and no further, into live slices only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.models.fused import ACTIVATIONS, Program, Step, laid_out
from stages.models.graph import Graph, Op
from stages.sparse.live import Live, channels_of
from stages.sparse.masks import max_pool_gradient, pack, unpack, window_index
from stages.sparse.weight_gradients import bias_gradient, weight_gradient

Saved = dict[str, Tensor]
"""Kept tensors: `mask <value>`, `index <operator>`, `whole <value>`, `slice <layer>`."""


class Suffix:
    """The operators downstream of the live layers: forward with saving, and backward."""

    def __init__(
        self, graph: Graph, tensors: Mapping[str, Tensor], live: Mapping[str, Live], *, channels_last: bool
    ) -> None:
        self.graph, self.tensors, self.live = graph, tensors, live
        self.names = graph.downstream(set(live))
        self.output = graph.ops[-1].name
        sources = {source for name in self.names for source in graph[name].inputs} - self.names
        self.boundary = tuple(op.name for op in graph.ops if op.name in sources) if self.names else (self.output,)
        self.whole = {self.root(name) for name, part in live.items() if part.keeps == "whole"}
        keep = {self.output} | (self.whole & self.names)
        self.program = Program(graph, tensors, self.names, keep, channels_last=channels_last, changing=set(live))

    def root(self, layer: str) -> str:
        """The value that a layer's input is made of: flattening inside the suffix is only another shape of it."""
        source = self.graph[self.graph[layer].inputs[0]]
        while source.kind == "flatten" and source.name in self.names:
            source = self.graph[source.inputs[0]]
        return source.name

    def forward(self, boundary: Sequence[Tensor], *, save: bool) -> tuple[Tensor, Saved]:
        """Values at the boundary, one per name of `boundary` -> features (N, D) and, if `save`, what backward needs."""
        values = dict(zip(self.boundary, boundary, strict=True))
        saved: Saved = {}
        if save:
            entering = {name: values[name] for name in self.boundary if name in self.whole}
            saved.update(
                {f"whole {name}": laid_out(value, self.program.channels_last) for name, value in entering.items()}
            )

        def watch(step: Step, inputs: Sequence[Tensor], output: Tensor) -> None:
            saved.update(self._kept(step, inputs, output))

        features = self.program(values, watch if save else None)[self.output]
        return features, saved

    def _kept(self, step: Step, inputs: Sequence[Tensor], output: Tensor) -> Saved:
        op, kept = step.op, {}
        if step.activation or op.kind in ACTIVATIONS:
            kept[f"mask {step.out}"] = pack(output, step.activation or op.kind, self.program.channels_last)
        if op.kind == "max_pool":
            kept[f"index {op.name}"] = window_index(op, inputs[0])
        if step.out in self.whole:
            kept[f"whole {step.out}"] = output
        if op.name in self.live and self.live[op.name].keeps == "slice":
            kept[f"slice {op.name}"] = channels_of(inputs[0], self.live[op.name].channels)
        return kept

    def backward(self, saved: Saved, gradient: Tensor) -> dict[str, Tensor]:
        """Gradients of the live slices, by parameter name, from that of the features (N, D)."""
        pending = Pending(self.names)
        pending.add(self.output, Flow(gradient, fresh=False))
        found: dict[str, Tensor] = {}
        for step in reversed(self.program.steps):
            flow = pending.take(step.out)
            if flow is None:
                continue
            if step.activation or step.op.kind in ACTIVATIONS:
                flow = self._through_mask(saved[f"mask {step.out}"], step.op.shape, flow)
            if step.op.is_layer:
                flow = Flow(laid_out(flow.gradient, self.program.channels_last), fresh=False)
                found.update(self._live_gradients(step.op, saved, flow.gradient))
            if pending.wants(step.op):
                for source, part in zip(step.op.inputs, PULL[step.op.kind](self, step.op, saved, flow), strict=True):
                    pending.add(source, part)
        return found

    def _through_mask(self, bits: Tensor, shape: tuple[int, ...], flow: Flow) -> Flow:
        passes = unpack(bits, len(flow.gradient), shape, self.program.channels_last)
        masked = flow.gradient.mul_(passes) if flow.fresh else flow.gradient * passes
        return Flow(masked, fresh=True)

    def _live_gradients(self, op: Op, saved: Saved, gradient: Tensor) -> dict[str, Tensor]:
        live = self.live.get(op.name)
        found: dict[str, Tensor] = {}
        if live is not None and live.weight is not None:
            key = f"slice {op.name}" if live.keeps == "slice" else f"whole {self.root(op.name)}"
            found[f"{op.name}.weight"] = weight_gradient(live, saved[key], gradient)
        if live is not None and live.bias is not None:
            found[f"{op.name}.bias"] = bias_gradient(live, gradient)
        return found


class Attached(torch.autograd.Function):
    """A suffix as one node of torch's graph; its inputs are the live slices."""

    @staticmethod
    def forward(ctx: Any, suffix: Suffix, boundary: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        features, saved = suffix.forward(boundary, save=True)
        ctx.suffix, ctx.keys = suffix, tuple(saved)
        ctx.save_for_backward(*saved.values())
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.suffix.backward(dict(zip(ctx.keys, ctx.saved_tensors, strict=True)), gradient)
        names = [name for live in ctx.suffix.live.values() for name in live.parameters()]
        return (None, None, *(found.get(name) for name in names))


# ---------------------------------------------------------------------------------------------------- flowing backward


class Flow(NamedTuple):
    """A gradient on its way back."""

    gradient: Tensor
    fresh: bool
    """Nobody else holds it, so it may be overwritten."""


class Pending:
    """Gradients of values that wait for the operator that made them, summed over their readers."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._flows: dict[str, Flow] = {}

    def wants(self, op: Op) -> bool:
        """Whether a gradient must flow into any input of `op`."""
        return not self._names.isdisjoint(op.inputs)

    def add(self, name: str, flow: Flow) -> None:
        if name not in self._names:
            return
        if name not in self._flows:
            self._flows[name] = flow
            return
        before = self._flows[name]
        if before.fresh:
            self._flows[name] = Flow(before.gradient.add_(flow.gradient), fresh=True)
        elif flow.fresh:
            self._flows[name] = Flow(flow.gradient.add_(before.gradient), fresh=True)
        else:
            self._flows[name] = Flow(before.gradient + flow.gradient, fresh=True)

    def take(self, name: str) -> Flow | None:
        """The gradient of a value; None where the features do not depend on it."""
        return self._flows.pop(name, None)


def _pull_conv(suffix: Suffix, op: Op, saved: Saved, flow: Flow) -> list[Flow]:
    """The transposed convolution of the output gradient."""
    axes = range(len(op.kernel))
    reach = [
        (op.shape[i + 1] - 1) * op.stride[i] - 2 * op.padding[i] + op.dilation[i] * (op.kernel[i] - 1) + 1 for i in axes
    ]
    unread = [op.in_shape[i + 1] - reach[i] for i in axes]
    transposed = F.conv_transpose1d if len(op.kernel) == 1 else F.conv_transpose2d
    weight = suffix.tensors[f"{op.name}.weight"]
    gradient = transposed(flow.gradient, weight, None, op.stride, op.padding, unread, op.groups, op.dilation)
    return [Flow(gradient, fresh=True)]


def _pull_linear(suffix: Suffix, op: Op, saved: Saved, flow: Flow) -> list[Flow]:
    return [Flow(flow.gradient @ suffix.tensors[f"{op.name}.weight"], fresh=True)]


def _pull_add(suffix: Suffix, op: Op, saved: Saved, flow: Flow) -> list[Flow]:
    return [Flow(flow.gradient, fresh=False) for _ in op.inputs]


def _pull_concat(suffix: Suffix, op: Op, saved: Saved, flow: Flow) -> list[Flow]:
    sizes = [suffix.graph[source].shape[0] for source in op.inputs]
    return [Flow(part, fresh=False) for part in torch.split_with_sizes(flow.gradient, sizes, 1)]


def _pull_flatten(suffix: Suffix, op: Op, saved: Saved, flow: Flow) -> list[Flow]:
    return [Flow(flow.gradient.reshape(-1, *op.in_shape), fresh=False)]


def _pull_global_pool(suffix: Suffix, op: Op, saved: Saved, flow: Flow) -> list[Flow]:
    each = flow.gradient.flatten(1) / prod(op.in_shape[1:])
    spread = each.view(*each.shape, *(1 for _ in op.in_shape[1:])).expand(-1, *op.in_shape)
    return [Flow(spread, fresh=False)]


def _pull_avg_pool(suffix: Suffix, op: Op, saved: Saved, flow: Flow) -> list[Flow]:
    flat = len(op.kernel) == 1  # one axis is a plane of height 1
    kernel, stride, padding = (
        ((1, *op.kernel), (1, *op.stride), (0, *op.padding)) if flat else (op.kernel, op.stride, op.padding)
    )
    gradient = flow.gradient.unsqueeze(2) if flat else flow.gradient
    shape = (op.in_shape[0], 1, op.in_shape[1]) if flat else op.in_shape
    sizes_only = gradient.new_empty(1).expand(len(gradient), *shape)
    spread = torch.ops.aten.avg_pool2d_backward(
        gradient, sizes_only, kernel, stride, padding, op.ceil_mode, op.count_include_pad, None
    )
    return [Flow(spread.squeeze(2) if flat else spread, fresh=True)]


def _pull_max_pool(suffix: Suffix, op: Op, saved: Saved, flow: Flow) -> list[Flow]:
    return [Flow(max_pool_gradient(op, saved[f"index {op.name}"], flow.gradient), fresh=True)]


def _pull_activation(suffix: Suffix, op: Op, saved: Saved, flow: Flow) -> list[Flow]:
    return [flow]  # the mask has been applied


PULL: dict[str, Callable[[Suffix, Op, Saved, Flow], list[Flow]]] = {
    "conv": _pull_conv,
    "linear": _pull_linear,
    "relu": _pull_activation,
    "relu6": _pull_activation,
    "add": _pull_add,
    "concat": _pull_concat,
    "flatten": _pull_flatten,
    "global_pool": _pull_global_pool,
    "avg_pool": _pull_avg_pool,
    "max_pool": _pull_max_pool,
}
"""Gradients of an operator's inputs from that of its output, one rule per kind."""
