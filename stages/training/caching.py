"""Whether the frozen layers' outputs of a support set and its views are worth keeping, by what they take here.

Across the iterations of an adaptation the same samples pass the same frozen layers: POET's question (what to keep,
what to make again) where a processor has most to win.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stages.engines.choice import TrainedNet
from stages.engines.parameter import Floats
from stages.training.adaptation import Adapting, total_iterations

SAMPLES, REPEATS = 4, 3
"""How many samples are timed, and how often: the median counts."""
SHARE = 0.5
"""Of the memory that is free, what a cache may take."""


@dataclass(frozen=True)
class Worth:
    """What a cache takes and saves."""

    bytes: int
    """Of all samples and views."""
    free_bytes: int | None
    """What there is; None where the kernel does not say."""
    run_s: float
    """Running the frozen layers for one sample."""
    read_s: float
    """Taking one sample's outputs from the cache."""
    uses: float
    """How often each view passes, over the whole adaptation."""

    @property
    def pays(self) -> bool:
        """Whether it fits, and saves time: the first pass is made in any case."""
        fits = self.free_bytes is None or self.bytes <= SHARE * self.free_bytes
        return fits and self.uses > 1 and (self.uses - 1) * self.run_s > self.uses * self.read_s


def worth_of(net: TrainedNet, x: Floats, how: Adapting, free_bytes: int | None) -> Worth:
    """What keeping the frozen layers' outputs of a support set x (N, *input) and its views is worth.

    Without fixed views there is nothing to keep beside the support's own outputs, which always are.
    """
    some = x[:SAMPLES]
    boundary = net.prefix(some)
    run_s = _median(lambda: net.prefix(some)) / len(some)
    rows = np.arange(len(some))
    read_s = _median(lambda: [np.array(value[rows]) for value in boundary]) / len(some)
    each = sum(value.nbytes for value in boundary) // len(some)
    uses = total_iterations(how) / how.views if how.views else 0.0
    return Worth(each * len(x) * (1 + how.views), free_bytes, run_s, read_s, uses)


def _median(body: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        body()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
