"""From a torch module to a `Graph`: what the module computes in evaluation mode, with stable names.

The module is traced symbolically (torch.fx), then run once on two zero samples for the shapes. A layer is named by its
module path; an operator without a module (`F.relu`, `+`) by the path of the module that calls it and its kind
(`blocks.02.add`). Dropout and Identity disappear, and so does what the output does not depend on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from stages.errors import UsageError
from stages.models.builder import Builder, with_blocks
from stages.models.execute import run
from stages.models.graph import Graph, Op, Shape
from stages.models.translate import translate

FORWARD = "the model's forward"
AGREEMENT = 1e-3
"""Largest difference between module and graph, relative to the largest output: rounding, not another function."""


@dataclass(frozen=True)
class Traced:
    """A traced module: its graph, its tensors by operator, and where each tensor lies in the module."""

    graph: Graph
    tensors: dict[str, Tensor]
    """`<op>.weight`, `<op>.bias`, for batchnorm also `.running_mean`, `.running_var` and the scalar `.eps`."""
    names: dict[str, str]
    """Key of `tensors` -> name in the module's own state dict; constants have none."""


class _Shapes(fx.Interpreter):
    """Runs a trace and notes every value's shape, as `torch.fx.passes.shape_prop` does, which imports sympy: 50 MB."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["shape"] = tuple(value.shape)
        return value


def trace(module: nn.Module, input_shape: Shape) -> tuple[Graph, dict[str, Tensor]]:
    """Graph and tensors of `module` for samples of `input_shape`; the tensors share the module's memory.

    Raises `UsageError` when the module cannot be traced or holds an operator outside `graph.KINDS`.
    """
    traced = trace_module(module, input_shape)
    return traced.graph, traced.tensors


def trace_module(module: nn.Module, input_shape: Shape) -> Traced:
    """`trace`, with the names that the tensors have in the module's state dict."""
    captured, sample, output = _capture(module, input_shape)
    builder = Builder(captured)
    for node in builder.captured.graph.nodes:
        translate(builder, node)
    ops = _reachable(builder.ops, _output(builder))
    if not any(op.is_layer for op in ops):
        raise UsageError(FORWARD, "no convolution or linear layer", "at least one")
    last = ops[-1]
    if len(last.shape) > 1:  # features are a vector: average what positions are left
        ops.append(Op("global_pool", "global_pool", (last.name,), last.shape[:1], last.shape))
    held = {op.name for op in ops}
    tensors = {key: tensor for key, tensor in builder.tensors.items() if key.rpartition(".")[0] in held}
    traced = Traced(with_blocks(tuple(ops)), tensors, {k: name for k, name in builder.names.items() if k in tensors})
    _check(traced, sample, output)
    return traced


def _capture(module: nn.Module, input_shape: Shape) -> tuple[fx.GraphModule, Tensor, Any]:
    """The symbolic trace in evaluation mode, every node knowing its output's shape; an input and its output.

    The module's mode is restored.
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    first = next(module.parameters(), torch.zeros(()))
    sample = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(first)
    try:
        captured = fx.symbolic_trace(module)
        with torch.no_grad():
            output = _Shapes(captured).run(sample.clone())
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(
            type(module).__name__,
            f"cannot be traced for input {input_shape}: {text[:300]}",
            "",
            "the forward must not branch on its input's values, and must fit its shape",
        ) from error
    finally:
        for part in training:
            part.training = True
    return captured, sample, output


def _check(traced: Traced, sample: Tensor, output: Tensor) -> None:
    """Raise `UsageError` unless the graph computes what the module computes.

    What a symbolic trace cannot see shows here: an in-place operator that changes a value which is read again.
    """
    with torch.no_grad():
        found = run(traced.graph, traced.tensors, sample)
    expected = output.flatten(2).mean(2) if output.dim() > 2 else output
    size = max(1.0, float(expected.abs().max()))
    if not torch.allclose(found, expected.reshape(found.shape), rtol=0.0, atol=AGREEMENT * size, equal_nan=True):
        raise UsageError(
            FORWARD,
            "computes something else than its operators one by one",
            "no in-place change of a value that is read again",
            "use F.relu(x) and x = x + y in place of inplace=True and x += y",
        )


def _output(builder: Builder) -> str:
    """Name of the operator whose output the module returns."""
    value = next(node for node in builder.captured.graph.nodes if node.op == "output").args[0]
    if not isinstance(value, fx.Node) or value not in builder.by_node:
        raise UsageError(FORWARD, f"returns {value!r}"[:120], "one tensor (N, ...) computed from the input")
    return builder.by_node[value].name


def _reachable(ops: Sequence[Op], last: str) -> list[Op]:
    """The input and the operators that `last` depends on, in order."""
    needed = {last, ops[0].name}
    for op in reversed(ops):
        if op.name in needed:
            needed.update(op.inputs)
    return [op for op in ops if op.name in needed]
