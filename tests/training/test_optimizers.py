"""Optimisers over live slices: schedules by hand, all-or-nothing steps, state that survives a checkpoint."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from stages.errors import DataError, UsageError
from stages.training.optimizers import (
    OPTIMIZERS,
    Optimizer,
    Optimizing,
    checked_step,
    learning_rate,
    load_state,
    make_optimizer,
    replace_parameter,
    state_arrays,
)


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def drive(weight: nn.Parameter, optimizer: Optimizer, updates: range, clip_norm: float = 0.0) -> None:
    """Updates on a fixed sequence of gradients that differ from each other."""
    for update in updates:
        weight.grad = torch.cos(torch.arange(weight.numel(), dtype=torch.float32) + update).view_as(weight)
        checked_step(optimizer, 1.0, rate=0.1, clip_norm=clip_norm, where="update")


def test_cosine_falls_from_the_peak_to_zero_after_the_warm_up() -> None:
    how = Optimizing(learning_rate=2.0, schedule="cosine", warmup_updates=2, total_updates=6)
    rates = [learning_rate(update, how) for update in range(8)]
    # warm-up 1/2, 2/2; then 0.5 * (1 + cos(pi * t / 4)) for t = 0..4, and 0 ever after
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1 + np.sqrt(0.5), 1.0, 1 - np.sqrt(0.5), 0.0, 0.0])


def test_step_schedule_is_titans() -> None:
    how = Optimizing(learning_rate=1.0, schedule="step")
    assert [learning_rate(update, how) for update in (0, 99, 100, 250)] == pytest.approx([1, 1, 0.95, 0.95**2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer": "rmsprop"},
        {"schedule": "linear"},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"momentum": 1.0},
        {"momentum": 0.9, "optimizer": "adam"},
        {"schedule": "cosine"},
        {"schedule": "cosine", "total_updates": 5, "warmup_updates": 5},
    ],
    ids=str,
)
def test_configurations_check_themselves(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Optimizing(**wrong)  # type: ignore[arg-type]


def test_sgd_with_momentum_and_weight_decay_by_hand() -> None:
    weight = parameter(1.0)
    optimizer = make_optimizer([weight], Optimizing(momentum=0.5, weight_decay=0.1))
    for _ in range(2):
        weight.grad = torch.tensor([2.0])
        checked_step(optimizer, 0.0, rate=0.1, clip_norm=0.0, where="update")
    # g1 = 2 + 0.1 * 1 = 2.1, w = 0.79; g2 = 2 + 0.079 = 2.079, buffer 0.5 * 2.1 + 2.079 = 3.129, w = 0.4771
    assert weight.item() == pytest.approx(0.4771)


def test_adam_moves_by_the_rate_first_whatever_the_gradient() -> None:
    weight = parameter(1.0, 1.0)
    optimizer = make_optimizer([weight], Optimizing(optimizer="adam"))
    weight.grad = torch.tensor([1e-3, -1e3])
    checked_step(optimizer, 0.0, rate=0.25, clip_norm=0.0, where="update")
    assert weight.tolist() == pytest.approx([0.75, 1.25], abs=1e-4)


def test_clipping_scales_the_whole_gradient() -> None:
    one, two = parameter(0.0), parameter(0.0)
    optimizer = make_optimizer([one, two], Optimizing())
    one.grad, two.grad = torch.tensor([3.0]), torch.tensor([4.0])
    checked_step(optimizer, 0.0, rate=1.0, clip_norm=1.0, where="update")
    assert (one.item(), two.item()) == pytest.approx((-0.6, -0.8), abs=1e-5)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(DataError, match="no live channel"):
        make_optimizer([], Optimizing())


@pytest.mark.parametrize(
    ("loss", "gradient", "message"),
    [
        (float("nan"), 1.0, "loss is nan"),
        (float("inf"), 1.0, "loss is inf"),
        (1.0, float("nan"), "gradient"),
        (1.0, -float("inf"), "gradient"),
        (1.0, 3e38, "weight"),
    ],
)
def test_a_step_that_would_break_the_model_leaves_it_alone(loss: float, gradient: float, message: str) -> None:
    weight, other = parameter(1.0), parameter(2.0)
    optimizer = make_optimizer([weight, other], Optimizing())
    weight.grad, other.grad = torch.tensor([gradient]), torch.tensor([1.0])
    with pytest.raises(DataError, match=f"update 7.*{message}"):
        checked_step(optimizer, loss, rate=100.0, clip_norm=0.0, where="update 7")
    assert (weight.item(), other.item()) == (1.0, 2.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_continues_bit_for_bit(name: str) -> None:
    how = Optimizing(optimizer=name, momentum=0.9 if name == "sgd" else 0.0, weight_decay=0.01)
    straight = parameter(1.0, -2.0, 3.0)
    drive(straight, make_optimizer([straight], how), range(10))
    first = parameter(1.0, -2.0, 3.0)
    optimizer = make_optimizer([first], how)
    drive(first, optimizer, range(5))
    second = nn.Parameter(first.detach().clone())
    resumed = make_optimizer([second], how)
    load_state(resumed, state_arrays(optimizer))
    drive(second, resumed, range(5, 10))
    assert torch.equal(second, straight)
    fresh = nn.Parameter(first.detach().clone())
    drive(fresh, make_optimizer([fresh], how), range(5, 10))
    assert not torch.equal(fresh, straight)


@pytest.mark.parametrize(
    "state", [{"1.momentum_buffer": np.zeros(3)}, {"0.momentum_buffer": np.zeros(2)}, {"x.step": np.zeros(1)}], ids=str
)
def test_state_of_another_plan_is_refused(state: dict[str, np.ndarray]) -> None:
    with pytest.raises(DataError, match="optimiser state"):
        load_state(make_optimizer([parameter(1.0, 2.0, 3.0)], Optimizing(momentum=0.9)), state)


def test_a_grown_head_keeps_the_momentum_of_its_old_rows() -> None:
    old = nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer([old], Optimizing(momentum=0.9))
    drive(old, optimizer, range(1))
    buffer = optimizer.state[0]["momentum_buffer"].clone()
    new = nn.Parameter(torch.zeros(3, 2))
    replace_parameter(optimizer, old, new, np.array([0, 2]))
    moved = optimizer.state[0]["momentum_buffer"]
    assert torch.equal(moved[[0, 2]], buffer)
    assert torch.equal(moved[1], torch.zeros(2))
    assert optimizer.parameters == [new]


TORCHS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.03, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.03),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.03),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rule_is_torchs(name: str) -> None:
    start = torch.linspace(-2, 2, 7, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    momentum = 0.9 if name == "sgd" else 0.0
    optimizer = make_optimizer([ours], Optimizing(optimizer=name, weight_decay=0.03, momentum=momentum))
    oracle = TORCHS[name]([theirs])
    for update in range(20):
        ours.grad = torch.cos(torch.arange(7, dtype=torch.float64) * update)
        theirs.grad = ours.grad.clone()
        optimizer.step(0.1)
        oracle.step()
    assert float((ours - start).detach().abs().max()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_optimiser_imports_torchs_compiler() -> None:
    """It would cost 71 MB and seconds of start-up, whatever the plan saves."""
    code = (
        "import sys, torch\n"
        "from stages.training.optimizers import Optimizing, OPTIMIZERS, checked_step, make_optimizer\n"
        "for name in OPTIMIZERS:\n"
        "    weight = torch.nn.Parameter(torch.ones(3)); weight.grad = torch.ones(3)\n"
        "    optimizer = make_optimizer([weight], Optimizing(optimizer=name))\n"
        "    checked_step(optimizer, 1.0, rate=0.1, clip_norm=1.0, where='')\n"
        "    assert float(weight.detach()[0]) < 1\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
