"""The optimum of the planning problem, by dynamic programming with bounds.

TinyTrain's greedy is a heuristic for a knapsack with coupled costs (`coupling.py`). Here the earliest live layer is
tried one by one; behind it, layers join a growing set of partial plans (*labels*) in execution order. A label is
dropped when it breaks a limit, when another one of the same state is worth as much at no higher cost, or when even
its bound is not worth more than the best plan known.

The bound is Lagrangian: with prices p >= 0 per resource, no completion of a label can be worth more than
    score + p . (capacity - used) + sum over later layers of max(0, max_r (score_r - p . cost_r)).
Prices come from a subgradient descent; any prices give a valid bound, good ones a tight one. A part is first searched
with only the most promising labels, which finds a good plan soon; the number of labels is raised until none had to be
left out, and by then the bounds leave little to search.

Most problems are small for this; some are not, such as dense connections, of which every layer keeps what others share.
The search therefore has a budget of labels, which bounds its time and its memory alike on every machine. When that is
spent the best plan known is returned, without the proof that it is the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.cost.training import memory_model
from stages.planning.arena import best_by_arena
from stages.planning.branching import best_by_branching
from stages.planning.coupling import Coupling, State, Vector, Way
from stages.planning.greedy import greedy
from stages.planning.problem import Choice, Problem, choice

BEAM = 64
"""Labels per state that the first pass keeps; each further pass keeps four times as many."""
PRICE_STEPS = 60
RIVALS = 48
"""Each label is compared with so many of the best ones; comparing all with all would cost more than it saves."""
TOLERANCE = 1e-9
"""Relative: a plan must be better by more to replace the best one."""
STATE_LABELS = 200
"""What handling one state costs beside its labels, in labels."""


class Limits(NamedTuple):
    """What a search may take, the same on every machine; about a million labels a second on a desktop processor."""

    labels: int
    """Labels that are made altogether."""
    at_once: int
    """Labels of one step; each takes about 0.1 kB, and is copied a few times."""


SEARCH = Limits(20_000_000, 400_000)
"""Where the optimum is what is wanted: four times what the paper's nets take when all their layers are candidates."""
COMPARISON = Limits(2_000_000, 50_000)
"""Where it is only compared with. TinyTrain's window of six blocks takes 10 thousand labels, 1 thousand at once."""


class Labels(NamedTuple):
    """Partial plans of one state."""

    score: Vector
    """(n,)."""
    used: NDArray[np.float64]
    """(n, R)."""
    picks: NDArray[np.int8]
    """(n, L): ratio index per candidate, -1 where it stays frozen."""

    def take(self, rows: NDArray[Any] | slice) -> Labels:
        """Some of the labels."""
        return Labels(self.score[rows], self.used[rows], self.picks[rows])


@dataclass(frozen=True)
class Start:
    """The part of the problem in which one candidate is the earliest live layer."""

    first: int
    prices: Vector
    later: Vector
    """(L + 1,): bound on what candidates from j on can add, net of prices."""
    bound: float
    """No plan of this part is worth more."""


class Effort:
    """What a search may still do."""

    def __init__(self, limits: Limits) -> None:
        self.left, self.at_once = limits

    def spend(self, fronts: dict[State, Labels]) -> None:
        """Count partial plans that have been made; too many at once are the end of the search."""
        made = sum(len(labels.score) for labels in fronts.values())
        self.left -= made + STATE_LABELS * len(fronts)
        if made > self.at_once:
            self.left = 0

    @property
    def spent(self) -> bool:
        """Whether the search has to stop."""
        return self.left <= 0


@dataclass(frozen=True)
class Best:
    """The best plan known."""

    score: float
    picks: NDArray[np.int8]


def knapsack(problem: Problem, limits: Limits = SEARCH) -> Choice:
    """The plan of highest total score under all budgets, over every combination of layers and ratios.

    Exact up to rounding in the scores, which the choice says (`optimal`). Milliseconds to tenths of a second for 60
    layers at 4 ratios. At its `limits` the search is given up, and what is returned is the best plan that it has seen,
    or greedy's where that is better. Memory by `arena` is no sum, and searched as `planning.arena` says; blocks are
    searched as `planning.branching` says.
    """
    if problem.by_blocks:
        return best_by_branching(problem)
    if problem.by_arena:
        return best_by_arena(problem, lambda coupling: _optimum(coupling, limits))
    budget = problem.budget
    model = memory_model("paper" if budget.memory_bytes is None else budget.memory_model)
    found = _optimum(Coupling(problem, model, budget.memory_bytes), limits)
    return found if found.optimal else max(found, greedy(problem), key=lambda one: one.score)


def _optimum(coupling: Coupling, limits: Limits) -> Choice:
    """The plan of highest total score under costs that add up, or the best one seen."""
    candidates = coupling.problem.candidates
    count = len(candidates)
    best = Best(0.0, np.full(count, -1, dtype=np.int8))
    if count == 0 or np.any(coupling.capacity < 0):
        return Choice(optimal=True)
    firsts, beam, effort = list(range(count)), BEAM, Effort(limits)
    while firsts and not effort.spent:
        found = [_start(coupling, first, best.score) for first in firsts]
        starts = sorted((start for start in found if start is not None), key=lambda start: -start.bound)
        firsts = []
        for start in starts:
            if _better(start.bound, best.score):
                best, exact = _search(coupling, start, best, beam, effort)
                firsts += [] if exact else [start.first]
        beam *= 4
    picked = [(one, int(r)) for one, r in zip(candidates, best.picks, strict=True) if r >= 0]
    return replace(choice([one.options[r] for one, r in picked]), optimal=not firsts)


def _better(value: float, score: float) -> bool:
    return value > score * (1 + TOLERANCE)


# ------------------------------------------------------------------------------------------------------------- bounds


def _start(coupling: Coupling, first: int, target: float) -> Start | None:
    """The part with this earliest layer, with good prices; None where it cannot open within the limits.

    `target` is the worth of the best plan known.
    """
    room = coupling.capacity - coupling.flow_cost(coupling.start, first)
    if np.any(room < 0):
        return None
    fitting = np.all(coupling.own[first:] <= room, axis=2)
    scores = np.where(fitting, coupling.scores[first:], -np.inf)
    if not fitting[0].any():
        return None
    prices = _prices(scores, coupling.own[first:], room, target)
    net = (scores - coupling.own[first:] @ prices).max(1)
    worth = np.concatenate([np.zeros(first), net[:1], np.maximum(net[1:], 0)])
    later = np.concatenate([np.cumsum(worth[::-1])[::-1], [0.0]])
    return Start(first, prices, later, float(later[first] + prices @ room))


def _prices(scores: Vector, costs: NDArray[np.float64], room: Vector, target: float) -> Vector:
    """Prices (R,) that make the bound low: scores (L, ratios) against costs (L, ratios, R) in `room` (R,).

    Subgradient descent on the bound with Polyak's steps towards `target`; ends where the bound falls to it.
    """
    unit = np.where(room > 0, room, 1.0)
    costs, room = costs / unit, room / unit
    rows = np.arange(len(scores))
    prices = best_prices = np.full(len(room), scores.max() / max(len(room), 1))
    best, pace = np.inf, 1.0
    target = max(target, float(scores[0].max()))
    for _ in range(PRICE_STEPS):
        net = scores - costs @ prices
        pick = net.argmax(1)
        taken = net[rows, pick] > 0
        taken[0] = True
        bound = float(net[rows, pick][taken].sum() + prices @ room)
        if bound < best:
            best, best_prices = bound, prices
        else:
            pace *= 0.9
        slack = room - costs[rows, pick][taken].sum(0)
        norm = float(slack @ slack)
        if norm == 0 or best <= target:
            break
        prices = np.maximum(prices - pace * (bound - target) / norm * slack, 0)
    return best_prices / unit


# ------------------------------------------------------------------------------------------------------------- search


def _search(coupling: Coupling, start: Start, best: Best, beam: int, effort: Effort) -> tuple[Best, bool]:
    """The best plan known after this part, and whether the part was searched exactly (no label left out)."""
    count = len(coupling.scores)
    empty = Labels(np.zeros(1), np.zeros((1, len(start.prices))), np.full((1, count), -1, dtype=np.int8))
    fronts = _extended(coupling, {coupling.start: empty}, start.first, optional=False)
    exact = True
    for j in range(start.first + 1, count + 1):
        effort.spend(fronts)
        if effort.spent:
            return best, False
        kept: dict[State, Labels] = {}
        for state, labels in fronts.items():
            best = _improved(best, labels)
            worthy = _pruned(coupling, start, labels, j, best)
            exact &= len(worthy.score) <= beam
            if len(worthy.score):
                kept[state] = worthy.take(slice(beam))
        fronts = _extended(coupling, kept, j, optional=True) if j < count else {}
    return best, exact


def _extended(coupling: Coupling, fronts: dict[State, Labels], j: int, *, optional: bool) -> dict[State, Labels]:
    """Every label with candidate j (and without, where it is `optional`), by what later ones can still share."""
    groups: dict[State, list[Labels]] = {}
    for state, labels in fronts.items():
        if optional:
            groups.setdefault(coupling.forget(state, j + 1), []).append(labels)
        for way in coupling.ways(state, j):
            groups.setdefault(coupling.forget(way.state, j + 1), []).append(_joined(coupling, labels, j, way))
    return {state: Labels(*map(np.concatenate, zip(*parts, strict=True))) for state, parts in groups.items()}


def _joined(coupling: Coupling, labels: Labels, j: int, way: Way) -> Labels:
    """The labels with candidate j, once per ratio, as far as they keep the limits."""
    score = (labels.score[:, None] + coupling.scores[j, way.ratios]).ravel()
    used = (labels.used[:, None] + (coupling.own[j, way.ratios] + way.cost)).reshape(len(score), -1)
    picks = np.repeat(labels.picks, len(way.ratios), axis=0)
    picks[:, j] = np.tile(way.ratios, len(labels.score))
    fits = np.all(used <= coupling.capacity, axis=1)
    return Labels(score, used, picks).take(fits)


def _improved(best: Best, labels: Labels) -> Best:
    """A label is a plan already: its later layers stay frozen."""
    if len(labels.score) == 0:
        return best
    top = int(labels.score.argmax())
    return Best(float(labels.score[top]), labels.picks[top]) if _better(labels.score[top], best.score) else best


def _pruned(coupling: Coupling, start: Start, labels: Labels, j: int, best: Best) -> Labels:
    """The labels worth extending by candidates from j on, most promising first."""
    bound = labels.score + (coupling.capacity - labels.used) @ start.prices + start.later[j]
    order = np.argsort(-bound, kind="stable")
    order = order[bound[order] > best.score * (1 + TOLERANCE)]
    labels = labels.take(order)
    return labels.take(~_dominated(labels))


def _dominated(labels: Labels) -> NDArray[np.bool_]:
    """(n,): labels that one of the first `RIVALS` equals or beats in score and in every cost; of equals one stays."""
    dominated = np.zeros(len(labels.score), dtype=np.bool_)
    for rival in range(min(RIVALS, len(labels.score))):
        if not dominated[rival]:
            worse = (labels.score <= labels.score[rival]) & np.all(labels.used >= labels.used[rival], axis=1)
            worse[rival] = False
            dominated |= worse
    return dominated
