"""Policies: which channels train next, decided while training, always within the same budgets.

A policy is a pure function of what was seen and of what it remembers; training records every plan that it makes.

* `static`: TinyTrain's. The plan stays.
* `velocity`: NEq (arXiv:2207.09455) and SCoTTi (arXiv:2312.12483). A channel whose output has settled is at
  equilibrium; where all of a layer's have, and all layers before it have left, the layer leaves the plan, so that the
  frozen prefix grows. Or, `by=budget`, Fisher information gives way to velocity as what a plan is worth
  (arXiv:2312.05282).
* `rotate`: EdgeTrain's, after SliceOut (arXiv:2007.10909): the plan's channels train in turns, each its own range.
* `rescore`: the plan is searched for again, from Fisher information of the weights that have been trained so far.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import fsum, isfinite
from typing import Any, NamedTuple

import numpy as np

from stages.artifacts.records import Array, LayerUpdate, Plan, Scores, detached_layers
from stages.cost.latency import Durations
from stages.cost.training import memory_bytes, plan_backward_macs, with_head
from stages.errors import BudgetError, UsageError, require
from stages.graphs.graph import Graph
from stages.graphs.updates import whole_update
from stages.operators import Op
from stages.planning.budget import Budget
from stages.planning.layers import SELECTORS, select_layers
from stages.planning.problem import Channels, Evidence, Problem, pose
from stages.planning.shortcuts import residual_entries, with_detached

Updates = tuple[LayerUpdate, ...]
Memory = Mapping[str, Array]
"""What a policy remembers from one revision to the next; part of checkpoints."""

OBSERVED_LOSSES = 20
"""Latest losses that a policy is told, from which a stream's band is taken."""
BAND = 3.0
"""Standard deviations that a loss may leave the mean by before training wakes."""
PANEL = 16
"""Channels that kernels compute together: ranges of whole panels cost what their share says."""
SEARCH = "search"
"""Name of the plan's fact that says how it was searched for (`search_text`)."""


@dataclass(frozen=True)
class Room:
    """What every revised plan keeps within, and how it is searched for."""

    problem: Problem
    """Budgets and costs, without candidates."""
    candidates: tuple[str, ...]
    """The layers that may train."""
    channels: Channels
    select: str
    weights: Mapping[str, Array] = field(default_factory=dict)
    """For channel rule `l2`."""

    @property
    def graph(self) -> Graph:
        return self.problem.graph


@dataclass(frozen=True)
class Seen:
    """What a policy is told at a revision."""

    first: Updates
    """The plan that training began with."""
    now: Updates
    """What trains; nothing where training sleeps."""
    room: Room
    losses: Sequence[float] = ()
    """Of the latest updates."""
    outputs: Mapping[str, Array] = field(default_factory=dict)
    """Layer -> (C_out, n): every output channel's values on the probe."""
    scores: Scores | None = None
    """From a Fisher pass with the weights as they are."""
    descents: Sequence[float] = ()
    """Of every update since the last revision the inner product of the gradient and the way that the update before it
    went: above 0 where the loss still falls in that direction."""
    rng: np.random.Generator | None = None


class Decision(NamedTuple):
    """What trains until the next revision, and what the policy remembers."""

    updates: Updates
    memory: Memory
    turn: int = 0
    """Where channels take turns, whose it is."""


# ------------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Static:
    """The plan stays."""

    every: int = 0
    """Updates from one revision to the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Velocity:
    """When a channel has settled, and what follows."""

    every: int = 10
    """Updates from one revision to the next."""
    threshold: float = 1e-3
    """Largest |velocity| of a settled channel: 1e-3 for classification (NEq)."""
    learn: float = 0.0
    """SCoTTi's: the rate at which the threshold itself is learnt (1e-4 there, from 0.05 on); 0 leaves it."""
    by: str = "threshold"
    """`threshold`: settled layers leave. `budget`: the best plan by velocity, under the plan's budgets."""
    mu: float = 0.5
    """How much of the velocity before counts, 0 to 0.5."""
    share: float = 1.0
    """Of a layer's channels, that must have settled for it to leave."""
    probe: str = "full"
    """Of a channel's output on a probe's sample: all of it, as NEq has it, or its mean (`means`), which takes a
    fraction of the memory and is noisier: a mean near 0 changes its sign."""

    def __post_init__(self) -> None:
        require(self.threshold >= 0, "--policy velocity", f"threshold {self.threshold}", "at least 0")
        require(self.learn >= 0, "--policy velocity", f"learn {self.learn}", "at least 0")
        require(0 <= self.mu <= 0.5, "--policy velocity", f"mu {self.mu}", "0 to 0.5")
        require(0 < self.share <= 1, "--policy velocity", f"share {self.share}", "above 0, at most 1")
        require(self.by in ("threshold", "budget"), "--policy velocity", f"by {self.by!r}", "threshold or budget")
        require(self.probe in ("means", "full"), "--policy velocity", f"probe {self.probe!r}", "means or full")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotate:
    """How the plan's channels take turns."""

    every: int = 1
    """Updates of a turn."""
    parts: int = 2
    """Into how many ranges a layer's live channels are divided."""

    def __post_init__(self) -> None:
        require(2 <= self.parts <= 255, "--policy rotate", f"parts {self.parts}", "2 to 255")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescore:
    """When the plan is searched for again, and by what."""

    every: int = 20
    """Updates from one search to the next."""
    criterion: str = ""
    """What a layer is worth, as `score-layers --criterion` says; empty: as the plan was made."""


# ------------------------------------------------------------------------------------------------------------- velocity


def similarity(before: Array, after: Array) -> Array:
    """Cosine of every channel's outputs before and after, (C, n) each -> float64 (C,); two silent outputs are alike.

    NEq's phi (arXiv:2207.09455): 1 where a channel's output is what it was, whatever its scale.
    """
    before, after = before.astype(np.float64), after.astype(np.float64)
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    silent = ~before.any(1) & ~after.any(1)
    cosine = np.divide((before * after).sum(1), lengths, out=np.zeros(len(before)), where=lengths > 0)
    alike = silent | (before == after).all(1)  # what has not moved is exactly 1
    return np.where(alike, 1.0, np.clip(cosine, -1, 1))


def velocity_of(change: Array, before: Array | None, mu: float) -> Array:
    """v_t = (phi_t - phi_(t-1)) - mu v_(t-1), as NEq's text has it; its code adds the velocity with a plus sign."""
    return change if before is None else change - mu * before


def _velocity(seen: Seen, memory: Memory, how: Velocity) -> Decision:
    if not seen.now:
        return _asleep(seen, memory)
    found = _observed(seen, memory, how)
    threshold = _learnt(seen, memory, how, found)
    velocities = {name: found[_key(name, "velocity")] for name in seen.outputs if _key(name, "velocity") in found}
    if how.by == "budget":
        updates = _worth_by_velocity(seen, velocities, threshold)
    else:
        updates = _without_settled(seen, velocities, threshold, how.share)
    if not any(update.trains for update in updates):
        losses = np.array(seen.losses, np.float64)
        return Decision((), {**found, "band": np.array([losses.mean(), losses.std()])})
    return Decision(updates, found)


def _key(layer: str, what: str) -> str:
    return f"{layer} {what}"


def _observed(seen: Seen, memory: Memory, how: Velocity) -> dict[str, Array]:
    """Of every layer its outputs, their similarity and velocity, as far as they are known yet."""
    found: dict[str, Array] = {"threshold": memory.get("threshold", np.array(how.threshold))}
    for name, outputs in seen.outputs.items():
        found[_key(name, "outputs")] = outputs
        last = memory.get(_key(name, "outputs"))
        if last is None or last.shape != outputs.shape:
            continue
        phi = found[_key(name, "similarity")] = similarity(last, outputs)
        before = memory.get(_key(name, "similarity"))
        if before is not None:
            found[_key(name, "velocity")] = velocity_of(phi - before, memory.get(_key(name, "velocity")), how.mu)
    return found


def _learnt(seen: Seen, memory: Memory, how: Velocity, found: dict[str, Array]) -> float:
    """SCoTTi's threshold after the updates since the last revision: SGD with momentum 0.9 on dL/d eps, which a
    straight-through step makes the descent along the update before (arXiv:2312.12483, `optimSCoTTi.py`)."""
    threshold, momentum = float(found["threshold"]), float(memory.get("threshold momentum", 0.0))
    if how.learn:
        for descent in seen.descents:
            momentum = 0.9 * momentum + descent
            threshold = max(0.0, threshold - how.learn * momentum)
        found |= {"threshold": np.array(threshold), "threshold momentum": np.array(momentum)}
    return threshold


def _without_settled(seen: Seen, velocities: Mapping[str, Array], threshold: float, share: float) -> Updates:
    """The plan without its first layers, as far as all, or this share, of their channels have settled."""
    live = [update for update in seen.now if update.trains]
    while live:
        update = live[0]
        velocity, watched = velocities.get(update.layer), neurons(seen.room.graph[update.layer], update)
        if velocity is None or (np.abs(velocity[watched]) <= threshold).mean() < share:
            break
        live = live[1:]
    if len(live) == sum(update.trains for update in seen.now):
        return seen.now
    return with_detached(seen.room.graph, live, detached_layers(seen.first))


def neurons(op: Op, update: LayerUpdate) -> list[int]:
    """The output channels that an update moves: all of them where input channels train."""
    if update.channels and update.axis == "input" and not op.is_depthwise:
        return list(range(op.out_channels))
    return sorted({*update.channels, *update.bias})


def _worth_by_velocity(seen: Seen, velocities: Mapping[str, Array], threshold: float) -> Updates:
    """The plan of most |velocity| under the budgets (arXiv:2312.05282, with an exact selector in the place of its
    ranking by |velocity| per parameter); the plan of now where none is known yet; nothing where all is settled."""
    room = seen.room
    layers = [name for name in room.candidates if name in velocities]
    if not layers:
        return seen.now
    speeds = [np.abs(velocities[name]) for name in layers]
    if not any((speed > threshold).any() for speed in speeds):
        return ()
    worth = np.array([fsum(speed) for speed in speeds])
    scores = Scores("velocity", tuple(layers), worth, worth, tuple(speeds), tuple(speeds))
    return _searched(seen, scores, replace(room.channels, axis="output", rule="fisher"))


def _asleep(seen: Seen, memory: Memory) -> Decision:
    """All has settled: training sleeps until a loss leaves the band that it had; then everything wakes."""
    mean, spread = memory["band"]
    if not seen.losses or not seen.losses[-1] > mean + BAND * spread:
        return Decision((), memory)
    return Decision(seen.first, {name: memory[name] for name in ("threshold", "threshold momentum") if name in memory})


# --------------------------------------------------------------------------------------------------- rotate and rescore


def turns_of(graph: Graph, updates: Updates, parts: int) -> list[Updates]:
    """The ranges of a plan's live channels, of every layer one in each turn; layers with fewer channels than turns, and
    recurrent ones whose units never train apart, have theirs in some of them. Turns in which nothing trains are left
    out."""
    turns: list[list[LayerUpdate]] = [[] for _ in range(parts)]
    for number, update in enumerate(updates):
        whole = graph[update.layer].operator.weight_gradient is not None
        for turn in range(parts):
            if whole:
                mine = update if turn == number % parts else replace(update, channels=(), bias=())
            else:
                mine = replace(
                    update, channels=_range(update.channels, turn, parts), bias=_range(update.bias, turn, parts)
                )
            if mine.trains or mine.detached:
                turns[turn].append(mine)
    return [tuple(turn) for turn in turns if any(update.trains for update in turn)]


def _range(channels: Sequence[int], turn: int, parts: int) -> tuple[int, ...]:
    """One of so many ranges of nearly equal size, of whole panels where there are enough.

    >>> [len(_range(range(96), turn, 4)) for turn in range(4)], [len(_range(range(5), turn, 2)) for turn in range(2)]
    ([32, 16, 16, 32], [2, 3])
    """
    unit = PANEL if len(channels) >= PANEL * parts else 1
    ends = [round(len(channels) * turn / parts / unit) * unit for turn in (turn, turn + 1)]
    if turn + 1 == parts:
        ends[1] = len(channels)
    return tuple(channels[ends[0] : ends[1]])


def _rotate(seen: Seen, memory: Memory, how: Rotate) -> Decision:
    count = len(turns_of(seen.room.graph, seen.first, how.parts))
    turn = (int(memory.get("turn", 0)) + 1) % count
    return Decision(seen.first, {"turn": np.array(turn)}, turn)


def _rescore(seen: Seen, memory: Memory, how: Rescore) -> Decision:
    if seen.scores is None or not np.any(seen.scores.score > 0):
        return Decision(seen.now, memory)
    return Decision(_searched(seen, seen.scores, seen.room.channels), memory)


def _searched(seen: Seen, scores: Scores, channels: Channels) -> Updates:
    """The best plan by these scores within the room; the plan of now where nothing fits."""
    room, costs = seen.room, seen.room.problem
    problem = pose(
        room.graph, scores, costs.budget, channels, Evidence(room.weights, seen.rng),
        fixed=costs.fixed, measured=costs.measured, detached=costs.detached,
    )  # fmt: skip
    try:
        found = select_layers(problem, room.select)
    except BudgetError:
        return seen.now
    return problem.complete(found.updates)


def _static(seen: Seen, memory: Memory, how: Static) -> Decision:
    return Decision(seen.now, memory)


# ------------------------------------------------------------------------------------------------------------ the table


class Kind(NamedTuple):
    """What is known of a policy besides its settings' values."""

    settings: Any
    """A frozen dataclass; its fields are what stands behind the colon."""
    revise: Callable[[Seen, Memory, Any], Decision]
    needs: str = ""
    """What it must be told of: `outputs`, `scores`, or nothing."""
    in_turns: bool = False
    """The plan stays as a whole, and its channels take turns."""


POLICIES: Mapping[str, Kind] = {
    "static": Kind(Static, _static),
    "velocity": Kind(Velocity, _velocity, needs="outputs"),
    "rotate": Kind(Rotate, _rotate, in_turns=True),
    "rescore": Kind(Rescore, _rescore, needs="scores"),
}


@dataclass(frozen=True)
class Policy:
    """A policy with its settings."""

    name: str
    settings: Any

    @property
    def kind(self) -> Kind:
        return POLICIES[self.name]

    @property
    def every(self) -> int:
        """Updates from one revision to the next; 0: there is none."""
        return int(self.settings.every)

    def revise(self, seen: Seen, memory: Memory) -> Decision:
        """What trains next."""
        return self.kind.revise(seen, memory, self.settings)

    @property
    def learns(self) -> bool:
        """Whether it wants to know `Seen.descents`."""
        return bool(getattr(self.settings, "learn", 0.0))

    @property
    def criterion(self) -> str:
        """What a layer is worth in a search of its own; empty: as the plan was made."""
        return str(getattr(self.settings, "criterion", ""))


def parse_policy(text: str) -> Policy:
    """A policy from `NAME` or `NAME:setting=value,...`.

    >>> parse_policy("velocity:every=5,by=budget").settings.every
    5

    Raises:
        UsageError: no policy or setting of that name (those there are are listed), or a value that cannot be.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise UsageError("--policy", repr(name), "one of " + ", ".join(POLICIES))
    kind, given = POLICIES[name].settings, dict[str, Any]()
    known = {} if name == "static" else _types(kind)
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if key not in known or not equals:
            expected = "one of " + ", ".join(f"{each}=..." for each in known) if known else "no settings"
            raise UsageError(f"--policy {name}", repr(pair), expected)
        try:
            given[key] = known[key](value)
        except ValueError:
            raise UsageError(f"--policy {name}", repr(pair), f"{key}= a number") from None
        number = given[key]
        require(isinstance(number, str) or isfinite(number), f"--policy {name}", repr(pair), "a finite number")
    made = kind(**given)
    require(name == "static" or made.every >= 1, f"--policy {name}", f"every={made.every}", "at least 1")
    return Policy(name, made)


def _types(settings: Any) -> dict[str, type]:
    return {each.name: type(each.default) for each in fields(settings)}


# ------------------------------------------------------------------------------------------------------------- the room


def search_text(**how: Any) -> str:
    """How a plan was searched for, for its facts."""
    return json.dumps(how, sort_keys=True)


def search_of(plan: Plan | None) -> dict[str, Any]:
    """How a plan was searched for; TinyTrain's way where the record does not say."""
    standard = {
        "criterion": "score", "select": "greedy", "layers": "filters", "ratios": (1.0, 0.5, 0.25, 0.125),
        "axis": "output", "rule": "fisher", "bias": False, "unit": "channels", "blocks": 6, "gradient": "exact",
        "head": "prototypes",
    }  # fmt: skip
    told = {} if plan is None else json.loads(plan.facts.get(SEARCH, "{}"))
    if plan is not None and plan.name in SELECTORS:
        standard["select"] = plan.name
    return {**standard, **told}


def room_of(
    graph: Graph,
    plan: Plan | None,
    updates: Updates,
    candidates: tuple[str, ...],
    *,
    classes: int = 0,
    optimizer: str = "adam",
    measured: Durations | None = None,
    weights: Mapping[str, Array] | None = None,
) -> Room:
    """What revised plans keep within: the budgets that a plan was made under, or else what it costs itself.

    Args:
        plan: the record's; None where a named plan is trained in its place.
        updates: what trains at first.
        candidates: the layers that a search may choose from.
        classes: rows of the linear head that the plan's budget paid for (`search_of(plan)["head"]`).
        optimizer: whose state memory counts where the plan does not say.
        measured: the run's profile, for plans under a budget of time.
        weights: for channel rule `l2`.
    """
    facts, how = ({} if plan is None else plan.facts), search_of(plan)
    fixed: tuple[LayerUpdate, ...] = ()
    if how["head"] == "linear" and classes:
        graph = with_head(graph, classes)
        fixed = (whole_update(graph.ops[-1]),)
    model = "paper" if plan is None else plan.memory_model
    accounting: dict[str, Any] = {
        "batch": int(facts.get("batch", 1)),
        "optimizer": str(facts.get("optimizer", optimizer)),
        "workers": int(facts.get("workers", 1)),
        "keep_bits": int(facts.get("keep_bits", 32)),
    }
    memory, macs, latency_s = (facts.get(f"budget_{what}") for what in ("memory_bytes", "macs", "latency_s"))
    if (memory, macs, latency_s) == (None, None, None):
        memory = memory_bytes(graph, (*updates, *fixed), model=model, **accounting)
        macs = plan_backward_macs(graph, (*updates, *fixed))
    budget = Budget(
        memory_bytes=None if memory is None else int(memory),
        backward_macs=None if macs is None else int(macs),
        latency_s=None if latency_s is None else float(latency_s),
        memory_model=model,
        **accounting,
    )
    channels = Channels(
        ratios=tuple(how["ratios"]), axis=how["axis"], rule=how["rule"], bias=how["bias"], unit=how["unit"]
    )
    ends = residual_entries(graph) if how["gradient"] == "shortcut" else detached_layers(updates)
    problem = Problem(graph, (), budget, fixed, measured if latency_s is not None else None, ends)
    return Room(problem, candidates, channels, str(how["select"]), weights or {})
