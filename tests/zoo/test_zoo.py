"""The zoo itself: every specimen is what its tests take it for."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tests.zoo import FAMILIES, FAST, ZOO, Specimen, result, selection
from tests.zoo.specimen import NORMS, tensors

MOST_PARAMETERS = 250_000
CLASSLESS = {"autoencoder"}
"""Specimens that answer with something else than five logits."""
SHIFTS = {"gc-resnet": "conv_mask.bias"}
"""Biases that a softmax takes away again: their gradient is zero up to rounding."""

every = pytest.mark.parametrize("specimen", selection())


@cache
def captured(name: str) -> ExportedProgram:
    """torch warns that hooks of weight_norm and recurrent layers set tensors in forward; the program is right all the
    same."""
    specimen = ZOO[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export", UserWarning)
        return torch.export.export(specimen.build(), (specimen.example(2),), strict=False)


def forward(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return result(module(x))


def used_in_evaluation(specimen: Specimen) -> set[str]:
    """Names of parameters that the captured program reads."""
    program = captured(specimen.name)
    parameters = program.graph_signature.inputs_to_parameters
    return {parameters[node.name] for node in program.graph.nodes if node.users and node.name in parameters}


def operators(specimen: Specimen) -> set[str]:
    return {str(node.target) for node in captured(specimen.name).graph.nodes if node.op == "call_function"}


def test_names_are_unique_and_there_are_enough() -> None:
    names = Counter(specimen.name for family in FAMILIES for specimen in family.SPECIMENS)
    assert max(names.values()) == 1
    assert len(ZOO) >= 55
    assert all(name == specimen.name for name, specimen in ZOO.items())


def test_those_expected_to_be_refused_say_why() -> None:
    refused = {name: specimen.refused for name, specimen in ZOO.items() if specimen.refused}
    assert refused == {}


def test_the_fast_ones_are_ten_and_pass() -> None:
    assert len(set(FAST)) == 10
    assert not any(ZOO[name].refused for name in FAST)


@pytest.mark.zoo
def test_the_fast_ones_hold_most_operators() -> None:
    """Most calls of the zoo are of an operator that one of the ten has too."""
    calls = Counter(operator for specimen in ZOO.values() for operator in operators(specimen))
    held = set().union(*(operators(ZOO[name]) for name in FAST))
    assert sum(count for operator, count in calls.items() if operator in held) > 0.85 * calls.total()


@every
def test_a_seed_makes_a_specimen(specimen: Specimen) -> None:
    before = torch.get_rng_state()
    one, same, other = specimen.build(1), specimen.build(1), specimen.build(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@every
def test_a_specimen_is_small_and_nothing_in_it_is_trivial(specimen: Specimen) -> None:
    module = specimen.build()
    assert sum(parameter.numel() for parameter in module.parameters()) < MOST_PARAMETERS
    for name, parameter in module.named_parameters():
        assert parameter.numel() == 1 or parameter.min() < parameter.max(), f"{name} is constant"
        assert parameter.any(), f"{name} is zero"
    for name, part in module.named_modules():
        if isinstance(part, NORMS) and getattr(part, "running_mean", None) is not None:
            assert part.running_mean.any(), f"{name} has no mean"
            assert (part.running_var != 1).all(), f"{name} has no variance"


@every
def test_answers_are_finite_and_the_same_twice(specimen: Specimen) -> None:
    module, x = specimen.build(), specimen.example(2)
    before = x.clone()
    first = forward(module, x)
    assert first.isfinite().all()
    assert torch.equal(first, forward(module, x))
    assert torch.equal(x, before)
    classes = specimen.input_shape[0] if specimen.name in CLASSLESS else 5
    assert first.shape == (2, classes)


@every
def test_answers_depend_on_the_input_and_not_on_the_batch(specimen: Specimen) -> None:
    module, x = specimen.build().double(), specimen.example(3, dtype=torch.float64)
    together = forward(module, x)
    apart = torch.cat([forward(module, part) for part in x.split(1)])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)
    assert (together[0] - together[1]).abs().max() > 1e-3 * together.abs().max()


@every
def test_gradients_reach_all_that_is_used(specimen: Specimen) -> None:
    module, x = specimen.build().double(), specimen.example(3, dtype=torch.float64)
    y = torch.cat([part.flatten() for part in tensors(module(x))])
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype)).sum().backward()
    used = used_in_evaluation(specimen)
    assert used
    for name in used:
        gradient = module.get_parameter(name).grad
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.isfinite().all()
        assert gradient.any() or name.endswith(SHIFTS.get(specimen.name, "/")), f"{name} has no part in the answer"


@every
def test_torch_export_captures_it(specimen: Specimen) -> None:
    module, x = specimen.build(), specimen.example(2, seed=5)
    program = captured(specimen.name)
    torch.testing.assert_close(result(program.module()(x)), forward(module, x), rtol=1e-4, atol=1e-4)
