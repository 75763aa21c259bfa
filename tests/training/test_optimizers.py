"""Optimisers over live slices: schedules by hand, all-or-nothing steps, state that survives a checkpoint."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.errors import DataError, UsageError
from stages.training import optimizers
from stages.training.optimizers import (
    OPTIMIZERS,
    NotFinite,
    Optimizer,
    Optimizing,
    Parameter,
    checked_step,
    gradient_square,
    learning_rate,
    load_state,
    make_optimizer,
    replace_parameter,
    state_arrays,
)
from tests.rounding import gamma


def parameter(*values: float) -> Parameter:
    return Parameter(np.array(values, np.float32), np.zeros(len(values), np.float32))


def drive(weight: Parameter, optimizer: Optimizer, updates: range, clip_norm: float = 0.0) -> None:
    """Updates on a fixed sequence of gradients that differ from each other."""
    for update in updates:
        weight.gradient += np.cos(np.arange(weight.value.size, dtype=np.float32) + update).reshape(weight.value.shape)
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
        weight.gradient += 2
        checked_step(optimizer, 0.0, rate=0.1, clip_norm=0.0, where="update")
    # g1 = 2 + 0.1 * 1 = 2.1, w = 0.79; g2 = 2 + 0.079 = 2.079, buffer 0.5 * 2.1 + 2.079 = 3.129, w = 0.4771
    assert weight.value[0] == pytest.approx(0.4771)


def test_adam_moves_by_the_rate_first_whatever_the_gradient() -> None:
    weight = parameter(1.0, 1.0)
    optimizer = make_optimizer([weight], Optimizing(optimizer="adam"))
    weight.gradient[...] = 1e-3, -1e3
    checked_step(optimizer, 0.0, rate=0.25, clip_norm=0.0, where="update")
    assert weight.value.tolist() == pytest.approx([0.75, 1.25], abs=1e-4)  # epsilon is 1e-5 of the smaller gradient


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_sets_the_gradients_to_zero_and_keeps_the_arrays(name: str) -> None:
    weight = parameter(1.0, 2.0)
    value, gradient = weight.value, weight.gradient
    drive(weight, make_optimizer([weight], Optimizing(optimizer=name)), range(2))
    assert weight.value is value
    assert weight.gradient is gradient
    assert not gradient.any()
    assert value.dtype == gradient.dtype == np.float32


def test_clipping_scales_the_whole_gradient() -> None:
    one, two = parameter(0.0), parameter(0.0)
    optimizer = make_optimizer([one, two], Optimizing())
    one.gradient[0], two.gradient[0] = 3, 4
    checked_step(optimizer, 0.0, rate=1.0, clip_norm=1.0, where="update")
    # 3 and 4 times 1 / (5 + 1e-6)
    expected = (-3 / (5 + 1e-6), -4 / (5 + 1e-6))
    assert (one.value[0], two.value[0]) == pytest.approx(expected, rel=gamma(4))


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.just(0.0), st.floats(1e-6, 3)), st.integers(1, 40), st.integers(0, 2**31))
def test_clipping_is_torchs(clip_norm: float, size: int, seed: int) -> None:
    gradients = np.random.default_rng(seed).normal(0, 0.3, (2, size)).astype(np.float32)
    ours = [Parameter(np.zeros(size, np.float32), row.copy()) for row in gradients]
    theirs = [torch.nn.Parameter(torch.zeros(size, dtype=torch.float64)) for _ in gradients]
    for leaf, row in zip(theirs, gradients, strict=True):
        leaf.grad = torch.from_numpy(row).double()
    checked_step(make_optimizer(ours, Optimizing()), 0.0, rate=1.0, clip_norm=clip_norm, where="")
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
    for mine, leaf in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.value, -leaf.grad.numpy(), rtol=gamma(4))  # the factor and its product


def test_the_norm_is_summed_in_float64_over_all_chunks() -> None:
    size = 2 * optimizers.CHUNK + 3
    weight = Parameter(np.zeros(size, np.float32), np.full(size, 1e-30, np.float32))  # whose square no float32 holds
    expected = float(np.float32(1e-30)) ** 2 * (size + 1)
    last = Parameter(np.zeros(1, np.float32), np.full(1, 1e-30, np.float32))
    assert gradient_square([weight, last]) == pytest.approx(expected, rel=gamma(size + 8, torch.float64))


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
    optimizer = make_optimizer([other, weight], Optimizing())
    weight.gradient[0], other.gradient[0] = gradient, 1.0
    with pytest.raises(NotFinite, match=f"update 7.*{message}"):
        checked_step(optimizer, loss, rate=100.0, clip_norm=0.0, where="update 7")
    assert (weight.value[0], other.value[0]) == (1.0, 2.0)
    assert (weight.gradient[0], other.gradient[0]) == (0.0, 0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_broken_value_in_the_last_chunk_undoes_all_chunks(name: str) -> None:
    size = 2 * optimizers.CHUNK + 5
    start = np.random.default_rng(0).normal(size=size).astype(np.float32)
    start[-1] = 3e38
    weight = Parameter(start.copy(), np.full(size, -1.0, np.float32))
    optimizer = make_optimizer([weight], Optimizing(optimizer=name))
    with pytest.raises(NotFinite, match="weight"):
        checked_step(optimizer, 1.0, rate=1e38, clip_norm=0.0, where="update")
    np.testing.assert_array_equal(weight.value, start)
    assert not weight.gradient.any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_continues_bit_for_bit(name: str) -> None:
    how = Optimizing(optimizer=name, momentum=0.9 if name == "sgd" else 0.0, weight_decay=0.01)
    straight = parameter(1.0, -2.0, 3.0)
    drive(straight, make_optimizer([straight], how), range(10))
    first = parameter(1.0, -2.0, 3.0)
    optimizer = make_optimizer([first], how)
    drive(first, optimizer, range(5))
    second, fresh = (parameter(*first.value.tolist()) for _ in range(2))
    resumed = make_optimizer([second], how)
    load_state(resumed, state_arrays(optimizer))
    drive(second, resumed, range(5, 10))
    np.testing.assert_array_equal(second.value, straight.value)
    drive(fresh, make_optimizer([fresh], how), range(5, 10))
    assert not np.array_equal(fresh.value, straight.value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_copied_out_and_in(name: str) -> None:
    how = Optimizing(optimizer=name, momentum=0.9 if name == "sgd" else 0.0)
    weight = parameter(1.0, 2.0)
    optimizer = make_optimizer([weight], how)
    assert not state_arrays(optimizer)
    drive(weight, optimizer, range(2))
    kept = state_arrays(optimizer)
    again = {key: array.copy() for key, array in kept.items()}
    other = make_optimizer([parameter(1.0, 2.0)], how)
    load_state(other, kept)
    drive(other.parameters[0], other, range(2))
    drive(weight, optimizer, range(1))
    assert kept.keys() == again.keys() != set()
    for key, array in kept.items():
        np.testing.assert_array_equal(array, again[key])


@pytest.mark.parametrize(
    "state", [{"1.momentum_buffer": np.zeros(3)}, {"0.momentum_buffer": np.zeros(2)}, {"x.step": np.zeros(1)}], ids=str
)
def test_state_of_another_plan_is_refused(state: dict[str, np.ndarray]) -> None:
    with pytest.raises(DataError, match="optimiser state"):
        load_state(make_optimizer([parameter(1.0, 2.0, 3.0)], Optimizing(momentum=0.9)), state)


def test_a_grown_head_keeps_the_momentum_of_its_old_rows() -> None:
    old = Parameter(np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32))
    other = parameter(1.0)
    optimizer = make_optimizer([other, old], Optimizing(momentum=0.9))
    drive(old, optimizer, range(1))
    buffer = optimizer.state[1]["momentum_buffer"].copy()
    new = Parameter(np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32))
    replace_parameter(optimizer, old, new, np.array([0, 2]))
    moved = optimizer.state[1]["momentum_buffer"]
    np.testing.assert_array_equal(moved[[0, 2]], buffer)
    assert buffer.all()
    assert not moved[1].any()
    assert optimizer.parameters == [other, new]
    drive(new, optimizer, range(1))


def test_a_parameter_is_two_arrays_that_match() -> None:
    wide = np.zeros((4, 4), np.float32)
    for value, gradient in ((wide, wide[:2]), (wide.T[1:], wide[1:]), (wide[:, 1:], wide[:, 1:])):
        with pytest.raises(ValueError, match="of one shape"):
            Parameter(value, gradient)


TORCHS = {
    "sgd": lambda p, momentum: torch.optim.SGD(p, lr=0.1, weight_decay=0.03, momentum=momentum),
    "adam": lambda p, momentum: torch.optim.Adam(p, lr=0.1, weight_decay=0.03),
    "adamw": lambda p, momentum: torch.optim.AdamW(p, lr=0.1, weight_decay=0.03),
}


@pytest.mark.parametrize(("name", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0), ("adamw", 0.0)])
def test_every_rule_is_torchs(name: str, momentum: float) -> None:
    """In float64, over more than a chunk; the state too."""
    size = optimizers.CHUNK + 7
    start: NDArray[np.float64] = np.linspace(-2, 2, size)
    ours = Parameter(start.copy(), np.zeros(size))  # type: ignore[arg-type]
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = make_optimizer([ours], Optimizing(optimizer=name, weight_decay=0.03, momentum=momentum))
    oracle = TORCHS[name]([theirs], momentum)
    for update in range(20):
        gradient = np.cos(np.arange(size, dtype=np.float64) * update) + 0.01
        ours.gradient += gradient
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step(0.1)
        oracle.step()
    assert np.abs(ours.value - start).max() > 0.1
    np.testing.assert_allclose(ours.value, theirs.detach().numpy(), rtol=1e-12, atol=1e-12)
    for key, array in optimizer.state[0].items():
        expected = oracle.state[theirs][key].numpy()
        np.testing.assert_allclose(array, expected, rtol=1e-12, atol=1e-12)
    assert optimizer.state[0].keys() == {k for k, v in oracle.state[theirs].items() if v is not None}


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(OPTIMIZERS)), st.integers(1, 12), st.integers(0, 2**31))
def test_how_values_are_cut_into_parameters_and_chunks_changes_no_bit(name: str, cut: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    start, gradients = rng.normal(size=13).astype(np.float32), rng.normal(size=(3, 13)).astype(np.float32)
    how = Optimizing(optimizer=name, weight_decay=0.01, momentum=0.9 if name == "sgd" else 0.0)

    def trained(cuts: list[int]) -> NDArray[np.float32]:
        parts = [Parameter(part.copy(), np.zeros(len(part), np.float32)) for part in np.split(start, cuts)]
        optimizer = make_optimizer(parts, how)
        for gradient in gradients:
            for part, own in zip(parts, np.split(gradient, cuts), strict=True):
                part.gradient += own
            optimizer.step(0.1)
        return np.concatenate([part.value for part in parts])

    whole = trained([])
    np.testing.assert_array_equal(trained([cut]), whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "CHUNK", cut)
        np.testing.assert_array_equal(trained([]), whole)


def test_a_step_makes_no_array_of_a_parameters_size() -> None:
    size = 40 * optimizers.CHUNK
    for name in OPTIMIZERS:
        weight = Parameter(np.zeros(size, np.float32), np.ones(size, np.float32))
        optimizer = make_optimizer([weight], Optimizing(optimizer=name, weight_decay=0.1))
        checked_step(optimizer, 1.0, rate=0.1, clip_norm=1.0, where="")  # makes the state
        weight.gradient += 1
        tracemalloc.start()
        try:
            checked_step(optimizer, 1.0, rate=0.1, clip_norm=1.0, where="")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < weight.value.nbytes / 4, name


def test_stepping_imports_no_torch() -> None:
    """It would cost more memory and time than all that a plan saves."""
    code = (
        "import sys, numpy as np\n"
        "from stages.training.optimizers import Optimizing, OPTIMIZERS, Parameter, checked_step, make_optimizer\n"
        "for name in OPTIMIZERS:\n"
        "    weight = Parameter(np.ones(3, np.float32), np.ones(3, np.float32))\n"
        "    optimizer = make_optimizer([weight], Optimizing(optimizer=name))\n"
        "    checked_step(optimizer, 1.0, rate=0.1, clip_norm=1.0, where='')\n"
        "    assert weight.value[0] < 1\n"
        "assert not {'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
