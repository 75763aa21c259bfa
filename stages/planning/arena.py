"""The search under a memory budget that is read by `arena`: what the native engine allocates is no sum over layers.

Buffers share their places in time, so only the lowered program says what a plan takes; that costs some hundredths of a
second a plan. The knapsack therefore runs on sums, and lowering judges what it finds:

1. With live values alone counted. Every arena lies beside them, so no plan within the budget is left out: where the
   best of these fits, it is the optimum.
2. Otherwise with what `saved` counts held in each worker's arena, less a *margin* for all that this leaves out: the
   working space of the passes, padding, the boundary. The margin is what the last plan really took beyond the count; a
   plan that does not fit raises it, one that fits lowers it, and between the two it is halved.

What is returned fits to the byte, and is worth at least greedy's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from stages.artifacts.records import LayerUpdate
from stages.cost.training import MemoryModel, Term, live_values, saved_activation_bytes
from stages.operators.op import ELEMENT_BYTES
from stages.planning.coupling import Coupling
from stages.planning.greedy import greedy
from stages.planning.problem import Choice, Problem

ROUNDS = 8
"""Margins that are tried."""


def best_by_arena(problem: Problem, solve: Callable[[Coupling], Choice]) -> Choice:
    """The best plan found; `solve` finds the optimum where costs add up. Empty where no plan fits."""
    limit = problem.budget.memory_bytes or 0
    relaxed = solve(Coupling(problem, _counted(problem, held=0), limit + _head_spare(problem)))
    fits = problem.fits(relaxed.updates)
    if relaxed.optimal and (fits or not relaxed.updates):
        return relaxed
    best = greedy(problem)
    if not best.updates or fits:
        return max(best, relaxed if fits else best, key=lambda one: one.score)
    return _by_margins(problem, solve, best, limit)


def _by_margins(problem: Problem, solve: Callable[[Coupling], Choice], best: Choice, limit: int) -> Choice:
    """The best of `best` and what is found with some margins between one that is too small and one that suffices."""
    held = problem.budget.workers + (problem.budget.batch if problem.budget.batch > 1 else 0)
    single = replace(problem, budget=replace(problem.budget, batch=1))  # what each sample keeps counts `held` times
    model = _counted(problem, held)
    small, enough = 0, limit
    margin = _beyond(problem, model, best.updates)
    for _ in range(ROUNDS):
        found = solve(Coupling(single, model, limit - margin))
        beyond = _beyond(problem, model, found.updates)
        if found.updates and not problem.fits(found.updates):
            small = margin
        else:
            enough = margin
            best = max(best, replace(found, optimal=False), key=lambda one: one.score)
        margin = beyond if small < beyond < enough else (small + enough) // 2
        if not small < margin < enough:
            break
    return best


def _counted(problem: Problem, held: int) -> MemoryModel:
    """Live values, gradients (each worker has one of its own, too) and state, and what a sample keeps `held` times."""
    return MemoryModel(1 + problem.budget.workers, biases=True, terms=(Term(saved=held),))


def _beyond(problem: Problem, model: MemoryModel, updates: Sequence[LayerUpdate]) -> int:
    """What a plan takes beyond what the model counts."""
    graph, whole = problem.graph, problem.complete((*updates, *problem.fixed))
    values, saved = live_values(graph, whole), saved_activation_bytes(graph, whole, keep_bits=problem.budget.keep_bits)
    counted = model.total_bytes(graph, values, saved, batch=1, optimizer=problem.budget.optimizer)
    return problem.memory(updates) - counted


def _head_spare(problem: Problem) -> int:
    """Gradients that the workers would hold of a head, which is not theirs."""
    return ELEMENT_BYTES * problem.budget.workers * live_values(problem.graph, problem.fixed)
