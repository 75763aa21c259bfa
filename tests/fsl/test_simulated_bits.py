"""Training simulated in few bits: the quantiser by hand, what rounding may change, the schedule and the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.artifacts.hdf5 import decode, encode
from stages.errors import UsageError
from stages.fsl.bit_widths import Bits, Dynamic, cost, parse_simulation
from stages.fsl.simulated_bits import (
    DynamicSimulation,
    ProgressiveSimulation,
    compute,
    layers_of,
    of_layer,
    one_hot,
    quantised,
    rounded,
    rounded_gradient,
)
from stages.fsl.trainer import BIT_MAC_SHARE
from stages.operators import Op
from stages.pretraining import STAGE, pretrain
from stages.settings.pretraining import Pretraining
from tests.fsl.test_slicing import inputs, net_of
from tests.test_pretraining import CONFIG, random_run, squares, tensors_equal

FEW = settings(max_examples=40, deadline=None, derandomize=True)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=chance(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- the quantiser


def test_values_by_hand() -> None:
    x = torch.tensor([[-1.0, 0.25, 0.75, 2.0], [0.0, 2.0, 5.0, 6.0]])
    # two bits of [-1, 6]: steps of 7/3 from -1; of each row: steps of 1 from -1, and of 2 from 0 (2.5 is rounded to 2)
    third = 7 / 3
    whole = torch.tensor([[0, 1, 1, 1], [0, 1, 3, 3]]) * third - 1
    torch.testing.assert_close(quantised(x, 2), whole)
    assert quantised(x, 2, rows=True).tolist() == [[-1, 0, 1, 2], [0, 2, 4, 6]]
    noise = torch.tensor([[0.4, 0.4, -0.4, 0.4], [-0.4, -0.4, 0.4, 0.4]])
    assert quantised(x, 2, rows=True, noise=noise).tolist() == [[-1, 1, 0, 2], [0, 2, 6, 6]]
    assert quantised(torch.full((3,), 7.5), 4).tolist() == [7.5] * 3


@FEW
@given(st.integers(2, 16), st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e4]))
def test_to_the_nearest_is_half_a_step_off_at_most_and_by_chance_less_than_one(
    bits: int, seed: int, scale: float
) -> None:
    x = normal(5, 7, seed=seed) * scale
    step = (x.max() - x.min()) / (2.0**bits - 1)
    slack = 1e-12 * x.abs().max()
    assert (quantised(x, bits) - x).abs().max() <= step / 2 + slack
    noise = torch.rand(x.shape, generator=chance(seed), dtype=x.dtype) - 0.5
    found = quantised(x, bits, noise=noise)
    assert (found - x).abs().max() <= step + slack
    assert x.min() - slack <= found.min()
    assert found.max() <= x.max() + slack


@pytest.mark.parametrize("bits", [2, 3, 6])
def test_rounding_by_chance_has_no_bias(bits: int) -> None:
    """One draw has the variance s^2 f (1 - f), f the fractional part; the ends have none."""
    draws, last = 20_000, 2**bits - 1
    places = torch.tensor([0.0, 0.1, 0.5, 0.9, last / 2 + 0.3, last - 0.25, last], dtype=torch.float64)
    x, step = 3.0 + 0.7 * places, 0.7
    noise = torch.rand(draws, len(x), generator=chance(bits), dtype=torch.float64) - 0.5
    mean = torch.stack([quantised(x, bits, noise=row) for row in noise]).mean(0)
    part = places % 1
    sigma = step * (part * (1 - part) / draws).sqrt()
    assert ((mean - x).abs() <= 5 * sigma + 1e-12).all()
    nearest = quantised(x, bits)
    assert ((nearest - x).abs() > 5 * sigma + 1e-12).sum() >= 4  # as rounding to the nearest would be found out


def test_gradients_go_straight_through_and_are_rounded_where_they_should_be() -> None:
    x = normal(4, 3).requires_grad_()
    pull = normal(4, 3, seed=1)
    (rounded(x, 3) * pull).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, pull)
    x.grad = None
    y = rounded_gradient(x, 4, chance(5))
    assert torch.equal(y, x)
    (y * pull).sum().backward()
    noise = torch.rand(pull.shape, generator=chance(5), dtype=pull.dtype) - 0.5
    assert torch.equal(x.grad, quantised(pull, 4, noise=noise))
    assert rounded(x, 32) is x
    assert rounded_gradient(x, 32, chance()) is x


# --------------------------------------------------------------------------------------------------------------- layers


def a_layer(arch: str, number: int) -> tuple[Op, Tensor, dict[str, Tensor]]:
    """A layer, inputs for it and its tensors, in double precision."""
    net = net_of(arch).double()
    op = layers_of(net.graph).ops[number]
    tensors = {name: value.detach() for name, value in net.values().items() if name.rpartition(".")[0] == op.owner}
    return op, normal(6, *op.in_shape, seed=3), tensors


LAYERS = [("cnn4-w32", 1), ("mlp", 1), ("ds-cnn", 1)]


@pytest.mark.parametrize(("arch", "number"), LAYERS)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_layers_output_is_off_by_what_half_steps_allow(arch: str, number: int, bits: int) -> None:
    """(x + a)(w + b) - x w with |a| <= s_x / 2 and |b| <= s_w / 2, summed over a layer's products.

    In double precision, whose own rounding is far below.
    """
    op, x, tensors = a_layer(arch, number)
    weight = tensors[f"{op.owner}.weight"]
    exact = op.operator.forward(op, [x], tensors)
    found = compute(op, [x], tensors, Bits(bits, bits, 32), chance())
    half_x = (x.max() - x.min()) / (2.0**bits - 1) / 2
    axes = tuple(range(1, weight.dim()))
    ranges = weight.amax(axes, keepdim=True) - weight.amin(axes, keepdim=True)
    half_w = (ranges / (2.0**bits - 1) / 2).expand_as(weight)
    plain = {name: torch.zeros_like(value) for name, value in tensors.items()}

    def products(a: Tensor, w: Tensor) -> Tensor:
        return op.operator.forward(op, [a], {**plain, f"{op.owner}.weight": w})

    everywhere = torch.full_like(x, float(half_x))
    bound = products(everywhere, weight.abs()) + products(x.abs(), half_w) + products(everywhere, half_w)
    assert (found - exact).abs().max() > 0
    assert ((found - exact).abs() <= bound * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize(("arch", "number"), LAYERS)
def test_one_rounded_gradient_serves_the_weight_and_the_input(arch: str, number: int) -> None:
    op, x, tensors = a_layer(arch, number)
    name, bits = f"{op.owner}.weight", Bits(3, 4, 6)
    x.requires_grad_()
    tensors[name].requires_grad_()
    y = compute(op, [x], tensors, bits, chance(1))
    pull = normal(*y.shape, seed=2)
    found = torch.autograd.grad(y, [x, tensors[name]], pull)
    noise = torch.rand(pull.shape, generator=chance(1), dtype=pull.dtype) - 0.5
    qx, qw = quantised(x.detach(), 3).requires_grad_(), quantised(tensors[name].detach(), 4, rows=True).requires_grad_()
    plain = op.operator.forward(op, [qx], {**tensors, name: qw})
    expected = torch.autograd.grad(plain, [qx, qw], quantised(pull, 6, noise=noise))
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(found, expected)


def test_what_widths_cost_by_hand() -> None:
    assert 100 * cost(Bits(3, 4, 6)) == pytest.approx(1.758, abs=1e-3)  # the bounds of cp with 4-bit weights
    assert 100 * cost(Bits(6, 4, 12)) == pytest.approx(4.688, abs=1e-3)
    layers = layers_of(net_of("cnn4-w32").graph)
    assert layers.count(Bits(3, 3, 6)) == pytest.approx((9 + 36) / 3072)
    assert layers.count(Bits(32, 32, 32)) == pytest.approx(1)
    # depthwise layers have 8 bits forward and 16 backward at least
    layers = layers_of(net_of("ds-cnn").graph)
    macs = {op.name: prod(op.shape) * prod(op.weight_shape[1:]) for op in layers.ops}
    deep = sum(macs[op.name] for op in layers.ops if op.is_depthwise) / sum(macs.values())
    assert 0 < deep < 0.5
    assert layers.count(Bits(3, 3, 6)) == pytest.approx(deep * (64 + 2 * 128) / 3072 + (1 - deep) * 45 / 3072)
    assert of_layer(next(op for op in layers.ops if op.is_depthwise), Bits(32, 32, 32)) == Bits(32, 32, 32)


# ------------------------------------------------------------------------------------------------------------- training

SMALL = replace(CONFIG, epochs=2, warmup_epochs=0)


def test_32_bits_are_float32_itself() -> None:
    plain = pretrain(random_run(), [squares()], SMALL, seed=0)
    wide = pretrain(random_run(), [squares()], replace(SMALL, simulate_bits="32/32"), seed=0)
    assert tensors_equal(wide, plain)
    assert wide.metrics[STAGE][BIT_MAC_SHARE] == pytest.approx([1, 1])
    assert BIT_MAC_SHARE not in plain.metrics[STAGE]


@pytest.mark.parametrize("how", ["3/6", "dfq:3/6,4/8:target=0.02"])
def test_names_stay_and_what_is_kept_is_float32(how: str) -> None:
    start = random_run()
    result = pretrain(start, [squares()], replace(SMALL, simulate_bits=how), seed=0)
    assert set(result.model.tensors) == set(start.model.tensors)
    assert not tensors_equal(result, start)
    assert not tensors_equal(result, pretrain(start, [squares()], SMALL, seed=0))
    weight = result.model.tensors["blocks.01.conv.weight"]
    assert all(len(np.unique(row)) > 2**4 for row in weight)
    again = pretrain(start, [squares()], replace(SMALL, simulate_bits=how), seed=0)
    assert encode(again) == encode(result)


@pytest.mark.parametrize("how", ["3/6,4/8:turn=99", "dfq:3/6,4/8:target=0.02"])
def test_a_resumed_training_is_bit_equal(how: str) -> None:
    """Also in the middle of the five losses that a schedule looks at, and past its move."""
    config = replace(SMALL, steps=1, epochs=6, supervised_epochs=1, supervised_batch=8, simulate_bits=how)
    saved: list[bytes] = []
    whole = pretrain(random_run(), [squares()], config, seed=0, save=lambda run: saved.append(encode(run)))
    for stop_after in (1, 4, 6):
        resumed = pretrain(random_run(), [squares()], config, seed=0, resume=decode(saved[stop_after - 1]))
        assert encode(resumed) == encode(whole)


# ------------------------------------------------------------------------------------------------------------- schedule


def progressive(text: str) -> ProgressiveSimulation:
    how = parse_simulation(text)
    assert not isinstance(how, Dynamic)
    return ProgressiveSimulation(net_of("cnn4-w32").graph, how, 0)


def test_widths_move_on_at_the_fifth_equal_loss() -> None:
    simulation, found = progressive("3/6,4/8,8/8"), []
    for _ in range(12):
        simulation.see(1.0)
        found.append(simulation.bits.forward)
    assert found == [3] * 4 + [4] * 5 + [8] * 3
    moving = progressive("3/6,4/8:turn=0.05")
    for loss in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        moving.see(loss)
    assert moving.bits.forward == 3


def test_a_new_phase_forgets_the_losses_and_keeps_the_width() -> None:
    simulation = progressive("3/6,4/8,8/8")
    for _ in range(5 + 4):
        simulation.see(1.0)
    simulation.forget()
    simulation.see(1.0)
    assert simulation.bits.forward == 4
    for _ in range(4):
        simulation.see(1.0)
    assert simulation.bits.forward == 8


def test_a_training_moves_on_and_counts_what_its_widths_cost() -> None:
    config = replace(SMALL, steps=1, epochs=7, validation_tasks=0, simulate_bits="3/6,8/8:turn=99")
    result = pretrain(random_run(), [squares()], config, seed=0)
    expected = [45 / 3072] * 5 + [192 / 3072] * 2
    assert result.metrics[STAGE][BIT_MAC_SHARE] == pytest.approx(expected, rel=1e-5)


def test_episodes_begin_with_no_losses_of_the_supervised_phase() -> None:
    config = replace(SMALL, steps=1, epochs=6, supervised_epochs=2, supervised_batch=8, validation_tasks=0)
    result = pretrain(random_run(), [squares()], replace(config, simulate_bits="3/6,8/8:turn=99"), seed=0)
    expected = [45 / 3072] * (2 + 5) + [192 / 3072]
    assert result.metrics[STAGE][BIT_MAC_SHARE] == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------- gate


def gated(text: str, arch: str = "mlp") -> tuple[DynamicSimulation, Dynamic]:
    how = parse_simulation(text)
    assert isinstance(how, Dynamic)
    return DynamicSimulation(net_of(arch).graph, how, 0), how


def test_a_choice_is_exact_and_has_the_gradient_of_softmax() -> None:
    scores = normal(5, 3).requires_grad_()
    pull = normal(5, 3, seed=1)
    found = one_hot(scores)
    assert torch.equal(found, torch.nn.functional.one_hot(scores.argmax(1), 3).double())
    (mine,) = torch.autograd.grad((found * pull).sum(), scores)
    (theirs,) = torch.autograd.grad((scores.softmax(1) * pull).sum(), scores)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("arch", ["mlp", "cnn4-w32"])
def test_every_sample_goes_on_in_the_width_that_its_block_chose(arch: str) -> None:
    """In all layers of the block; and gradients reach the gate."""
    simulation, how = gated("dfq:2/4,3/6,6/12:target=0.02", arch)
    assert simulation.gate is not None
    for parameter in simulation.gate.parameters():
        parameter.data *= 8  # so that samples differ in their choice
    net, unit = net_of(arch), simulation.unit(3)
    x, seen = inputs(net, 24), dict[str, tuple[Sequence[Tensor], Mapping[str, Tensor], Tensor]]()
    rules = {name: lambda op, i, t, rule=rule: seen.setdefault(op.name, (i, t, rule(op, i, t)))[2]
             for name, rule in unit.rules.items()}  # fmt: skip
    net.rules = rules
    net(x).square().sum().backward()
    chosen = []
    for op in layers_of(net.graph).ops:
        given, tensors, found = seen[op.name]
        candidates = torch.stack([compute(op, given, tensors, bits, chance()) for bits in how.bits])
        away = (candidates - found).abs().flatten(2).amax(2)
        assert (away.amin(0) <= 1e-5 * found.abs().max()).all()
        chosen.append(away.argmin(0))
    assert len(torch.unique(torch.stack(chosen))) > 1
    count = np.mean([[cost(how.bits[int(j)]) for j in row] for row in chosen], axis=1)
    assert unit.bit_mac_share == pytest.approx(count @ list(layers_of(net.graph).shares.values()), rel=1e-5)
    assert all(value.grad is not None and value.grad.any() for value in simulation.gate.parameters())


@pytest.mark.parametrize("above", [True, False])
def test_the_cost_goes_to_the_target_from_both_sides(above: bool) -> None:
    """By the regulariser alone: the gate moves until it goes to and fro around the target."""
    simulation, how = gated("dfq:3/6,6/12:target=0.03")
    net = net_of("mlp")
    x = inputs(net, 32)
    assert simulation.gate is not None
    dict(simulation.gate.named_parameters())["scores.bias"].data = torch.tensor([0.0, 0.5 if above else -0.5])
    rule = torch.optim.SGD(simulation.gate.parameters(), lr=3.0)
    shares = []
    for number in range(150):
        unit = simulation.unit(number)
        net.rules = unit.rules
        net(x)
        rule.zero_grad()
        penalty = unit.penalty
        assert isinstance(penalty, Tensor)
        penalty.backward()  # type: ignore[no-untyped-call]
        rule.step()
        shares.append(unit.bit_mac_share)
    assert (shares[0] > how.target) == above
    assert abs(np.mean(shares[-40:]) - how.target) < 0.5 * abs(shares[0] - how.target)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "text",
    ["", "3", "3/6/8", "three/6", "1/6", "3/24", "3/6,", "8/8,3/6", "3/6,3/6", "3/6:turn=0.1", "3/6,8/8:turn=0",
     "3/6,8/8:decay=2", "3/6,8/8:speed=1", "3/6,8/8:turn", "dfq:3/6,4/8", "dfq:3/6:target=0.02",
     "dfq:3/6,3/6:target=0.02", "dfq:3/6,4/8:target=1", "dfq:3/6,4/8:target=nan", "dfq:3/6,4/8:target=0.02,weights=4.5",
     "dfq:3/6,4/8:target=0.02,weights=40"],
)  # fmt: skip
def test_other_settings_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"--simulate-bits: .*, expected ") as caught:
        Pretraining(simulate_bits=text)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_together_and_targets_out_of_reach() -> None:
    with pytest.raises(UsageError, match="together with --slice"):
        Pretraining(simulate_bits="3/6", slice=0.5)
    config = replace(SMALL, simulate_bits="dfq:3/6,6/12:target=0.015")
    with pytest.raises(UsageError, match=r"target=0.015, expected 0.0176 to 0.0469"):
        pretrain(random_run(), [squares()], config, seed=0)
