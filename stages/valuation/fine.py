"""Fine-grained selection: a batch from the candidates of one round, by strategy.

Every strategy reads the same `GradientView` and returns a `Chosen` batch whose weighted loss stands for the loss of
the whole pool, sum q_i l_i. The strategies that say `unbiased` hit it exactly in expectation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np

from stages.artifacts.records import Array
from stages.errors import UsageError, require
from stages.owncode import own
from stages.valuation import baselines
from stages.valuation.coreset import coreset
from stages.valuation.designs import Design, Strata, divide, draw, equal_design, importance_design, random_variance
from stages.valuation.forgetting import Memory, Settings, remembering
from stages.valuation.gradients import Gradients
from stages.valuation.strata import merge_chain


@dataclass(frozen=True)
class GradientView:
    """What strategies may look at. Fields that a strategy does not need (`Strategy.needs`) are None.

    Candidates have positive mass; the caller leaves others out.
    """

    labels: Array
    """int64 (n,): class labels."""
    mass: Array
    """float64 (n,), positive: q_i, what each candidate weighs in the pool's loss."""
    gradients: Gradients | None = None
    probabilities: Array | None = None
    """float64 (n, C)."""
    targets: Array | None = None
    """int64 (n,): the column of `probabilities` that is each candidate's own class."""
    inputs: Array | None = None
    """float32 (n, d): raw samples, flat."""

    @cached_property
    def whole(self) -> Strata:
        """The pool as a single stratum."""
        return divide(np.zeros(len(self.labels), np.int64), self.mass, gradients_of(self))


@dataclass(frozen=True)
class Chosen:
    """A batch: distinct rows of the pool, ascending, with the weights of their losses."""

    rows: Array
    """int64 (m,)."""
    times: Array
    """int64 (m,): how often each was drawn."""
    weights: Array
    """float64 (m,)."""
    design: str
    """`importance`, `equal` or `fixed` (no chance involved)."""
    strata: int = 1
    variance: float | None = None
    """Closed-form E |estimate - its mean|^2; None where no gradients were seen."""


Choose = Callable[[GradientView, int, float, np.random.Generator], Chosen]


@dataclass(frozen=True)
class Strategy:
    """One entry of `SELECTIONS`: choose(view, places, epsilon, rng) and what it promises."""

    choose: Choose
    needs: str
    """`labels`, `inputs` (raw samples), `answers` (a forward pass and the head) or `gradients` (of the same)."""
    unbiased: bool
    doc: str
    memory: Callable[[Settings], Memory] | None = None
    """What it remembers from block to block: it is offered each block first and chooses from what that leaves."""


# ------------------------------------------------------------------------------------------------- sampling strategies


def class_strata(labels: Array) -> Array:
    """Strata 0..K-1, one per class that is present: int64 (n,)."""
    return np.asarray(np.unique(labels, return_inverse=True)[1]).reshape(-1)


def class_chain(view: GradientView, places: int) -> Iterator[tuple[float, Strata]]:
    """Strata from one per class down to a single one, as far as `places` suffice for one draw in each.

    With each comes the variance below which no importance sampling within it, or after it in the chain, can get.
    """
    of, gradients = class_strata(view.labels), gradients_of(view)
    products = gradients.group_products(of, int(of.max()) + 1, view.mass)
    pulls = np.bincount(of, weights=view.mass * np.sqrt(gradients.squared_norms))
    for level in merge_chain(pulls, products):
        if len(level.pulls) <= places:
            yield level.least_variance(places), divide(level.of[of], view.mass, gradients, level.products)


def classified(view: GradientView, places: int, epsilon: float) -> Design:
    """Titan's C-IS, merged strata or flat importance sampling, whichever has the least closed-form variance."""
    return _least(class_chain(view, places), places, epsilon, ())


def least_variance(view: GradientView, places: int, epsilon: float) -> Design:
    """As `classified`, or drawing without replacement from the classes or from the whole pool where that varies less.

    The second kind wins where norms hardly differ within classes (early in training) and where the batch takes a good
    part of the pool, and where both are equal, for it draws no duplicates. Never worse than importance sampling, and
    never worse than random choice without replacement.
    """
    chain = class_chain(view, places)
    first = next(chain)
    equal = (equal_design(first[1], places), equal_design(view.whole, places))
    return _least(itertools.chain([first], chain), places, epsilon, equal)


def _least(chain: Iterator[tuple[float, Strata]], places: int, epsilon: float, others: tuple[Design, ...]) -> Design:
    """The least variance among `others` and importance sampling within the strata of the chain."""
    best = min(others, key=lambda design: design.variance, default=None)
    for reachable, strata in chain:
        if best is not None and best.variance <= reachable:
            break
        design = importance_design(strata, places, epsilon)
        if best is None or design.variance < best.variance:
            best = design
    if best is None:
        raise ValueError("no design to choose from")
    return best


def flat_importance(view: GradientView, places: int, epsilon: float) -> Design:
    """Importance sampling by gradient norm over the whole pool (Lemma 1)."""
    return importance_design(view.whole, places, epsilon)


def by_label(view: GradientView, places: int, epsilon: float) -> Design:
    """Quotas and counts by label only, without replacement; the smallest classes are merged if places are too few.

    With no gradients seen the variance is unknown (NaN).
    """
    of = class_strata(view.labels)
    masses = np.bincount(of, weights=view.mass)
    chain = merge_chain(masses, np.diag(masses**2))  # as if classes pulled at right angles: merges the lightest first
    level = next(level for level in chain if len(level.pulls) <= places)
    return _blind(view, level.of[of], places)


def at_random(view: GradientView, places: int, epsilon: float) -> Design:
    """Every candidate alike, without replacement."""
    return _blind(view, np.zeros(len(view.labels), np.int64), places)


def _blind(view: GradientView, of: Array, places: int) -> Design:
    if view.gradients is not None:
        return equal_design(divide(of, view.mass, view.gradients), places, blind=True)
    unseen = np.zeros(int(of.max()) + 1)
    strata = Strata(of, view.mass, np.zeros(len(of)), unseen)
    return replace(equal_design(strata, places, blind=True), variance=np.nan)


def _sampling(design: Callable[[GradientView, int, float], Design]) -> Choose:
    def choose(view: GradientView, places: int, epsilon: float, rng: np.random.Generator) -> Chosen:
        made = design(view, places, epsilon)
        rows, times, weights = draw(made, rng)
        kind = "equal" if made.probability is None else "importance"
        variance = None if np.isnan(made.variance) else made.variance
        return Chosen(rows, times, weights, kind, made.strata.number, variance)

    return choose


# -------------------------------------------------------------------------------------------- deterministic strategies


def _fixed(rows: Array, weights: Array, view: GradientView) -> Chosen:
    known = None if view.gradients is None else 0.0
    return Chosen(rows, np.ones(len(rows), np.int64), weights, "fixed", variance=known)


def _ranking(score: Callable[[GradientView], Array]) -> Choose:
    """The highest scores, averaged: every one of m chosen weighs 1/m of the pool's mass."""

    def choose(view: GradientView, places: int, epsilon: float, rng: np.random.Generator) -> Chosen:
        rows = baselines.highest(score(view), places)
        return _fixed(rows, np.full(len(rows), view.mass.sum() / len(rows)), view)

    return choose


def _everything(view: GradientView, places: int, epsilon: float, rng: np.random.Generator) -> Chosen:
    return _fixed(np.arange(len(view.labels)), view.mass.copy(), view)


def _presented(view: GradientView, places: int, epsilon: float, rng: np.random.Generator) -> Chosen:
    """All that the memory offered: what was left out was so before the forward pass."""
    rows = np.arange(len(answers_of(view)))
    return Chosen(rows, np.ones(len(rows), np.int64), view.mass.copy(), "equal")


def _camel(view: GradientView, places: int, epsilon: float, rng: np.random.Generator) -> Chosen:
    rows, masses = coreset(_required(view.inputs, "inputs"), view.mass, places)
    return _fixed(rows, masses, view)


def _losses(view: GradientView) -> Array:
    return baselines.losses(_required(view.probabilities, "probabilities"), _required(view.targets, "targets"))


def _entropies(view: GradientView) -> Array:
    return baselines.entropies(_required(view.probabilities, "probabilities"))


def _ocs(view: GradientView) -> Array:
    return baselines.ocs_scores(gradients_of(view).inner_products())


def answers_of(view: GradientView) -> Array:
    """Whether each candidate's own class is the likeliest: bool (n,)."""
    likeliest = _required(view.probabilities, "probabilities").argmax(axis=1)
    return np.asarray(likeliest == _required(view.targets, "targets"))


def _required(value: Array | None, name: str) -> Array:
    if value is None:
        raise ValueError(f"this strategy needs {name}: see Strategy.needs")
    return value


def gradients_of(view: GradientView) -> Gradients:
    """The view's gradients; a strategy that asks for what it has not been given is a mistake of the caller."""
    if view.gradients is None:
        raise ValueError("this strategy needs gradients: see Strategy.needs")
    return view.gradients


SELECTIONS: Mapping[str, Strategy] = MappingProxyType({
    "titan": Strategy(_sampling(least_variance), "gradients", True,
                      "the least closed-form variance: C-IS, merged strata, flat IS, or the same without replacement"),
    "c-is": Strategy(_sampling(classified), "gradients", True,
                     "the paper's classified importance sampling; merged strata or flat IS where they vary less"),
    "stratified": Strategy(_sampling(by_label), "labels", True, "quotas and counts by label, no forward pass"),
    "is": Strategy(_sampling(flat_importance), "gradients", True, "importance sampling by gradient norm alone"),
    "random": Strategy(_sampling(at_random), "labels", True, "every candidate alike, without replacement"),
    "all": Strategy(_everything, "labels", True, "every candidate; --batch is ignored"),
    "forgetting": Strategy(_presented, "answers", True,
                           "repeated data without a share of what is never forgotten; --batch is ignored", remembering),
    "high-loss": Strategy(_ranking(_losses), "gradients", False, "the highest losses"),
    "low-loss": Strategy(_ranking(lambda view: -_losses(view)), "gradients", False, "the lowest losses"),
    "entropy": Strategy(_ranking(_entropies), "gradients", False, "the least certain predictions"),
    "ocs": Strategy(_ranking(_ocs), "gradients", False,
                    "online coreset selection: gradients like the mean's and unlike each other"),
    "camel": Strategy(_camel, "inputs", False, "greedy cover of the raw inputs, no model"),
})  # fmt: skip
"""Name -> strategy; all share one signature."""


def selection_named(name: str) -> Strategy:
    """The strategy of the table, or the user's own: `package.module:function`.

    A function chooses from a `GradientView` with gradients: `(view, places, epsilon, rng) -> Chosen`. A `Strategy` in
    place of a function says for itself what it needs.
    """
    if name in SELECTIONS:
        return SELECTIONS[name]
    found = own(name, "--strategy")
    return found if isinstance(found, Strategy) else Strategy(_checked(found, name), "gradients", False, name)


def _checked(choose: Choose, name: str) -> Choose:
    """The user's function; raises `UsageError` when it fails or returns no batch of the pool."""
    require(callable(choose), name, f"a {type(choose).__name__}", "a function that chooses")

    def checked(view: GradientView, places: int, epsilon: float, rng: np.random.Generator) -> Chosen:
        try:
            found = choose(view, places, epsilon, rng)
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(name, f"failed: {line}", "a function that chooses") from error
        require(isinstance(found, Chosen), name, f"returned a {type(found).__name__}", "a Chosen batch")
        rows = np.asarray(found.rows)
        inside = len(rows) > 0 and bool((np.diff(rows) > 0).all()) and rows[0] >= 0 and rows[-1] < len(view.labels)
        require(bool(inside), name, "rows that are no batch", "distinct rows of the pool, ascending")
        require(bool(np.isfinite(found.weights).all()), name, "weights that are not finite", "finite weights")
        return found

    return checked


# ------------------------------------------------------------------------------------------------------------ reporting


def reference_variances(view: GradientView, places: int, epsilon: float) -> dict[str, float]:
    """Closed-form variances of the pool for the two references: `variance_is` and `variance_random`.

    The second is Titan's (arXiv:2505.16563): drawing with replacement, by mass alone.
    """
    strata = view.whole
    return {
        "variance_is": importance_design(strata, places, epsilon).variance,
        "variance_random": random_variance(strata, places),
    }


def squared_bias(view: GradientView, chosen: Chosen) -> float:
    """|sum w_i g_i - sum q_i g_i|^2 of a batch without chance: how far it always is from the pool's gradient."""
    excess = -view.mass
    excess[chosen.rows] += chosen.weights
    return float(gradients_of(view).group_products(np.zeros(len(excess), np.int64), 1, excess)[0, 0])
