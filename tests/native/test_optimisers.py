"""Optimisers of the C library beside those in numpy: the same bits, where the library rounds one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.engines.native.library import library
from stages.engines.parameter import Parameter
from stages.training.optimizers import (
    COLUMNS,
    Optimizing,
    checked_step,
    clip_factor,
    gradient_square,
    make_optimizer,
)

RULES = {
    "sgd": Optimizing(optimizer="sgd"),
    "momentum": Optimizing(optimizer="sgd", momentum=0.9, weight_decay=0.03),
    "adam": Optimizing(optimizer="adam"),
    "adam with decay": Optimizing(optimizer="adam", weight_decay=0.03),
    "adamw": Optimizing(optimizer="adamw", weight_decay=0.03),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("clip_norm", [0.0, 2.0])
def test_a_step_has_the_same_bits_in_c_and_in_numpy(name: str, clip_norm: float) -> None:
    how, rng, rate, count = RULES[name], np.random.default_rng(5), 0.0123, 1003
    values = rng.standard_normal(count).astype(np.float32)
    values[:2] = 0.0, -0.0
    mine, first, second = values.copy(), np.zeros(count, np.float32), np.zeros(count, np.float32)
    parameter, lib = Parameter(values), library(same_bits=True)
    optimizer = make_optimizer([parameter], how)
    for update in range(1, 40):
        gradient = rng.standard_normal(count).astype(np.float32)
        parameter.gradient += gradient
        checked_step(optimizer, 0.0, rate=rate, clip_norm=clip_norm, where="")
        if clip_norm:
            factor = lib.et_clip_factor(lib.et_square_sum(gradient.ctypes.data, count), clip_norm)
            assert factor == clip_factor(gradient_square([Parameter(values, gradient)]), clip_norm) < 1
            gradient *= np.float32(factor)
        if how.optimizer == "sgd":
            state = first.ctypes.data if how.momentum else None
            lib.et_sgd(mine.ctypes.data, gradient.ctypes.data, state, count, rate, how.momentum, how.weight_decay)
        else:
            lib.et_adam(
                mine.ctypes.data, gradient.ctypes.data, first.ctypes.data, second.ctypes.data, count, rate,
                how.weight_decay, int(how.optimizer == "adamw"), update,
            )  # fmt: skip
        np.testing.assert_array_equal(mine.view(np.int32), values.view(np.int32))


@given(st.lists(st.floats(-1e3, 1e3, width=32), max_size=3 * COLUMNS))
def test_the_sum_of_squares_has_the_same_bits(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    found = library(same_bits=True).et_square_sum(values.ctypes.data, len(values))
    assert found == gradient_square([Parameter(values, values)])


def test_a_norm_that_is_too_large_gives_no_factor() -> None:
    lib = library(same_bits=True)
    assert lib.et_clip_factor(1e39, 2.0) == clip_factor(1e39, 2.0) == 0
    assert lib.et_clip_factor(0.0, 2.0) == clip_factor(0.0, 2.0) == 1
