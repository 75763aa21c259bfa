"""Few-shot tasks: which classes, which samples support and which are asked.

Two ways to draw a task from labelled samples: Meta-Dataset's various-way various-shot sampler (Triantafillou et al.,
arXiv:1903.03096, as P>M>F's code has it) and the fixed N-way K-shot one. Task number i of a seed has its own generator,
so it is the same on every machine, in every shard and in every order.

An `Episode` holds positions in the data, not the samples themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log

import numpy as np

from stages.artifacts.records import Array, Block, check_labelled
from stages.errors import DataError, require
from stages.randomness import generator


@dataclass(frozen=True)
class Episode:
    """One task. Support and query have no sample, and no group, in common."""

    classes: Array
    """int64 (C,): class labels in the data; class i of the task is `classes[i]`."""
    support: Array
    """int64 (S,): positions in the data, class by class."""
    support_labels: Array
    """int64 (S,): 0..C-1."""
    query: Array
    """int64 (Q,)."""
    query_labels: Array
    """int64 (Q,): 0..C-1."""

    @property
    def ways(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class Pool:
    """What tasks are drawn from: positions of each class's samples, their groups, and the classes' families."""

    classes: Array
    """int64 (C,): class labels, ascending."""
    members: tuple[Array, ...]
    """Per class: int64 positions in the data."""
    groups: Array | None = None
    """int64 (N,) by position: samples of one group never stand on both sides of a task."""
    families: tuple[tuple[int, ...], ...] = ()
    """Where classes are hierarchical (alphabet/character): class numbers of each family; a task keeps to one."""

    def sizes(self) -> Array:
        """Samples per class: int64 (C,)."""
        return np.array([len(positions) for positions in self.members], np.int64)

    def only(self, keep: Array) -> Pool:
        """The pool with the classes where `keep` (C,) is true."""
        number = np.cumsum(keep) - 1
        families = tuple(tuple(int(number[c]) for c in family if keep[c]) for family in self.families)
        members = tuple(positions for positions, kept in zip(self.members, keep, strict=True) if kept)
        return Pool(self.classes[keep], members, self.groups, tuple(family for family in families if family))


def pool_of(block: Block, *, group: str | None = None, hierarchical: bool = False) -> Pool:
    """The pool over a block's samples; `hierarchical` splits class names at the last `/`.

    `group` names a column: samples of one value are a group, in whatever class they are (a speaker). Where values start
    anew in each class (a track's number), groups nest in classes: `class+track`.

    Raises `DataError` for an empty block, a missing column or names without families.
    """
    if not len(block):
        raise DataError("samples", "none", "samples to draw tasks from")
    check_labelled(block.y, "samples")
    classes, number = np.unique(np.asarray(block.y), return_inverse=True)
    order = np.argsort(number, kind="stable").astype(np.int64)
    members = np.split(order, np.cumsum(np.bincount(number))[:-1])
    families = _families([block.name_of(int(label)) for label in classes]) if hierarchical else ()
    return Pool(classes.astype(np.int64), tuple(members), _group_numbers(block, group), families)


def _group_numbers(block: Block, group: str | None) -> Array | None:
    if group is None:
        return None
    names = (group,) if group in block.columns else tuple(group.split("+"))
    columns = {"class": np.asarray(block.y), **block.columns}
    for name in names:
        if name not in columns:
            there = f"one of its columns ({', '.join(sorted(columns))})"
            raise DataError("samples", f"no column {name!r}", there, "see `edgetrain inspect`")
    numbers = np.zeros(len(block), np.int64)
    for name in names:
        values, number = np.unique(columns[name], return_inverse=True)
        numbers = np.unique(numbers * len(values) + number, return_inverse=True)[1].astype(np.int64)
    return numbers


def _families(names: list[str]) -> tuple[tuple[int, ...], ...]:
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        family, slash, _ = name.rpartition("/")
        if not slash:
            raise DataError("samples", f"class {name!r}", "names such as alphabet/character for a hierarchy")
        found.setdefault(family, []).append(number)
    return tuple(tuple(numbers) for numbers in found.values())


# ----------------------------------------------------------------------------------------------------- the samplers


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedShape:
    """N-way K-shot tasks with a fixed number of query samples per class."""

    ways: int = 5
    shots: int = 5
    queries: int = 15
    repeat: bool = False
    """Let a class with too few samples repeat them: for training, where every copy is augmented differently."""

    def __post_init__(self) -> None:
        require(self.ways >= 2, "episodes", f"{self.ways} ways", "at least 2")
        require(self.shots >= 1 and self.queries >= 1, "episodes", f"{self.shots} shots, {self.queries} queries", "1+")

    @property
    def most(self) -> tuple[int, int]:
        """The most support and query samples of a task."""
        return self.ways * self.shots, self.ways * self.queries

    @property
    def least_samples(self) -> int:
        """Samples that a class must have."""
        return 1 if self.repeat else self.shots + self.queries

    @property
    def least_ways(self) -> int:
        """Classes that there must be (in one family)."""
        return self.ways

    def draw(self, pool: Pool, rng: np.random.Generator) -> Episode:
        """One task. Raises `DataError` where the groups leave a class too few samples on one side."""
        chosen = rng.choice(_family(pool, self.ways, rng), self.ways, replace=False)
        if self.repeat:
            return _episode(pool, chosen, [self._repeated(pool.members[c], rng) for c in chosen])
        sides = _sides(pool, chosen, [self.queries] * self.ways, rng, self.shots)
        _check_sides(pool, chosen, sides, self.shots, self.queries)
        return _episode(pool, chosen, [(ask[: self.queries], given[: self.shots]) for ask, given in sides])

    def _repeated(self, positions: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        count = self.shots + self.queries
        drawn = rng.choice(positions, count, replace=len(positions) < count)
        return drawn[: self.queries], drawn[self.queries :]


@dataclass(frozen=True, kw_only=True, slots=True)
class VariousShape:
    """Meta-Dataset's tasks: ways, shots and imbalance are drawn. Defaults are the published ones."""

    least_ways: int = 5
    most_ways: int = 50
    most_queries: int = 10
    """Per class."""
    most_support: int = 500
    most_per_class: int = 100
    """How much one class may contribute to the support's size."""
    least_samples: int = 2

    def __post_init__(self) -> None:
        ways = f"{self.least_ways} to {self.most_ways} ways"
        require(2 <= self.least_ways <= self.most_ways, "--max-ways", ways, "2 and up")
        least = f"at least {self.most_ways}, one for each way"
        require(self.most_support >= self.most_ways, "--max-support", f"{self.most_support}", least)
        require(self.most_queries >= 1, "episodes", f"{self.most_queries} queries", "at least 1")
        require(self.least_samples >= 2, "episodes", f"{self.least_samples} samples per class", "at least 2")

    @property
    def most(self) -> tuple[int, int]:
        """The most support and query samples of a task."""
        return self.most_support, self.most_ways * self.most_queries

    def draw(self, pool: Pool, rng: np.random.Generator) -> Episode:
        """One task. Raises `DataError` where the groups leave a class no sample on one side."""
        family = _family(pool, self.least_ways, rng)
        ways = int(rng.integers(self.least_ways, min(len(family), self.most_ways) + 1))
        chosen = rng.choice(family, ways, replace=False)
        sizes = pool.sizes()[chosen]
        queries = query_size(sizes, self.most_queries)
        sides = _sides(pool, chosen, [queries] * ways, rng, 1)
        _check_sides(pool, chosen, sides, 1, queries)
        remaining = np.array([len(given) for _, given in sides], np.int64)
        total = support_size(remaining, rng.random(), self.most_support, self.most_per_class)
        shots = shots_per_class(sizes, remaining, total, rng.uniform(log(0.5), log(2.0), ways))
        return _episode(
            pool, chosen, [(ask[:queries], given[:k]) for (ask, given), k in zip(sides, shots, strict=True)]
        )


Shape = FixedShape | VariousShape


def query_size(sizes: Array, most: int) -> int:
    """Queries per class: min(10, floor(min_c |c| / 2))."""
    return min(most, int(sizes.min()) // 2)


def support_size(remaining: Array, beta: float, most: int, most_per_class: int) -> int:
    """Size of the whole support: min(500, sum_c floor(beta * min(100, rem_c) + 1)), beta ~ U(0, 1)."""
    contributions = np.floor(beta * np.minimum(most_per_class, remaining) + 1)
    return min(most, int(contributions.sum()))


def shots_per_class(sizes: Array, remaining: Array, total: int, alpha: Array) -> Array:
    """Support samples of each class: min(floor(R_c * (S - ways)) + 1, rem_c), R_c proportional to |c| exp(alpha_c)."""
    share = sizes * np.exp(alpha)
    share = share / share.sum()
    shots: Array = np.minimum(np.floor(share * (total - len(sizes))).astype(np.int64) + 1, remaining)
    return shots


def check_pool(pool: Pool, shape: Shape, *, skip: bool = False) -> tuple[Pool, int]:
    """The pool that tasks of this shape can be drawn from, and how many classes were left out of it.

    Raises `DataError` for a class with too few samples (unless `skip` leaves such classes out), and where too few
    classes remain. With families, those with too few classes are left out silently, as Meta-Dataset does.
    """
    sizes = pool.sizes()
    few = sizes < shape.least_samples
    if few.any() and not skip:
        first = int(np.flatnonzero(few)[0])
        raise DataError(
            f"class {pool.classes[first]}",
            f"{sizes[first]} samples ({int(few.sum())} such classes)",
            f"at least {shape.least_samples} for a task",
            "ask for fewer shots or queries, or leave such classes out with --on-bad skip",
        )
    left = pool.only(~few)
    largest = max(map(len, left.families), default=0) if pool.families else len(left.classes)
    if largest < shape.least_ways:
        what = "classes in the largest family" if pool.families else "classes"
        raise DataError("samples", f"{largest} {what}", f"at least {shape.least_ways}", "ask for fewer ways")
    return left, int(few.sum())


def draw_episodes(
    pool: Pool, shape: Shape, seed: int, numbers: range | list[int], *, stage: str = "episodes"
) -> Iterator[Episode]:
    """The tasks of these numbers: each from the generator of (seed, stage, number)."""
    for number in numbers:
        yield shape.draw(pool, generator(seed, stage, number))


# --------------------------------------------------------------------------------------------- drawing classes, sides


def _family(pool: Pool, least: int, rng: np.random.Generator) -> Array:
    """Class numbers to choose from: all of them, or those of one family that is large enough."""
    if not pool.families:
        return np.arange(len(pool.classes))
    large = [family for family in pool.families if len(family) >= least]
    return np.array(large[int(rng.integers(len(large)))], np.int64)


def _sides(
    pool: Pool, chosen: Array, queries: list[int], rng: np.random.Generator, shots: int
) -> list[tuple[Array, Array]]:
    """For each chosen class its samples on the query's side and on the support's, both in random order.

    Without groups the query's side gets exactly the wanted number. With groups, whole groups go to it until it has
    enough, and then up to half of them, so that queries are not all of one group (frames of one track); one group at
    least and `shots` samples stay on the other side, and a group that an earlier class has placed stays where it is.
    """
    placed: dict[int, bool] = {}
    sides = []
    for number, wanted in zip(chosen, queries, strict=True):
        members = rng.permutation(pool.members[number])
        if pool.groups is None:
            sides.append((members[:wanted], members[wanted:]))
            continue
        groups = pool.groups[members]
        _place(groups, wanted, shots, placed)
        asked = np.array([placed[int(group)] for group in groups], bool)
        sides.append((members[asked], members[~asked]))
    return sides


def _place(groups: Array, wanted: int, shots: int, placed: dict[int, bool]) -> None:
    """Decide for each group of a class (in random order) whether it is asked; updates `placed`."""
    new = [int(group) for group in dict.fromkeys(groups.tolist()) if group not in placed]
    asked = sum(placed.get(int(group), False) for group in groups)
    given = any(not placed.get(int(group), True) for group in groups)
    for i, group in enumerate(new):
        last_hope = not given and i == len(new) - 1
        placed[group] = asked < wanted and not last_hope
        asked += int((groups == group).sum()) if placed[group] else 0
        given = given or not placed[group]
    _spread(groups, new, min(wanted, len(np.unique(groups)) // 2), shots, placed)


def _spread(groups: Array, new: list[int], wanted: int, shots: int, placed: dict[int, bool]) -> None:
    """Ask further ones of the `new` groups, up to `wanted` groups, as long as `shots` samples of others remain."""
    asked = sum(placed[int(group)] for group in np.unique(groups))
    left = sum(not placed[int(group)] for group in groups)
    for group in new:
        size = int((groups == group).sum())
        if asked < wanted and not placed[group] and left - size >= max(shots, 1):
            placed[group] = True
            asked, left = asked + 1, left - size


def _check_sides(pool: Pool, chosen: Array, sides: list[tuple[Array, Array]], shots: int, queries: int) -> None:
    for number, (ask, given) in zip(chosen, sides, strict=True):
        if len(ask) < queries or len(given) < shots:
            raise DataError(
                f"class {pool.classes[number]}",
                f"its groups split into {len(given)} support and {len(ask)} query samples",
                f"at least {shots} and {queries}",
                "ask for fewer shots or queries, or group by something finer (`class+COLUMN`: groups within classes)",
            )


def _episode(pool: Pool, chosen: Array, parts: list[tuple[Array, Array]]) -> Episode:
    """An episode from (query, support) positions per class."""
    numbers = np.arange(len(chosen))
    return Episode(
        classes=pool.classes[chosen],
        support=np.concatenate([given for _, given in parts]),
        support_labels=np.repeat(numbers, [len(given) for _, given in parts]),
        query=np.concatenate([ask for ask, _ in parts]),
        query_labels=np.repeat(numbers, [len(ask) for ask, _ in parts]),
    )
