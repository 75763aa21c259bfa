"""`profile`: what a model costs per layer, computed from shapes, and what it takes on this machine, measured.

The run's model leaves in deploy form (BatchNorm folded), which is what everything after `profile` works on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from stages.artifacts.records import Array, Profile, Run
from stages.cost.model import (
    LayerCost,
    cost_table,
    forward_macs,
    full_backward_macs,
    inference_peak_bytes,
    paper_peak_bytes,
)
from stages.cost.training import full_training_bytes, inference_totals
from stages.engines.choice import layer_times, make_net, threads_of
from stages.engines.parameter import Floats
from stages.engines.timing import LayerTimes, median_and_spread, repeat
from stages.graphs.graph import Graph
from stages.measurement.energy import find_meter, joules_per_run
from stages.measurement.process import process_memory
from stages.methods.scheduling import Point, frontier, scheduling
from stages.models.deploy import Backbone, deploy, store
from stages.planning.baselines import named_plan
from stages.settings.profiling import Profiling as Profiling


def profile_run(
    run: Run,
    config: Profiling,
    *,
    allow: str | None = None,
    machine: Path = Path("/"),
    on_step: Callable[[int], None] = lambda done: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Run:
    """The run with a profile, its model in deploy form.

    `allow` names user code that may be imported; `machine` is where the kernel's files are found; `on_step` gets the
    number of operators measured; `on_note` a line where another engine computes than a user would expect.

    Raises `DataError` for weights that do not fit the model, `UsageError` for an operator without a cost rule.
    """
    backbone = deploy(run.model, allow=allow, engine=config.engine, device=config.device, on_note=on_note)
    table = cost_table(backbone.graph)
    columns, totals = cost_columns(table), cost_totals(backbone.graph, table)
    if config.measure:
        measured_columns, measured_totals = measure(backbone, config, machine, on_step)
        columns, totals = {**columns, **measured_columns}, {**totals, **measured_totals}
    profile = Profile(tuple(row.layer for row in table), columns, totals)
    return replace(run, model=store(run.model, backbone), profile=profile)


def frontier_of(run: Run, config: Profiling, page_dir: str | None = None, *, allow: str | None = None) -> list[Point]:
    """What `train-sparse --ram` takes for the run's plan, or for all layers where it has none, under several budgets.

    Raises `OutputError` for a folder that cannot be written.
    """
    backbone = deploy(run.model, allow=allow, engine=config.engine, device=config.device)
    updates = named_plan("full", backbone.graph) if run.plan is None else run.plan.updates
    return frontier(scheduling(backbone, updates, profile=run.profile, page_dir=page_dir))


# ----------------------------------------------------------------------------------------------------------- computed


def cost_columns(table: tuple[LayerCost, ...]) -> dict[str, Array]:
    """Layer costs as columns, integers (L,); the sums of training a layer beside them."""
    names = [field.name for field in fields(LayerCost) if field.name not in ("layer", "kind")]
    columns: dict[str, Array] = {name: _integers([getattr(row, name) for row in table]) for name in names}
    columns["kind"] = np.array([row.kind.encode() for row in table])
    columns["backward_macs"] = _integers([row.backward_macs for row in table])
    columns["saved_bytes"] = _integers([row.saved_bytes for row in table])
    return columns


def _integers(values: list[int]) -> Array:
    return np.array(values, dtype=np.int64)


def cost_totals(graph: Graph, table: tuple[LayerCost, ...]) -> dict[str, Any]:
    """What the whole model costs, per sample where the name does not say otherwise."""
    return {
        "layers": len(table),
        "parameters": sum(row.parameters for row in table),
        "weights": sum(row.weights for row in table),
        "macs": forward_macs(graph),
        "backward_macs": full_backward_macs(graph),
        "saved_bytes": sum(row.saved_bytes for row in table),
        "inference_peak_bytes": inference_peak_bytes(graph),
        "paper_peak_bytes": paper_peak_bytes(graph),
        **inference_totals(graph),
        "full_training_bytes": full_training_bytes(graph, 1),
    }


# ----------------------------------------------------------------------------------------------------------- measured


def measure(
    backbone: Backbone, config: Profiling, machine: Path, on_step: Callable[[int], None]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Measured columns and totals: seconds for one sample, bytes of this process, joules where a sensor tells."""
    x = np.zeros((1, *backbone.graph.input_shape), np.float32)
    times = layer_times(backbone, x, config.repeats, on_step=on_step)
    step = _training_step(backbone, x)
    totals: dict[str, Any] = {
        "engine": backbone.engine.name,
        "threads": threads_of(backbone.engine),
        "repeats": config.repeats,
    }
    for name, run in (("forward", lambda: backbone.features(x)), ("full_step", step)):
        totals[f"{name}_s"], totals[f"{name}_spread_s"] = median_and_spread(repeat(run, config.repeats))
    meter, totals["energy_source"] = find_meter(machine, config.power_watts)
    if meter is not None:
        totals["forward_j"] = joules_per_run(meter, lambda: backbone.features(x))
        totals["full_step_j"] = joules_per_run(meter, step)
    totals |= process_memory(machine / "proc")
    return _time_columns([times[op.name] for op in backbone.graph.layers]), totals


def _time_columns(times: list[LayerTimes]) -> dict[str, Array]:
    columns: dict[str, Array] = {}
    for name in ("forward", "backward", "input_gradient", "weight_gradient"):
        figures = np.array([median_and_spread(getattr(one, name)) for one in times])
        columns[f"{name}_s"], columns[f"{name}_spread_s"] = figures[:, 0], figures[:, 1]
    return columns


def _training_step(backbone: Backbone, x: Floats) -> Callable[[], None]:
    """Forward and backward pass of one sample with every weight live."""
    net = make_net(backbone, named_plan("full", backbone.graph))
    gradient = np.ones((len(x), backbone.graph.feature_dim), np.float32)

    def step() -> None:
        _, kept = net.forward(net.prefix(x))
        net.backward(kept, gradient)

    return step
