"""Models as torch modules: the form in which code defines, meta-trains and captures them.

A record of schema 1 has no graph: its architecture is built and captured again, for user models from the code that the
caller allows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stages.artifacts.records import Array, Model
from stages.engines.torch import reference
from stages.graphs.blocks import with_blocks
from stages.graphs.folding import fold
from stages.graphs.graph import Graph
from stages.graphs.record import check_tensors, graph_tree, tensor_shapes
from stages.models import registry
from stages.models.deploy import open_graph, with_graph
from stages.models.state import arrays_of, from_state, state_rows, trained_keys
from stages.operators import Shape
from stages.operators.op import Forward

WRONG_CODE = "are --arch and --arg those of the weights?"


class Cut(Protocol):
    """Which channels of a graph a training step keeps (`fsl.slicing`)."""

    @property
    def graph(self) -> Graph: ...
    def tensors(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def write_back(self, whole: Mapping[str, Tensor], parts: Mapping[str, Tensor], names: Sequence[str]) -> None: ...


class Net(nn.Module):
    """A record's model as a torch module whose parameters train: (N, *input) -> (N, D), BatchNorm in place if it is."""

    cut: Cut | None = None
    """Set for a step that trains some of the channels alone."""
    rules: Mapping[str, Forward] = reference.NO_RULES
    """Set for a pass in which operators of these names compute otherwise."""

    def __init__(self, graph: Graph, tensors: Mapping[str, Array], trained: frozenset[str]) -> None:
        super().__init__()
        self.graph, self.names = graph, tuple(tensors)
        statistics = {f"{op.owner}.{what}" for op in graph.ops for what in op.operator.statistics}
        self._statistics = sorted(statistics)
        for i, (name, array) in enumerate(tensors.items()):
            value = torch.from_numpy(np.array(array, dtype=np.float32))
            layer = graph[name.rpartition(".")[0]].is_layer
            if name not in statistics and (name in trained or layer):
                self.register_parameter(f"value{i}", nn.Parameter(value))
            else:
                self.register_buffer(f"value{i}", value)

    def forward(self, x: Tensor) -> Tensor:
        values = self.values()
        if self.cut is None:
            return reference.run(self.graph, values, x, training=self.training, rules=self.rules)
        parts = self.cut.tensors(values)
        features = reference.run(self.cut.graph, parts, x, training=self.training)
        if self.training:
            self.cut.write_back(values, parts, self._statistics)
        return features

    def values(self) -> dict[str, Tensor]:
        """The graph's tensors by name: parameters and buffers of this module."""
        return {name: getattr(self, f"value{i}") for i, name in enumerate(self.names)}

    def arrays(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """The graph's tensors from a state of this module."""
        return {name: state[f"value{i}"] for i, name in enumerate(self.names)}


def trainable(model: Model, *, allow: str | None = None) -> Net:
    """The record's model as a module in evaluation mode, in the record's own form."""
    model = with_graph(model, allow=allow)
    graph = open_graph(model)
    check_tensors(tensor_shapes(graph), model.tensors, "/model/tensors")
    net = Net(graph, model.tensors, trained_keys(model))
    return net.eval()


# ------------------------------------------------------------------------------------------------------------ schema 1


def upgraded(model: Model, allow: str | None) -> Model:
    """The record of schema 1 as schema 2 has it. Raises as `deploy.with_graph`."""
    module, captured = code_of(model.arch, model.arch_args, model.input.shape, allow=allow)
    last = final_linear(captured)
    cut = last if last and f"{last}.weight" not in model.tensors else ""
    state = arrays_of(module)
    if model.form == "batchnorm":
        expected = {name: tuple(value.shape) for name, value in state.items() if is_weight(name)}
        expected = {name: shape for name, shape in expected.items() if not cut or name.rpartition(".")[0] != cut}
        check_tensors(expected, model.tensors, "/model/tensors", WRONG_CODE)
        state |= model.tensors
    tensors = from_state(captured, state)
    graph: Graph = captured.graph
    if cut:
        graph, tensors = without_last(graph, tensors)
    rows, rest = state_rows(module, state, captured, cut)
    if model.form == "deploy":
        graph, _ = fold(graph, tensors)
        tensors = _old_tensors(graph, model.tensors)
    return replace(model, tensors=tensors, graph=graph_tree(graph), state=rows, rest=rest)


def _old_tensors(graph: Graph, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Schema 1's deploy form: a BatchNorm that is a layer was a depthwise convolution, (C, 1, 1) for (C,)."""
    shapes = tensor_shapes(graph)
    found = dict(tensors)
    for name, shape in shapes.items():
        if name in found and len(shape) == 1 and found[name].size == shape[0]:
            found[name] = found[name].reshape(shape)
    check_tensors(shapes, found, "/model/tensors", WRONG_CODE)
    return found


def code_of(
    arch: str, arch_args: Mapping[str, Any], shape: Shape, *, allow: str | None = None
) -> tuple[nn.Module, Any]:
    """An architecture's module with its initial weights, and its capture."""
    if ":" in arch:
        from stages.graphs.capture import capture

        module = registry.build(arch, arch_args, allow=allow)
        return module, capture(module, shape)
    return _known(arch, json.dumps(arch_args, sort_keys=True), shape)


@lru_cache(maxsize=16)
def _known(arch: str, arguments: str, shape: Shape) -> tuple[nn.Module, Any]:
    from stages.graphs.capture import capture

    module = registry.build(arch, json.loads(arguments))
    return module, capture(module, shape)


def final_linear(captured: Any) -> str:
    """Name of the linear layer that a user's classifier ends in; empty for a backbone."""
    last = captured.graph.ops[-1]
    known = f"{last.name}.weight" in captured.origins
    return last.name if last.is_layer and not last.kernel and last.operator.candidate and known else ""


def without_last(graph: Graph, tensors: Mapping[str, Any]) -> tuple[Graph, dict[str, Any]]:
    """The graph and tensors without the last operator and its tensors."""
    last = graph.ops[-1].name
    return with_blocks(graph.ops[:-1]), {k: value for k, value in tensors.items() if k.rpartition(".")[0] != last}


def is_weight(name: str) -> bool:
    """Whether schema 1 kept this entry of a state dict: everything but BatchNorm's batch counters."""
    return not name.endswith("num_batches_tracked")


def state(module: nn.Module) -> dict[str, Array]:
    """A module's state dict as arrays, without BatchNorm's batch counters: a model in schema 1's batchnorm form."""
    return {name: value.detach().cpu().numpy().copy() for name, value in module.state_dict().items() if is_weight(name)}
