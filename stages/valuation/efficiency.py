"""Selection that pays: which way of choosing brings the most progress per second (`--strategy auto`).

A step of size eta with an estimate of second moment M = |G|^2 + V lowers a loss of curvature L by
eta |G|^2 - eta^2 L M / 2 (the descent lemma; Bottou, Curtis and Nocedal, *SIAM Review* 2018, eq. 4.4). The step size is
the user's and does not follow the choice, so it is taken to be the one that makes the most of random batches of the
smallest size, eta = |G|^2 / (L M0). A round's progress is then in proportion to 2 M0 - M: taking all the noise away
doubles it at most, however large M0 is: the diminishing return of large batches at a fixed step size. What progress
costs is in proportion to the cost of a round / (2 M0 - M).
V has three parts: of the window as a sample of the stream, of the pool as a sample of the window, and of the batch as a
sample of the pool, the last in closed form for every strategy and batch size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.errors import DataError
from stages.valuation.costs import Costs, Meter
from stages.valuation.designs import Design, divide, equal_design, equal_spread
from stages.valuation.fine import (
    GradientView,
    by_label,
    class_strata,
    flat_importance,
    gradients_of,
    least_variance,
)

FADE = 0.5
"""Weight of the past in the running moments, per observation: gradients change fast between the early ones."""

EARLY = (0, 1, 4, 16)
"""The first rounds that are observed. Each costs the forward pass of a whole pool."""

PROBE_EVERY = 50
"""Rounds between observations after that."""

SCORED = frozenset({"is", "titan"})
"""Options that score their candidates; the others look at labels only."""


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
class Decision:
    """What was chosen for a round, and the costs that decided: enough to do the same again."""

    option: Option
    observed: bool
    """The pool was scored whole, to learn from it."""
    select_cost: float
    update_cost: float
    unit: str

    def facts(self) -> dict[str, Any]:
        """Of the round's block, beside its `strategy`."""
        return {"auto_batch": self.option.batch, "auto_candidates": self.option.candidates,
                "auto_observed": int(self.observed), "auto_select_cost": self.select_cost,
                "auto_update_cost": self.update_cost, "auto_unit": self.unit}  # fmt: skip

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Decision:
        """What `facts` and `strategy` say. Raises `KeyError` where one is missing."""
        option = Option(facts["strategy"], int(facts["auto_candidates"]), int(facts["auto_batch"]))
        return cls(option, bool(facts["auto_observed"]), float(facts["auto_select_cost"]),
                   float(facts["auto_update_cost"]), facts["auto_unit"])  # fmt: skip


def recorded(rows: Iterable[Mapping[str, Any]], where: str) -> dict[int, Decision]:
    """Round -> decision, from the metrics lines of an earlier run; rounds without candidates had nothing to decide.

    Raises `DataError` for lines that say nothing of it.
    """
    try:
        found = {int(row["round"]): Decision.from_facts(row) for row in rows if row["candidates"]}
    except (KeyError, TypeError, ValueError) as error:
        fix = "give the --metrics FILE of an earlier `select --strategy auto`"
        raise DataError(
            where, f"a line without {error}", "`round`, `strategy` and `auto_...` in every line", fix
        ) from error
    return found


# -------------------------------------------------------------------------------------------------------------- tuning


@dataclass(frozen=True)
class Yield:
    """What a design brings."""

    variance: float
    distinct: float
    """Samples to train on, on average."""

    @classmethod
    def of(cls, design: Design) -> Yield:
        return cls(design.variance, design.distinct)


@dataclass(frozen=True)
class Moments:
    """Second-order properties of a pool's gradient."""

    signal: float
    """|G|^2 of the stream, without the noise of window and pool; negative by chance where there is hardly any."""
    window: float
    """Variance of the window's class shares as an estimate of the stream's."""
    pool: float
    """Variance of the pool's mean as an estimate of the window's."""
    batch: Mapping[tuple[str, int], Yield]
    """(strategy, batch) -> the batch as an estimate of the pool's mean."""

    def fade_into(self, newer: Moments) -> Moments:
        """The running mean of these moments and newer ones."""

        def mix(old: float, new: float) -> float:
            return FADE * old + (1.0 - FADE) * new

        batch = {}
        for key, new in newer.batch.items():
            old = self.batch[key]
            batch[key] = Yield(mix(old.variance, new.variance), mix(old.distinct, new.distinct))
        return Moments(
            mix(self.signal, newer.signal), mix(self.window, newer.window), mix(self.pool, newer.pool), batch
        )


def moments(view: GradientView, batches: tuple[int, ...], epsilon: float, arrived: int) -> Moments:
    """What a scored pool, out of so many samples that arrived, tells about every option."""
    classes, everything = divide(class_strata(view.labels), view.mass, gradients_of(view)), view.whole
    squared = float(everything.squared_sum.sum())
    pool = float((equal_spread(classes) / classes.sizes).sum())
    window = max(float((classes.squared_sum / classes.masses).sum()) * float(classes.masses.sum()) - squared, 0.0)
    window /= arrived
    yields: dict[tuple[str, int], Yield] = {}
    for batch in batches:
        yields["random", batch] = Yield.of(equal_design(everything, batch))
        yields["stratified", batch] = Yield.of(by_label(view, batch, epsilon))
        yields["is", batch] = Yield.of(flat_importance(view, batch, epsilon))
        yields["titan", batch] = Yield.of(least_variance(view, batch, epsilon))
    return Moments(squared - pool - window, window, pool, yields)


class Tuner:
    """Decides how to spend each round, from what scored rounds have shown so far and what the meter says.

    `replay`: the decisions of an earlier run, taken again as they were.
    """

    def __init__(self, batch: int, max_batch: int, meter: Meter, replay: Mapping[int, Decision] | None = None) -> None:
        self.meter = meter
        self.batches = tuple(range(batch, max_batch + 1, batch))
        self._max_batch, self._replay = max_batch, replay
        self._first: int | None = None
        self._moments: Moments | None = None
        self._size = 0
        self._decision: Decision | None = None

    def due(self, number: int) -> bool:
        """Whether a round is scored whole and observed: 0, 1, 4, 16 after the first, and every fiftieth."""
        if self._replay is not None:
            return self._recorded(number).observed
        self._first = number if self._first is None else self._first
        since = number - self._first
        return since in EARLY or since % PROBE_EVERY == 0

    def observe(self, view: GradientView, epsilon: float, arrived: int) -> None:
        """Take in a scored pool out of so many samples that arrived."""
        if self._replay is None:
            found = moments(view, self.batches, epsilon, arrived)
            self._moments = found if self._moments is None else self._moments.fade_into(found)
            self._size = len(view.labels)

    def decide(self, number: int, size: int) -> Decision:
        """The option for a pool of `size` candidates that costs least per unit of progress, as of the last observation.

        Where several batch sizes are allowed, the early observed rounds take the smallest and the largest in turn, so
        that the cost of both becomes known. Raises `DataError` for a round that the replayed run did not have.
        """
        if self._replay is not None:
            return self._recorded(number)
        observed, options = self.due(number), list(self.options(size))
        if self._decision is not None and not observed and self._decision.option in options:
            return self._decision
        self._decision = self._cheapest(options, observed=False)
        since = number - (self._first or 0)
        if not observed:
            return self._decision
        if len(self.batches) > 1 and since in EARLY:
            extreme = (min, max)[EARLY.index(since) % 2](option.batch for option in options)
            options = [option for option in options if option.batch == extreme]
        return self._cheapest(options, observed=True)

    def _cheapest(self, options: Sequence[Option], *, observed: bool) -> Decision:
        costs = self.meter.costs()
        option = min(options, key=lambda each: self.price(each, costs))
        select, update = costs.score.of(option.scored), costs.update.of(self._trained(option))
        return Decision(option, observed, select, update, costs.unit)

    def options(self, size: int) -> Iterator[Option]:
        """Every strategy and batch size; scored ones also on a half, a quarter, ... of the pool."""
        for batch in self.batches:
            if batch < size:
                yield Option("random", size, batch)
                yield Option("stratified", size, batch)
                candidates = size
                while candidates > batch:
                    yield Option("is", candidates, batch)
                    yield Option("titan", candidates, batch)
                    candidates //= 2
        if size <= self._max_batch:
            yield Option("all", size, size)

    def price(self, option: Option, costs: Costs) -> float:
        """Cost of a round, divided by its progress relative to random choice of the smallest batch."""
        cost, reference = costs.of(option.scored, self._trained(option)), self._reference()
        if not reference:
            return cost
        progress = 2.0 - self._second_moment(option) / reference
        return cost / progress if progress > 0 else float("inf")

    def _reference(self) -> float:
        """The second moment that the step size is made for: of random choice of the smallest batch."""
        found = self._known()
        return max(found.signal, 0.0) + found.window + found.pool + found.batch["random", self.batches[0]].variance

    def _second_moment(self, option: Option) -> float:
        found = self._known()
        pool = found.pool * self._size / option.candidates
        chosen = 0.0 if option.strategy == "all" else self._yield(option).variance
        return max(found.signal, 0.0) + found.window + pool + chosen

    def explain(self, decision: Decision) -> str:
        """The choice in words, beside the best option of every other strategy."""
        option, costs = decision.option, self.meter.costs()
        scored = f", {option.candidates} candidates scored" if option.scored else ""
        said = f"{option.strategy}, batch {option.batch}{scored}"
        if self._replay is not None:
            return f"{said} (replayed)"
        if not self._reference():
            return f"{said} (nothing varies)"
        best = self.price(option, costs)
        others: dict[str, float] = {}
        for other in self.options(self._size):
            if other.strategy != option.strategy:
                ratio = self.price(other, costs) / best
                others[other.strategy] = min(ratio, others.get(other.strategy, ratio))
        beside = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in sorted(others.items(), key=lambda item: item[1]))
        return f"{said} (cost per progress of others, in {costs.unit}: {beside})"

    def _trained(self, option: Option) -> float:
        return option.candidates if option.strategy == "all" else self._yield(option).distinct

    def _yield(self, option: Option) -> Yield:
        return self._known().batch[option.strategy, option.batch]

    def _known(self) -> Moments:
        if self._moments is None:
            raise ValueError("nothing has been observed yet")
        return self._moments

    def _recorded(self, number: int) -> Decision:
        found = None if self._replay is None else self._replay.get(number)
        if found is None:
            raise DataError(
                f"round {number}", "not in the run that is replayed", "the same stream", "leave out --replay"
            )
        return found
