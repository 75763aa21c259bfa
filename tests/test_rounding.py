"""The rounding bounds: hand values, random float32 computations inside them, and wrong ones outside."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings

from stages.engines.torch import reference
from tests.engines.random_graphs import cases, dense_gradients, distance_to_kinks, random_backbone, random_input
from tests.engines.torch.test_net import chain, weighted
from tests.rounding import (
    Bounded,
    as_tensors,
    check_features,
    gamma,
    gradient_bounds,
    in_double,
    loss_bound,
    no_worse,
    product_bound,
    unit_roundoff,
)

FLOAT, DOUBLE = torch.float32, torch.float64


def test_unit_roundoffs_are_those_of_rounding_to_nearest():
    assert (unit_roundoff(FLOAT), unit_roundoff(DOUBLE)) == (2**-24, 2**-53)


def test_gamma_by_hand():
    u = 2**-24 + 2**-53
    assert gamma(0) == 0
    assert gamma(10) == 10 * u / (1 - 10 * u)
    with pytest.raises(ValueError, match="no correct digit"):
        gamma(2**24)


def test_every_order_of_a_sum_lies_within_its_bound():
    """A sum that cancels: orders differ by far more than the result's own last bit, never by more than the bound."""
    terms = torch.tensor([2.0**24, 1.0, -(2.0**24), 1.0, 3.0, -3.0])
    ones = torch.ones(len(terms), 1)
    exact, bound = float(terms.double().sum()), float(product_bound(terms[None], ones))
    found = set()
    for order in permutations(terms):
        total = torch.tensor(0.0)
        for term in order:
            total = total + term
        found.add(float(total))
    assert len(found) > 2
    assert all(abs(total - exact) <= bound for total in found)
    assert bound == pytest.approx(6 * 2**-24 * (2 * 2**24 + 8), rel=1e-6)


def test_no_worse_allows_for_another_order_and_not_for_another_value():
    exact = torch.ones(2, dtype=DOUBLE)
    plain = (exact * (1 + 2**-23)).float()
    no_worse((exact * (1 + 18 * 2**-23)).float(), plain, exact, longest=100)  # 2 * sqrt(100) times the plain error
    with pytest.raises(AssertionError, match="at most"):
        no_worse((exact * (1 + 22 * 2**-23)).float(), plain, exact, longest=100)
    no_worse((exact * (1 + 2**-22)).float(), exact.float(), exact, longest=100)  # a plain one that is exact
    with pytest.raises(AssertionError, match="at most"):
        no_worse(exact.float() + 1e-4, plain, exact, longest=100)


def test_features_of_a_deep_net_in_another_layout_pass_and_those_of_other_weights_do_not():
    backbone, x = random_backbone(chain(), 3, FLOAT), random_input(chain(), 10, 3, FLOAT)
    tensors = as_tensors(backbone.tensors)
    found = reference.run(backbone.graph, tensors, x.contiguous(memory_format=torch.channels_last))
    check_features(found, backbone, x)
    other = {**tensors, "stem.weight": tensors["stem.weight"] * (1 + 1e-4)}
    with pytest.raises(AssertionError, match="at most"):
        check_features(reference.run(backbone.graph, other, x), backbone, x)


def test_a_value_outside_its_bound_is_told():
    bounded = Bounded(torch.tensor([1.0, 2.0], dtype=DOUBLE), torch.tensor([0.0, 0.5], dtype=DOUBLE))
    bounded.check(torch.tensor([1.0, 2.5]))
    with pytest.raises(AssertionError, match=r"x: 0\.25 outside"):
        bounded.check(torch.tensor([1.0, 2.75]), "x")
    with pytest.raises(AssertionError, match="expected"):
        bounded.check(torch.tensor([1.0]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_stock_autograd_in_float32_lies_within_the_bounds(case):
    graph, _, batch, seed = case
    backbone, x = random_backbone(graph, seed, FLOAT), random_input(graph, batch, seed, FLOAT)
    loss = in_double(weighted)
    features, gradients = gradient_bounds(backbone, x, loss, FLOAT)
    found, dense = dense_gradients(backbone, x, loss)
    features.check(found, "features")
    loss_bound(loss, features, largest=1e6).check(loss(found))
    if any(op.kind == "max_pool" for op in graph.ops) and distance_to_kinks(backbone, x) <= float(features.error.max()):
        return  # a tie
    for name, gradient in dense.items():
        gradients[name].check(gradient, name)


def test_the_bounds_are_tight_enough_to_see_a_lost_sample():
    """Far below the gradients themselves: at most 2e-4 of them for a small net in float32, 1e-12 in float64."""
    for dtype, share in ((FLOAT, 1e-3), (DOUBLE, 1e-11)):
        backbone, x = random_backbone(chain(), 3, dtype), random_input(chain(), 10, 3, dtype)
        _, bounds = gradient_bounds(backbone, x, in_double(weighted), dtype)
        for name, bound in bounds.items():
            assert bound.error.norm() < share * bound.value.norm(), name
        _, less = dense_gradients(backbone, x[:9], in_double(weighted))
        for name, gradient in less.items():
            with pytest.raises(AssertionError, match="outside the bound"):
                bounds[name].check(gradient, name)


def test_half_the_precision_is_outside_the_bounds():
    backbone, x = random_backbone(chain(), 3, FLOAT), random_input(chain(), 10, 3, FLOAT)
    features, _ = gradient_bounds(backbone, x, in_double(weighted), FLOAT)
    tensors = as_tensors(backbone.tensors, torch.bfloat16)
    with pytest.raises(AssertionError, match="outside the bound"):
        features.check(reference.run(backbone.graph, tensors, x.bfloat16()))


def test_a_detached_layer_passes_nothing_on():
    backbone, x = random_backbone(chain(), 3, FLOAT), random_input(chain(), 4, 3, FLOAT)
    _, bounds = gradient_bounds(backbone, x, in_double(weighted), FLOAT, {"middle"})
    _, dense = dense_gradients(backbone, x, in_double(weighted), {"middle"})
    for name, gradient in dense.items():
        bounds[name].check(gradient, name)
