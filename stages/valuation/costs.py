"""What choosing and training cost: seconds where they are measured, else forward passes of one sample.

Either is a line, a fixed part and so much per sample: what a round costs whatever its batch (reading, dispatching,
publishing) decides whether small batches or large ones pay. Lines are fitted by medians to the latest rounds, so a page
fault or a busy neighbour does not move them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from stages.artifacts.records import Block

RECENT = 8
"""Times that are kept of each size: sizes that have not been seen for long still tell the slope."""

Clock = Callable[[], float]
"""Seconds that never go back. The commands hand in the processor time of their thread: waiting costs nothing."""

Times = Sequence[tuple[int, float]]
"""(samples, seconds) of past work."""

T = TypeVar("T")


class Recent:
    """The latest times of each size."""

    def __init__(self) -> None:
        self._by_size: dict[int, deque[float]] = {}

    def add(self, samples: int, seconds: float) -> None:
        self._by_size.setdefault(samples, deque(maxlen=RECENT)).append(seconds)

    def times(self) -> Times:
        return [(samples, seconds) for samples, kept in self._by_size.items() for seconds in kept]


class UpdateClock:
    """Times a trainer's updates from outside: from the block that it takes to the version that it publishes."""

    def __init__(self, clock: Clock) -> None:
        self._recent = Recent()
        self._clock, self._samples, self._began_s = clock, 0, 0.0

    def through(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks as they are."""
        for block in blocks:
            self._samples, self._began_s = len(block), self._clock()
            yield block

    def published(self) -> None:
        """The update from the latest block is done. The first of a size warms up; medians pass over it."""
        self._recent.add(self._samples, self._clock() - self._began_s)

    def times(self) -> Times:
        """What the latest updates took."""
        return self._recent.times()


@dataclass(frozen=True)
class Line:
    """What handling n samples at once costs: fixed + each * n."""

    fixed: float
    each: float

    def of(self, samples: float) -> float:
        return self.fixed + self.each * samples


def fit(times: Times) -> Line:
    """The line through times of different sizes, by medians (after Theil and Sen); neither part is negative.

    Its slope is the median over pairs at least half as far apart as the farthest. Where all sizes are alike nothing
    tells the fixed part from the rest, and all of it is taken to grow with the samples.
    """
    samples, seconds = np.array(times, dtype=float).T
    apart = samples[:, None] - samples
    far = (apart > 0) & (apart >= np.ptp(samples) / 2)
    if far.any():
        each = max(float(np.median((seconds[:, None] - seconds)[far] / apart[far])), 0.0)
        fixed = float(np.median(seconds - each * samples))
        if fixed >= 0:
            return Line(fixed, each)
    some = samples > 0
    if not some.any():
        return Line(float(np.median(seconds)), 0.0)
    return Line(0.0, float(np.median(seconds[some] / samples[some])))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a round costs, in the unit that `unit` names."""

    score: Line = Line(0.0, 1.0)
    """Choosing a batch, so many candidates scored."""
    update: Line = Line(0.0, 3.0)
    """Training on so many samples: without measurement forward, input gradient and weight gradient."""
    overlap: bool = False
    """Choosing has a processor of its own and goes on while the update before it does."""
    unit: str = "forward passes"

    def of(self, scored: float, trained: float) -> float:
        """A round that scores and trains on so many samples."""
        choosing, training = self.score.of(scored), self.update.of(trained)
        return max(choosing, training) if self.overlap else choosing + training


class Meter:
    """Learns what rounds and updates cost.

    Args:
        ratio: forward passes that training on a sample takes, for as long as no update has been measured.
        fixed_ratio: never to take measured updates instead.
        clock: None measures nothing: all is counted in forward passes.
    """

    def __init__(self, ratio: float, *, fixed_ratio: bool = False, overlap: bool = False, clock: Clock | None = None):
        self._ratio, self._fixed, self._overlap, self._clock = ratio, fixed_ratio, overlap, clock
        self._rounds = Recent()
        self._updates: Times = ()
        self._spent_s = 0.0
        self._warm = False

    def time(self, work: Callable[[], T]) -> T:
        """Do some of a round's work and count its time."""
        if self._clock is None:
            return work()
        began = self._clock()
        done = work()
        self._spent_s += self._clock() - began
        return done

    def close_round(self, scored: int) -> None:
        """The round's work is done; so many candidates were scored. The first round warms up and is not counted."""
        if self._clock is not None and self._warm:
            self._rounds.add(scored, self._spent_s)
        self._spent_s, self._warm = 0.0, True

    def updates(self, times: Times) -> None:
        """What the trainer says its latest updates took."""
        measured = [(samples, seconds) for samples, seconds in times if samples]
        if measured:
            self._updates = measured

    def costs(self) -> Costs:
        """As far as is known by now."""
        rounds = self._rounds.times()
        if not any(scored for scored, _ in rounds):
            return Costs(update=Line(0.0, self._ratio), overlap=self._overlap)
        score = fit(rounds)
        if self._fixed or not self._updates:
            update, unit = Line(0.0, self._ratio * score.each), "seconds, updates by ratio"
        else:
            update, unit = fit(self._updates), "seconds"
        return Costs(score=score, update=update, overlap=self._overlap, unit=unit)
