"""Predicted duration of one training step from a profile's measurements on this device, in whole nanoseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stages.artifacts.records import LayerUpdate, Profile
from stages.cost.training import passes_on
from stages.errors import DataError
from stages.graphs.graph import Graph

COLUMNS = ("forward_s", "input_gradient_s", "weight_gradient_s")
"""Measured columns that a prediction needs: seconds per layer for one sample, the operators behind it included."""


@dataclass(frozen=True)
class Durations:
    """Measured nanoseconds for one sample: of the whole forward pass, and of each layer's two gradients."""

    forward_ns: int
    input_gradient_ns: Mapping[str, int]
    weight_gradient_ns: Mapping[str, int]


def durations(profile: Profile | None) -> Durations:
    """The measurements of a profile.

    Raises:
        DataError: there is no profile, or it was written without measuring.
    """
    if profile is None or any(name not in profile.columns for name in COLUMNS):
        raise DataError("/profile", "no measured latency", ", ".join(COLUMNS), "run `edgetrain profile` on this device")
    forward, inputs, weights = ([round(1e9 * s) for s in profile.columns[name]] for name in COLUMNS)
    by_layer = (dict(zip(profile.layer, column, strict=True)) for column in (inputs, weights))
    return Durations(sum(forward), *by_layer)


def weight_gradient_ns(measured: Durations, update: LayerUpdate) -> int:
    """A live layer's weight gradient, in proportion to its live channels."""
    return measured.weight_gradient_ns[update.layer] * len(update.channels) // update.axis_channels


def predicted_latency_ns(graph: Graph, measured: Durations, updates: Iterable[LayerUpdate]) -> int:
    """Nanoseconds of one forward and backward pass of one sample when these updates train.

    The whole forward pass, the input gradient of every layer behind the earliest live one (detached ones aside), and
    the live layers' weight gradients. An estimate: a kernel over half the channels rarely takes exactly half the time.
    """
    updates = tuple(updates)
    passed_on = sum(measured.input_gradient_ns.get(op.owner, 0) * inputs for op, inputs in passes_on(graph, updates))
    return measured.forward_ns + passed_on + sum(weight_gradient_ns(measured, update) for update in updates)
