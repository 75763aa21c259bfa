"""The costs of a planning problem taken apart: what each option costs by itself, and what options share.

Costs are coupled in two ways. The first live layer on a path opens it for gradients: everything behind it passes
input gradients on and keeps activation bits, once, whatever else trains there. And layers that read the same tensor
keep it once. The memory models' `max` of two terms is no coupling: each term is a resource with a limit of its own.

Costs are vectors with one entry per resource, whole numbers held exactly in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import LayerUpdate
from stages.cost.latency import weight_gradient_ns
from stages.cost.ops import input_gradient_macs
from stages.cost.training import (
    MemoryModel,
    live_values,
    live_weights,
    saved_activation_bytes,
    weight_gradient_macs,
)
from stages.graphs.keeping import flow_holds, holding, kept_values, layer_holds, slice_bytes, value_bytes
from stages.planning.problem import Problem

Vector = NDArray[np.float64]


class State(NamedTuple):
    """What a partial plan has opened, as far as later layers can still share it."""

    reach: frozenset[str] = frozenset()
    """Operators that gradients reach."""
    kept: frozenset[str] = frozenset()
    """Tensors kept whole."""


class Way(NamedTuple):
    """Options of one candidate that open the same things."""

    state: State
    """After the candidate has joined."""
    ratios: NDArray[np.int8]
    """(n,): which options."""
    cost: Vector
    """(R,): what joining adds beyond the option's own cost."""


@dataclass(frozen=True)
class Raw:
    """One cost before it becomes a vector."""

    values: int = 0
    saved_bytes: int = 0
    macs: int = 0
    latency_ns: int = 0


@dataclass(frozen=True)
class Coupling:
    """Costs of one problem. Candidates are numbered in execution order."""

    problem: Problem
    model: MemoryModel
    """What memory is counted by."""
    memory_bytes: int | None
    """The limit by that model."""
    _ways: dict[tuple[State, int], tuple[Way, ...]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def capacity(self) -> Vector:
        """(R,): what the limits leave after the fixed updates and the inference buffers; negative where nothing fits.

        Resources: one per term of the memory model, then MACs, then nanoseconds, as far as there are limits.
        """
        problem, budget = self.problem, self.problem.budget
        _, macs, latency_ns = budget.limits
        left: list[int] = []
        if self.memory_bytes is not None:
            model = self.model
            values = live_values(problem.graph, problem.fixed, biases=model.biases)
            saved = saved_activation_bytes(problem.graph, problem.fixed, budget.batch, budget.keep_bits)
            base = self.memory_bytes - values * model.bytes_per_value(budget.optimizer)
            buffers = [term.saved * saved + budget.batch * term.buffer_bytes(problem.graph) for term in model.terms]
            left += [base - buffer for buffer in buffers]
        used = problem.work(())
        left += [limit - cost for limit, cost in zip((macs, latency_ns), used, strict=True) if limit is not None]
        return np.array(left, dtype=np.float64)

    @cached_property
    def scores(self) -> Vector:
        """(L, ratios): worth of every option."""
        return np.array([[option.score for option in one.options] for one in self.problem.candidates])

    @cached_property
    def own(self) -> NDArray[np.float64]:
        """(L, ratios, R): cost of every option that nothing else shares."""
        rows = [[self._vector(self._own(o.update)) for o in one.options] for one in self.problem.candidates]
        return np.array(rows).reshape(*self.scores.shape, len(self.capacity))

    @cached_property
    def start(self) -> State:
        """What the fixed updates have opened."""
        fixed = self.problem.fixed
        held = holding(self.problem.graph, fixed) if fixed else None
        return State(self._flow_of({update.layer for update in fixed}), held.values if held else frozenset())

    def flow_cost(self, state: State, candidate: int) -> Vector:
        """(R,): what it costs that gradients reach the candidate too."""
        return self._vector(self._opening(state, state.reach | self._reach[candidate])[0])

    def ways(self, state: State, candidate: int) -> tuple[Way, ...]:
        """How the candidate can join: its options, grouped by the shared values that they keep."""
        if (state, candidate) not in self._ways:
            self._ways[state, candidate] = tuple(self._group_ways(state, candidate))
        return self._ways[state, candidate]

    def _group_ways(self, state: State, candidate: int) -> Iterator[Way]:
        reach = state.reach | self._reach[candidate]
        opened, kept = self._opening(state, reach)
        groups: dict[frozenset[str], list[int]] = {}
        for ratio, values in enumerate(self._values[candidate]):
            groups.setdefault((values & self._shared) - kept, []).append(ratio)
        for new, ratios in groups.items():
            cost = self._vector(replace(opened, saved_bytes=opened.saved_bytes + self._bytes_of(new)))
            yield Way(State(reach, kept | new), np.array(ratios, dtype=np.int8), cost)

    def _opening(self, state: State, reach: frozenset[str]) -> tuple[Raw, frozenset[str]]:
        """What it costs that gradients reach `reach` too, and all that is kept whole then."""
        problem, graph = self.problem, self.problem.graph
        measured = problem.measured.input_gradient_ns if problem.measured else {}
        new = reach - state.reach
        touched = new | {reader for name in new for reader in graph.consumers[name]}
        saved_bytes = macs = latency_ns = 0
        kept = set(state.kept)
        for op in (graph[name] for name in touched & reach):
            before = graph.wanted(op, state.reach, problem.detached)
            after = graph.wanted(op, reach, problem.detached)
            if after == before:
                continue
            keep = op.operator.keeps(op, after)
            held = op.operator.keeps(op, before).own_bytes(op, problem.budget.batch) if before else 0
            saved_bytes += keep.own_bytes(op, problem.budget.batch) - held
            kept |= kept_values(graph, op, keep)
            macs += input_gradient_macs(op) * (len(after) - len(before))
            latency_ns += measured.get(op.owner, 0) * (len(after) - len(before))
        saved_bytes += self._bytes_of(kept - state.kept)
        return Raw(saved_bytes=saved_bytes, macs=macs, latency_ns=latency_ns), frozenset(kept)

    def _bytes_of(self, values: Iterable[str]) -> int:
        """Those that a passing gradient may need count as they are, whatever trains: on the safe side."""
        graph, budget = self.problem.graph, self.problem.budget
        return sum(
            value_bytes(graph, name, budget.batch, 32 if name in self._passing else budget.keep_bits) for name in values
        )

    def forget(self, state: State, candidate: int) -> State:
        """The state without what no candidate from this one on can share."""
        reach, kept = self._future[candidate]
        return State(state.reach & reach, state.kept & kept)

    @cached_property
    def _reach(self) -> tuple[frozenset[str], ...]:
        """Operators that gradients reach when a candidate trains."""
        return tuple(self._flow_of({one.options[0].update.layer}) for one in self.problem.candidates)

    def _flow_of(self, layers: Set[str]) -> frozenset[str]:
        return self.problem.graph.gradient_flow(layers, self.problem.detached)

    @cached_property
    def _passing(self) -> frozenset[str]:
        """Values that operators keep for gradients that pass them, whatever trains."""
        everywhere = frozenset().union(self.start.reach, *self._reach)
        return frozenset(flow_holds(self.problem.graph, everywhere, self.problem.detached)[0])

    @cached_property
    def _shared(self) -> frozenset[str]:
        """Values that more than one candidate, a candidate and a fixed update, or a passing gradient would keep."""
        readers = Counter(name for options in self._values for name in frozenset().union(*options))
        readers.update(self.start.kept)
        return frozenset(name for name, count in readers.items() if count > 1) | self._passing

    @cached_property
    def _values(self) -> tuple[tuple[frozenset[str], ...], ...]:
        """Per candidate and option: the values that it would keep whole for its own weight gradient."""
        return tuple(tuple(self._layer_values(o.update) for o in one.options) for one in self.problem.candidates)

    def _layer_values(self, update: LayerUpdate) -> frozenset[str]:
        graph = self.problem.graph
        return frozenset(name for op in graph.uses(update.layer) for name in layer_holds(graph, op, update)[0])

    @cached_property
    def _future(self) -> tuple[State, ...]:
        """Per candidate: everything that it or a later one may open."""
        futures = [State()]
        for options, reach in zip(reversed(self._values), reversed(self._reach), strict=True):
            passing = flow_holds(self.problem.graph, reach, self.problem.detached)[0] if self._passing else set()
            own = frozenset().union(*options) & self._shared
            futures.append(State(futures[-1].reach | reach, futures[-1].kept | own | passing))
        return tuple(reversed(futures))

    def _own(self, update: LayerUpdate) -> Raw:
        problem, graph = self.problem, self.problem.graph
        sliced = sum(
            slice_bytes(op, channels, problem.budget.batch, problem.budget.keep_bits)
            for op in graph.uses(update.layer)
            if (channels := layer_holds(graph, op, update)[1])
        )
        biases = self.model.biases * len(update.bias)
        return Raw(
            values=live_weights(graph[update.layer], update) + biases,
            saved_bytes=sliced + self._bytes_of(self._layer_values(update) - self._shared),
            macs=weight_gradient_macs(graph, update),
            latency_ns=weight_gradient_ns(problem.measured, update) if problem.measured else 0,
        )

    def _vector(self, raw: Raw) -> Vector:
        """(R,), in the order of `capacity`."""
        return np.array(list(self._entries(raw)), dtype=np.float64)

    def _entries(self, raw: Raw) -> Iterator[int]:
        budget = self.problem.budget
        _, macs, latency_ns = budget.limits
        if self.memory_bytes is not None:
            weights = raw.values * self.model.bytes_per_value(budget.optimizer)
            yield from (weights + term.saved * raw.saved_bytes for term in self.model.terms)
        if macs is not None:
            yield raw.macs
        if latency_ns is not None:
            yield raw.latency_ns
