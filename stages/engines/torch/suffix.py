"""The trained part of a backbone as one autograd function that keeps as little as possible for the backward pass.

What is kept is `graphs.keeping`'s rule, all of it through `save_for_backward` (so
`torch.autograd.graph.saved_tensors_hooks` sees each tensor). Gradients flow back to the earliest live layers and no
further, into live slices only; detached layers pass none on. Operators that no gradient comes by keep nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.artifacts.records import LayerUpdate, detached_layers
from stages.engines.torch.live import Live, channels_of
from stages.engines.torch.masks import pack, unpack
from stages.engines.torch.program import Program, Step, laid_out
from stages.engines.torch.reference import apply
from stages.engines.torch.returning import RECOMPUTE, Returning
from stages.engines.torch.rounding import Rounding, unpack_values
from stages.engines.torch.weight_gradients import bias_gradient, weight_gradient
from stages.graphs.graph import Graph
from stages.graphs.keeping import holding, needs_of
from stages.operators import Op
from stages.operators.op import Flow, Keep, Kept, Pull

Saved = dict[str, Tensor]
"""Kept tensors: `value <name>`, `bits <operator>`, `index <operator>`, `slice <operator>`, and `range <kept>` (N, 2) of
those in fewer bits."""


@dataclass(frozen=True, slots=True)
class Node:
    """What one operator does for the backward pass, decided once."""

    op: Op
    keep: Keep
    wanted: frozenset[int]
    """Inputs that get a gradient from it."""
    live: Live | None
    pull: Pull | None
    """None where no gradient needs to flow into any input."""


class Suffix:
    """The operators downstream of the live layers: forward with saving, and backward."""

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Tensor],
        live: Mapping[str, Live],
        updates: Sequence[LayerUpdate] = (),
        *,
        channels_last: bool,
        changing: Collection[str] = (),
        rounding: Rounding | None = None,
        how: Mapping[str, str] | None = None,
        page_dir: str = "",
    ) -> None:
        """`changing`: the layers that train at some time, where `live` and `updates` are one turn of several;
        `rounding`: how inputs of live layers are kept in fewer bits; `how`: what of all that the backward pass needs is
        paged to a file in `page_dir`, or made again."""
        self.rounding = rounding
        self.returning = Returning(graph, needs_of(graph, updates), how or {}, page_dir)
        self.graph, self.tensors, self.live, self.channels_last = graph, tensors, live, channels_last
        self.held, self.detached = holding(graph, updates), detached_layers(updates)
        self.flow = graph.gradient_flow(set(live), self.detached)
        changing = set(changing) | set(live)
        executed = graph.made_with(graph.downstream(graph.computed_by(changing)))
        self.boundary = graph.boundary(executed) if changing else (graph.output,)
        if how:  # values that others are made of again are kept as they are
            self.held = replace(self.held, narrow=frozenset())
        self.stored = self.returning.stored(self.held.values)
        keep = {graph.output} | ((self.held.values | self.stored) & executed)
        self._changing, self._again = frozenset(changing), dict[frozenset[str], Program]()
        self.program = Program(graph, tensors, executed, keep, channels_last=channels_last, changing=changing)
        self.nodes = {op.name: self._node(op) for op in graph.ops if op.name in self.flow}

    def _node(self, op: Op) -> Node:
        wanted = self.graph.wanted(op, self.flow, self.detached)
        keep = op.operator.keeps(op, wanted) if wanted else Keep()
        rule = op.operator.pull or _run_again
        return Node(op, keep, wanted, self.live.get(op.owner), rule(op, self.tensors) if wanted else None)

    # ----------------------------------------------------------------------------------------------------- forward

    def forward(self, boundary: Sequence[Tensor]) -> Tensor:
        """Values at the boundary, one per name of `self.boundary` -> features (N, D)."""
        return self.program(self._entering(boundary))[self.graph.output]

    def forward_saving(self, boundary: Sequence[Tensor]) -> tuple[Tensor, Saved]:
        """The same, with what the backward pass needs."""
        values = self._entering(boundary)
        saved: Saved = {}
        self.returning.begin()
        for name in self.boundary:
            if name in self.stored:
                self._store(saved, "value", name, values[name], narrow=name in self.held.narrow)

        def watch(step: Step, inputs: Sequence[Tensor], output: Tensor) -> None:
            self._keep(step, inputs, output, saved)

        return self.program(values, watch)[self.graph.output], saved

    def _entering(self, boundary: Sequence[Tensor]) -> dict[str, Tensor]:
        """The boundary's values by name, in the suffix's layout: kernels, and so last bits, depend on the layout."""
        entries = zip(self.boundary, boundary, strict=True)
        return {name: laid_out(value, self.channels_last) for name, value in entries}

    def _keep(self, step: Step, inputs: Sequence[Tensor], output: Tensor, saved: Saved) -> None:
        channels = self.held.slices.get(step.op.name)
        if channels is not None and self.returning.way(f"slice {step.op.name}") != RECOMPUTE:
            part = channels_of(step.op, inputs[0], self.live[step.op.owner].channels)
            self._store(saved, "slice", step.op.name, part, narrow=True)
        if step.out in self.stored:
            self._store(saved, "value", step.out, output, narrow=step.out in self.held.narrow)
        own = self.held.own.get(step.out)
        if own is None:
            return
        op = self.graph[step.out]  # the activation, where one is fused behind the step's operator
        seen = inputs if op is step.op else ()
        if own.bits and op.operator.passes is not None:
            saved[f"bits {op.name}"] = pack(op.operator.passes(op, seen, output), self.channels_last)
        if own.index_bytes and op.operator.index is not None:
            saved[f"index {op.name}"] = op.operator.index(op, seen, output)

    def _store(self, saved: Saved, what: str, name: str, value: Tensor, *, narrow: bool) -> None:
        if self.returning.page_out(f"slice {name}" if what == "slice" else name, value):
            return
        if narrow and self.rounding is not None:
            saved[f"{what} {name}"], saved[f"range {what} {name}"] = self.rounding.pack(value)
        else:
            saved[f"{what} {name}"] = _alone(value)

    def _stored(self, saved: Saved, what: str, name: str) -> Tensor | None:
        paged = self.returning.page_in(f"slice {name}" if what == "slice" else name)
        if paged is not None:
            return paged
        value = saved.get(f"{what} {name}")
        scale = saved.get(f"range {what} {name}")
        return value if value is None or scale is None else unpack_values(value, scale)

    # ---------------------------------------------------------------------------------------------------- backward

    def backward(self, saved: Saved, gradient: Tensor) -> dict[str, Tensor]:
        """Gradients of the live slices, by parameter name, from that of the features (N, D)."""
        pending = {self.graph.output: Flow(gradient, fresh=False)}
        found: dict[str, Tensor] = {}
        for node in reversed(self.nodes.values()):
            flow = pending.pop(node.op.name, None)
            if flow is None:  # no gradient is needed there
                continue
            if node.op.is_layer:
                flow = Flow(laid_out(flow.gradient, self.channels_last), flow.fresh)
            if node.live is not None:
                _add(found, self._live_gradients(node, saved, flow.gradient))
            if node.pull is not None:
                self._pull(node, saved, flow, pending)
            for name in self.returning.last_needed.get(node.op.name, ()):
                saved.pop(f"value {name}", None)
        return found

    def _pull(self, node: Node, saved: Saved, flow: Flow, pending: dict[str, Flow]) -> None:
        assert node.pull is not None
        parts = node.pull(self._kept(node, saved, len(flow.gradient)), flow)
        for i, (source, part) in enumerate(zip(node.op.inputs, parts, strict=True)):
            if i in node.wanted:
                pending[source] = _sum(pending[source], part) if source in pending else part

    def _kept(self, node: Node, saved: Saved, batch: int) -> Kept:
        op, keep = node.op, node.keep
        bits = saved.get(f"bits {op.name}")
        return Kept(
            {i: self._value(op.inputs[i], saved) for i in keep.inputs},
            self._value(op.name, saved) if keep.output else None,
            None if bits is None else unpack(bits, batch, op.shape, self.channels_last),
            saved.get(f"index {op.name}"),
        )

    def _value(self, name: str, saved: Saved) -> Tensor:
        """A kept value, or a view of one, or a constant, made again."""
        stored = self._stored(saved, "value", name)
        if stored is not None:
            return stored
        op = self.graph[name]
        if name not in self.graph.constants and not op.operator.view and not op.operator.made_again(op):
            self._run_again(name, saved)
            return saved[f"value {name}"]
        return apply(op, [self._value(source, saved) for source in op.inputs], self.tensors)

    def _run_again(self, name: str, saved: Saved) -> None:
        """Make a value again, and with it those that lie between it and what is stored: each once."""
        at_hand = self.stored | {key.removeprefix("value ") for key in saved if key.startswith("value ")}
        names = frozenset(op.name for op in self.graph.upstream_until([name], at_hand))
        if names not in self._again:
            keep = {name, *(value for value in names if self.returning.way(value) == RECOMPUTE)}
            self._again[names] = Program(
                self.graph, self.tensors, names, keep, channels_last=self.channels_last, changing=self._changing
            )
        entries = {value: self._value(value, saved) for value in self.graph.boundary(names)}
        for value, tensor in self._again[names](entries).items():
            saved[f"value {value}"] = _alone(tensor)

    def _live_gradients(self, node: Node, saved: Saved, gradient: Tensor) -> dict[str, Tensor]:
        live, op = node.live, node.op
        assert live is not None
        found: dict[str, Tensor] = {}
        if live.weight is not None:
            sliced = self._stored(saved, "slice", op.name)
            kept = self._value(op.inputs[0], saved) if sliced is None else sliced
            if sliced is None and op.name in self.held.slices:
                kept = channels_of(op, kept, live.channels)
            own = op.operator.weight_gradient
            if own is not None:
                found[f"{op.owner}.weight"] = own(op, self.tensors, kept, gradient, live.channels)
            else:
                found[f"{op.owner}.weight"] = weight_gradient(live, op, kept, gradient)
        if live.bias is not None:
            found[f"{op.owner}.bias"] = bias_gradient(live, op, gradient)
        return found


def _alone(value: Tensor) -> Tensor:
    """The value without what it is a part of: a slice would keep the whole in memory."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def _run_again(op: Op, tensors: Mapping[str, Tensor]) -> Pull:
    """The backward rule of an operator that keeps its inputs and has none of its own: forward again, differentiated."""

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        leaves = {i: value.detach().requires_grad_() for i, value in kept.inputs.items()}
        with torch.enable_grad():
            output = apply(op, [leaves[i] for i in sorted(leaves)], tensors)
            found = torch.autograd.grad(output, list(leaves.values()), flow.gradient)
        return [Flow(part, fresh=True) for part in found]

    return pull


def _add(found: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Gradients of a layer that is called more than once are sums over its calls."""
    for name, value in more.items():
        found[name] = found[name] + value if name in found else value


def _sum(first: Flow, second: Flow) -> Flow:
    """Two readers' gradients of one value, added into one that may be overwritten."""
    if first.fresh:
        return Flow(first.gradient.add_(second.gradient), fresh=True)
    if second.fresh:
        return Flow(second.gradient.add_(first.gradient), fresh=True)
    return Flow(first.gradient + second.gradient, fresh=True)


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
