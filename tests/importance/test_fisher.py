"""Fisher potentials: by hand, against dense autograd, against another formula."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from stages.engines.torch.inspector import Inspector
from stages.engines.torch.reference import run
from stages.errors import DataError
from stages.graphs.graph import Graph
from stages.importance.fisher import fisher_pass
from stages.operators import Op
from tests.importance.nets import INPUT, LAYERS, deployed, mixed
from tests.rounding import as_tensors

SAMPLES = 6
BACKBONE = deployed(mixed())
DOUBLE = deployed(mixed(), torch.float64)
"""What potentials are compared in: other kernels, orders and micro-batches then differ far below `assert_same`."""
ALL = tuple(op.name for op in BACKBONE.graph.layers)


def batch(seed=0, samples=SAMPLES):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *INPUT.shape, generator=rng), torch.randint(3, (samples,), generator=rng)


def doubles(seed=0):
    x, y = batch(seed)
    return x.double(), y


def loss_of(seed=0):
    """The loss of a prototypes head, in the features' precision."""
    means = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed))

    def loss(features, y):
        directions = functional.normalize(features, dim=1), functional.normalize(means.to(features), dim=1)
        return functional.cross_entropy(10 * directions[0] @ directions[1].T, y, reduction="none")

    return loss


def inspected(backbone, window, batches, loss, **options):
    """The pass by torch's inspector; batches of tensors, a loss whose gradient autograd takes."""

    def losses_and_gradients(features, y):
        leaf = torch.from_numpy(features).clone().requires_grad_()
        losses = loss(leaf, torch.from_numpy(y))
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach().double().numpy(), gradient.numpy()

    arrays = [(x.numpy(), y.numpy()) for x, y in batches]
    return fisher_pass(Inspector(backbone.graph, backbone.tensors, window), arrays, losses_and_gradients, **options)


def in_pieces(x, y, size):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def assert_same(left, right, rtol=1e-9):
    """Per layer, relative to the layer's largest channel: a channel that cancels to zero has no digits of its own."""
    assert left.keys() == right.keys()
    for layer in left:
        np.testing.assert_allclose(left[layer], right[layer], rtol=rtol, atol=rtol * np.max(right[layer]))


# ------------------------------------------------------------------------------------------------------------ by hand


def tiny_net():
    """1x1 convolution from one channel to two, ReLU, mean: two positions, two features."""
    ops = (
        Op("input", "input", (), (1, 1, 2)),
        Op("conv", "conv", ("input",), (2, 1, 2), ((1, 1, 2),), (1, 1), (1, 1), (0, 0), (1, 1), bias=True),
        Op("relu", "relu", ("conv",), (2, 1, 2), ((2, 1, 2),)),
        Op("pool", "global_pool", ("relu",), (2,), ((2, 1, 2),)),
    )
    tensors = {"conv.weight": torch.tensor([2.0, -1.0]).view(2, 1, 1, 1), "conv.bias": torch.tensor([0.0, 1.0])}
    return SimpleNamespace(graph=Graph(ops), tensors=tensors)


def test_by_hand():
    """Loss 3 f_0 + 4 f_1. Sample (1, 2): outputs (2, 4) and (0, -1); sample (-1, 0): (-2, 0) and (2, 1).

    Gradient at a position is 3/2 or 4/2 where the output is positive. Channel 0: sums 2*1.5 + 4*1.5 = 9 and 0, so
    81 / 4. Channel 1: 0 and 2*2 + 1*2 = 6, so 36 / 4. Input: sample 1 has gradients (2*1.5, 2*1.5), so
    1*3 + 2*3 = 9; sample 2 has -1*2 at both positions: -1*-2 + 0 = 2; together (81 + 4) / 4.
    """
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.0]]).view(2, 1, 1, 2)

    def weighted(features, _):
        return features @ torch.tensor([3.0, 4.0])

    found = inspected(tiny_net(), ["conv"], [(x, torch.zeros(2))], weighted)
    np.testing.assert_allclose(found.output["conv"], [81 / 4, 36 / 4], rtol=1e-6)
    np.testing.assert_allclose(found.input["conv"], [85 / 4], rtol=1e-6)
    assert found.samples == 2
    assert found.loss == pytest.approx((3 * 3 + 4 * 0 + 3 * 0 + 4 * 1.5) / 2)


# ------------------------------------------------------------------------------------------------------------ oracles


def dense_output_fisher(net, x, y, loss):
    """One sample at a time through the module itself, BatchNorm unfolded, every value kept by stock autograd."""
    sums = dict.fromkeys(LAYERS, 0.0)
    seen = {}
    for layer, place in LAYERS.items():
        net.get_submodule(place).register_forward_hook(lambda m, a, out, layer=layer: seen.update({layer: out}))
    for i in range(len(x)):
        features = net(x[i : i + 1].clone().requires_grad_())
        gradients = torch.autograd.grad(loss(features, y[i : i + 1]).sum(), list(seen.values()))
        for (layer, a), g in zip(seen.items(), gradients, strict=True):
            sums[layer] = sums[layer] + (a * g).reshape(a.shape[1], -1).sum(1).double().square()
    return {layer: (value / (2 * len(x))).detach().numpy() for layer, value in sums.items()}


def test_output_channels_match_dense_autograd():
    x, y = doubles()
    found = inspected(DOUBLE, ALL, in_pieces(x, y, 4), loss_of())
    expected = dense_output_fisher(mixed().double(), x, y, loss_of())
    assert min(values.max() for values in expected.values()) > 0
    assert_same(found.output, expected)


def weight_products(x, y, loss):
    """Per sample <W, dL/dW> by input channel, and <W, dL/dW> + b dL/db by output channel, by torch.func."""
    graph, tensors = DOUBLE.graph, as_tensors(DOUBLE.tensors)

    def sample_loss(weights, one, target):
        return loss(run(graph, weights, one[None]), target[None]).sum()

    gradients = torch.func.vmap(torch.func.grad(sample_loss), (None, 0, 0))(tensors, x, y)
    out, into = {}, {}
    for op in graph.layers:
        w, b = f"{op.name}.weight", f"{op.name}.bias"
        product = (tensors[w] * gradients[w]).flatten(3).sum(3) if op.kind == "conv" else tensors[w] * gradients[w]
        out[op.name] = product.sum(2) + tensors[b] * gradients[b]
        per_group = product.view(len(x), op.groups, op.out_channels // op.groups, -1).sum(2)
        into[op.name] = per_group.reshape(len(x), op.in_channels)
    return out, into


def test_both_axes_match_the_gradient_of_the_weights():
    x, y = doubles(1)
    found = inspected(DOUBLE, ALL, [(x, y)], loss_of(1))
    out, into = weight_products(x, y, loss_of(1))
    assert_same(found.output, {k: v.double().square().sum(0).numpy() / (2 * SAMPLES) for k, v in out.items()})
    assert_same(found.input, {k: v.double().square().sum(0).numpy() / (2 * SAMPLES) for k, v in into.items()})


# --------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=25, deadline=None)
@given(st.integers(1, SAMPLES), st.integers(0, 3))
def test_micro_batches_do_not_change_the_result(size, seed):
    x, y = doubles(seed)
    whole = inspected(DOUBLE, ALL, [(x, y)], loss_of())
    pieces = inspected(DOUBLE, ALL, in_pieces(x, y, size), loss_of())
    assert_same(pieces.output, whole.output)
    assert_same(pieces.input, whole.input)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-9)


def test_seeing_every_sample_twice_changes_nothing():
    x, y = doubles()
    once = inspected(DOUBLE, ALL, [(x, y)], loss_of())
    twice = inspected(DOUBLE, ALL, [(x, y), (x, y)], loss_of())
    assert_same(twice.output, once.output)


def test_twice_the_loss_gives_four_times_the_potential():
    x, y = doubles()
    once = inspected(DOUBLE, ALL, [(x, y)], loss_of())
    twice = inspected(DOUBLE, ALL, [(x, y)], lambda f, t: 2 * loss_of()(f, t))
    assert_same(twice.output, {layer: 4 * values for layer, values in once.output.items()})


@pytest.mark.parametrize("first", range(len(ALL)))
def test_a_window_sees_what_the_whole_network_sees(first):
    x, y = doubles()
    whole = inspected(DOUBLE, ALL, [(x, y)], loss_of())
    part = inspected(DOUBLE, ALL[first:], [(x, y)], loss_of())
    assert_same(part.output, {layer: whole.output[layer] for layer in part.layers})
    assert_same(part.input, {layer: whole.input[layer] for layer in part.layers})


def test_progress_counts_samples():
    x, y = batch()
    done = []
    inspected(BACKBONE, ALL, in_pieces(x, y, 4), loss_of(), on_step=done.append)
    assert done == [4, 6]


def test_no_sample_is_an_error():
    with pytest.raises(DataError, match="no samples"):
        inspected(BACKBONE, ALL, [], loss_of())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(bad):
    x, y = batch()
    with pytest.raises(DataError, match="finite"):
        inspected(BACKBONE, ALL, [(x, y)], lambda f, t: f.sum(1) * bad)
