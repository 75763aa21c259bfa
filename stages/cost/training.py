"""What training costs when only the updates of a plan are live: backward MACs, and memory by a named model.

Memory is never a bare number. The models in `MEMORY_MODELS`:

* `paper`: TinyTrain's accounting (appendix A.4), which reproduces its Tables 2, 7 and 8: live weights (biases are not
  counted), their gradients and optimiser state, plus the larger of the inference peak and what is kept for backward,
  because the saved tensors reuse the inference buffers.
* `saved`: what this project's engine keeps: tensors for backward, gradients and optimiser state of everything live.
* `peak`: `saved` and the inference peak beside it.
* `arena`: what the native engine allocates, to the byte (`engines.native.memory`): each worker's arena and gradients,
  the live values, their gradients and optimiser state, the head's, and what each sample of a batch has outside the
  arena. Frozen weights are a figure of their own, the image. It is read from the lowered program, so it is no sum over
  layers as the others are.

MB in the papers means 2^20 bytes; everything here is bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from stages.artifacts.records import LayerUpdate, detached_layers
from stages.cost.model import inference_peak_bytes, paper_peak_bytes
from stages.cost.ops import input_gradient_macs
from stages.cost.ops import weight_gradient_macs as whole_weight_gradient_macs
from stages.engines.native.lowering import uncovered
from stages.engines.native.memory import Memory, memory_of
from stages.errors import UsageError
from stages.graphs.graph import Graph
from stages.graphs.keeping import held_bytes, holding
from stages.operators import Op
from stages.operators.op import ELEMENT_BYTES

OPTIMIZER_STATE: Mapping[str, int] = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}
"""Values of state per live value."""

HEAD = "/head"
"""Name of the linear classifier that `with_head` appends: no operator of a model has a slash in its name."""


def live_weights(op: Op, update: LayerUpdate) -> int:
    """Weights that train: an equal share of the layer's weights per live channel, along either axis."""
    return op.weights * len(update.channels) // update.axis_channels


def weight_gradient_macs(graph: Graph, update: LayerUpdate) -> int:
    """MACs per sample of the live channels' weight gradient: r_i * M_i with r_i exact (TinyTrain A.4).

    Of a layer that is called more than once, over all its calls.
    """
    whole = sum(map(whole_weight_gradient_macs, graph.uses(update.layer)))
    return whole * len(update.channels) // update.axis_channels


def reached(graph: Graph, updates: Iterable[LayerUpdate]) -> frozenset[str]:
    """Operators at whose outputs the backward pass needs a gradient."""
    updates = tuple(updates)
    return graph.gradient_flow({update.layer for update in updates if update.trains}, detached_layers(updates))


def passes_on(graph: Graph, updates: Iterable[LayerUpdate]) -> Iterator[tuple[Op, int]]:
    """The operators through which the backward pass goes on, and to how many of their inputs."""
    updates = tuple(updates)
    flow, ends = reached(graph, updates), detached_layers(updates)
    found = ((op, len(graph.wanted(op, flow, ends))) for op in graph.ops)
    return ((op, inputs) for op, inputs in found if inputs)


def plan_backward_macs(graph: Graph, updates: Iterable[LayerUpdate]) -> int:
    """MACs of one backward pass of one sample (TinyTrain appendix A.4).

    The live share of each live layer's weight gradient, and the input gradient of every operator behind the earliest
    live layer, detached ones aside; the earliest live layer itself passes no gradient on.
    """
    updates = tuple(updates)
    passed_on = sum(inputs * input_gradient_macs(op) for op, inputs in passes_on(graph, updates))
    return passed_on + sum(weight_gradient_macs(graph, update) for update in updates)


def saved_activation_bytes(graph: Graph, updates: Iterable[LayerUpdate], batch: int = 1, keep_bits: int = 32) -> int:
    """Bytes kept between the forward and the backward pass of a batch (`graphs.keeping`)."""
    return held_bytes(graph, holding(graph, tuple(updates)), batch, keep_bits)


def live_values(graph: Graph, updates: Iterable[LayerUpdate], *, biases: bool = True) -> int:
    """Number of values that train."""
    return sum(live_weights(graph[u.layer], u) + (len(u.bias) if biases else 0) for u in updates)


def _no_buffer(graph: Graph) -> int:
    return 0


class Term(NamedTuple):
    """One candidate for a memory model's activation term: saved activations plus an inference buffer."""

    saved: int
    """How many times they are held."""
    buffer_bytes: Callable[[Graph], int] = _no_buffer
    """Per sample."""


@dataclass(frozen=True)
class MemoryModel:
    """Named accounting: 4 bytes * live values * copies, plus the largest of `terms`.

    Every term is linear in what a plan adds, so a budget on the model is one linear constraint per term.
    """

    weight_copies: int
    """Beside gradient and state: 1 where the live values themselves are counted."""
    biases: bool
    terms: tuple[Term, ...]

    def bytes_per_value(self, optimizer: str) -> int:
        """Bytes per live value: itself where counted, its gradient, its optimiser state."""
        return ELEMENT_BYTES * (self.weight_copies + 1 + optimizer_state(optimizer))

    def total_bytes(self, graph: Graph, values: int, saved_bytes: int, *, batch: int, optimizer: str) -> int:
        """Bytes of training so many values, where a batch keeps `saved_bytes` for its backward pass."""
        activations = max(term.saved * saved_bytes + batch * term.buffer_bytes(graph) for term in self.terms)
        return values * self.bytes_per_value(optimizer) + activations


MEMORY_MODELS: Mapping[str, MemoryModel] = {
    "paper": MemoryModel(1, False, (Term(saved=1), Term(saved=0, buffer_bytes=paper_peak_bytes))),
    "saved": MemoryModel(0, True, (Term(saved=1),)),
    "peak": MemoryModel(0, True, (Term(saved=1, buffer_bytes=inference_peak_bytes),)),
}
"""Those that are linear in what a plan adds."""

ARENA = "arena"
"""The memory model that is not."""


def memory_model(name: str) -> MemoryModel:
    """The linear memory model of that name. Raises UsageError that lists the names there are."""
    check_memory_model(name)
    return MEMORY_MODELS[name]


def check_memory_model(name: str, graph: Graph | None = None) -> None:
    """Raise UsageError unless there is such a memory model, and it can be read for the graph."""
    if name not in (*MEMORY_MODELS, ARENA):
        raise UsageError("memory model", repr(name), "one of " + ", ".join((*MEMORY_MODELS, ARENA)))
    if name == ARENA and graph is not None and not covers(graph):
        fix = "use another memory model: " + ", ".join(MEMORY_MODELS)
        reason = uncovered(without_head(graph))
        raise UsageError("memory model arena", reason, "a graph that the native engine runs", fix)


@lru_cache(8)
def covers(graph: Graph) -> bool:
    """Whether the native engine runs the graph, and so the memory model `arena` can be read for it."""
    return not uncovered(without_head(graph))


def optimizer_state(name: str) -> int:
    """Values of state per live value. Raises UsageError that lists the optimisers there are."""
    if name not in OPTIMIZER_STATE:
        raise UsageError("optimizer", repr(name), "one of " + ", ".join(OPTIMIZER_STATE))
    return OPTIMIZER_STATE[name]


def memory_bytes(
    graph: Graph,
    updates: Iterable[LayerUpdate],
    *,
    model: str = "paper",
    batch: int = 1,
    optimizer: str = "adam",
    workers: int = 1,
    keep_bits: int = 32,
) -> int:
    """Bytes that training the updates takes by the named memory model, for a batch of `batch` samples.

    `workers` are the native engine's threads, which only `arena` counts; inputs of live layers are kept in `keep_bits`.

    Raises:
        UsageError: no such memory model or optimiser, or an operator that the native engine lacks (`arena`).
    """
    updates = tuple(updates)
    check_memory_model(model, graph)
    if model == ARENA:
        head = live_values(graph, (update for update in updates if update.layer == HEAD))
        memory = native_memory(graph, updates, keep_bits)
        return memory.working(batch=batch, workers=workers, state=optimizer_state(optimizer), head=head)
    accounting = memory_model(model)
    values = live_values(graph, updates, biases=accounting.biases)
    saved = saved_activation_bytes(graph, updates, batch, keep_bits)
    return accounting.total_bytes(graph, values, saved, batch=batch, optimizer=optimizer)


def native_memory(graph: Graph, updates: Iterable[LayerUpdate], keep_bits: int = 32) -> Memory:
    """What the native engine allocates for the updates; a head that was appended is not the engine's, and left out.

    Raises:
        UsageError: an operator that the native engine lacks.
    """
    return memory_of(without_head(graph), [update for update in updates if update.layer != HEAD], keep_bits)


def inference_totals(graph: Graph) -> dict[str, int]:
    """What the native engine allocates to run the graph: `inference_arena_bytes` of one worker, and `image_bytes`, its
    steps and weights; nothing where it lacks an operator."""
    if not covers(graph):
        return {}
    memory = native_memory(graph, ())
    return {"inference_arena_bytes": memory.arena, "image_bytes": memory.image}


def full_training_bytes(graph: Graph, batch: int, optimizer: str = "adam") -> int:
    """What training everything costs in a stock framework, as TinyTrain charges FullTrain (Table 2).

    Kept for backward, all in float32: the input of every layer, of its BatchNorm (the layer's output) and of every
    ReLU. Plus parameters (BatchNorm's scale and shift included), gradients and optimiser state. `graph` is in deploy
    form: a layer with a bias stands for a layer and its BatchNorm.
    """
    normalised = [op for op in graph.layers if op.bias]
    kept = sum(op.in_elements for op in graph.layers) + sum(op.elements for op in normalised)
    kept += sum(op.in_elements for op in graph.ops if op.operator.fused)
    parameters = sum(op.weights for op in graph.layers) + sum(2 * op.out_channels for op in normalised)
    return ELEMENT_BYTES * (batch * kept + parameters * (2 + optimizer_state(optimizer)))


def with_head(graph: Graph, classes: int) -> Graph:
    """The graph with a linear classifier of `classes` rows behind its features, its last operator (`HEAD`).

    In streams the linear head always trains: cost it by adding `whole_update(with_head(graph, C).ops[-1])`.
    """
    last = graph.ops[-1]
    head = Op(HEAD, "linear", (last.name,), (classes,), ((prod(last.shape),),), bias=True)
    return replace(graph, ops=(*graph.ops, head))


@lru_cache(8)
def without_head(graph: Graph) -> Graph:
    """The graph that `with_head` was given; any other graph is left as it is."""
    return replace(graph, ops=graph.ops[:-1]) if graph.output == HEAD else graph
