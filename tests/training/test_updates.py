"""Exact updates in micro-batches, and cached outputs of the frozen prefix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.artifacts.hdf5 import decode_tree, encode_tree
from stages.artifacts.records import Group, LayerUpdate, detached_layers
from stages.engines.torch.net import SparseNet
from stages.errors import DataError
from stages.fsl.protonet import support_loss
from stages.models.deploy import Backbone
from stages.training.updates import PrefixCache, cache_prefix, features_of, gradient_update
from tests.engines.random_graphs import cases, random_backbone, random_input
from tests.engines.torch.test_net import chain, expected_gradients
from tests.rounding import Bounded, gradient_bounds, in_double, loss_bound

UPDATES = (LayerUpdate("middle", "output", (0, 2), 4, (1,)), LayerUpdate("last", "input", (1, 3), 4))
LABELS = torch.tensor([0, 1, 1, 2, 0])


def prototypes_loss(ways: int = 3):
    """The ProtoNet loss of five support and five query samples, the gradient flowing through the prototypes."""
    return support_loss(LABELS, LABELS.flip(0), ways, 10.0)


def net_and_input(dtype: torch.dtype = torch.float64) -> tuple[SparseNet, torch.Tensor]:
    backbone = random_backbone(chain(), 3, dtype)
    return SparseNet(backbone, UPDATES), random_input(chain(), 10, 3, dtype)


def gradients(net: SparseNet) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 9, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_micro_batch_gives_the_update_of_the_whole_batch(micro_batch, dtype):
    """The exact gradient of the whole batch, up to what the order of sums may change (`tests.rounding`)."""
    backbone, x = random_backbone(chain(), 3, dtype), random_input(chain(), 10, 3, dtype)
    check_update(backbone, UPDATES, x, in_double(prototypes_loss()), micro_batch)


def check_update(backbone: Backbone, updates, x: torch.Tensor, loss, micro_batch: int, sources=lambda net: []) -> None:
    """The loss and every live gradient within their rounding bounds; none where the loss does not depend on it."""
    net = SparseNet(backbone, updates)
    features, dense = gradient_bounds(backbone, x, loss, x.dtype, detached_layers(updates))
    found = gradient_update(net, sources(net) or x, loss, micro_batch=micro_batch)
    loss_bound(loss, features).check(torch.tensor(found, dtype=torch.float64), "loss")
    values, errors = ({name: getattr(each, what) for name, each in dense.items()} for what in ("value", "error"))
    bounds = [expected_gradients(net, backbone, part, updates) for part in (values, errors)]
    for gradient, value, error in zip(gradients(net), *bounds, strict=True):
        Bounded(value, error).check(torch.zeros_like(value) if gradient is None else gradient)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 4))
def test_micro_batches_of_random_models_with_a_loss_that_couples_samples(case, micro_batch):
    graph, updates, batch, seed = case
    assume(graph.feature_dim * (batch + 1) <= 300)  # the bound takes the loss's whole curvature
    backbone, x = random_backbone(graph, seed, torch.float64), random_input(graph, batch + 1, seed, torch.float64)

    def coupled(features: torch.Tensor) -> torch.Tensor:
        return ((features @ features.t()).softmax(1) ** 2).sum()

    check_update(backbone, updates, x, coupled, micro_batch)


def test_plain_accumulation_would_be_another_update():
    """A loss that couples samples is not the sum of its values on micro-batches, so two passes are needed."""
    net, x = net_and_input()

    def coupled(features: torch.Tensor) -> torch.Tensor:
        return ((features @ features.t()).softmax(1) ** 2).sum()

    gradient_update(net, x, coupled)
    whole = gradients(net)
    for half in (x[:5], x[5:]):
        gradient_update(net, half, coupled)
    assert any((a - b).norm() > 0.1 * b.norm() for a, b in zip(gradients(net), whole, strict=True))


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_sources_are_joined_in_order(micro_batch):
    backbone, x = random_backbone(chain(), 3, torch.float64), random_input(chain(), 10, 3, torch.float64)

    def sources(net: SparseNet) -> list:
        return [cache_prefix(net, x[:5], micro_batch=2), x[5:]]

    check_update(backbone, UPDATES, x, prototypes_loss(), micro_batch, sources)


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_parameters_of_the_loss_get_their_gradients(micro_batch):
    net, x = net_and_input()
    head = torch.nn.Linear(5, 2, dtype=torch.float64)
    gradient_update(net, x, lambda features: head(features).pow(2).mean(), micro_batch=micro_batch)
    expected = torch.autograd.grad(head(net.features(x)).pow(2).mean(), head.weight)[0]
    assert torch.allclose(head.weight.grad, expected)


def test_updates_accumulate():
    net, x = net_and_input()
    gradient_update(net, x, prototypes_loss())
    once = [parameter.grad.clone() for parameter in net.parameters()]
    gradient_update(net, x, prototypes_loss(), micro_batch=3)
    for parameter, gradient in zip(net.parameters(), once, strict=True):
        assert torch.allclose(parameter.grad, 2 * gradient)


def kept_bytes(net: SparseNet, x: torch.Tensor, micro_batch: int) -> int:
    """Most bytes that autograd holds at once for the suffix."""
    held, most = {}, 0

    def note(tensor: torch.Tensor) -> int:
        nonlocal most
        held[id(tensor)] = tensor
        most = max(most, sum(t.untyped_storage().nbytes() for t in held.values()))
        return id(tensor)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda key: held.pop(key)):
        gradient_update(net, x, lambda features: _CountFree.apply(features), micro_batch=micro_batch)
    return most


class _CountFree(torch.autograd.Function):
    """Sum of all features that keeps nothing."""

    @staticmethod
    def forward(ctx, features):
        ctx.shape = features.shape
        return features.sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.expand(ctx.shape)


def test_memory_depends_on_the_micro_batch_only():
    net, x = net_and_input(torch.float32)
    sizes = [kept_bytes(net, x.repeat(times, 1, 1, 1), 5) for times in (1, 2, 4)]
    assert sizes[0] == sizes[1] == sizes[2]
    assert kept_bytes(net, x, 10) == 2 * sizes[0]


# --------------------------------------------------------------------------------------------------------- the cache


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 3), st.integers(0, 3), st.sampled_from([torch.float32, torch.float64]))
def test_cached_outputs_give_bit_equal_features(case, fill, use, dtype):
    """However the cache was filled, and however it is used, unless matrix products are cached."""
    graph, updates, batch, seed = case
    frozen = {op.name for op in graph.layers} - graph.downstream({update.layer for update in updates})
    fill = use if any(graph[name].kind == "linear" for name in frozen) else fill
    net = SparseNet(random_backbone(graph, seed, dtype), updates)
    x = random_input(graph, batch, seed, dtype)
    cache = cache_prefix(net, x, micro_batch=fill)
    assert len(cache) == batch
    assert torch.equal(features_of(net, cache, micro_batch=use), features_of(net, x, micro_batch=use))


def test_cached_updates_are_bit_equal():
    net, x = net_and_input(torch.float32)
    loss = gradient_update(net, x, prototypes_loss(), micro_batch=4)
    direct = gradients(net)
    assert gradient_update(net, cache_prefix(net, x), prototypes_loss(), micro_batch=4) == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients(net), direct, strict=True))


def test_a_cache_survives_training():
    net, x = net_and_input(torch.float32)
    cache = cache_prefix(net, x)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        gradient_update(net, cache, prototypes_loss())
        optimizer.step()
    assert torch.equal(features_of(net, cache), features_of(net, x))


def test_rows_of_a_cache():
    net, x = net_and_input(torch.float32)
    cache, rows = cache_prefix(net, x), torch.tensor([7, 0, 3])
    assert torch.equal(features_of(net, cache[rows.numpy()]), features_of(net, x[rows]))
    assert torch.equal(features_of(net, cache[2:5]), features_of(net, x[2:5]))


def test_a_piece_of_a_cache_is_memory_of_its_own():
    """Matrix products round by the alignment of their input: a view into the cache would begin anywhere."""
    net, x = net_and_input(torch.float32)
    cache = cache_prefix(net, x)
    for whole, piece in zip(cache.boundary, cache[3:5].boundary, strict=True):
        assert torch.equal(piece, whole[3:5])
        assert piece.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_a_cache_goes_through_a_file():
    net, x = net_and_input(torch.float32)
    cache = cache_prefix(net, x)
    image = encode_tree(Group(arrays=cache.arrays()))
    back = PrefixCache.from_arrays(decode_tree(image).arrays)
    assert torch.equal(features_of(net, back), features_of(net, x))
    with pytest.raises(DataError, match="boundary0"):
        PrefixCache.from_arrays({"boundary1": cache.arrays()["boundary0"]})


def test_the_prefix_is_all_that_is_frozen_before_the_earliest_live_layer():
    backbone: Backbone = random_backbone(chain(), 0, torch.float32)
    x = random_input(chain(), 2, 0, torch.float32)
    shapes = {
        "stem": [(2, 2, 6, 6)],
        "middle": [(2, 4, 6, 6)],
        "last": [(2, 4)],
    }
    for layer, expected in shapes.items():
        channels = backbone.graph[layer].out_channels
        net = SparseNet(backbone, [LayerUpdate(layer, "output", (0,), channels)])
        assert [tuple(value.shape) for value in net.prefix(x)] == expected
