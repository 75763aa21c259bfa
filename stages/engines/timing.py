"""Seconds of layers and of whole passes: what every engine measures, and medians of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WARM_UP = 2
"""Runs before the measured ones: the first allocates memory and chooses kernels."""

Seconds = NDArray[np.float64]
Clock = Callable[[], float]


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer and the operators behind it, one entry per repeat (R,)."""

    forward: Seconds
    input_gradient: Seconds
    weight_gradient: Seconds

    @property
    def backward(self) -> Seconds:
        """Both gradients."""
        return self.input_gradient + self.weight_gradient


def repeat(run: Callable[[], object], repeats: int, clock: Clock = time.perf_counter) -> Seconds:
    """Seconds of each of `repeats` runs (R,), after a warm-up."""
    seconds = np.empty(repeats)
    for i in range(-WARM_UP, repeats):
        start = clock()
        run()
        if i >= 0:
            seconds[i] = clock() - start
    return seconds


def median_and_spread(seconds: Seconds) -> tuple[float, float]:
    """Median and interquartile range: neither is moved by a few interruptions."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return float(middle), float(high - low)
