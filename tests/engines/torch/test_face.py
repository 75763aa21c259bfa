"""Nets of tensors behind the protocol of arrays: the same values and gradients, and parameters in shared memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from stages.artifacts.records import LayerUpdate
from stages.engines.torch.face import ArrayNet, TorchNet, to_array
from stages.engines.torch.net import SparseNet
from stages.models.deploy import Backbone
from stages.training.optimizers import Optimizing, make_optimizer
from tests.engines.protocol import closed
from tests.engines.random_graphs import cases, random_backbone, random_input
from tests.engines.torch.test_net import MIDDLE, chain, weighted

FEW = settings(max_examples=30, deadline=None, derandomize=True)
PLAN = (MIDDLE, LayerUpdate("last", "input", (1, 3), 4))
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # in float64: far above its rounding, far below any mistake


def backbone(dtype: torch.dtype = torch.float32) -> Backbone:
    return random_backbone(chain(), 3, dtype)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return random_input(chain(), 5, 3, dtype)


@FEW
@given(cases())
def test_values_and_gradients_are_those_of_the_net_under_autograd(case):
    graph, updates, batch, seed = case
    base = random_backbone(graph, seed, torch.float64)
    x = random_input(graph, batch, seed, torch.float64)
    net, face = SparseNet(base, updates), TorchNet(SparseNet(base, updates))
    features = net.suffix(net.prefix(x))
    weighted(features).backward()
    assert face.boundary == net.boundary
    entered = face.prefix(x.numpy())
    for mine, theirs in zip(entered, net.prefix(x), strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), **CLOSE)
    found, kept = face.forward(entered)
    for mine in (found, face.suffix(entered), face.features(x.numpy())):
        np.testing.assert_allclose(mine, features.detach().numpy(), **CLOSE)
    face.backward(kept, closed(weighted)(found)[1])
    assert len(face.parameters()) == len(net.parameters()) > 0
    for mine, theirs in zip(face.parameters(), net.parameters(), strict=True):
        assert np.array_equal(mine.value, theirs.detach().numpy())
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        np.testing.assert_allclose(mine.gradient, expected.numpy(), **CLOSE)


def test_optimisers_change_arrays_in_place_and_torch_sees_it():
    """Three steps of Adam over the arrays, and the same over tensors."""
    net, face = SparseNet(backbone(torch.float64), PLAN), TorchNet(SparseNet(backbone(torch.float64), PLAN))
    x, loss = batch(torch.float64), closed(weighted)
    mine = make_optimizer(face.parameters(), Optimizing(optimizer="adam", weight_decay=0.1))
    theirs = torch.optim.Adam(net.parameters(), lr=0.05, weight_decay=0.1)
    before = face.features(x.numpy())
    for _ in range(3):
        features, kept = face.forward(face.prefix(x.numpy()))
        face.backward(kept, loss(features)[1])
        assert mine.step(0.05)
        theirs.zero_grad()
        weighted(net.suffix(net.prefix(x))).backward()
        theirs.step()
    after = face.features(x.numpy())
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_allclose(after, net.features(x).numpy(), **CLOSE)
    for name, value in net.tensors().items():
        np.testing.assert_allclose(face.tensors()[name], value.numpy(), **CLOSE)


@pytest.mark.parametrize("update", [MIDDLE, LayerUpdate("middle", "input", (0, 2), 4, (1,))], ids=["output", "input"])
def test_arrays_and_tensors_share_memory(update):
    """Also where a live slice does not lie in one piece: along the input axis indexing leaves it strided."""
    net = SparseNet(backbone(), [update])
    face = TorchNet(net)
    for mine, theirs in zip(face.parameters(), net.parameters(), strict=True):
        assert mine.value.flags.c_contiguous
        mine.value[...] = 2
        assert bool((theirs == 2).all())
        with torch.no_grad():
            theirs.fill_(3)
        assert bool((mine.value == 3).all())
    face.load_live({name: value + 1 for name, value in face.live_tensors().items()})
    assert all(bool((mine.value == 4).all()) for mine in face.parameters())


def test_features_are_computed_under_the_values_of_the_moment():
    """Autograd counts changes that tensors make and not those of arrays: a weight prepared before would be missed."""
    face = TorchNet(SparseNet(backbone(), PLAN))
    entered = face.prefix(batch().numpy())
    first, _ = face.forward(entered)
    for parameter in face.parameters():
        parameter.value *= -1
    second, _ = face.forward(entered)
    assert np.abs(second - first).max() > 1e-2
    assert np.array_equal(face.suffix(entered), face.features(batch().numpy()))


class Weighing:
    """Features w * x of the part behind x = 2 * input; a second parameter takes no part."""

    def __init__(self, *parameters: Sequence[float]) -> None:
        self._parameters = [nn.Parameter(torch.tensor(values)) for values in parameters]

    def prefix(self, x: Tensor) -> tuple[Tensor, ...]:
        return (2 * x,)

    def suffix(self, boundary: tuple[Tensor, ...]) -> Tensor:
        return boundary[0] * self._parameters[0] if self._parameters else boundary[0]

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters


X = np.float32([[1, 2], [3, 4]])


def test_any_net_by_hand():
    """dL/dw = sum over samples of gradient * 2 x: (1 * 2 + 0 * 6, -1 * 4 + 2 * 8)."""
    net = ArrayNet(Weighing([0.5, 3.0], [7.0]))
    (entered,) = net.prefix(X)
    assert entered.tolist() == [[2, 4], [6, 8]]
    features, kept = net.forward((entered,))
    assert features.tolist() == net.suffix((entered,)).tolist() == net.features(X).tolist() == [[1, 12], [3, 24]]
    gradient = np.float32([[1, -1], [0, 2]])
    for times in (1, 2):
        features, kept = net.forward((entered,))
        net.backward(kept, gradient)
        assert [parameter.gradient.tolist() for parameter in net.parameters()] == [[2 * times, 12 * times], [0]]
    net.parameters()[0].value[:] = [1, 0]
    assert net.features(X).tolist() == [[2, 0], [6, 0]]
    assert entered.tolist() == [[2, 4], [6, 8]]


def test_a_caller_without_autograd_trains_all_the_same():
    net = ArrayNet(Weighing([0.5, 3.0]))
    with torch.no_grad():
        features, kept = net.forward(net.prefix(X))
        net.backward(kept, np.ones_like(features))
    assert net.parameters()[0].gradient.tolist() == [8, 12]
    with torch.enable_grad():
        assert not isinstance(net.suffix(net.prefix(X)), Tensor)


def test_a_net_without_parameters_has_nothing_to_go_back_to():
    net = ArrayNet(Weighing())
    assert net.parameters() == []
    features, kept = net.forward(net.prefix(X))
    net.backward(kept, np.ones_like(features))
    assert features.tolist() == net.features(X).tolist() == [[2, 4], [6, 8]]


def test_a_tensors_array_is_its_own_memory():
    value = torch.ones(3, requires_grad=True)
    to_array(value)[1] = 5
    assert value.tolist() == [1, 5, 1]
