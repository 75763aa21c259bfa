"""Schedules of memory (after POET, arXiv:2207.07697): what is kept, made again, or paged to a file between the forward
and the backward pass, so that a step takes the least time within a given memory.

Every value that the backward pass needs is *kept*, *recompute*d once, from stored values, when the backward pass
enters the stretch that it lies in, or *page*d. Chosen exactly by a dynamic program over the links of the trained part
(`planning.links`): a partial schedule is what it stores so far, what it takes, and which of the crossing values are
stored; of those that store as much and as fast as another, one is kept. Gradients do not depend on the schedule.

The published program (POET's, a MILP) has tensors that run several times, and counts neither paging's time nor what
layers work with; ours recomputes once, and counts both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf
from typing import NamedTuple

import numpy as np

from stages.artifacts.records import Array
from stages.errors import BudgetError, DataError
from stages.planning.budget import format_bytes
from stages.planning.links import Chain, Link

KEEP, PAGE, RECOMPUTE = "keep", "page", "recompute"
WAYS = (KEEP, RECOMPUTE, PAGE)
"""What may become of a value, in the order that they are tried."""
How = Mapping[str, str]
"""Value, or `slice <operator>` -> one of `WAYS`; what it does not name is kept where the backward pass needs it."""


@dataclass(frozen=True)
class Costs:
    """What the ways cost, in seconds of a step (or joules, where that is to be least)."""

    links: Sequence[float]
    """Of each link's forward pass."""
    page: float = 0.0
    """Of each byte that is written and read back."""


@dataclass(frozen=True)
class Schedule:
    """What becomes of every value that the backward pass needs."""

    how: How
    seconds: float
    """What it costs beyond keeping everything."""
    peak_bytes: int
    """Of one sample, by the accounting of this module."""
    budget_bytes: int | None = None

    def text(self, plan: str) -> str:
        """As JSON, for the plan with this mark."""
        facts = {
            "plan": plan,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "budget_bytes": self.budget_bytes,
        }
        return json.dumps({**facts, "values": dict(self.how)}, sort_keys=True)


def read_schedule(text: str, plan: str, where: str) -> Schedule:
    """What `Schedule.text` gave. Raises `DataError` for other text, and for a schedule of another plan."""
    try:
        known = json.loads(text)
        how = {str(name): str(way) for name, way in known["values"].items()}
        if not set(how.values()) <= set(WAYS):
            raise ValueError("a way that there is not")
        found = Schedule(how, float(known["seconds"]), int(known["peak_bytes"]), known["budget_bytes"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(where, f"a schedule that cannot be read ({error})", "one that train-sparse wrote") from error
    if known.get("plan") != plan:
        raise DataError(where, "a schedule of another plan or model", "one of this plan", "make a new one with --ram")
    return found


# ----------------------------------------------------------------------------------------------------------- the search


class _Move(NamedTuple):
    """What is decided for some links in a row."""

    first: int
    end: int
    again: bool
    """They run again; else what they need is stored."""
    stored: tuple[tuple[str, str], ...]
    """Values that are stored for them, and how."""


State = tuple[tuple[str, str], ...]
"""Of the values that cross, those that are stored, and how."""


Stretches = dict[tuple[int, int], "Stretch | None"]
"""Stretches by their ends, as far as somebody asked."""


def best_schedule(
    chain: Chain,
    costs: Costs,
    budget_bytes: int,
    ways: Sequence[str] = WAYS,
    known: Stretches | None = None,
) -> Schedule | None:
    """The schedule of least cost within a budget; None where there is none.

    Args:
        ways: what may become of values: `keep`, and perhaps the others.
        known: stretches of this chain, for searches under several budgets.
    """
    if chain.floor_bytes > budget_bytes:
        return None
    if (whole := peak_bytes(chain, {})) <= budget_bytes:
        return Schedule({}, 0.0, whole, budget_bytes)
    known, most = {} if known is None else known, inf
    if {RECOMPUTE, PAGE} <= set(ways):  # what is possible without a file says what a file may cost at most
        alone = best_schedule(chain, costs, budget_bytes, (KEEP, RECOMPUTE), known)
        most = inf if alone is None else alone.seconds
    found = _Search(chain, costs, budget_bytes, frozenset(ways), known, most).run()
    if found is None:
        return None
    how, seconds = found
    return Schedule(how, seconds, peak_bytes(chain, how), budget_bytes)


class _Search:
    def __init__(
        self, chain: Chain, costs: Costs, budget_bytes: int, ways: frozenset[str], known: Stretches, most: float
    ) -> None:
        self.chain, self.costs, self.budget, self.ways = chain, costs, budget_bytes, ways
        self.own = np.cumsum([0, *(link.own_bytes for link in chain.links)])
        self._run_seconds = np.cumsum([0.0, *costs.links])
        self._stretches, self._most = known, most
        self._forward: dict[tuple[int, frozenset[str]], list[int]] = {}
        self.fronts: list[dict[State, list[tuple[Array, Array, Array]]]] = [{} for _ in range(len(chain.links) + 1)]
        self.history: list[tuple[int, _Move]] = []
        """(the partial schedule before, the move) of each partial schedule, by number."""

    def run(self) -> tuple[dict[str, str], float] | None:
        start = np.zeros(1, np.int64), np.zeros(1), np.full(1, -1)
        self.fronts[0][()] = [start]
        count = len(self.chain.links)
        for first in range(count):
            for state, blocks in self.fronts[first].items():
                stored, seconds, numbers = _pareto(blocks)
                for move, add, cost, need in self._moves(first, dict(state)):
                    fits = (stored + need <= self.budget) & (seconds + cost <= self._most)
                    if fits.any():
                        self._push(move, state, stored[fits] + add, seconds[fits] + cost, numbers[fits])
            self.fronts[first] = {}
        ends = [(seconds[i], numbers[i]) for blocks in self.fronts[count].values()
                for _, seconds, numbers in [_pareto(blocks)] for i in range(len(seconds))]  # fmt: skip
        if not ends:
            return None
        seconds, number = min(ends)
        return self._how(int(number)), float(seconds)

    def _push(self, move: _Move, state: State, stored: Array, seconds: Array, numbers: Array) -> None:
        known = {**dict(state), **dict(move.stored)}
        crossing = self.chain.links[move.end - 1].crossing
        after = tuple(sorted((name, known[name]) for name in crossing if name in known))
        start = len(self.history)
        self.history += [(int(number), move) for number in numbers]
        block = stored, seconds, np.arange(start, len(self.history))
        self.fronts[move.end].setdefault(after, []).append(block)

    def _how(self, number: int) -> dict[str, str]:
        moves: list[_Move] = []
        while number >= 0:
            number, move = self.history[number]
            moves.append(move)
        how: dict[str, str] = {}
        for move in reversed(moves):
            if move.again:
                links = self.chain.links[move.first : move.end]
                made = frozenset().union(*(link.makes for link in links))
                how |= {item: RECOMPUTE for link in links for item in link.items if item in made}
            how |= dict(move.stored)
        return how

    # ------------------------------------------------------------------------------------------------------------ moves

    def _moves(self, first: int, state: dict[str, str]) -> Iterator[tuple[_Move, int, float, int]]:
        """(move, bytes that it stores, its cost, the most that it needs beside what is stored already)."""
        link = self.chain.links[first]
        for chosen in self._choices([item for item in link.items if item not in state]):
            yield self._kept(first, state, chosen)
        if RECOMPUTE not in self.ways:
            return
        for end in range(first + 1, len(self.chain.links) + 1):
            stretch = self._stretch(first, end)
            if stretch is None:
                continue
            if stretch.least > self.budget:
                break  # a longer one makes more
            for chosen in self._choices([name for name in stretch.entries if name not in state]):
                yield self._again(stretch, state, chosen)

    def _choices(self, names: Sequence[str]) -> Iterator[dict[str, str]]:
        ways = [way for way in (KEEP, PAGE) if way in self.ways]
        for picked in product(ways, repeat=len(names)):
            yield dict(zip(names, picked, strict=True))

    def _kept(self, first: int, state: dict[str, str], chosen: dict[str, str]) -> tuple[_Move, int, float, int]:
        add, cost = self._stored(chosen)
        known, link = {**state, **chosen}, self.chain.links[first]
        own = int(self.own[first + 1])
        brought = sum(brought_bytes(self.chain, name, known[name]) for name in link.items)
        need = own + max(forward_bytes(self.chain, first, known, chosen), add + link.gradient_bytes + brought)
        return _Move(first, first + 1, False, tuple(chosen.items())), add, cost, need

    def _stretch(self, first: int, end: int) -> Stretch | None:
        if (first, end) not in self._stretches:
            self._stretches[first, end] = stretch_of(self.chain, self.own, first, end)
        return self._stretches[first, end]

    def _again(self, stretch: Stretch, state: dict[str, str], chosen: dict[str, str]) -> tuple[_Move, int, float, int]:
        add, cost = self._stored(chosen)
        known, first, end = {**state, **chosen}, stretch.first, stretch.end
        cost += self._run_seconds[first + stretch.last + 1] - self._run_seconds[first]
        names = frozenset(name for name, way in known.items() if way == KEEP)
        forward = self._most_forward(first, end, names) + sum(
            self.chain.sizes[name] for name, way in chosen.items() if way == KEEP
        )
        need = max(forward, add + stretch.backward_bytes(self.chain, known))
        return _Move(first, end, True, tuple(chosen.items())), add, cost, need

    def _most_forward(self, first: int, end: int, kept: frozenset[str]) -> int:
        """The most that these links' forward passes work with, own bits included, where such values lie in memory."""
        key = first, kept
        known = self._forward.setdefault(key, [0])
        while len(known) <= end - first:
            number = first + len(known) - 1
            working = forward_bytes(self.chain, number, dict.fromkeys(kept, KEEP), {})
            known.append(max(known[-1], int(self.own[number + 1]) + working))
        return known[end - first]

    def _stored(self, chosen: Mapping[str, str]) -> tuple[int, float]:
        sizes = self.chain.sizes
        add = sum(sizes[name] for name, way in chosen.items() if way == KEEP)
        return add, self.costs.page * sum(sizes[name] for name, way in chosen.items() if way == PAGE)


@dataclass(frozen=True)
class Stretch:
    """Links that run again together."""

    first: int
    end: int
    last: int
    """The last that must run again, counted from the first."""
    entries: tuple[str, ...]
    """Values made before it that must be stored."""
    backward: tuple[tuple[int, frozenset[str]], ...]
    """Of each link's backward pass the bytes beside what is stored, and the stored values that it reads."""
    again_bytes: int
    """The most while it runs again, beside what is stored."""
    read: frozenset[str]
    """The stored values that are read by then."""

    @property
    def least(self) -> int:
        """What it takes whatever else is stored."""
        return max(self.again_bytes, *(bytes_ for bytes_, _ in self.backward))

    def backward_bytes(self, chain: Chain, known: Mapping[str, str]) -> int:
        """The most of its backward pass beside what is stored, room for stored values that are read included."""

        def brought(names: frozenset[str]) -> int:
            return sum(brought_bytes(chain, name, known.get(name, "")) for name in names)

        return max(self.again_bytes + brought(self.read), *(each + brought(names) for each, names in self.backward))


def stretch_of(chain: Chain, own: Array, first: int, end: int) -> Stretch | None:
    """These links as a stretch; None where nothing of what they need is made by them."""
    links = chain.links[first:end]
    makers: dict[str, int] = {}
    for number, link in enumerate(links):
        makers |= dict.fromkeys(link.makes, number)
    wanted = dict.fromkeys(item for link in links for item in link.items if item in makers)
    last = max((makers[item] for item in wanted), default=-1)
    if last < 0:
        return None
    needed = [name for link in links[: last + 1] for name in link.reads] + [i for link in links for i in link.items]
    entries = tuple(name for name in dict.fromkeys(needed) if name not in makers)
    backward, inside, held = [], set[str](), 0
    for number, link in enumerate(links):
        for item in link.items:
            if item in makers and item not in inside:
                inside.add(item)
                held += chain.whole[item]
        outside = frozenset(item for item in link.items if item not in makers)
        backward.append((int(own[first + number + 1]) + link.gradient_bytes + held, outside))
    again = made_bytes = 0
    made: set[str] = set()
    for link in links[: last + 1]:
        for name in link.makes:
            if name in wanted:
                made.add(name)
                made_bytes += chain.whole[name]
        alive = {*link.reads, *_outs(link)} - made - set(entries)
        again = max(again, made_bytes + sum(chain.whole[name] for name in alive))
    read = frozenset(name for link in links for name in (*link.reads, *link.items) if name not in makers)
    pending = int(own[end]) + links[-1].pending_bytes
    return Stretch(first, end, last, entries, tuple(backward), again + pending, read)


def brought_bytes(chain: Chain, name: str, way: str) -> int:
    """What reading a stored value takes beside its store: nothing where it lies in memory as it is read."""
    if way == PAGE or (way == KEEP and chain.sizes[name] != chain.whole[name]):
        return chain.whole[name]
    return 0


def forward_bytes(chain: Chain, number: int, known: Mapping[str, str], new: Mapping[str, str]) -> int:
    """What a link's forward pass works with, and what is stored for it, beside all that was stored before: values that
    lie in memory as they are worked with count once."""
    link = chain.links[number]
    before = chain.links[number - 1].crossing if number else chain.before
    alive = {*before, *link.reads, *_outs(link), *link.crossing}
    shared = {name for name in alive if known.get(name) == KEEP and chain.sizes[name] == chain.whole[name]}
    working = sum(chain.whole[name] for name in alive - shared)
    return working + sum(chain.sizes[name] for name, way in new.items() if way == KEEP)


def _outs(link: Link) -> list[str]:
    return [name for name in link.crossing if name in link.ops] or [link.name]


def _pareto(blocks: Sequence[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    """Of partial schedules those that no other beats in both bytes and time, by bytes."""
    stored, seconds, numbers = (np.concatenate(column) for column in zip(*blocks, strict=True))
    order = np.lexsort((seconds, stored))
    stored, seconds, numbers = stored[order], seconds[order], numbers[order]
    best = np.minimum.accumulate(seconds)
    keep = np.r_[True, seconds[1:] < best[:-1]]
    return stored[keep], seconds[keep], numbers[keep]


# ------------------------------------------------------------------------------------------------------ what one takes


def stretches(chain: Chain, how: How) -> list[Stretch]:
    """The links that run again together under a schedule: those that make a value that is made again, from what is
    stored on, up to the last that needs one."""
    stored = {item for link in chain.links for item in link.items if how.get(item) != RECOMPUTE}
    stored |= {name for name, way in how.items() if way != RECOMPUTE}
    own, found = _own(chain), list[Stretch]()
    for number, link in enumerate(chain.links):
        missing = [item for item in link.items if how.get(item) == RECOMPUTE]
        if not missing:
            continue
        begin, end = min(_maker(chain, item, number) for item in missing), number + 1
        while True:
            while found and begin < found[-1].end:
                begin = min(begin, found.pop().first)
            stretch = stretch_of(chain, own, begin, end)
            assert stretch is not None
            open_ends = [name for name in stretch.entries if name not in stored and name not in chain.before]
            if not open_ends:
                break
            begin = min(_maker(chain, name, begin) for name in open_ends)
        found.append(stretch)
    return found


def _own(chain: Chain) -> Array:
    return np.cumsum([0, *(link.own_bytes for link in chain.links)])


def _maker(chain: Chain, item: str, number: int) -> int:
    return next(place for place in range(number, -1, -1) if item in chain.links[place].makes)


def peak_bytes(chain: Chain, how: How) -> int:
    """The most that one sample takes at one moment under a schedule, parameters and their gradients aside."""
    own, again = _own(chain), {stretch.first: stretch for stretch in stretches(chain, how)}
    peak, known, stored, number = chain.floor_bytes, dict[str, str](), 0, 0
    while number < len(chain.links):
        stretch, link = again.get(number), chain.links[number]
        names = link.items if stretch is None else stretch.entries
        end = number + 1 if stretch is None else stretch.end
        new = {name: how.get(name, KEEP) for name in names if name not in known}
        known |= new
        add = sum(chain.sizes[name] for name, way in new.items() if way == KEEP)
        if stretch is None:
            brought = sum(brought_bytes(chain, item, known[item]) for item in link.items)
            back = int(own[end]) + link.gradient_bytes + brought
        else:
            back = stretch.backward_bytes(chain, known)
        forward = max(int(own[place + 1]) + forward_bytes(chain, place, known, new) for place in range(number, end))
        peak = max(peak, stored + forward, stored + add + back)
        stored, number = stored + add, end
    return peak


def price(chain: Chain, costs: Costs, how: How) -> float:
    """What a schedule costs beyond keeping everything."""
    again = stretches(chain, how)
    run = sum(sum(costs.links[each.first : each.first + each.last + 1]) for each in again)
    paged = sum(chain.sizes[name] for name in _stored_names(chain, again) if how.get(name, KEEP) == PAGE)
    return run + costs.page * paged


def _stored_names(chain: Chain, again: Sequence[Stretch]) -> set[str]:
    """What is stored for the backward pass, in memory or in a file."""
    names = {name for stretch in again for name in stretch.entries}
    for number, link in enumerate(chain.links):
        if not any(stretch.first <= number < stretch.end for stretch in again):
            names |= set(link.items)
    return names


def kept_bytes(chain: Chain, how: How) -> int:
    """What stays in memory between the forward and the backward pass of a sample."""
    names = _stored_names(chain, stretches(chain, how))
    held = sum(chain.sizes[name] for name in names if how.get(name, KEEP) == KEEP)
    return held + int(_own(chain)[-1])


def least_bytes(chain: Chain, ways: Sequence[str] = WAYS) -> tuple[int, str]:
    """The smallest budget for which there is a schedule, and the operator that sets it."""
    free, known = Costs([0.0] * len(chain.links)), Stretches()
    low, high = chain.floor_bytes, peak_bytes(chain, {})
    if (found := best_schedule(chain, free, low, ways, known)) is not None:
        return low, "the frozen layers"
    while high - low > 1:
        middle = (low + high) // 2
        if (now := best_schedule(chain, free, middle, ways, known)) is None:
            low = middle
        else:
            high, found = min(middle, now.peak_bytes), now
    found = found or best_schedule(chain, free, high, ways, known)
    assert found is not None
    return high, _where(chain, found)


def _where(chain: Chain, schedule: Schedule) -> str:
    """The operator of the link at which a schedule takes most."""
    for end in range(1, len(chain.links) + 1):
        part = Chain(chain.links[:end], chain.sizes, chain.whole, chain.before, 0)
        if peak_bytes(part, schedule.how) >= schedule.peak_bytes:
            return chain.links[end - 1].name
    return chain.links[-1].name


def nothing_fits(chain: Chain, budget_bytes: int, ways: Sequence[str] = WAYS) -> BudgetError:
    """The error for a budget that is too small: says the smallest that is not."""
    least, where = least_bytes(chain, ways)
    found = f"{format_bytes(budget_bytes)} are too few for a sample's values"
    return BudgetError("--ram", found, f"at least {format_bytes(least)} (for {where})", "raise --ram, or train less")
