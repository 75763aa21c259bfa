"""The one check of a plan against a graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from stages.artifacts.records import LayerUpdate, detached_layers
from stages.errors import DataError
from stages.graphs.graph import Graph

AXES = ("output", "input")
FIX = "make a plan for this model with `edgetrain score-layers`"


def check_updates(updates: Sequence[LayerUpdate], graph: Graph) -> None:
    """Raise `DataError` unless the updates name layers of the model in execution order, each once, and their channels.

    There must be something to train, and a way for the gradient to each layer that does.
    """
    for update in updates:
        _check_update(update, graph)
    if not any(update.trains for update in updates):
        raise DataError("/plan", "nothing trains", "at least one live channel or bias", FIX)
    positions = [graph.position[update.layer] for update in updates]
    if any(a >= b for a, b in pairwise(positions)):
        raise DataError("/plan/layer", "layers repeated or out of order", "each layer once, in execution order", FIX)
    names = {update.layer for update in updates if update.trains}
    starts = graph.computed_by(names)
    cut_off = (graph.gradient_flow(names) & starts) - graph.gradient_flow(names, detached_layers(updates))
    if cut_off:
        where = f"/plan ({min(cut_off, key=graph.position.__getitem__)})"
        raise DataError(where, "every way to the features is detached", "one that is not, for its gradient", FIX)


def _check_update(update: LayerUpdate, graph: Graph) -> None:
    where = f"/plan ({update.layer})"
    op = graph.by_name.get(update.layer)
    if op is None or not op.is_layer or op.shares:
        raise DataError("/plan/layer", repr(update.layer), "a layer of this model", FIX)
    if update.axis not in AXES:
        raise DataError(where, f"axis {update.axis!r}", " or ".join(AXES), FIX)
    if update.axis == "input" and op.operator.by_output:
        raise DataError(where, f"input channels of a layer of kind {op.kind}", "output channels", FIX)
    channels = op.out_channels if update.axis == "output" else op.in_channels
    if update.axis_channels != channels:
        raise DataError(where, f"{update.axis_channels} {update.axis} channels", f"{channels}", FIX)
    if not update.trains and not update.detached:
        raise DataError(where, "nothing trains", "live channels or biases", FIX)
    _check_indices(where, update.channels, channels)
    _check_indices(f"{where} bias", update.bias, op.out_channels if op.bias else 0)


def _check_indices(where: str, indices: tuple[int, ...], count: int) -> None:
    ascending = all(a < b for a, b in pairwise(indices))
    if indices and not (ascending and indices[0] >= 0 and indices[-1] < count):
        found = f"channels {indices[0]}..{indices[-1]}"
        raise DataError(where, found, f"ascending numbers from 0 to {count - 1}" if count else "none", FIX)
