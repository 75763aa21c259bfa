"""Closed-form last-layer gradients against torch.func, and the two ways to sum them against each other."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from stages.valuation.gradients import Kernel, LastLayer


def last_layer(rng, n=20, classes=4, dim=5):
    features = rng.normal(size=(n, dim))
    logits = features @ rng.normal(size=(dim, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = rng.integers(0, classes, n)
    return LastLayer(p - np.eye(classes)[y], features), y


def test_equals_per_sample_gradients_of_torch_func():
    rng = np.random.default_rng(0)
    layer = torch.nn.Linear(6, 3).double()
    x, y = torch.from_numpy(rng.normal(size=(12, 6))), torch.from_numpy(rng.integers(0, 3, 12))
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters, sample, target):
        scores = functional_call(layer, parameters, (sample[None],))
        return torch.nn.functional.cross_entropy(scores, target[None])

    found = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    expected = torch.cat([found["weight"].flatten(1), found["bias"]], 1).double().numpy()

    p = torch.softmax(layer(x), 1).detach().double().numpy()
    closed = LastLayer(p - np.eye(3)[y.numpy()], x.double().numpy())
    np.testing.assert_allclose(closed.squared_norms, (expected**2).sum(1), rtol=1e-10)
    np.testing.assert_allclose(closed.inner_products(), expected @ expected.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "groups"), [(4, 2), (200, 3)], ids=["by inner products", "by sums"])
def test_group_products_by_either_way(n, groups):
    rng = np.random.default_rng(1)
    gradients, _ = last_layer(rng, n=n)
    mass, group = rng.random(n), np.arange(n) % groups
    flat = np.einsum("nc,nd->ncd", gradients.residuals, np.c_[gradients.features, np.ones(n)]).reshape(n, -1)
    sums = np.stack([(flat * mass[:, None])[group == index].sum(0) for index in range(groups)])
    np.testing.assert_allclose(gradients.group_products(group, groups, mass), sums @ sums.T, rtol=1e-10)
    by_kernel = Kernel(flat @ flat.T)
    np.testing.assert_allclose(by_kernel.group_products(group, groups, mass), sums @ sums.T, rtol=1e-10)
    np.testing.assert_allclose(by_kernel.squared_norms, gradients.squared_norms, rtol=1e-10)


def test_large_pools_of_few_classes_never_build_all_inner_products(monkeypatch):
    gradients, y = last_layer(np.random.default_rng(2), n=500)
    monkeypatch.setattr(LastLayer, "inner_products", lambda self: pytest.fail("n x n products for a large pool"))
    gradients.group_products(y, 4, np.ones(500))
