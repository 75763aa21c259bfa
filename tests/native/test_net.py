"""The native engine against double precision: gradients as good as the torch engine's, memory as planned, bits that do
not depend on vectors, threads or what an arena held before."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.artifacts.records import LayerUpdate, Model, detached_layers
from stages.engines.native import library
from stages.engines.native.lowering import NotCovered, lower, uncovered
from stages.engines.native.memory import memory_of
from stages.engines.native.net import LOT, NativeNet
from stages.engines.torch.live import Live
from stages.engines.torch.net import SparseNet
from stages.errors import DataError
from stages.graphs.graph import Graph
from stages.models import registry
from stages.models.deploy import Backbone, deploy
from stages.operators import Op
from tests.engines.random_graphs import cases, dense_gradients, distance_to_kinks, random_backbone, random_input
from tests.native import random_graphs as everything
from tests.operators import random_graphs as table_graphs

pytestmark = pytest.mark.skipif(not library.is_built(), reason="the native library is not built: make setup")
FEW = settings(max_examples=40, deadline=None, derandomize=True)
EPSILON = 2.0**-24


def weighted(features: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient differs for every feature of every sample."""
    weights = torch.linspace(-1, 2, features.numel(), dtype=features.dtype).reshape(features.shape)
    return (features * weights).sum() + (features**2).mean()


def pull(features: np.ndarray) -> np.ndarray:
    """The gradient of `weighted`."""
    return np.linspace(-1, 2, features.size).reshape(features.shape) + 2 * features / features.size


def native(backbone: Backbone, updates, **options) -> NativeNet:
    return NativeNet(backbone.graph, in_single(backbone).tensors, updates, **options)


def in_single(backbone: Backbone) -> Backbone:
    return replace(backbone, tensors={name: np.float32(value) for name, value in backbone.tensors.items()})


def train(net: NativeNet, x: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    features, kept = net.forward(net.prefix(x))
    net.clear_gradients()
    net.backward(kept, pull(features))
    return features, net.gradients()


def live_slices(graph: Graph, updates, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Whole gradients cut to what trains."""
    found = {}
    for update in updates:
        if update.trains:
            parameters = Live(graph[update.layer], update, tensors).parameters()
            found |= {name: value.detach().numpy() for name, value in parameters.items()}
    return found


def torch_gradients(backbone: Backbone, updates, x: torch.Tensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features and gradients of the torch engine in single precision."""
    net = SparseNet(in_single(backbone), updates)
    features = net.suffix(net.prefix(x.float()))
    weighted(features).backward()
    return features.detach().numpy(), {
        name: p.grad.numpy() for name, p in zip(net.live_names, net.parameters(), strict=True)
    }


def rounding(graph: Graph) -> float:
    """How far rounding may carry a result, relative to the sums of absolute values that make it up: an epsilon for
    each addition of the longest dot product, there and back, through every operator."""
    longest = max(op.weights // op.out_channels for op in graph.layers)
    return 4 * EPSILON * len(graph.ops) * max(8.0, longest**0.5)


@FEW
@given(cases(), st.sampled_from([0, 1, 4]))
def test_gradients_are_no_worse_than_the_torch_engines(case, width):
    graph, updates, batch, seed = case
    backbone, x = random_backbone(graph, seed, torch.float64), random_input(graph, batch, seed, torch.float64)
    assume(distance_to_kinks(backbone, x) > 1e-4)  # nearer, a mask bit may differ
    features, dense = dense_gradients(backbone, x, weighted, detached_layers(updates))
    exact = live_slices(graph, updates, dense)
    theirs_features, theirs = torch_gradients(backbone, updates, x)
    mine_features, mine = train(native(backbone, updates, width=width), x.float().numpy())
    assert mine.keys() == exact.keys() == theirs.keys()
    scale = max(1.0, *(float(gradient.norm()) for gradient in dense.values()))  # sums that cancel round by this scale
    for found, other, expected, size in [
        (mine_features, theirs_features, features.numpy(), float(features.norm())),
        *((mine[name], theirs[name], exact[name], scale) for name in exact),
    ]:
        error, allowed = np.linalg.norm(found - expected), np.linalg.norm(other - expected)
        assert error <= allowed + rounding(graph) * max(1.0, size), f"{error:.3g}, the torch engine {allowed:.3g}"


@settings(FEW, max_examples=25)
@given(cases())
def test_shared_memory_and_chains_change_nothing(case):
    graph, updates, batch, seed = case
    backbone = random_backbone(graph, seed, torch.float32)
    x = random_input(graph, batch, seed, torch.float32).numpy()
    expected = train(native(backbone, updates), x)
    for options in ({"separate": True}, {"chains": False}):
        features, gradients = train(native(backbone, updates, lowering=lower(graph, updates, **options)), x)
        assert np.array_equal(features, expected[0])
        assert all(np.array_equal(gradients[name], value) for name, value in expected[1].items())


@settings(FEW, max_examples=25)
@given(cases())
def test_every_width_gives_the_same_bits(case):
    graph, updates, batch, seed = case
    backbone = random_backbone(graph, seed, torch.float32)
    x = random_input(graph, batch, seed, torch.float32).numpy()
    expected = train(native(backbone, updates, width=1, same_bits=True), x)
    width = 4
    while width <= library.library(True).et_width():
        features, gradients = train(native(backbone, updates, width=width, same_bits=True), x)
        assert np.array_equal(features, expected[0])
        assert all(np.array_equal(gradients[name], value) for name, value in expected[1].items())
        width *= 2


# ----------------------------------------------------------------------------------------------------- architectures

ARCHITECTURES = (
    "mcunet-5fps", "mobilenetv2-w0.35", "proxyless-w0.3", "mobilenetv1-w0.25", "squeezenet", "cnn4", "ds-cnn", "cnn1d",
    "mlp",
)  # fmt: skip


def small(arch: str) -> Backbone:
    """A registry architecture with random weights, at a small input size where it takes pictures."""
    return random_weights(
        arch, {"size": 64} if registry.input_spec(arch, {}).kind == "image" and arch != "cnn4" else {}
    )


def large(arch: str) -> Backbone:
    """At 128 x 128."""
    return random_weights(arch, {"size": 128})


def random_weights(arch: str, args: dict[str, int]) -> Backbone:
    state = registry.build(arch, args).state_dict()
    tensors = {name: value.numpy() for name, value in state.items() if not name.endswith("num_batches_tracked")}
    return deploy(Model(arch, args, registry.input_spec(arch, args), "batchnorm", tensors))


def every_other(backbone: Backbone) -> list[LayerUpdate]:
    """Half of the channels of every third layer, from both ends, with biases."""
    chosen = backbone.graph.layers[-1::-3][:4][::-1]
    return [
        LayerUpdate(
            op.name, axis, tuple(range(0, count, 2)), count, tuple(range(0, op.out_channels, 3)) if op.bias else ()
        )
        for number, op in enumerate(chosen)
        for axis, count in [("input", op.in_channels) if number % 2 else ("output", op.out_channels)]
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures_train_as_in_the_torch_engine(arch):
    backbone = small(arch)
    updates = every_other(backbone)
    x = torch.rand(2, *backbone.graph.input_shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    theirs_features, theirs = torch_gradients(backbone, updates, x)
    net = native(backbone, updates)
    features, gradients = train(net, x.numpy())
    assert np.linalg.norm(features - theirs_features) <= 1e-5 * np.linalg.norm(theirs_features)
    for name, value in theirs.items():
        error = np.linalg.norm(gradients[name] - value)
        assert error <= 2e-3 * np.linalg.norm(value), name  # a few bits at thresholds; exactness: the properties above
    assert net.sizes.arena_bytes == memory_of(backbone.graph, updates).arena == net._workers[0].arena.nbytes


def test_mcunets_arena_is_below_what_the_inference_peak_alone_takes_elsewhere():
    """MCUNet at 128 x 128 with a plan like TinyTrain's: the target is 174,080 bytes."""
    graph = large("mcunet-5fps").graph
    updates = [
        LayerUpdate(layer, "output", tuple(range(0, graph[layer].out_channels, 2)), graph[layer].out_channels)
        for layer in ("blocks.10.expand", *(f"blocks.{n}.depthwise" for n in (10, 11, 12, 13)))
    ]
    lowering = lower(graph, updates)
    assert 4 * lowering.bound_floats <= lowering.arena_bytes <= 174_080


# ------------------------------------------------------------------------------------------------------- one small net


@pytest.fixture
def backbone() -> Backbone:
    return small("mobilenetv2-w0.35")


@pytest.fixture
def updates(backbone) -> list[LayerUpdate]:
    return every_other(backbone)


@pytest.fixture
def x(backbone) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.standard_normal((2 * LOT + 3, *backbone.graph.input_shape), dtype=np.float32)


def test_the_number_of_threads_changes_no_bit(backbone, updates, x):
    expected = train(native(backbone, updates), x)
    found = train(native(backbone, updates, threads=2), x)
    assert np.array_equal(found[0], expected[0])
    assert all(np.array_equal(found[1][name], value) for name, value in expected[1].items())


def test_what_an_arena_held_before_changes_nothing(backbone, updates, x):
    net = native(backbone, updates)
    expected = train(net, x)
    net._workers[0].arena[:] = 0xFF
    boundary = net.prefix(x)
    net._workers[0].arena[:] = 0xFF
    features, kept = net.forward(boundary)
    net._workers[0].arena[:] = 0xFF
    net.clear_gradients()
    net.backward(kept, pull(features))
    assert np.array_equal(features, expected[0])
    assert all(np.array_equal(net.gradients()[name], value) for name, value in expected[1].items())


def allocated(net: NativeNet, x: np.ndarray) -> int:
    """Bytes of the distinct arrays that a forward and a backward pass of these samples hold."""
    boundary = net.prefix(x)
    features, kept = net.forward(boundary)
    gradient = pull(features).astype(np.float32)
    net.backward(kept, gradient)
    arrays = [net.live, net.gradient, features, gradient, kept, net._kept, net._joined(boundary), *boundary]
    arrays += [array for worker in net._workers for array in (worker.arena, worker.gradient)]
    owners = {id(owner): owner for owner in map(owner_of, arrays)}
    return sum(array.nbytes for array in owners.values())


def owner_of(array: np.ndarray) -> np.ndarray:
    """The array whose memory this one looks at; one that `aligned` made, a slice of bytes with a margin, is its own."""
    base = array.base
    return base if isinstance(base, np.ndarray) and base.dtype == array.dtype and base.ndim == 2 else array


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (2, 1), (2, 2 * LOT + 3)])
def test_memory_is_what_was_foreseen(backbone, updates, x, threads, batch):
    net, foreseen = native(backbone, updates, threads=threads), memory_of(backbone.graph, updates)
    assert foreseen.image == net.image.nbytes == net.sizes.image_bytes
    found = allocated(net, x[:batch])
    assert found == foreseen.working(batch=batch, workers=threads)
    live = net.live.nbytes
    assert foreseen.working(batch=batch, workers=threads, state=2) == found + 2 * live
    assert foreseen.working(batch=batch, workers=threads, head=7) == found + 2 * 7 * 4


@settings(FEW, max_examples=25)
@given(everything.cases(), st.integers(1, 2))
def test_memory_of_any_graph_is_what_was_foreseen(case, threads):
    graph, updates, batch, seed = case
    net = native(random_backbone(graph, seed, torch.float32), updates, threads=threads)
    foreseen = memory_of(graph, updates)
    assert foreseen.image == net.image.nbytes
    found = allocated(net, random_input(graph, batch, seed, torch.float32).numpy())
    assert found == foreseen.working(batch=batch, workers=threads)


@settings(FEW, max_examples=25)
@given(cases())
def test_a_sample_alone_trains_as_it_does_among_others(case):
    """What it keeps never leaves the arena; its gradient has the same bits as in a batch whose others pull nothing."""
    graph, updates, _, seed = case
    backbone = random_backbone(graph, seed, torch.float32)
    x = random_input(graph, 2, seed, torch.float32).numpy()
    both, alone = native(backbone, updates), native(backbone, updates)
    features, kept = both.forward(both.prefix(x))
    pulls = np.ones_like(features)
    pulls[1] = 0
    both.backward(kept, pulls)
    mine, kept = alone.forward(alone.prefix(x[:1]))
    alone.backward(kept, pulls[:1])
    assert np.array_equal(mine, features[:1])
    for name, value in both.gradients().items():
        assert np.array_equal(alone.gradients()[name], value)


def test_what_a_single_sample_kept_is_lost_with_the_next_pass(backbone, updates, x):
    net = native(backbone, updates)
    features, kept = net.forward(net.prefix(x[:1]))
    net.prefix(x[:1])
    with pytest.raises(RuntimeError, match="right behind its forward pass"):
        net.backward(kept, features)


def test_the_engine_needs_no_torch():
    code = "import sys, stages.engines.native.net; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_running_forward_again_equals_keeping(backbone, updates, x):
    net = native(backbone, updates)
    features, gradients = train(net, x)
    net.clear_gradients()
    net.again(net.prefix(x), pull(features))
    assert all(np.array_equal(net.gradients()[name], value) for name, value in gradients.items())


def test_only_live_values_change(backbone, updates, x):
    net = native(backbone, updates)
    before = {name: value.copy() for name, value in backbone.tensors.items()}
    train(net, x)
    net.live -= np.float32(0.1) * net.gradient
    after = net.tensors()
    changed = {name for name in before if not np.array_equal(after[name], before[name])}
    assert changed == net.live_tensors().keys() == net.changed_tensors().keys()
    allowed = {name: torch.zeros(value.shape) for name, value in before.items()}
    for update in updates:
        live = Live(backbone.graph[update.layer], update, allowed)
        for parameter in live.parameters().values():
            parameter.data.fill_(1)
        live.write(allowed)
    for name, value in after.items():
        frozen = allowed[name].numpy() == 0
        assert np.array_equal(value[frozen], before[name][frozen]), name


def test_live_values_can_be_taken_out_and_put_back(backbone, updates, x):
    net, other = native(backbone, updates), native(backbone, updates)
    net.live *= np.float32(0.5)
    assert not np.array_equal(net.features(x), other.features(x))
    other.load_live(net.live_tensors())
    assert np.array_equal(net.features(x), other.features(x))
    third = native(backbone, updates)
    third.load_whole(net.changed_tensors())
    assert np.array_equal(third.live, net.live)
    name = next(iter(net.live_tensors()))
    with pytest.raises(DataError, match="live slice"):
        other.load_live({name: net.live_tensors()[name]})
    with pytest.raises(DataError, match=name):
        other.load_live({**net.live_tensors(), name: net.live_tensors()[name][:1]})


def test_bytes_are_scaled_on_the_way_in(backbone, updates):
    net = native(backbone, updates)
    channels, height, width = backbone.graph.input_shape
    pixels = np.random.default_rng(2).integers(0, 256, (3, height, width, channels), dtype=np.uint8)
    scale, offset = np.float32([0.01, 0.02, 0.03]), np.float32([-1, 0, 1])
    expected = net.features((pixels * scale + offset).transpose(0, 3, 1, 2))
    net.prepare_bytes(scale, offset)
    assert np.allclose(net.features(pixels), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match="bytes"):
        net.features(pixels[:, :-1])


def test_a_boundary_of_another_plan_is_refused(backbone, updates, x):
    net = native(backbone, updates)
    with pytest.raises(DataError, match="boundary"):
        net.suffix(tuple(value[..., :-1] for value in net.prefix(x)))
    with pytest.raises(DataError, match="model input"):
        net.prefix(x[:, :, 1:])


def test_a_kind_without_a_kernel_is_named(backbone):
    ops = tuple(
        Op(op.name, "power", op.inputs, op.shape, op.in_shape) if op.kind == "global_pool" else op
        for op in backbone.graph.ops
    )
    assert "power" in uncovered(Graph(ops))
    with pytest.raises(NotCovered, match="power"):
        lower(Graph(ops), [])


@pytest.mark.parametrize(
    ("update", "found"),
    [
        (LayerUpdate("nowhere", "output", (0,), 4), "nowhere"),
        (LayerUpdate("stem", "output", (0,), 5), "5 output channels"),
        (LayerUpdate("stem", "output", (), 16), "nothing trains"),
        (LayerUpdate("stem", "output", (2, 1), 16), "ascending"),
    ],
)
def test_a_plan_of_another_model_is_refused(backbone, update, found):
    with pytest.raises(DataError, match=found):
        lower(backbone.graph, [update])


# -------------------------------------------------------------------------------------------- everything with a rule


@settings(FEW, max_examples=60)
@given(everything.cases())
def test_graphs_of_every_kind_train(case):
    assert uncovered(case[0]) == ""
    check_training(case)


@settings(FEW, max_examples=100)
@given(table_graphs.cases().filter(lambda case: not uncovered(case[0])))
def test_tokens_attention_and_whatever_else_is_covered_trains(case):
    check_training(case)


@settings(FEW, max_examples=40)
@given(table_graphs.cases().filter(lambda case: not uncovered(case[0])))
def test_memory_and_width_change_nothing_of_whatever_is_covered(case):
    graph, updates, batch, seed = case
    backbone = table_graphs.random_backbone(graph, seed, torch.float32)
    x = table_graphs.random_input(graph, batch, seed, torch.float32).numpy()
    expected = train(native(backbone, updates, width=1, same_bits=True), x)
    apart = {"lowering": lower(graph, updates, separate=True)}
    for options in (apart, {"width": 0}, {"width": 4}):
        features, gradients = train(native(backbone, updates, same_bits=True, **options), x)
        assert np.array_equal(features, expected[0], equal_nan=True)
        assert all(np.array_equal(gradients[name], value, equal_nan=True) for name, value in expected[1].items())


def check_training(case) -> None:
    """Features and gradients against double precision, no worse than the torch engine's."""
    graph, updates, batch, seed = case
    backbone = table_graphs.random_backbone(graph, seed, torch.float64)
    x = table_graphs.random_input(graph, batch, seed, torch.float64)
    assume(distance_to_kinks(backbone, x) > 1e-4)
    features, dense = table_graphs.dense_gradients(backbone, x, weighted, detached_layers(updates))
    exact = live_slices(graph, updates, dense)
    assume(all(value.float().isfinite().all() for value in (features, *dense.values())))
    theirs_features, theirs = torch_gradients(backbone, updates, x)
    mine_features, mine = train(native(backbone, updates), x.float().numpy())
    scale = max(1.0, *(float(gradient.norm()) for gradient in dense.values()))
    for found, other, expected, size in [
        (mine_features, theirs_features, features.numpy(), float(features.norm())),
        *((mine[name], theirs[name], exact[name], scale) for name in exact),
    ]:
        error, allowed = np.linalg.norm(found - expected), np.linalg.norm(other - expected)
        assert error <= 4 * allowed + 4 * rounding(graph) * max(1.0, size), (
            f"{error:.3g}, the torch engine {allowed:.3g}"
        )


@settings(FEW, max_examples=300)
@given(table_graphs.graphs())
def test_graphs_of_the_whole_table_are_lowered_or_refused_by_name(graph):
    reason = uncovered(graph)
    if not reason:
        lower(graph, [])
        return
    assert any(f"operator {op.name}: " in reason for op in graph.ops)
    with pytest.raises(NotCovered):
        lower(graph, [])
