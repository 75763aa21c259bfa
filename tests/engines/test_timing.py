"""What every engine's timing is made of: repeated runs under a clock that counts calls, and medians of them."""

from __future__ import annotations

import itertools

import numpy as np

from stages.engines.timing import WARM_UP, LayerTimes, median_and_spread, repeat


def test_repeat_leaves_the_warm_up_out():
    now, runs = itertools.count(), []
    seconds = repeat(lambda: runs.append(next(now)), 3, clock=lambda: float(next(now)))
    assert len(runs) == 3 + WARM_UP
    assert list(seconds) == [2.0, 2.0, 2.0]


def test_median_and_spread():
    assert median_and_spread(np.array([1.0, 2.0, 3.0, 4.0, 100.0])) == (3.0, 2.0)


def test_the_backward_pass_is_both_gradients():
    assert LayerTimes(np.ones(2), np.array([1.0, 2.0]), np.array([3.0, 5.0])).backward.tolist() == [4.0, 7.0]
