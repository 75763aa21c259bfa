"""Selection that pays: which way of choosing brings the most progress per unit of computing (`--strategy auto`).

A step of gradient descent with an estimate of second moment M = |G|^2 + V makes progress in proportion to |G|^4 / M at
the best step size (the descent lemma), so what a step costs per unit of progress is in proportion to M x cost. Where
noise dominates this is the classic criterion of efficiency, variance x cost (Glynn and Whitt, 1992); where the gradient
does, it prefers cheap steps. V has two parts: of the pool as a sample of the stream, and of the batch as a sample of
the pool, the latter in closed form for every strategy and batch size. Costs are in forward passes of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from stages.errors import require
from stages.valuation.designs import divide, equal_design, equal_spread
from stages.valuation.fine import GradientView, by_label, class_strata, gradients_of, least_variance, whole

FADE = 0.8
"""Weight of the past in the running moments, per observation."""

PROBE_EVERY = 50
"""Rounds between observations, after the first ones at rounds 0, 1, 2, 4, 8, ...: at most 2 % of the rounds."""

SCORED = frozenset({"titan"})
"""Options that score their candidates; the others look at labels only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a round costs, in forward passes of one sample."""

    update: float = 3.0
    """Training on one sample: forward, input gradient and weight gradient (3 for full training)."""
    overlap: bool = False
    """Scoring runs on a processor of its own while the update before it goes on."""

    def __post_init__(self) -> None:
        require(self.update >= 1.0, "--update-cost", f"{self.update}", "at least 1, the forward pass itself")

    def of(self, scored: int, trained: int) -> float:
        """A round that scores and trains on so many samples."""
        update = self.update * trained
        return max(float(scored), update) if self.overlap else scored + update


@dataclass(frozen=True)
class Option:
    """One way to spend a round."""

    strategy: str
    candidates: int
    """How many of the pool are used."""
    batch: int

    @property
    def scored(self) -> int:
        return self.candidates if self.strategy in SCORED else 0


@dataclass(frozen=True)
class Moments:
    """Second-order properties of a pool's gradients."""

    signal: float
    """|G|^2 of the stream, estimated without the pool's noise."""
    pool: float
    """Variance of the pool's mean as an estimate of the stream's."""
    batch: Mapping[tuple[str, int], float]
    """(strategy, batch) -> variance of the batch as an estimate of the pool's mean."""

    def fade_into(self, newer: Moments) -> Moments:
        """The running mean of these moments and newer ones."""

        def mix(old: float, new: float) -> float:
            return FADE * old + (1.0 - FADE) * new

        batch = {key: mix(self.batch.get(key, value), value) for key, value in newer.batch.items()}
        return Moments(mix(self.signal, newer.signal), mix(self.pool, newer.pool), batch)


def moments(view: GradientView, batches: tuple[int, ...], epsilon: float) -> Moments:
    """What a scored pool tells about every option."""
    classes = divide(class_strata(view.labels), view.mass, gradients_of(view))
    pool = float((equal_spread(classes) / classes.sizes).sum())
    everything = whole(view)
    signal = max(float(everything.squared_sum.sum()) - pool, 0.0)
    variances: dict[tuple[str, int], float] = {}
    for batch in batches:
        variances["random", batch] = equal_design(everything, batch).variance
        variances["stratified", batch] = by_label(view, batch, epsilon).variance
        variances["titan", batch] = least_variance(view, batch, epsilon).variance
    return Moments(signal, pool, variances)


class Tuner:
    """Decides how to spend each round, from what scored rounds have shown so far."""

    def __init__(self, batch: int, max_batch: int, costs: Costs) -> None:
        self.costs = costs
        self.batches = tuple(batch * factor for factor in range(1, max(max_batch // batch, 1) + 1))
        self._rounds = 0
        self._moments: Moments | None = None
        self._size = 0

    def due(self) -> bool:
        """Whether this round is to be scored whole and observed; counts rounds."""
        number, self._rounds = self._rounds, self._rounds + 1
        return number & (number - 1) == 0 or number % PROBE_EVERY == 0

    def observe(self, view: GradientView, epsilon: float) -> None:
        """Take in a scored pool."""
        found = moments(view, self.batches, epsilon)
        self._moments = found if self._moments is None else self._moments.fade_into(found)
        self._size = len(view.labels)

    def choose(self, size: int) -> Option:
        """The option that costs least per unit of progress, for a pool of `size` candidates."""
        return min(self.options(size), key=self.price)

    def options(self, size: int) -> Iterator[Option]:
        """Every strategy and batch size; scored ones also on half of the pool."""
        for batch in self.batches:
            yield Option("random", size, batch)
            yield Option("stratified", size, batch)
            yield Option("titan", size, batch)
            if batch <= size // 2:
                yield Option("titan", size // 2, batch)

    def explain(self, option: Option) -> str:
        """The choice in words, beside the best option of every other strategy."""
        best = self.price(option)
        others = {other.strategy: self.price(other) / best
                  for other in sorted(self.options(option.candidates), key=self.price, reverse=True)
                  if other.strategy != option.strategy}  # fmt: skip
        beside = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in sorted(others.items(), key=lambda item: item[1]))
        scored = f", {option.candidates} candidates scored" if option.scored else ""
        return f"{option.strategy}, batch {option.batch}{scored} (cost per progress of others: {beside})"

    def price(self, option: Option) -> float:
        """Second moment x cost: in arbitrary units, lower is better."""
        if self._moments is None:
            raise ValueError("nothing has been observed yet")
        pool = self._moments.pool * self._size / option.candidates
        second = self._moments.signal + pool + self._moments.batch[option.strategy, option.batch]
        return second * self.costs.of(option.scored, min(option.batch, option.candidates))
