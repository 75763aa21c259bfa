"""The planning problem: which layers, at which channel ratios, under which budget, worth what.

The worth of a layer at ratio r is its score times the share of its Fisher information that the live channels hold:
the whole score at r = 1, and more than r * score where the best channels are chosen. (Where a layer has no Fisher
information at all, the share is the live channels' part of the channels.) A plan is worth the sum over its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum

import numpy as np

from stages.artifacts.records import Array, LayerUpdate, Scores
from stages.cost.latency import Durations, predicted_latency_ns
from stages.cost.training import ARENA, check_memory_model, live_values, memory_bytes, plan_backward_macs
from stages.errors import BudgetError, DataError, UsageError, require
from stages.graphs.blocks import inside
from stages.graphs.graph import Graph
from stages.graphs.heads import input_heads, output_heads
from stages.graphs.updates import whole_update
from stages.operators import Op
from stages.operators.op import ELEMENT_BYTES
from stages.planning.budget import Budget, format_bytes
from stages.planning.channels import ChannelEvidence, axis_of, channel_rule, make_update
from stages.planning.shortcuts import with_detached

RATIOS = (1.0, 0.5, 0.25, 0.125)
"""The channel ratios that TinyTrain studies (Figures 3, 4, 7-10)."""


UNITS = ("channels", "heads", "blocks")
"""What lives or freezes as one: a channel of a layer; where a layer makes or reads the heads of an attention a whole
head, other layers as before; or every layer of a block, whole and with its biases."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to train a layer, or a block, and what it is worth."""

    updates: tuple[LayerUpdate, ...]
    score: float

    @property
    def update(self) -> LayerUpdate:
        """The one layer's."""
        (update,) = self.updates
        return update


@dataclass(frozen=True)
class Candidate:
    """A layer that may train: its score as a whole, and one option per ratio. Or a block, which has one option."""

    score: float
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Problem:
    """Candidates in execution order; every candidate has as many options, one per ratio."""

    graph: Graph
    candidates: tuple[Candidate, ...]
    budget: Budget
    fixed: tuple[LayerUpdate, ...] = ()
    """Updates that every plan contains, outside the candidates: a linear head that always trains."""
    measured: Durations | None = None
    """What a latency budget is predicted from."""
    detached: frozenset[str] = frozenset()
    """Layers that pass no gradient on (`shortcuts.residual_entries`)."""

    def __post_init__(self) -> None:
        require(
            self.budget.latency_s is None or self.measured is not None,
            "latency budget",
            "no measurements",
            "a measured profile",
            "run `edgetrain profile` on this device first",
        )
        if self.budget.memory_bytes is not None:
            check_memory_model(self.budget.memory_model, self.graph)

    def fits(self, updates: Sequence[LayerUpdate]) -> bool:
        """Whether the updates, with the fixed ones, keep within every budget, to the byte and the MAC."""
        memory, *others = self.budget.limits
        if not within(self.work(updates), others):
            return False
        if memory is None or (self.by_arena and self._live_bytes(updates) > memory):  # without lowering the plan
            return memory is None
        return self.memory(updates) <= memory

    def complete(self, updates: Sequence[LayerUpdate]) -> tuple[LayerUpdate, ...]:
        """The updates with the problem's detached layers, as far as gradients would come by them: what is executed."""
        return with_detached(self.graph, updates, self.detached)

    def usage(self, updates: Sequence[LayerUpdate]) -> tuple[int, int, int]:
        """Memory (bytes, by the budget's model), backward MACs and predicted nanoseconds (0 without measurements)."""
        return self.memory(updates), *self.work(updates)

    def memory(self, updates: Sequence[LayerUpdate]) -> int:
        """Bytes, by the budget's model."""
        budget = self.budget
        return memory_bytes(
            self.graph, self.complete((*updates, *self.fixed)), model=budget.memory_model, batch=budget.batch,
            optimizer=budget.optimizer, workers=budget.workers, keep_bits=budget.keep_bits,
        )  # fmt: skip

    def work(self, updates: Sequence[LayerUpdate]) -> tuple[int, int]:
        """Backward MACs and predicted nanoseconds (0 without measurements)."""
        updates = self.complete((*updates, *self.fixed))
        latency_ns = predicted_latency_ns(self.graph, self.measured, updates) if self.measured else 0
        return plan_backward_macs(self.graph, updates), latency_ns

    @property
    def by_blocks(self) -> bool:
        """Whether candidates are of several layers."""
        return any(len(option.updates) > 1 for one in self.candidates for option in one.options)

    @property
    def by_arena(self) -> bool:
        """Whether memory is limited, and by the one model that is no sum over layers."""
        return self.budget.memory_bytes is not None and self.budget.memory_model == ARENA

    def _live_bytes(self, updates: Sequence[LayerUpdate]) -> int:
        """The live values and their gradients, which every arena lies beside."""
        return 2 * ELEMENT_BYTES * live_values(self.graph, (*updates, *self.fixed))


def within(costs: Sequence[int], limits: Sequence[int | None]) -> bool:
    """Whether every cost keeps its limit; None is no limit."""
    return all(limit is None or cost <= limit for cost, limit in zip(costs, limits, strict=True))


@dataclass(frozen=True)
class Choice:
    """What a selector found: updates in execution order, and what they are worth together."""

    updates: tuple[LayerUpdate, ...] = ()
    score: float = 0.0
    optimal: bool = False
    """Proven: no plan within the budgets is worth more."""


def choice(options: Sequence[Option]) -> Choice:
    """The choice of these options (execution order); its score does not depend on the order of summation."""
    updates = tuple(update for option in options for update in option.updates)
    return Choice(updates, fsum(option.score for option in options))


@dataclass(frozen=True, kw_only=True, slots=True)
class Channels:
    """How channels are chosen inside a layer, and in which portions.

    Raises:
        UsageError: no ratios, or one outside (0, 1]; an unknown axis or rule.
    """

    ratios: tuple[float, ...] = RATIOS
    axis: str = "output"
    rule: str = "fisher"
    bias: bool = False
    """Whether the biases of live channels train too."""
    unit: str = "channels"
    """What lives or freezes as one: one of `UNITS`."""

    def __post_init__(self) -> None:
        require(len(self.ratios) > 0, "channel ratios", "none", "at least one")
        for ratio in self.ratios:
            require(0 < ratio <= 1, "channel ratio", f"{ratio}", "more than 0 and at most 1")
        require(self.axis in ("output", "input"), "channel axis", repr(self.axis), "output or input")
        require(self.unit in UNITS, "unit", repr(self.unit), "one of " + ", ".join(UNITS))
        channel_rule(self.rule)


@dataclass(frozen=True)
class Evidence:
    """What options are made from besides the scores."""

    weights: Mapping[str, Array] = field(default_factory=dict)
    """`<layer>.weight` -> array, for channel rule `l2`."""
    rng: np.random.Generator | None = None
    """For channel rule `random`."""


def pose(
    graph: Graph,
    scores: Scores,
    budget: Budget,
    how: Channels,
    evidence: Evidence,
    *,
    fixed: Sequence[LayerUpdate] = (),
    measured: Durations | None = None,
    detached: frozenset[str] = frozenset(),
) -> Problem:
    """The planning problem over the scored layers. Layers whose score is 0 cannot help and are left out.

    A block is worth the sum of its scored layers; scored layers outside every block do not count with `unit` blocks.

    Raises:
        DataError: scores of another model, not finite or negative, or all 0.
        UsageError: `unit` blocks where no scored layer lies in a block.
    """
    _check_scores(graph, scores)
    if how.unit == "blocks":
        candidates = tuple(_block_candidates(graph, scores))
    else:
        worth = [i for i in range(len(scores.layer)) if scores.score[i] > 0]
        candidates = tuple(_candidate(graph, scores, i, how, evidence) for i in worth)
    return Problem(graph, candidates, budget, tuple(fixed), measured, detached)


def _check_scores(graph: Graph, scores: Scores) -> None:
    unknown = [name for name in scores.layer if name not in graph.by_name or not graph[name].is_layer]
    if unknown:
        raise DataError("/scores/layer", f"{unknown[0]!r}", "layers of this model", "score this model again")
    if not np.all(np.isfinite(scores.score)) or np.any(scores.score < 0):
        raise DataError("/scores/score", "a negative or non-finite score", "finite scores of at least 0")
    if not np.any(scores.score > 0):
        raise DataError(
            "/scores/score",
            "every layer scores 0",
            "a layer whose training changes the loss",
            "does the support set hold more than one class?",
        )


def _block_candidates(graph: Graph, scores: Scores) -> Iterator[Candidate]:
    """The blocks in which something is scored, each whole."""
    worth = {name: float(score) for name, score in zip(scores.layer, scores.score, strict=True)}
    found = False
    for number in range(len(graph.blocks)):
        layers = inside(graph, number)
        score = fsum(worth.get(op.name, 0.0) for op in layers)
        if score > 0:
            found = True
            yield Candidate(score, (Option(tuple(whole_update(op) for op in layers), score),))
    if not found:
        raise UsageError("unit blocks", "no scored layer in a block", "a model of blocks", "use unit channels")


def _groups(graph: Graph, op: Op, how: Channels) -> tuple[str, Array | None]:
    """Along which axis a layer's channels are chosen, and the head of each where heads are asked for and it has any."""
    if how.unit == "heads":
        for axis, heads in (("output", output_heads), ("input", input_heads)):
            if (groups := heads(graph, op)) is not None:
                return axis, groups
    return how.axis, None


def _candidate(graph: Graph, scores: Scores, i: int, how: Channels, evidence: Evidence) -> Candidate:
    op = graph[scores.layer[i]]
    wanted, groups = _groups(graph, op, how)
    axis, channels = axis_of(op, wanted)
    information = np.asarray((scores.output_fisher if axis == "output" else scores.input_fisher)[i], dtype=np.float64)
    if information.shape != (channels,):
        raise DataError(
            f"/scores ({op.name})", f"{information.size} {axis} channels", f"{channels}", "score this model again"
        )
    weight = evidence.weights.get(f"{op.name}.weight")
    ranking = channel_rule(how.rule)(ChannelEvidence(op, axis, channels, information, weight, evidence.rng))
    updates = [make_update(op, axis, ranking, ratio, bias=how.bias, groups=groups) for ratio in how.ratios]
    whole = float(scores.score[i])
    return Candidate(whole, tuple(Option((update,), whole * _share(information, update)) for update in updates))


def _share(information: Array, update: LayerUpdate) -> float:
    """Part of a layer's Fisher information that lies in the live channels."""
    total = fsum(information)
    if total <= 0:
        return update.ratio
    return fsum(information[list(update.channels)]) / total


def nothing_fits(problem: Problem) -> BudgetError:
    """The error for a problem for which a selector found no plan: says the smallest budget that admits one.

    Costs only grow with a plan, so the smallest plan trains one layer. Where one limit alone is too tight, its
    smallest sufficient value is stated; otherwise all of them, for the layer that needs the least.
    """
    budget = problem.budget
    single = [min(one.options, key=_ratio).updates for one in problem.candidates]
    if not single:
        return BudgetError("budget", "no candidate layer", "layers to choose from")
    used = [(problem.usage(updates), updates) for updates in single]
    if any(within(costs, budget.limits) for costs, _ in used):
        return BudgetError(
            "budget",
            f"the layer of highest score does not fit {budget}",
            "a larger budget",
            "or `greedy`, which skips it",
        )
    for which in range(len(budget.limits)):
        others = [limit for i, limit in enumerate(budget.limits) if i != which]
        enough = [entry for entry in used if within([c for i, c in enumerate(entry[0]) if i != which], others)]
        if enough and budget.limits[which] is not None:
            costs, updates = min(enough, key=lambda entry: entry[0][which])
            needed = _describe(costs, tuple(i == which for i in range(len(costs))))
            break
    else:
        costs, updates = min(used, key=lambda entry: entry[0])
        needed = _describe(costs, tuple(limit is not None for limit in budget.limits))
    first = updates[0]
    what = f"{first.layer} at ratio {first.ratio:.3g}" if len(updates) == 1 else _block_of(problem.graph, first.layer)
    smallest = f"at least {needed} (for {what})"
    return BudgetError("budget", f"no plan fits {budget}", smallest, "raise the budget, or allow smaller ratios")


def _ratio(option: Option) -> float:
    return max(update.ratio for update in option.updates)


def _block_of(graph: Graph, layer: str) -> str:
    return f"the block {graph.blocks[graph[layer].block]}"


def _describe(costs: tuple[int, int, int], mention: Sequence[bool]) -> str:
    memory, macs, latency_ns = costs
    words = (f"{format_bytes(memory)} of memory", f"{macs:,} backward MACs", f"{latency_ns / 1e6:g} ms")
    return " and ".join(word for word, wanted in zip(words, mention, strict=True) if wanted)
