"""TinyTrain's own selection: by descending score while the budget lasts."""

from __future__ import annotations

from stages.planning.problem import Choice, Option, Problem, choice


def greedy(problem: Problem) -> Choice:
    """TinyTrain's selection (section 2.2), skipping what does not fit; the best of the allowed ratios."""
    return _best_ratio(problem, stop=False)


def strict_prefix(problem: Problem) -> Choice:
    """As `greedy`, but ended by the first layer that does not fit."""
    return _best_ratio(problem, stop=True)


def _best_ratio(problem: Problem, *, stop: bool) -> Choice:
    ratios = range(len(problem.candidates[0].options)) if problem.candidates else ()
    found = [_descend(problem, ratio, stop=stop) for ratio in ratios]
    return max(found, key=lambda one: one.score, default=Choice())


def _descend(problem: Problem, ratio: int, *, stop: bool) -> Choice:
    """Take layers by descending score at one ratio while they fit."""
    order = sorted(range(len(problem.candidates)), key=lambda i: -problem.candidates[i].score)
    chosen: dict[int, Option] = {}
    for i in order:
        trial = {**chosen, i: problem.candidates[i].options[ratio]}
        if problem.fits(choice(tuple(trial.values())).updates):
            chosen = trial
        elif stop:
            break
    return choice([chosen[i] for i in sorted(chosen)])
