"""A record's model, ready to run: its graph and tensors in deploy form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from stages.artifacts.records import Array, InputSpec, Model
from stages.engines.choice import Engine, TrainedNet, choose, make_net, need_torch
from stages.engines.parameter import Floats
from stages.errors import DataError
from stages.graphs.folding import fold
from stages.graphs.graph import Graph
from stages.graphs.record import check_tensors, graph_tree, read_graph, tensor_shapes


@dataclass(frozen=True)
class Backbone:
    """A model in deploy form, ready to run: model input (N, *input.shape) -> features (N, D)."""

    graph: Graph
    tensors: dict[str, Floats]
    """float32, contiguous, `<operator>.<what>`."""
    input: InputSpec
    engine: Engine = field(default=Engine("native"))

    def features(self, x: Floats) -> Floats:
        """(N, *input.shape) float32 -> (N, D), as fast as this machine allows.

        From the first call on the tensors must keep their values. Raises `DataError` for an input of another shape.
        """
        return self._net.features(x)

    @cached_property
    def _net(self) -> TrainedNet:
        return make_net(self)


def deploy(
    model: Model,
    *,
    allow: str | None = None,
    engine: str = "auto",
    device: str = "cpu",
    same_bits: bool = False,
    keep_bits: int = 32,
    keep_rounding: str = "stochastic",
    on_note: Callable[[str], None] = lambda text: None,
) -> Backbone:
    """The record's backbone in deploy form, from either form, and the engine that runs it.

    `on_note` hears why it is not the engine that a user would expect.

    Raises `SchemaError` for a graph that is none, `DataError` when tensors do not fit it or are not finite, what
    `engines.choice.choose` raises, and for schema 1 `UsageError` for code that `allow` does not name.
    """
    model = with_graph(model, allow=allow)
    graph, tensors = open_graph(model), dict(model.tensors)
    check_tensors(tensor_shapes(graph), tensors, "/model/tensors")
    if model.form == "batchnorm":
        graph, tensors = fold(graph, tensors)
    elif any(op.operator.statistics for op in graph.ops):
        raise DataError("/model/graph", "a BatchNorm in deploy form", "form batchnorm, or a folded graph")
    chosen = choose(engine, graph, device, same_bits=same_bits)
    if chosen.note:
        on_note(chosen.note)
    chosen = replace(chosen, keep_bits=keep_bits, keep_rounding=keep_rounding)
    return Backbone(graph, {name: _float32(name, array) for name, array in tensors.items()}, model.input, chosen)


def open_graph(model: Model) -> Graph:
    """The record's graph, in the record's own form. Raises `SchemaError` for one that is none or takes other inputs."""
    assert model.graph is not None
    graph = read_graph(model.graph)
    if graph.input_shape != model.input.shape:
        raise DataError("/model/graph", f"an input {graph.input_shape}", f"{model.input.shape}, as /model/input says")
    return graph


def _float32(name: str, array: Array) -> Floats:
    if array.dtype.kind not in "fiub":
        raise DataError(f"/model/tensors/{name}", f"{array.dtype}", "numbers")
    value = np.array(array, np.float32, order="C")
    masks = name.endswith(".value")  # a constant may hold an attention mask's infinities
    if not (~np.isnan(value) if masks else np.isfinite(value)).all():
        raise DataError(f"/model/tensors/{name}", "a value that is not finite", "finite weights")
    return value


def store(model: Model, backbone: Backbone) -> Model:
    """The record with this backbone, in deploy form; head and version stay."""
    tensors: dict[str, Array] = dict(backbone.tensors)
    return replace(model, form="deploy", tensors=tensors, input=backbone.input, graph=graph_tree(backbone.graph))


def with_graph(model: Model, *, allow: str | None = None) -> Model:
    """The record as schema 2 has it. Raises `UsageError` for code that `allow` does not name, `DataError` for tensors
    that do not fit the architecture."""
    if model.graph is not None:
        return model
    need_torch("a record of schema 1")
    from stages.models.modules import upgraded

    return upgraded(model, allow)
