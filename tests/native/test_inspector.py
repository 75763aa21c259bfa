"""The native Fisher pass against torch's tape in double precision; memory to the byte, bits that nothing changes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.engines.native import library
from stages.engines.native.inspector import Inspector, fisher_bytes, lower_inspection
from stages.engines.native.lowering import NotCovered, uncovered
from stages.engines.torch import inspector as tape
from stages.errors import DataError
from stages.graphs.graph import Graph
from stages.importance.fisher import fisher_pass, inspected_layers
from stages.models.deploy import Backbone
from stages.operators import Op
from tests.engines import random_graphs as dense
from tests.native import random_graphs as everything
from tests.native.test_net import FEW, in_single, large, pull, rounding, small
from tests.operators import random_graphs as table_graphs

pytestmark = pytest.mark.skipif(not library.is_built(), reason="the native library is not built: make setup")


def native(backbone: Backbone, window, **options) -> Inspector:
    return Inspector(backbone.graph, in_single(backbone).tensors, window, **options)


def look(inspector, x: np.ndarray) -> dict[str, np.ndarray]:
    """Everything that a pass over these samples gives, by name."""
    features = inspector.features(x)
    found = inspector.sums(pull(features).astype(features.dtype))
    return {"features": features} | {
        f"{layer} {side}": value
        for layer, pair in found.items()
        for side, value in zip(("out", "in"), pair, strict=True)
    }


def on_tape(backbone: Backbone, window, x: torch.Tensor) -> dict[str, np.ndarray]:
    return look(tape.Inspector(backbone.graph, backbone.tensors, window), x.numpy())


def sizes_on_tape(backbone: Backbone, window, x: torch.Tensor) -> float:
    """The largest |a| |g| of any layer's ends: what bounds every sum of a g (Cauchy and Schwarz)."""
    graph, start = backbone.graph, frozenset(window)
    tensors = {name: torch.from_numpy(value) for name, value in backbone.tensors.items()}
    features, kept = tape.forward(graph, tensors, x, frozenset(tape.kept_names(graph, start)))
    seen = tape.backward(graph, tensors, kept, start, torch.from_numpy(pull(features.numpy())))
    pairs = [p for s in seen for p in ((s.output, s.output_gradient), (s.input, s.input_gradient))]
    return max(1.0, float(features.norm()), *(float(a.norm() * g.norm()) for a, g in pairs))


def check(backbone: Backbone, window, x: torch.Tensor, **options) -> None:
    """No further from double precision than rounding goes, by the measure of `test_net`."""
    exact, theirs = on_tape(backbone, window, x), on_tape(in_single(backbone), window, x.float())
    mine = look(native(backbone, window, **options), x.float().numpy())
    assert mine.keys() == exact.keys()
    scale = sizes_on_tape(backbone, window, x)
    for name, expected in exact.items():
        error, allowed = np.linalg.norm(mine[name] - expected), np.linalg.norm(theirs[name] - expected)
        assert error <= 4 * allowed + 4 * rounding(backbone.graph) * scale, f"{name}: {error:.3g}, torch {allowed:.3g}"


@st.composite
def windows(draw, graphs) -> tuple[Graph, tuple[str, ...], int, int]:
    """(graph, layers to inspect, batch, seed)."""
    graph = draw(graphs.filter(lambda graph: graph.layers))
    names = st.sampled_from([op.name for op in graph.layers])
    window = tuple(draw(st.lists(names, min_size=1, max_size=3, unique=True)))
    assume(graph.gradient_flow(frozenset(window)))
    return graph, window, draw(st.integers(1, 4)), draw(st.integers(0, 2**16))


@settings(FEW, max_examples=60)
@given(windows(dense.graphs()), st.sampled_from([0, 1, 4]))
def test_sums_are_those_of_the_tape(case, width):
    graph, window, batch, seed = case
    backbone = dense.random_backbone(graph, seed, torch.float64)
    x = dense.random_input(graph, batch, seed, torch.float64)
    assume(dense.distance_to_kinks(backbone, x) > 1e-4)
    check(backbone, window, x, width=width)


@settings(FEW, max_examples=60)
@given(windows(everything.graphs()))
def test_sums_through_every_kind_are_those_of_the_tape(case):
    check_case(case)


def check_case(case) -> None:
    graph, window, batch, seed = case
    backbone = table_graphs.random_backbone(graph, seed, torch.float64)
    x = table_graphs.random_input(graph, batch, seed, torch.float64)
    assume(dense.distance_to_kinks(backbone, x) > 1e-4)
    check(backbone, window, x)


@settings(FEW, max_examples=60)
@given(windows(table_graphs.graphs().filter(lambda graph: not uncovered(graph))))
def test_sums_over_tokens_are_those_of_the_tape(case):
    check_case(case)


@settings(FEW, max_examples=25)
@given(windows(dense.graphs()), st.integers(1, 3))
def test_threads_batches_and_places_change_no_bit(case, threads):
    graph, window, _, seed = case
    backbone = dense.random_backbone(graph, seed, torch.float32)
    x = dense.random_input(graph, 5, seed, torch.float32).numpy()
    one = [look_at_weighted(native(backbone, window), x[i : i + 1]) for i in range(len(x))]
    expected = {name: np.concatenate([each[name] for each in one]) for name in one[0]}
    options = {"threads": threads, "inspection": lower_inspection(graph, window, separate=threads == 2)}
    found = look_at_weighted(native(backbone, window, **options), x)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


def look_at_weighted(inspector: Inspector, x: np.ndarray) -> dict[str, np.ndarray]:
    """As `look`, with gradients that do not depend on the batch."""
    features = inspector.features(x)
    found = inspector.sums(np.cos(3 * features))
    return {layer: np.concatenate(pair, 1) for layer, pair in found.items()} | {"features": features}


@settings(FEW, max_examples=25)
@given(windows(dense.graphs()))
def test_every_width_gives_the_same_bits(case):
    graph, window, batch, seed = case
    backbone = dense.random_backbone(graph, seed, torch.float32)
    x = dense.random_input(graph, batch, seed, torch.float32).numpy()
    expected = look(native(backbone, window, width=1, same_bits=True), x)
    width = 4
    while width <= library.library(True).et_width():
        found = look(native(backbone, window, width=width, same_bits=True), x)
        assert all(np.array_equal(found[name], value) for name, value in expected.items())
        width *= 2


def test_potentials_are_torchs():
    backbone = small("mobilenetv2-w0.35")
    window = [op.name for op in backbone.graph.layers[-9:]]
    x = np.random.default_rng(0).standard_normal((7, *backbone.graph.input_shape), dtype=np.float32)

    def loss(features, targets):
        return (features**2).sum(1, dtype=np.float64) / 2, features

    def batches(size):
        return [(x[i : i + size], np.zeros(len(x[i : i + size]), np.int64)) for i in range(0, len(x), size)]

    mine = fisher_pass(native(backbone, window, threads=2), batches(4), loss)
    tensors = {name: value.astype(np.float64) for name, value in backbone.tensors.items()}
    double = [(pixels.astype(np.float64), targets) for pixels, targets in batches(3)]
    theirs = fisher_pass(tape.Inspector(backbone.graph, tensors, window), double, loss)
    assert mine.layers == theirs.layers == tuple(op.name for op in inspected_layers(backbone.graph, window))
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
    for side in ("output", "input"):
        for layer, expected in getattr(theirs, side).items():
            found = getattr(mine, side)[layer]
            assert np.linalg.norm(found - expected) <= 2e-3 * np.linalg.norm(expected), layer  # bits at thresholds


# ------------------------------------------------------------------------------------------------------- one small net


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small("mobilenetv2-w0.35")


@pytest.fixture(scope="module")
def window(backbone) -> list[str]:
    return [op.name for op in backbone.graph.layers[-9:]]


@pytest.fixture
def x(backbone) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((5, *backbone.graph.input_shape), dtype=np.float32)


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (1, 5), (2, 2), (2, 5)])
def test_memory_is_what_was_foreseen(backbone, window, x, threads, batch):
    inspector = native(backbone, window, threads=threads)
    features = inspector.features(x[:batch])
    sums = inspector.sums(np.ones_like(features))
    (rows,) = {id(array.base): array.base for pair in sums.values() for array in pair}.values()
    held = [features, rows, inspector._boundary, inspector._again]
    held += [array for worker in inspector._workers for array in (worker.arena, worker.gradient)]
    assert sum(array.nbytes for array in held) == fisher_bytes(backbone.graph, window, batch, workers=threads)


def test_a_pass_over_sixteen_samples_holds_less_than_the_tape_keeps_of_three():
    """MCUNet at 128 x 128, its last six blocks: what is kept between the ways is one sample's, and no arena is smaller
    with these steps."""
    graph = large("mcunet-5fps").graph
    window = [op.name for op in graph.layers if op.block >= len(graph.blocks) - 6]
    lowering = lower_inspection(graph, window).lowering
    assert lowering.arena_floats == lowering.bound_floats
    assert fisher_bytes(graph, window, 16) <= 3 * tape.fisher_bytes(graph, window, 1)


def test_what_arenas_held_before_changes_nothing(backbone, window, x):
    inspector = native(backbone, window, threads=2)
    expected = look_at_weighted(inspector, x)
    for worker in inspector._workers:
        worker.arena[:] = 0xFF
        worker.gradient[:] = np.nan
    found = look_at_weighted(inspector, x)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


def test_gradients_come_once_and_in_the_features_shape(backbone, window, x):
    inspector = native(backbone, window)
    with pytest.raises(DataError, match="features"):
        inspector.sums(np.ones((1, backbone.graph.feature_dim), np.float32))
    features = inspector.features(x)
    with pytest.raises(DataError, match="gradient at the features"):
        inspector.sums(features[1:])
    inspector.sums(features)
    with pytest.raises(DataError, match="call `features` first"):
        inspector.sums(features)
    with pytest.raises(DataError, match="model input"):
        inspector.features(x[:, 1:])


def test_a_layer_that_nothing_hears_of_has_no_sums():
    """Its output is multiplied by nothing that the features come from."""
    sizes = {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    entry = Op("input", "input", (), (2, 3, 3))
    heard, unheard = (Op(n, "conv", ("input",), (4, 3, 3), (entry.shape,), **sizes) for n in ("heard", "unheard"))
    graph = Graph((entry, unheard, heard, Op("mean", "global_pool", ("heard",), (4,), ((4, 3, 3),))))
    backbone = dense.random_backbone(graph, 0, torch.float32)
    x = dense.random_input(graph, 2, 0, torch.float32).numpy()
    assert look(native(backbone, ["heard", "unheard"]), x).keys() == {"features", "heard out", "heard in"}
    nothing = native(backbone, ["unheard"])
    assert nothing.sums(nothing.features(x)) == {}


def test_shared_layers_are_refused(backbone):
    op = backbone.graph.layers[-1]
    ops = (*backbone.graph.ops, Op("again", op.kind, (op.inputs[0],), op.shape, op.in_shapes, shares=op.name))
    with pytest.raises(NotCovered, match="again"):
        lower_inspection(Graph(ops), [op.name])


def test_the_inspector_needs_no_torch():
    code = "import sys, stages.engines.native.inspector, stages.importance.fisher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
