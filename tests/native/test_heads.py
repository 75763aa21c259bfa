"""The library's optimisers, heads, losses and functions against torch and against exact values."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stages.engines.native import library
from stages.errors import PartMissing

pytestmark = pytest.mark.skipif(not library.is_built(), reason="the native library is not built: make setup")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(4)


def at(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


@pytest.mark.parametrize("same_bits", [False, True])
def test_exp_and_log_are_within_three_units_in_the_last_place(same_bits):
    lib = library.library(same_bits)
    for x in np.concatenate([np.linspace(-87, 88, 3001), np.linspace(-1e-3, 1e-3, 101)]).astype(np.float32):
        exact = np.exp(np.float64(x))
        assert abs(lib.et_exp(float(x)) - exact) <= 3 * np.spacing(np.float32(exact))
    for x in np.concatenate([np.logspace(-37, 38, 3001), np.linspace(0.5, 2, 1001)]).astype(np.float32):
        exact = np.log(np.float64(x))
        assert abs(lib.et_log(float(x)) - exact) <= 3 * np.spacing(np.float32(max(abs(exact), 2**-10)))
    assert lib.et_exp(-200.0) == 0
    assert lib.et_log(0.0) == -np.inf
    assert np.isnan([lib.et_exp(float("nan")), lib.et_log(-1.0)]).all()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD([p], lr=0.05, momentum=0.9, weight_decay=0.1),
    "plain sgd": lambda p: torch.optim.SGD([p], lr=0.05),
    "adam": lambda p: torch.optim.Adam([p], lr=0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW([p], lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_move_values_as_torchs_do(name, rng):
    lib, count = library.library(), 37
    values = rng.standard_normal(count).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(values.copy()))
    optimizer = OPTIMIZERS[name](parameter)
    first, second = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for update in range(1, 6):
        gradient = rng.standard_normal(count).astype(np.float32)
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        if "sgd" in name:
            momentum, decay = (None, 0.0) if name == "plain sgd" else (at(first), 0.1)
            lib.et_sgd(at(values), at(gradient), momentum, count, 0.05, 0.9, decay)
        else:
            lib.et_adam(at(values), at(gradient), at(first), at(second), count, 0.05, 0.1, int(name == "adamw"), update)
        assert np.allclose(values, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_linear_head_and_its_gradients(weighted, rng):
    lib, n, d, c = library.library(), 9, 13, 5
    features, weight = rng.standard_normal((n, d)).astype(np.float32), rng.standard_normal((c, d)).astype(np.float32)
    bias, labels = rng.standard_normal(c).astype(np.float32), rng.integers(0, c, n).astype(np.int32)
    weights = rng.random(n).astype(np.float32) if weighted else np.full(n, 1 / n, np.float32)
    tensors = [torch.from_numpy(value).double().requires_grad_() for value in (features, weight, bias)]
    losses = F.cross_entropy(F.linear(*tensors), torch.from_numpy(labels).long(), reduction="none")
    loss = (losses * torch.from_numpy(weights)).sum()
    loss.backward()
    logits = np.empty((n, c), np.float32)
    lib.et_linear(at(features), at(weight), at(bias), at(logits), n, d, c)
    importance = np.empty(n, np.float32)
    lib.et_last_layer_importance(at(features), at(logits), at(labels), at(importance), n, d, c)
    found = lib.et_softmax_loss(at(logits), at(labels), at(weights) if weighted else None, at(logits), n, c)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    gradients = [np.empty((n, d), np.float32), np.zeros((c, d), np.float32), np.zeros(c, np.float32)]
    lib.et_linear_gradients(
        at(features), at(weight), at(logits), at(gradients[1]), at(gradients[2]), at(gradients[0]), n, d, c
    )
    for mine, tensor in zip(gradients, tensors, strict=True):
        assert np.allclose(mine, tensor.grad.numpy(), rtol=1e-4, atol=1e-6)
    for i in range(n):  # the norm of one sample's gradient of weight and bias, by autograd
        own = [tensor.detach().clone().requires_grad_() for tensor in tensors[1:]]
        row = F.linear(tensors[0][i : i + 1].detach(), *own)
        F.cross_entropy(row, torch.from_numpy(labels[i : i + 1]).long()).backward()
        expected = sum(float((tensor.grad**2).sum()) for tensor in own) ** 0.5
        assert importance[i] == pytest.approx(expected, rel=1e-4)


def test_the_prototype_loss_goes_back_through_the_prototypes(rng):
    lib, n, d, ways = library.library(), 12, 11, 4
    features = rng.standard_normal((2 * n, d)).astype(np.float32)
    labels = (np.arange(n) % ways).astype(np.int32)
    exact = torch.from_numpy(features).double().requires_grad_()
    y = torch.from_numpy(labels).long()
    prototypes = torch.stack([exact[:n][y == way].mean(0) for way in range(ways)])
    logits = 10 * F.normalize(exact[n:]) @ F.normalize(prototypes).t()
    expected = F.cross_entropy(logits, y)
    expected.backward()
    gradient, work, loss = np.empty_like(features), np.empty(ways * (2 * d + 2), np.float32), ctypes.c_float()
    code = lib.et_prototype_loss(
        at(features), at(labels), at(gradient), at(work), n, d, ways, 10.0, ctypes.byref(loss)
    )  # fmt: skip
    assert code == 0
    assert loss.value == pytest.approx(expected.item(), rel=1e-5)
    assert np.allclose(gradient, exact.grad.numpy(), rtol=1e-4, atol=1e-6)
    labels[3] = ways
    assert lib.et_prototype_loss(at(features), at(labels), at(gradient), at(work), n, d, ways, 10.0, ctypes.byref(loss))


def test_squared_sums_by_hand():
    """One channel: 1 * 2 + 3 * -1 = -1, squared 1; the other 0.5 * 4 + 2 * 1 = 4, squared 16."""
    values, gradient = np.float32([[1, 0.5], [3, 2]]), np.float32([[2, 4], [-1, 1]])
    sums = np.float32([10, 20])
    library.library().et_squared_sums(at(values), at(gradient), at(sums), 2, 2)
    assert sums.tolist() == [11, 36]


def test_every_function_of_the_header_is_declared():
    header = (library.HERE / "c" / "edgetrain.h").read_text(encoding="utf-8")
    named = {line.split("(")[0].split()[-1].lstrip("*") for line in header.splitlines() if line.startswith("ET_API")}
    assert named == library.SIGNATURES.keys()
    assert len(named) > 20


def test_a_library_of_another_version_is_not_called(monkeypatch, tmp_path):
    load = library.library.__wrapped__
    monkeypatch.setattr(library, "VERSION", 99)
    with pytest.raises(PartMissing, match="another version of EdgeTrain"):
        load()
    (tmp_path / library.NAMES[False]).write_bytes(b"no library")
    monkeypatch.setattr(library, "HERE", tmp_path)
    with pytest.raises(PartMissing, match="cannot be loaded"):
        load()
