"""The optimum over candidates of several layers each, blocks, by branch and bound.

There are few of them, and what layers of one block share with another's is found by asking for the cost of a plan as a
whole. Candidates are taken in the order of their worth; a branch ends where its plan breaks a budget, since costs only
grow with a plan, and where not even all that is left would make it the best.
"""

from __future__ import annotations

from math import fsum

from stages.planning.problem import Choice, Option, Problem, choice

MOST_PLANS = 20_000
"""Plans whose cost is asked for; some milliseconds each."""


def best_by_branching(problem: Problem, most: int = MOST_PLANS) -> Choice:
    """The plan of highest total score under all budgets; `optimal` unless `most` plans were too few to prove it."""
    order = sorted(problem.candidates, key=lambda one: -one.score)
    best, asked, whole = Choice(), 0, True
    waiting: list[tuple[int, tuple[Option, ...]]] = [(0, ())]
    while waiting:
        depth, taken = waiting.pop()
        score = fsum(option.score for option in taken)
        if score > best.score:
            best = choice(taken)
        if depth == len(order) or score + fsum(one.score for one in order[depth:]) <= best.score:
            continue
        waiting.append((depth + 1, taken))
        for option in order[depth].options[::-1]:
            if asked == most:
                whole = False
                break
            asked += 1
            if problem.fits(choice((*taken, option)).updates):
                waiting.append((depth + 1, (*taken, option)))
    place = problem.graph.position
    return Choice(tuple(sorted(best.updates, key=lambda update: place[update.layer])), best.score, whole)
