"""Plans as records: costing a set of updates, checking one against a model, and reading one that a user wrote.

A hand-made plan is a TOML or JSON file that lists layers:

    name = "my-plan"            # optional

    [[layer]]
    layer = "blocks.12.expand"
    ratio = 0.5                 # a share of the channels, chosen as `score-layers --channel-rule` says ...
    axis = "input"              # optional: output (default) or input

    [[layer]]
    layer = "blocks.13.project"
    channels = [0, 3, 17]       # ... or the channels themselves
    bias = true                 # optional: the biases of the layer train too

    [[layer]]
    layer = "mix"
    bias = true                 # neither ratio nor channels: the biases alone

In JSON the same: {"name": "my-plan", "layer": [{"layer": "blocks.12.expand", "ratio": 0.5}, ...]}.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stages.artifacts.records import Array, LayerUpdate, Plan
from stages.cost.training import ARENA, HEAD, covers, memory_bytes, native_memory, plan_backward_macs
from stages.errors import DataError
from stages.graphs.checking import AXES, check_updates
from stages.graphs.graph import Graph
from stages.graphs.updates import whole_update
from stages.operators import Op
from stages.planning.channels import axis_of, make_update

Ranking = Callable[[Op, str], Array]
"""(layer, axis) -> importance of its channels along the axis (C,)."""

KEYS = frozenset({"layer", "ratio", "channels", "axis", "bias"})


def make_plan(
    name: str,
    updates: Iterable[LayerUpdate],
    graph: Graph,
    *,
    memory_model: str = "paper",
    batch: int = 1,
    optimizer: str = "adam",
    workers: int = 1,
    keep_bits: int = 32,
    facts: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan record of these updates, sorted into execution order, with its cost; the accounting joins the facts.

    Where the native engine runs the graph, so does what it allocates (`native_facts`), whatever the memory model.

    Raises:
        DataError: the updates do not fit the model (see `check_plan`).
        UsageError: no such memory model or optimiser.
    """
    ordered = tuple(sorted(updates, key=lambda update: graph.position.get(update.layer, -1)))
    check_updates(ordered, graph)
    accounting: dict[str, Any] = {"batch": batch, "optimizer": optimizer, "workers": workers, "keep_bits": keep_bits}
    memory = memory_bytes(graph, ordered, model=memory_model, **accounting)
    known = {**accounting, **native_facts(graph, ordered, **accounting), **(facts or {})}
    return Plan(name, ordered, memory, memory_model, plan_backward_macs(graph, ordered), known)


def native_facts(
    graph: Graph, updates: Sequence[LayerUpdate], *, batch: int, optimizer: str, workers: int, keep_bits: int = 32
) -> dict[str, int]:
    """What the native engine allocates for a plan; nothing where it lacks an operator.

    `arena_bytes` of one worker; `arena_training_bytes`, all that the memory model `arena` counts, with the linear head
    where the graph ends in one; `image_bytes`, the steps and the frozen weights.
    """
    if not covers(graph):
        return {}
    memory = native_memory(graph, updates, keep_bits)
    head = [whole_update(graph[HEAD])] if graph.output == HEAD else []
    together = (*(update for update in updates if update.layer != HEAD), *head)
    accounting: dict[str, Any] = {"batch": batch, "optimizer": optimizer, "workers": workers, "keep_bits": keep_bits}
    working = memory_bytes(graph, together, model=ARENA, **accounting)
    return {"arena_bytes": memory.arena, "arena_training_bytes": working, "image_bytes": memory.image}


def check_plan(plan: Plan, graph: Graph) -> None:
    """Raise `DataError` unless the plan is one for this model."""
    check_updates(plan.updates, graph)


# ------------------------------------------------------------------------------------------------- hand-made plans


def parse_plan(text: str, where: str, graph: Graph, ranking: Ranking) -> tuple[str, tuple[LayerUpdate, ...]]:
    """Name and updates (execution order) of a hand-made plan; `where` is its file name, `.json` or TOML.

    Raises:
        DataError: not TOML or JSON, an unknown key, layer or channel, or a value of the wrong kind.
    """
    document = _load(text, where)
    unknown = document.keys() - {"name", "layer"}
    rows = document.get("layer")
    if unknown or not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        found = f"keys {sorted(document)}" if unknown or rows is None else "an empty or malformed list `layer`"
        raise DataError(where, found, "`name` and a list of tables `layer`")
    updates = [_row_update(row, f"{where} layer {i}", graph, ranking) for i, row in enumerate(rows, start=1)]
    updates.sort(key=lambda update: graph.position[update.layer])
    check_updates(updates, graph)
    name = document.get("name", "hand-made")
    if not isinstance(name, str) or not name:
        raise DataError(where, f"name {name!r}", "a word")
    return name, tuple(updates)


def _load(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text) if where.endswith(".json") else tomllib.loads(text)
    except ValueError as error:
        raise DataError(where, str(error), "TOML or JSON", "see the plan file's format in the manual") from error
    if not isinstance(document, dict):
        raise DataError(where, type(document).__name__, "a table with a list `layer`")
    return document


def _row_update(row: Mapping[str, Any], where: str, graph: Graph, ranking: Ranking) -> LayerUpdate:
    unknown = sorted(row.keys() - KEYS)
    if unknown:
        raise DataError(where, f"key {unknown[0]!r}", "one of " + ", ".join(sorted(KEYS)))
    name = row.get("layer")
    if not isinstance(name, str) or name not in graph.by_name or not graph[name].is_layer:
        raise DataError(where, f"layer {name!r}", "a layer of this model", "`edgetrain inspect` lists them")
    op = graph[name]
    axis, bias = row.get("axis", "output"), row.get("bias", False)
    if axis not in AXES or not isinstance(bias, bool):
        raise DataError(where, f"axis {axis!r}, bias {bias!r}", "axis output or input; bias true or false")
    weights = _weights(row, where, op, axis, ranking)
    return replace(weights, bias=tuple(range(op.out_channels)) if bias and op.bias else ())


def _weights(row: Mapping[str, Any], where: str, op: Op, axis: str, ranking: Ranking) -> LayerUpdate:
    """The live weights of one row: by list, by ratio, or none."""
    if "ratio" in row and "channels" in row:
        raise DataError(where, "both ratio and channels", "one of them")
    axis, count = axis_of(op, axis)
    if "ratio" in row:
        ratio = row["ratio"]
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise DataError(where, f"ratio {ratio!r}", "a number above 0, at most 1")
        return make_update(op, axis, None if ratio == 1 else ranking(op, axis), ratio)
    channels = row.get("channels", [])
    if not isinstance(channels, list) or not all(type(channel) is int for channel in channels):
        raise DataError(where, f"channels {channels!r}", "a list of channel numbers")
    return LayerUpdate(op.name, axis, tuple(sorted(channels)), count)
