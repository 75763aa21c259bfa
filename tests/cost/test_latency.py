"""Predicted duration of a step."""

import numpy as np
import pytest

from stages.artifacts.records import LayerUpdate, Profile
from stages.cost.latency import durations, predicted_latency_ns
from stages.errors import DataError
from stages.graphs.updates import whole_update
from tests.cost.nets import inverted_residual

LAYERS = ("stem", "b.expand", "b.depthwise", "b.project")


def profile(**columns: list[float]) -> Profile:
    return Profile(LAYERS, {name: np.array(values) for name, values in columns.items()}, {})


def test_prediction_by_hand():
    graph = inverted_residual()
    measured = durations(
        profile(
            forward_s=[1e-6, 2e-6, 3e-6, 4e-6],
            input_gradient_s=[10e-6, 20e-6, 30e-6, 40e-6],
            weight_gradient_s=[100e-6, 200e-6, 300e-6, 400e-6],
        )
    )
    half = LayerUpdate("b.depthwise", "output", (0, 1, 2, 3), 8)
    assert predicted_latency_ns(graph, measured, [half]) == 10_000 + 40_000 + 150_000
    assert predicted_latency_ns(graph, measured, [whole_update(graph["b.project"])]) == 10_000 + 400_000
    assert predicted_latency_ns(graph, measured, []) == 10_000


@pytest.mark.parametrize("without", [None, profile(macs=[1, 2, 3, 4])])
def test_no_prediction_without_measurements(without):
    with pytest.raises(DataError, match="edgetrain profile"):
        durations(without)
