"""Selectors: which layers train, at which ratio. One signature, one table; `exhaustive` is the slow, certain one.

* `greedy`: TinyTrain's. Layers in descending order of score; one that does not fit is skipped. All layers share one
  channel ratio; with several allowed, every ratio is tried and the plan of highest total score kept.
* `strict-prefix`: the same, but the first layer that does not fit ends it (what the paper's formula says literally).
* `knapsack`: the plan of highest total score over layers x ratios under all budgets, found exactly unless that would
  take too long (`Choice.optimal`).
* `exhaustive`: the same optimum by trying everything; for small models and for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from math import prod

from stages.errors import UsageError
from stages.planning.greedy import greedy, strict_prefix
from stages.planning.knapsack import knapsack
from stages.planning.problem import Choice, Problem, choice, nothing_fits

MOST_COMBINATIONS = 2_000_000
"""`exhaustive` refuses larger problems."""

Selector = Callable[[Problem], Choice]


def exhaustive(problem: Problem) -> Choice:
    """The best of all combinations of layers and ratios; of equals the first found.

    Raises:
        UsageError: more than `MOST_COMBINATIONS` combinations.
    """
    options = [(None, *candidate.options) for candidate in problem.candidates]
    combinations = prod(len(ways) for ways in options)
    if combinations > MOST_COMBINATIONS:
        raise UsageError(
            "selector exhaustive",
            f"{combinations:.3g} combinations",
            f"at most {MOST_COMBINATIONS:,}",
            "use `knapsack`, which finds the same optimum, or fewer --blocks",
        )
    best = Choice()
    for picked in product(*options):
        found = choice([option for option in picked if option is not None])
        if found.score > best.score and problem.fits(found.updates):
            best = found
    return replace(best, optimal=True)


SELECTORS: Mapping[str, Selector] = {
    "greedy": greedy,
    "strict-prefix": strict_prefix,
    "knapsack": knapsack,
    "exhaustive": exhaustive,
}


def select_layers(problem: Problem, selector: str) -> Choice:
    """The named selector's choice: at least one layer, within every budget.

    Raises:
        UsageError: no such selector, or a problem too large for it.
        BudgetError: nothing fits; the message says the smallest budget that would.
    """
    if selector not in SELECTORS:
        raise UsageError("selector", repr(selector), "one of " + ", ".join(SELECTORS))
    found = SELECTORS[selector](problem)
    if not found.updates:
        raise nothing_fits(problem)
    return found
