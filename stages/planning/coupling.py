"""The costs of a planning problem taken apart: what each option costs by itself, and what options share.

Costs are coupled in two ways. The first live layer on a path opens it for gradients: everything behind it passes
input gradients on and keeps activation bits, once, whatever else trains there. And layers that read the same tensor
keep it once. The memory models' `max` of two terms is no coupling: each term is a resource with a limit of its own.

Costs are vectors with one entry per resource, whole numbers held exactly in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import LayerUpdate
from stages.cost.latency import weight_gradient_ns
from stages.cost.ops import input_gradient_macs, kept_bytes
from stages.cost.training import (
    kept_input,
    live_values,
    live_weights,
    memory_model,
    saved_activation_bytes,
    weight_gradient_macs,
)
from stages.models.graph import Op
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
    _ways: dict[tuple[State, int], tuple[Way, ...]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def capacity(self) -> Vector:
        """(R,): what the limits leave after the fixed updates and the inference buffers; negative where nothing fits.

        Resources: one per term of the memory model, then MACs, then nanoseconds, as far as there are limits.
        """
        problem, budget = self.problem, self.problem.budget
        memory, macs, latency_ns = budget.limits
        left: list[int] = []
        if memory is not None:
            model = memory_model(budget.memory_model)
            values = live_values(problem.graph, problem.fixed, biases=model.biases)
            saved = saved_activation_bytes(problem.graph, problem.fixed, budget.batch)
            base = memory - values * model.bytes_per_value(budget.optimizer)
            buffers = [term.saved * saved + budget.batch * term.buffer_bytes(problem.graph) for term in model.terms]
            left += [base - buffer for buffer in buffers]
        used = problem.usage(())
        left += [limit - cost for limit, cost in ((macs, used[1]), (latency_ns, used[2])) if limit is not None]
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
        return State(self._flow_of({update.layer for update in fixed}), self._kept_names(fixed))

    def flow_cost(self, state: State, candidate: int) -> Vector:
        """(R,): what the operators cost that gradients reach only when the candidate joins."""
        cost = np.zeros(len(self.capacity))
        for name in self._reach[candidate] - state.reach:
            cost = cost + self._flow[name]
        return cost

    def ways(self, state: State, candidate: int) -> tuple[Way, ...]:
        """How the candidate can join: its options, grouped by the shared tensor that they keep."""
        if (state, candidate) not in self._ways:
            self._ways[state, candidate] = tuple(self._group_ways(state, candidate))
        return self._ways[state, candidate]

    def _group_ways(self, state: State, candidate: int) -> Iterator[Way]:
        flow = self.flow_cost(state, candidate)
        groups: dict[tuple[str | None, int], list[int]] = {}
        for ratio, option in enumerate(self.problem.candidates[candidate].options):
            tensor, size_bytes = kept_input(self.problem.graph, option.update, self.problem.budget.batch)
            new = tensor in self._shared and tensor not in state.kept
            groups.setdefault((tensor, size_bytes) if new else (None, 0), []).append(ratio)
        for (tensor, size_bytes), ratios in groups.items():
            kept = state.kept | ({tensor} if tensor else frozenset())
            cost = flow + self._vector(Raw(saved_bytes=size_bytes))
            yield Way(State(state.reach | self._reach[candidate], kept), np.array(ratios, dtype=np.int8), cost)

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
    def _shared(self) -> frozenset[str]:
        """Tensors that more than one candidate, or a candidate and a fixed update, would keep whole."""
        fixed = (self._kept_names([update]) for update in self.problem.fixed)
        readers = Counter(name for names in (*self._tensors, *fixed) for name in names)
        return frozenset(name for name, count in readers.items() if count > 1)

    @cached_property
    def _tensors(self) -> tuple[frozenset[str], ...]:
        """Tensors that a candidate may keep whole."""
        return tuple(self._kept_names([o.update for o in one.options]) for one in self.problem.candidates)

    def _kept_names(self, updates: Iterable[LayerUpdate]) -> frozenset[str]:
        names = (kept_input(self.problem.graph, update, 1)[0] for update in updates)
        return frozenset(name for name in names if name is not None)

    @cached_property
    def _future(self) -> tuple[State, ...]:
        """Per candidate: everything that it or a later one may open."""
        futures = [State()]
        for tensors, reach in zip(reversed(self._tensors), reversed(self._reach), strict=True):
            futures.append(State(futures[-1].reach | reach, futures[-1].kept | (tensors & self._shared)))
        return tuple(reversed(futures))

    @cached_property
    def _flow(self) -> dict[str, Vector]:
        """What each operator costs once gradients reach its output: its bits, and its readers' input gradients."""
        return {op.name: self._vector(self._flow_cost(op)) for op in self.problem.graph.ops}

    def _flow_cost(self, op: Op) -> Raw:
        problem = self.problem
        readers = [problem.graph[name] for name in problem.graph.consumers[op.name] if name not in problem.detached]
        measured = problem.measured.input_gradient_ns if problem.measured else {}
        return Raw(
            saved_bytes=kept_bytes(op, problem.budget.batch),
            macs=sum(input_gradient_macs(reader) for reader in readers),
            latency_ns=sum(measured.get(reader.name, 0) for reader in readers),
        )

    def _own(self, update: LayerUpdate) -> Raw:
        problem = self.problem
        op = problem.graph[update.layer]
        tensor, size_bytes = kept_input(problem.graph, update, problem.budget.batch)
        return Raw(
            values=live_weights(op, update) + memory_model(problem.budget.memory_model).biases * len(update.bias),
            saved_bytes=0 if tensor in self._shared else size_bytes,
            macs=weight_gradient_macs(op, update),
            latency_ns=weight_gradient_ns(problem.measured, update) if problem.measured else 0,
        )

    def _vector(self, raw: Raw) -> Vector:
        """(R,), in the order of `capacity`."""
        return np.array(list(self._entries(raw)), dtype=np.float64)

    def _entries(self, raw: Raw) -> Iterator[int]:
        budget = self.problem.budget
        memory, macs, latency_ns = budget.limits
        if memory is not None:
            model = memory_model(budget.memory_model)
            weights = raw.values * model.bytes_per_value(budget.optimizer)
            yield from (weights + term.saved * raw.saved_bytes for term in model.terms)
        if macs is not None:
            yield raw.macs
        if latency_ns is not None:
            yield raw.latency_ns
