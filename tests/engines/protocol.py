"""What the tests of the protocol that all engines share are made of: nets, losses, and what a plan's values are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import assume
from torch import Tensor

from stages.artifacts.records import Array, LayerUpdate, detached_layers
from stages.engines.choice import Engine, TrainedNet, make_net
from stages.engines.native.library import is_built
from stages.engines.parameter import Floats
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.training.updates import Loss, Net
from tests.engines.random_graphs import distance_to_kinks, random_backbone, random_input
from tests.operators.random_graphs import mark
from tests.rounding import Bounded, gradient_bounds, in_double

Values = TypeVar("Values", Tensor, Array)

needs_native = pytest.mark.skipif(not is_built(), reason="the native library is not built: no C compiler")
on_every_engine = pytest.mark.parametrize("engine", [pytest.param("native", marks=needs_native), "torch"])


def net_of(
    backbone: Backbone,
    updates: Sequence[LayerUpdate],
    engine: str,
    turns: Sequence[Sequence[LayerUpdate]] = (),
) -> TrainedNet:
    return make_net(replace(backbone, engine=Engine(engine)), updates, turns)


def in_turns(updates: Sequence[LayerUpdate], count: int) -> list[tuple[LayerUpdate, ...]]:
    """A plan's channels and biases dealt out to so many plans that share none; layers that only end gradients stay."""
    dealt = [
        [replace(u, channels=u.channels[turn::count], bias=u.bias[turn::count]) for u in updates]
        for turn in range(count)
    ]
    return [tuple(update for update in turn if update.trains or update.detached) for turn in dealt]


def closed(loss: Callable[[Tensor], Tensor]) -> Loss:
    """A loss in torch as the stages have them: taken in float64, its gradient in the features' precision."""

    def value_and_gradient(features: Floats) -> tuple[float, Floats]:
        at = torch.tensor(features, dtype=torch.float64, requires_grad=True)
        value = loss(at)
        (gradient,) = torch.autograd.grad(value, at)
        return float(value.detach()), gradient.numpy().astype(features.dtype)

    return value_and_gradient


def taken_gradients(net: Net) -> list[Array]:
    """The parameters' gradients, which are 0 afterwards."""
    found = [parameter.gradient.copy() for parameter in net.parameters()]
    for parameter in net.parameters():
        parameter.gradient[...] = 0
    return found


def named_gradients(net: TrainedNet) -> dict[str, Array]:
    """The parameters' gradients in the names and shapes of `live_tensors`, and 0 afterwards.

    An engine orders its live values as it likes, so the gradients go where the values are, and come out by name.
    """
    before = [parameter.value.copy() for parameter in net.parameters()]
    for parameter, gradient in zip(net.parameters(), taken_gradients(net), strict=True):
        parameter.value[...] = gradient
    found = net.live_tensors()
    for parameter, value in zip(net.parameters(), before, strict=True):
        parameter.value[...] = value
    return found


def live_entries(
    graph: Graph, updates: Sequence[LayerUpdate], tensors: Mapping[str, Array | Tensor]
) -> dict[str, Array]:
    """Where the values lie that a plan trains, by the meaning of the axes: bool, in the shape of every tensor."""
    marked = {name: np.zeros(tuple(value.shape), bool) for name, value in tensors.items()}
    for update in updates:
        mark(graph[update.layer], update, marked)
    return marked


def live_slices(graph: Graph, updates: Sequence[LayerUpdate], tensors: Mapping[str, Values]) -> dict[str, Values]:
    """Whole tensors cut to what trains: by name, a row (live, values) for each live channel or bias, in their order."""
    found = {}
    for update in updates:
        alone = replace(update, channels=(), bias=())
        parts = {
            "weight": [replace(alone, channels=(channel,)) for channel in update.channels],
            "bias": [replace(alone, bias=(channel,)) for channel in update.bias],
        }
        for name, ones in ((f"{update.layer}.{what}", ones) for what, ones in parts.items() if ones):
            whole = tensors[name]
            rows = [whole[live_entries(graph, [one], tensors)[name]] for one in ones]
            found[name] = torch.stack(rows) if isinstance(whole, Tensor) else np.stack(rows)
    return found


def check_gradients(
    found: Mapping[str, Array | Tensor], dense: Mapping[str, Bounded], graph: Graph, updates: Sequence[LayerUpdate]
) -> None:
    """Assert that live gradients by name lie within the bounds of the whole tensors', element by element."""
    values, errors = ({name: getattr(each, what) for name, each in dense.items()} for what in ("value", "error"))
    values, errors = (live_slices(graph, updates, part) for part in (values, errors))
    assert found.keys() == values.keys()
    assert found
    for name, gradient in found.items():
        Bounded(values[name], errors[name]).check(gradient.reshape(len(gradient), -1), name)


def bounded(
    case: tuple[Graph, Sequence[LayerUpdate], int, int], loss: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> tuple[Backbone, Tensor, Bounded, dict[str, Bounded]]:
    """A case (graph, plan, batch, seed) as a backbone in `dtype` with a batch, and the bounds of its features and
    gradients. Cases where a maximum could be another value's are put aside."""
    graph, updates, batch, seed = case
    if graph.feature_dim * batch > 300:
        assume(False)  # the bounds take the loss's whole curvature
    backbone, x = random_backbone(graph, seed, dtype), random_input(graph, batch, seed, dtype)
    features, dense = gradient_bounds(backbone, x, in_double(loss), dtype, detached_layers(updates))
    pools = any(op.kind == "max_pool" for op in graph.ops)
    if pools and distance_to_kinks(backbone, x) <= float(features.error.max()):
        assume(False)
    return backbone, x, features, dense
