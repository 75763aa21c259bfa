"""The trained part of a backbone as one autograd function that keeps as little as possible for the backward pass.

Kept, all through `save_for_backward` (so `torch.autograd.graph.saved_tensors_hooks` sees each tensor):

* one bit per output of a ReLU or ReLU6, one byte per output of a max-pool;
* a live layer's input: whole where output channels are live (once, however many layers share it), the live channels
  where input channels are live or the layer is depthwise;
* for frozen layers, additions, concatenations, averages: nothing.

Gradients flow back to the earliest live layers and no further, into live slices only; detached layers pass none on.
Operators that no gradient comes by keep nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.models.fused import ACTIVATIONS, Program, Step, laid_out
from stages.models.graph import Graph, Op
from stages.models.reach import within_reach
from stages.sparse.live import Live, channels_of
from stages.sparse.masks import max_pool_gradient, pack, unpack, window_index
from stages.sparse.weight_gradients import bias_gradient, is_matrix, weight_gradient

Saved = dict[str, Tensor]
"""Kept tensors: `mask <value>`, `index <operator>`, `whole <value>`, `slice <layer>`."""


class Flow(NamedTuple):
    """A gradient on its way back."""

    gradient: Tensor
    fresh: bool
    """Nobody else holds it, so it may be overwritten."""


Pull = Callable[[Saved, Tensor], Sequence[Flow]]
"""Gradients of an operator's inputs, from what was kept and the gradient of its output."""


@dataclass(frozen=True, slots=True)
class Node:
    """What one step does beyond its forward kernel, decided once."""

    step: Step
    activation: str
    """`relu`, `relu6` or empty: fused behind the operator, or the operator itself. Empty where no gradient comes by."""
    live: Live | None
    kept_whole: bool
    """The step's output is some live layer's input."""
    pull: Pull | None
    """None where no gradient needs to flow into any input."""


class Suffix:
    """The operators downstream of the live layers: forward with saving, and backward."""

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Tensor],
        live: Mapping[str, Live],
        *,
        detached: Set[str] = frozenset(),
        channels_last: bool,
    ) -> None:
        self.graph, self.tensors, self.live, self.channels_last = graph, tensors, live, channels_last
        self.names = graph.downstream(set(live))
        self.flow, self.detached = graph.gradient_flow(set(live), detached), detached
        self.output = graph.ops[-1].name
        executed = self.names | _flattened(graph, self.names)
        sources = {source for name in executed for source in graph[name].inputs} - executed
        self.boundary = tuple(op.name for op in graph.ops if op.name in sources) if self.names else (self.output,)
        self.whole = {root(graph, name) for name, part in live.items() if part.keeps == "whole"}
        keep = {self.output} | (self.whole & self.names)
        self.program = Program(graph, tensors, executed, keep, channels_last=channels_last, changing=set(live))
        self.nodes = {step.out: self._node(step) for step in self.program.steps}

    def _node(self, step: Step) -> Node:
        op = step.op
        activation = step.activation or (op.kind if op.kind in ACTIVATIONS else "")
        if step.out not in self.flow:
            return Node(step, "", None, step.out in self.whole, None)
        ends = op.name in self.detached or self.flow.isdisjoint(op.inputs)
        pull = None if ends else PULL[op.kind](self, op)
        return Node(step, activation, self.live.get(op.name), step.out in self.whole, pull)

    # ----------------------------------------------------------------------------------------------------- forward

    def forward(self, boundary: Sequence[Tensor]) -> Tensor:
        """Values at the boundary, one per name of `self.boundary` -> features (N, D)."""
        return self.program(self._entering(boundary))[self.output]

    def forward_saving(self, boundary: Sequence[Tensor]) -> tuple[Tensor, Saved]:
        """The same, with what the backward pass needs."""
        values = self._entering(boundary)
        saved = {f"whole {name}": values[name] for name in self.boundary if name in self.whole}

        def watch(step: Step, inputs: Sequence[Tensor], output: Tensor) -> None:
            self._keep(self.nodes[step.out], inputs, output, saved)

        return self.program(values, watch)[self.output], saved

    def _entering(self, boundary: Sequence[Tensor]) -> dict[str, Tensor]:
        """The boundary's values by name, in the suffix's layout: kernels, and so last bits, depend on the layout."""
        entries = zip(self.boundary, boundary, strict=True)
        return {name: laid_out(value, self.channels_last) for name, value in entries}

    def _keep(self, node: Node, inputs: Sequence[Tensor], output: Tensor, saved: Saved) -> None:
        op = node.step.op
        if node.activation:
            saved[f"mask {node.step.out}"] = pack(output, node.activation, self.channels_last)
        if op.kind == "max_pool" and node.pull is not None:
            saved[f"index {op.name}"] = window_index(op, inputs[0])
        if node.kept_whole:
            saved[f"whole {node.step.out}"] = output
        if node.live is not None and node.live.keeps == "slice":
            saved[f"slice {op.name}"] = channels_of(inputs[0], node.live.channels)

    # ---------------------------------------------------------------------------------------------------- backward

    def backward(self, saved: Saved, gradient: Tensor) -> dict[str, Tensor]:
        """Gradients of the live slices, by parameter name, from that of the features (N, D)."""
        pending = {self.output: Flow(gradient, fresh=False)}
        found: dict[str, Tensor] = {}
        for node in reversed(self.nodes.values()):
            flow = pending.pop(node.step.out, None)
            if flow is None:  # no gradient is needed there
                continue
            value = self._before_activation(node, saved, flow)
            if node.live is not None:
                found.update(self._live_gradients(node.live, saved, value))
            if node.pull is not None:
                for source, part in zip(node.step.op.inputs, node.pull(saved, value), strict=True):
                    if source in self.flow:
                        pending[source] = _sum(pending[source], part) if source in pending else part
        return found

    def _before_activation(self, node: Node, saved: Saved, flow: Flow) -> Tensor:
        if not node.activation:
            return laid_out(flow.gradient, self.channels_last)
        bits = saved[f"mask {node.step.out}"]
        passes = unpack(bits, flow.gradient.shape[0], node.step.op.shape, self.channels_last)
        return flow.gradient.mul_(passes) if flow.fresh else flow.gradient * passes

    def _live_gradients(self, live: Live, saved: Saved, gradient: Tensor) -> dict[str, Tensor]:
        name = live.op.name
        found: dict[str, Tensor] = {}
        if live.weight is not None:
            kept = saved[f"slice {name}" if live.keeps == "slice" else f"whole {root(self.graph, name)}"]
            found[f"{name}.weight"] = weight_gradient(live, kept, gradient)
        if live.bias is not None:
            found[f"{name}.bias"] = bias_gradient(live, gradient)
        return found


def _sum(first: Flow, second: Flow) -> Flow:
    """Two readers' gradients of one value, added into one that may be overwritten."""
    if first.fresh:
        return Flow(first.gradient.add_(second.gradient), fresh=True)
    if second.fresh:
        return Flow(second.gradient.add_(first.gradient), fresh=True)
    return Flow(first.gradient + second.gradient, fresh=True)


def root(graph: Graph, layer: str) -> str:
    """The value that a layer's input is made of: flattening is only another shape of it."""
    source = graph[graph[layer].inputs[0]]
    while source.kind == "flatten":
        source = graph[source.inputs[0]]
    return source.name


def _flattened(graph: Graph, names: Set[str]) -> set[str]:
    """Flattenings that feed `names`: run with them, so that what is kept is the value before, which others share."""
    found: set[str] = set()
    for op in reversed(graph.ops):
        if op.kind == "flatten" and op.name not in names and not (names | found).isdisjoint(graph.consumers[op.name]):
            found.add(op.name)
    return found


class Attached(torch.autograd.Function):
    """A suffix as one node of torch's graph; its inputs are the live slices."""

    @staticmethod
    def forward(ctx: Any, suffix: Suffix, boundary: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        features, saved = suffix.forward_saving(boundary)
        ctx.suffix, ctx.keys = suffix, tuple(saved)
        ctx.save_for_backward(*saved.values())
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.suffix.backward(dict(zip(ctx.keys, ctx.saved_tensors, strict=True)), gradient)
        names = [name for live in ctx.suffix.live.values() for name in live.parameters()]
        return (None, None, *(found.get(name) for name in names))


# ---------------------------------------------------------------------------------------------------------- pull rules


def _pull_conv(suffix: Suffix, op: Op) -> Pull:
    """The transposed convolution of the output gradient; for 1x1 convolutions, one matrix product."""
    if is_matrix(op) and set(op.stride) == {1}:
        matrix = suffix.tensors[f"{op.name}.weight"].flatten(1)
        return lambda saved, gradient: [Flow((gradient.movedim(1, -1) @ matrix).movedim(-1, 1), fresh=True)]
    op, weight = within_reach(op, suffix.tensors[f"{op.name}.weight"])
    spatial = zip(op.in_shape[1:], op.shape[1:], op.kernel, op.stride, op.padding, op.dilation, strict=True)
    unread = [
        size - ((out - 1) * step - 2 * pad + apart * (taps - 1) + 1) for size, out, taps, step, pad, apart in spatial
    ]
    transposed = F.conv_transpose1d if len(op.kernel) == 1 else F.conv_transpose2d

    def pull(saved: Saved, gradient: Tensor) -> list[Flow]:
        spread = transposed(gradient, weight, None, op.stride, op.padding, unread, op.groups, op.dilation)
        return [Flow(spread, fresh=True)]

    return pull


def _pull_linear(suffix: Suffix, op: Op) -> Pull:
    weight = suffix.tensors[f"{op.name}.weight"]
    return lambda saved, gradient: [Flow(gradient @ weight, fresh=True)]


def _pull_add(suffix: Suffix, op: Op) -> Pull:
    return lambda saved, gradient: [Flow(gradient, fresh=False)] * 2


def _pull_concat(suffix: Suffix, op: Op) -> Pull:
    sizes = [suffix.graph[source].shape[0] for source in op.inputs]
    return lambda saved, gradient: [Flow(part, False) for part in torch.split_with_sizes(gradient, sizes, 1)]


def _pull_flatten(suffix: Suffix, op: Op) -> Pull:
    return lambda saved, gradient: [Flow(gradient.reshape(-1, *op.in_shape), fresh=False)]


def _pull_global_pool(suffix: Suffix, op: Op) -> Pull:
    positions = op.in_shape[1:]

    def pull(saved: Saved, gradient: Tensor) -> list[Flow]:
        each = (gradient / prod(positions)).view(-1, op.in_channels, *(1 for _ in positions))
        return [Flow(each.expand(-1, -1, *positions), fresh=False)]

    return pull


def _pull_avg_pool(suffix: Suffix, op: Op) -> Pull:
    line = len(op.kernel) == 1  # torch has the gradient for planes only: a line is a plane of height 1
    kernel, stride = ((1, *op.kernel), (1, *op.stride)) if line else (op.kernel, op.stride)
    padding = (0, *op.padding) if line else op.padding
    shape = (op.in_channels, 1, *op.in_shape[1:]) if line else op.in_shape

    def pull(saved: Saved, gradient: Tensor) -> list[Flow]:
        plane = gradient.unsqueeze(2) if line else gradient
        like_input = plane.new_empty(1).expand(plane.shape[0], *shape)  # only its sizes are read
        spread = torch.ops.aten.avg_pool2d_backward(
            plane, like_input, kernel, stride, padding, op.ceil_mode, op.count_include_pad, None
        )
        return [Flow(spread.squeeze(2) if line else spread, fresh=True)]

    return pull


def _pull_max_pool(suffix: Suffix, op: Op) -> Pull:
    return lambda saved, gradient: [Flow(max_pool_gradient(op, saved[f"index {op.name}"], gradient), fresh=True)]


def _pull_activation(suffix: Suffix, op: Op) -> Pull:
    return lambda saved, gradient: [Flow(gradient, fresh=False)]  # the mask has been applied


PULL: dict[str, Callable[[Suffix, Op], Pull]] = {
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
"""How gradients flow back through an operator, one rule per kind; called once per operator, when the net is built."""
