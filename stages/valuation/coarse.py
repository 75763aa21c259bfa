"""Coarse filtering: which samples of a window stay as candidates, by strategy.

A strategy gives every arriving sample a key once; the buffer keeps the highest keys of each class, or of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from stages.artifacts.records import Array
from stages.owncode import answers, own
from stages.valuation.class_statistics import ClassStatistics

CENTRE_SHARE = 0.1
"""`priority`: distances count from this share of the class's radius, so that no sample's priority is unbounded."""


@dataclass(frozen=True)
class Arrivals:
    """A chunk of samples that have just arrived; `statistics` include them already."""

    labels: Array
    """int64 (n,)."""
    draws: Array
    """float64 (n,), uniform on (0, 1]: the chunk's randomness."""
    features: Array | None = None
    """float (n, F): unit vectors where the strategy `needs` "directions"."""
    statistics: ClassStatistics | None = None
    inputs: Array | None = None
    """The samples as they came, (n, ...), where the strategy `needs` "inputs"."""


@dataclass(frozen=True)
class Filter:
    """One entry of `FILTERS`."""

    worth: Callable[[Arrivals], Array]
    """What a sample is worth: float64 (n,)."""
    scope: str
    """Among which samples the highest keys stay: `class` (fair shares of the places), `window`, or `cover` (greedy
    cover of the inputs, which has no keys)."""
    needs: str
    """`labels`, `features`, `directions` (features scaled to length one) or `inputs`."""
    unbiased: bool
    """The weighted candidates have the window's mean loss as expectation."""
    doc: str
    chance: bool = False
    """The key is worth / draw (priority sampling; with equal worths plain random sampling); else the worth itself."""
    warning: str = ""


def _alike(arrivals: Arrivals) -> Array:
    return np.ones(len(arrivals.labels))


def _nearness(arrivals: Arrivals) -> Array:
    """1 / (distance to the class mean + a share of the class's radius); 1 where a class has no spread."""
    features, statistics = _of(arrivals)
    distance = np.sqrt(statistics.squared_distances(arrivals.labels, features))
    radius = np.sqrt(statistics.spreads(arrivals.labels))
    scale = distance + CENTRE_SHARE * radius
    return np.divide(radius, scale, out=np.ones_like(scale), where=(scale > 0) & (radius > 0))


def _representativeness(arrivals: Arrivals) -> Array:
    features, statistics = _of(arrivals)
    return statistics.representativeness(arrivals.labels, features)


def _diversity(arrivals: Arrivals) -> Array:
    features, statistics = _of(arrivals)
    return statistics.diversity(arrivals.labels, features)


def _literal(arrivals: Arrivals) -> Array:
    """Rep + Div as published: the feature variance of the sample's class, the same for all its samples."""
    return _representativeness(arrivals) + _diversity(arrivals)


def _ocs(arrivals: Arrivals) -> Array:
    """Cosine to the class's mean direction minus mean cosine to the class (arXiv:2106.01085 equations 2 and 3).

    With u the sample's direction and m the mean direction of its class that is <u, m> / |m| - <u, m>.
    """
    features, statistics = _of(arrivals)
    means = statistics.means(arrivals.labels)
    cosine = np.einsum("nf,nf->n", features, means)
    norms = np.sqrt(np.einsum("nf,nf->n", means, means))
    return np.asarray(np.divide(cosine, norms, out=np.zeros_like(cosine), where=norms > 0) - cosine)


def _of(arrivals: Arrivals) -> tuple[Array, ClassStatistics]:
    if arrivals.features is None or arrivals.statistics is None:
        raise ValueError("this strategy needs features: see Filter.needs")
    return arrivals.features, arrivals.statistics


FILTERS: Mapping[str, Filter] = MappingProxyType({
    "quota": Filter(_alike, "class", "labels", True, "a random sample of each class, places shared evenly",
                    chance=True),
    "priority": Filter(_nearness, "class", "features", False,
                       "as quota, but samples near their class's mean are likelier and weigh less "
                       "(unbiased up to normalising the weights per class)", chance=True),
    "rep": Filter(_representativeness, "class", "features", False, "of each class the nearest to its mean",
                  warning="`rep` always keeps the most typical samples: its gradients are biased and final accuracy "
                          "suffers on clean data; it helps where labels are wrong"),
    "div": Filter(_diversity, "class", "features", False, "of each class the farthest from its mean",
                  warning="`div` always keeps the least typical samples: wrong labels and outliers come first"),
    "rep-div": Filter(_literal, "window", "features", False, "the published score Rep + Div over the whole window",
                      warning="Rep + Div is constant within a class: the score ranks classes by feature variance and "
                              "drops most of them; `quota` is the filter to use"),
    "random": Filter(_alike, "window", "labels", True, "a random sample of the window", chance=True),
    "camel": Filter(_alike, "cover", "inputs", False, "greedy cover of the raw inputs, no model"),
    "ocs": Filter(_ocs, "class", "directions", False, "of each class the most like its mean and unlike its samples"),
})  # fmt: skip
"""Name -> strategy; all share one signature."""


def filter_named(name: str) -> Filter:
    """The strategy of the table, or the user's own: `package.module:function`.

    A function of `Arrivals` returns what each sample is worth, float (n,), by its label and the sample itself
    (`inputs`); of each class the worthiest stay. A `Filter` in place of a function says for itself what it needs.
    """
    if name in FILTERS:
        return FILTERS[name]
    found = own(name, "--strategy")
    if isinstance(found, Filter):
        return found

    def worth(arrivals: Arrivals) -> Array:
        return answers(found, name, len(arrivals.labels), arrivals)

    return Filter(worth, "class", "inputs", False, f"your own {name}")


def keys_of(strategy: Filter, worth: Array, draws: Array) -> Array:
    """Sort keys, the highest are kept: float64 (n,).

    Priority sampling (Duffield, Lund, Thorup, J. ACM 2007) keeps the k highest worth / draw; it is literally a
    priority queue over a stream.
    """
    return worth / draws if strategy.chance else worth
