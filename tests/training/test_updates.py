"""Exact updates in micro-batches, and cached outputs of the frozen prefix: over every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from stages.artifacts.hdf5 import decode_tree, encode_tree
from stages.artifacts.records import Array, Group, LayerUpdate
from stages.engines.choice import TrainedNet
from stages.engines.parameter import Boundary, Floats, Parameter
from stages.errors import DataError
from stages.fsl.protonet import support_loss
from stages.training.optimizers import Optimizing, checked_step, make_optimizer
from stages.training.updates import PrefixCache, Source, boundary_of, cache_prefix, features_of, gradient_update
from tests.engines.protocol import (
    bounded,
    check_gradients,
    closed,
    named_gradients,
    needs_native,
    net_of,
    on_every_engine,
    taken_gradients,
)
from tests.engines.random_graphs import cases, random_backbone, random_input
from tests.engines.torch.test_net import chain
from tests.rounding import gradient_bounds, loss_bound

UPDATES = (LayerUpdate("middle", "output", (0, 2), 4, (1,)), LayerUpdate("last", "input", (1, 3), 4))
LABELS = np.array([0, 1, 1, 2, 0])
in_every_precision = pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("torch", torch.float64),
        ("torch", torch.float32),
        pytest.param("native", torch.float32, marks=needs_native),
    ],
)


def prototypes_loss(features: Tensor) -> Tensor:
    """ProtoNet's of five support and five query samples, the gradient flowing through the prototypes."""
    support, query, labels = features[:5], features[5:], torch.from_numpy(LABELS)
    means = torch.stack([support[labels == way].mean(0) for way in range(3)])
    return F.cross_entropy(10 * F.normalize(query) @ F.normalize(means).t(), labels.flip(0))


def coupled(features: Tensor) -> Tensor:
    """A loss that is not the sum of its values on micro-batches; its curvature is the same everywhere."""
    return features.sum(0).square().sum()


LOSS = support_loss(LABELS, LABELS[::-1].copy(), 3, 10.0)
"""The stage's form of `prototypes_loss`."""


def net_and_input(engine: str, dtype: torch.dtype = torch.float32) -> tuple[TrainedNet, Floats]:
    net = net_of(random_backbone(chain(), 3, dtype), UPDATES, engine)
    return net, random_input(chain(), 10, 3, dtype).numpy()


Sources = Callable[[TrainedNet, Floats], Source | Sequence[Source]]


def check_update(engine: str, dtype: torch.dtype, micro_batch: int, sources: Sources = lambda net, x: x) -> None:
    """The loss and every live gradient within their rounding bounds (`tests.rounding`)."""
    backbone = random_backbone(chain(), 3, dtype)
    x = random_input(chain(), 10, 3, dtype)
    features, dense = gradient_bounds(backbone, x, prototypes_loss, dtype)
    net = net_of(backbone, UPDATES, engine)
    loss = LOSS if dtype == torch.float32 else closed(prototypes_loss)
    found = gradient_update(net, sources(net, x.numpy()), loss, micro_batch=micro_batch)
    loss_bound(prototypes_loss, features).check(np.float64(found), "loss")
    check_gradients(named_gradients(net), dense, chain(), UPDATES)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 9, 10, 100])
@in_every_precision
def test_any_micro_batch_gives_the_update_of_the_whole_batch(engine, dtype, micro_batch):
    """The exact gradient of the whole batch, up to what the order of sums may change."""
    check_update(engine, dtype, micro_batch)


@pytest.mark.parametrize("micro_batch", [0, 4])
@in_every_precision
def test_sources_are_joined_in_order(engine, dtype, micro_batch):
    check_update(engine, dtype, micro_batch, lambda net, x: [cache_prefix(net, x[:5], micro_batch=2), x[5:]])


@in_every_precision
@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 4))
def test_micro_batches_of_random_models_with_a_loss_that_couples_samples(engine, dtype, case, micro_batch):
    graph, updates, batch, seed = case
    backbone, x, features, dense = bounded((graph, updates, batch + 1, seed), coupled, dtype)
    net = net_of(backbone, updates, engine)
    found = gradient_update(net, x.numpy(), closed(coupled), micro_batch=micro_batch)
    loss_bound(coupled, features, largest=1e6).check(np.float64(found), "loss")
    check_gradients(named_gradients(net), dense, graph, updates)


@on_every_engine
def test_plain_accumulation_would_be_another_update(engine):
    """A loss that couples samples is not the sum of its values on micro-batches, so two passes are needed."""
    net, x = net_and_input(engine)
    gradient_update(net, x, closed(coupled))
    whole = taken_gradients(net)
    for half in (x[:5], x[5:]):
        gradient_update(net, half, closed(coupled))
    assert any(
        np.linalg.norm(a - b) > 0.1 * np.linalg.norm(b) for a, b in zip(taken_gradients(net), whole, strict=True)
    )


@on_every_engine
@pytest.mark.parametrize("micro_batch", [0, 3])
def test_the_loss_sees_all_features_once_and_may_train_values_of_its_own(engine, micro_batch):
    """A linear head under the mean square of its scores: dL/dW = 2 / (N C) scores^T features."""
    net, x = net_and_input(engine)
    head, calls = Parameter(np.float32([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])), []

    def loss(features: Floats) -> tuple[float, Floats]:
        calls.append(features)
        scores = features @ head.value.T
        head.gradient += 2 / scores.size * scores.T @ features
        return float((scores**2).mean()), 2 / np.float32(scores.size) * scores @ head.value

    value = gradient_update(net, x, loss, micro_batch=micro_batch)
    (features,) = calls
    np.testing.assert_allclose(features, net.features(x), rtol=1e-4)
    weight = torch.tensor(head.value, dtype=torch.float64, requires_grad=True)
    expected = (torch.tensor(features, dtype=torch.float64) @ weight.T).square().mean()
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(head.gradient, weight.grad.numpy(), rtol=1e-4)


@on_every_engine
def test_updates_accumulate(engine):
    net, x = net_and_input(engine)
    gradient_update(net, x, LOSS, micro_batch=3)
    once = taken_gradients(net)
    for _ in range(2):
        gradient_update(net, x, LOSS, micro_batch=3)
    for twice, gradient in zip(taken_gradients(net), once, strict=True):
        np.testing.assert_allclose(twice, 2 * gradient, rtol=1e-5, atol=1e-5 * float(np.abs(gradient).max()))


class Watched:
    """A net, and with how many samples each of its passes was called."""

    def __init__(self, net: TrainedNet) -> None:
        self._net = net
        self.sizes: dict[str, list[int]] = {"prefix": [], "suffix": [], "forward": [], "backward": []}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)

    def prefix(self, x: Floats) -> Boundary:
        self.sizes["prefix"].append(len(x))
        return self._net.prefix(x)

    def suffix(self, boundary: Boundary) -> Floats:
        self.sizes["suffix"].append(len(boundary[0]))
        return self._net.suffix(boundary)

    def forward(self, boundary: Boundary) -> tuple[Floats, Any]:
        self.sizes["forward"].append(len(boundary[0]))
        return self._net.forward(boundary)

    def backward(self, kept: Any, gradient: Floats) -> None:
        self.sizes["backward"].append(len(gradient))
        self._net.backward(kept, gradient)


@on_every_engine
def test_no_pass_holds_more_samples_than_a_micro_batch(engine):
    """Two lots of ten and five: no piece reaches over the end of the first. The whole batch takes one pass."""
    net, x = net_and_input(engine)
    watched, zero = Watched(net), lambda features: (0.0, np.zeros_like(features))
    gradient_update(watched, [x, x[:5]], zero, micro_batch=4)
    pieces = [4, 4, 2, 4, 1]
    assert watched.sizes == {"prefix": pieces * 2, "suffix": pieces, "forward": pieces, "backward": pieces}
    watched = Watched(net)
    gradient_update(watched, [x, x[:5]], zero)
    assert watched.sizes == {"prefix": [10, 5], "suffix": [], "forward": [15], "backward": [15]}
    watched = Watched(net_of(random_backbone(chain(), 3, torch.float32), [], engine))
    gradient_update(watched, x, zero, micro_batch=4)
    assert watched.sizes == {"prefix": [4, 4, 2], "suffix": [4, 4, 2], "forward": [], "backward": []}


def kept_bytes(net: TrainedNet, x: Floats, micro_batch: int) -> int:
    """Most bytes that autograd holds at once for the suffix."""
    held, most = {}, 0

    def note(tensor: Tensor) -> int:
        nonlocal most
        held[id(tensor)] = tensor
        most = max(most, sum(t.untyped_storage().nbytes() for t in held.values()))
        return id(tensor)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda key: held.pop(key)):
        gradient_update(net, x, lambda features: (0.0, np.ones_like(features)), micro_batch=micro_batch)
    return most


def test_memory_depends_on_the_micro_batch_only():
    net, x = net_and_input("torch")
    sizes = [kept_bytes(net, np.tile(x, (times, 1, 1, 1)), 5) for times in (1, 2, 4)]
    assert sizes[0] == sizes[1] == sizes[2] > 0
    assert kept_bytes(net, x, 10) == 2 * sizes[0]


# --------------------------------------------------------------------------------------------------------- the cache


@in_every_precision
@settings(max_examples=20, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 3), st.integers(0, 3))
def test_cached_outputs_give_bit_equal_features(engine, dtype, case, fill, use):
    """However the cache was filled, and however it is used, unless torch's matrix products are cached."""
    graph, updates, batch, seed = case
    still = {op.name for op in graph.layers} - graph.downstream({update.layer for update in updates})
    fill = use if engine == "torch" and any(graph[name].kind == "linear" for name in still) else fill
    net = net_of(random_backbone(graph, seed, dtype), updates, engine)
    x = random_input(graph, batch, seed, dtype).numpy()
    cache = cache_prefix(net, x, micro_batch=fill)
    assert len(cache) == batch
    assert np.array_equal(features_of(net, cache, micro_batch=use), features_of(net, x, micro_batch=use))


@on_every_engine
def test_cached_updates_are_bit_equal(engine):
    net, x = net_and_input(engine)
    loss = gradient_update(net, x, LOSS, micro_batch=4)
    direct = taken_gradients(net)
    assert gradient_update(net, cache_prefix(net, x), LOSS, micro_batch=4) == loss
    assert all(np.array_equal(a, b) for a, b in zip(taken_gradients(net), direct, strict=True))


@on_every_engine
def test_a_cache_survives_training(engine):
    net, x = net_and_input(engine)
    cache, before = cache_prefix(net, x), features_of(net, x)
    optimizer = make_optimizer(net.parameters(), Optimizing(optimizer="adam"))
    for _ in range(3):
        loss = gradient_update(net, cache, LOSS)
        checked_step(optimizer, loss, rate=0.1, clip_norm=0.0, where="")
    assert np.array_equal(features_of(net, cache), features_of(net, x))
    assert not np.array_equal(features_of(net, cache), before)


@on_every_engine
def test_rows_of_a_cache(engine):
    net, x = net_and_input(engine)
    cache, rows = cache_prefix(net, x), np.array([7, 0, 3])
    assert np.array_equal(features_of(net, cache[rows]), features_of(net, x[rows]))
    assert np.array_equal(features_of(net, cache[2:5]), features_of(net, x[2:5]))


@on_every_engine
def test_a_piece_of_a_cache_is_memory_of_its_own(engine):
    """Matrix products of torch round by the alignment of their input: a view into the cache would begin anywhere."""
    net, x = net_and_input(engine)
    cache = cache_prefix(net, x)
    for whole, piece in zip(cache.boundary, cache[3:5].boundary, strict=True):
        assert np.array_equal(piece, whole[3:5])
        assert not np.shares_memory(piece, whole)


@on_every_engine
def test_a_cache_goes_through_a_file(engine):
    net, x = net_and_input(engine)
    cache = cache_prefix(net, x)
    image = encode_tree(Group(arrays=cache.arrays()))
    back = PrefixCache.from_arrays(decode_tree(image).arrays)
    assert np.array_equal(features_of(net, back), features_of(net, x))
    wrong: list[dict[str, Array]] = [{"boundary1": cache.arrays()["boundary0"]}, {}]
    for arrays in wrong:
        with pytest.raises(DataError, match="boundary0"):
            PrefixCache.from_arrays(arrays)


@on_every_engine
def test_a_boundary_in_words_is_that_of_its_operators_and_engine(engine):
    def words(*updates: LayerUpdate) -> str:
        return boundary_of(net_of(random_backbone(chain(), 3, torch.float32), updates, engine))

    assert words(*UPDATES) == words(*UPDATES)
    assert words(*UPDATES).startswith(f"act ({engine}")
    assert words(LayerUpdate("stem", "output", (0,), 4)).startswith(f"input ({engine}")


@needs_native
def test_the_native_engines_boundary_is_that_of_one_plan():
    """It orders channels by what trains, so that another plan's would be read wrongly: the words tell them apart."""
    nets = [
        net_of(random_backbone(chain(), 3, torch.float32), [LayerUpdate("middle", "input", (channel,), 4)], "native")
        for channel in (0, 3)
    ]
    assert nets[0].boundary == nets[1].boundary
    assert boundary_of(nets[0]) != boundary_of(nets[1])
