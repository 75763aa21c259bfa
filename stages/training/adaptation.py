"""Few-shot adaptation: train a net on a support set with the ProtoNet loss on its augmented copy.

The procedure is P>M>F's fine-tuning (Hu et al., arXiv:2204.07305) as TinyTrain uses it (arXiv:2307.09988, appendix C):
prototypes from the support, cross-entropy of the pseudo-query (the augmented support) against them, Adam. One iteration
is one pass over the whole support and one optimiser step; prototypes are recomputed with the current weights in each,
and the gradient flows through them unless `detach_prototypes`.

Changed: the learning rate is chosen inside the support set, by leaving samples out; P>M>F chooses it with labels of
query sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import InputSpec, LayerUpdate
from stages.engines.choice import TrainedNet, make_net
from stages.engines.parameter import Floats
from stages.errors import require
from stages.fsl.augment import PSEUDO_QUERY, Augmentation, augment
from stages.fsl.protonet import cosine_logits, prototypes, query_loss, support_loss
from stages.losses import cross_entropy
from stages.models.deploy import Backbone
from stages.randomness import generator
from stages.training.optimizers import NotFinite, Optimizing, checked_step, learning_rate, make_optimizer
from stages.training.prefix_file import PrefixFile, prefix_key
from stages.training.revising import Follower
from stages.training.updates import Net, PrefixCache, Source, boundary_of, cache_prefix, features_of, gradient_update

N = TypeVar("N", bound=Net)

LEARNING_RATES = (0.0, 3e-4, 1e-3, 3e-3, 1e-2)
"""The rates to choose from; 0 is no adaptation at all."""

FALLBACK = 1e-3
"""Where nothing can be left out, because every class has a single sample, the candidate nearest to this is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapting:
    """How a backbone adapts to a support set."""

    iterations: int = 40
    learning_rates: tuple[float, ...] = LEARNING_RATES
    """Candidates; a single one is used without choosing."""
    folds: int = 3
    """Parts of the support that are left out in turn to choose the rate."""
    optimizing: Optimizing = field(default_factory=lambda: Optimizing(optimizer="adam"))
    """Its learning rate is replaced by the chosen one."""
    views: int = 0
    """Augmented copies of the support, drawn once and used in turn; 0 draws a fresh one for every iteration."""
    cache_prefix: bool = False
    """Keep the frozen layers' outputs of the support and its views in memory; needs `views`."""
    detach_prototypes: bool = False
    """Stop the gradient at the prototypes: cheaper by half a pass, and less accurate."""
    scale: float = 10.0
    """Of the cosine logits."""
    micro_batch: int = 0
    """Samples that are in memory at once in a pass; 0 is all of them. The update is the same."""
    augmentation: Augmentation = PSEUDO_QUERY

    def __post_init__(self) -> None:
        where = "adaptation"
        require(self.iterations > 0, where, f"{self.iterations} iterations", "at least 1")
        require(len(self.learning_rates) > 0, where, "no learning rate", "at least one")
        require(
            all(isfinite(rate) and rate >= 0 for rate in self.learning_rates),
            where,
            f"learning rates {self.learning_rates}",
            "finite numbers, at least 0",
        )
        require(self.folds >= 2, where, f"{self.folds} folds", "at least 2")
        require(self.views >= 0, where, f"{self.views} views", "at least 0")
        require(self.views > 0 or not self.cache_prefix, where, "a prefix cache without fixed views", "--views V")
        require(isfinite(self.scale) and self.scale > 0, where, f"scale {self.scale}", "a positive number")
        require(self.micro_batch >= 0, where, f"micro-batch {self.micro_batch}", "at least 0")


def adaptation_inputs(how: Adapting, support: int, query: int = 0) -> int:
    """How many model inputs are in memory at once while a backbone adapts, beside those of a micro-batch.

    The support, the outputs of its frozen layers (taken for as large as the inputs), a view or all that are drawn
    beforehand, and of both the rows that train while a rate is chosen; and the query.
    """
    chosen = 2 if len(how.learning_rates) > 1 else 0
    return support * (2 + max(how.views, 1) + chosen) + query


class Adaptation(NamedTuple, Generic[N]):
    """A net adapted to a support set."""

    net: N
    prototypes: Floats
    """(C, D): class means of the support with the adapted weights."""
    learning_rate: float
    losses: tuple[float, ...]
    """One per iteration; empty where the rate is 0."""
    follower: Follower | None = None
    """Who revised the plan, where somebody did."""


class Trained(NamedTuple, Generic[N]):
    """A net trained on some rows of a support set."""

    net: N
    losses: tuple[float, ...]
    support: Source
    """The whole support, as the net takes it."""
    follower: Follower | None = None


Caches = Sequence[PrefixCache]
Store = Callable[[Sequence[Floats], Callable[[], Caches]], Caches]
"""(lots of model inputs, what computes the frozen layers' outputs of them) -> these outputs, kept or computed."""


def adapt(
    backbone: Backbone,
    updates: Sequence[LayerUpdate],
    support_x: Floats,
    support_y: NDArray[np.int64],
    how: Adapting,
    rng: np.random.Generator,
    on_step: Callable[[int], None] = lambda done: None,
    stop: Callable[[], int] = lambda: 0,
    cache_file: PrefixFile | None = None,
    follow: Callable[[], Follower] | None = None,
) -> Adaptation[TrainedNet]:
    """Adapt a plan's live slices to a support set, as `adapt_net` does; the caller's backbone is left alone.

    `cache_file` keeps what `how.cache_prefix` caches for the next call with the same inputs. `follow` makes somebody
    who revises the plan of one training: of each candidate of the learning rate, and of the final one.

    Raises:
        DataError: as `adapt_net`; or updates that do not fit the backbone.
    """
    updates = tuple(updates)

    def store(lots: Sequence[Floats], compute: Callable[[], Caches]) -> Caches:
        if cache_file is None:
            return compute()
        layout = "" if follow is None else fresh().layout
        return cache_file.through(prefix_key(backbone, updates, lots, layout), compute)

    def fresh() -> TrainedNet:
        return make_net(backbone, updates) if follow is None else follow().begin()

    return adapt_net(fresh, backbone.input, support_x, support_y, how, rng, on_step, stop, store, follow)


def adapt_net(
    fresh: Callable[[], N],
    spec: InputSpec,
    support_x: Floats,
    support_y: NDArray[np.int64],
    how: Adapting,
    rng: np.random.Generator,
    on_step: Callable[[int], None] = lambda done: None,
    stop: Callable[[], int] = lambda: 0,
    store: Store = lambda lots, compute: compute(),
    follow: Callable[[], Follower] | None = None,
) -> Adaptation[N]:
    """Adapt to a support set: model inputs (N, *input) and labels int64 (N,) in 0..C-1, every class present.

    `fresh` makes an untrained net, the same one at every call: each candidate of the learning rate trains its own.
    `on_step` gets the number of iterations done, of at most `total_iterations`; `stop` is asked before each of them,
    and what is not 0 ends training with the weights reached.

    Raises:
        DataError: a class without a sample, or a loss, gradient or weight that is not finite.
    """
    task = _Task(fresh, spec, support_x, support_y, how, int(rng.integers(2**63)), on_step, stop, store, follow)
    rate = choose_rate(task, leave_out_folds(support_y, how.folds, rng))
    everything = np.arange(len(support_y))
    result = task.train(everything, rate)
    return Adaptation(result.net, task.prototypes(result, everything), rate, result.losses, result.follower)


def total_iterations(how: Adapting) -> int:
    """Iterations that `adapt` makes at most: those of the choice of the rate, and the final ones."""
    trials = how.folds * sum(rate > 0 for rate in how.learning_rates) if len(how.learning_rates) > 1 else 0
    return how.iterations * (trials + 1)


# ------------------------------------------------------------------------------------------------ the learning rate


def leave_out_folds(
    labels: NDArray[np.int64], folds: int, rng: np.random.Generator
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Stratified (rest, left out) index pairs: each sample of a class with two or more is left out exactly once.

    Every class keeps a sample in every rest: one with a single sample always stays there. Parts that would be empty
    are dropped, so the list is empty where all classes have one sample.
    """
    part = np.full(len(labels), -1)
    dealt = 0
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            part[members] = (dealt + np.arange(len(members))) % folds
            dealt += len(members)
    return [(np.flatnonzero(part != fold), np.flatnonzero(part == fold)) for fold in range(folds) if fold in part]


def choose_rate(task: _Task[Any], folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> float:
    """The rate with the highest accuracy on the left-out samples; then the lowest loss, then the smallest rate.

    A rate at which training diverges is out.
    """
    rates = task.how.learning_rates
    if len(rates) == 1:
        return rates[0]
    if not folds:
        return min(rates, key=lambda rate: (abs(rate - FALLBACK), rate))
    results = {}
    for rate in sorted(rates):
        try:
            hits, loss = np.sum([_leave_out(task, rate, *fold) for fold in folds], axis=0)
        except NotFinite:
            hits, loss = -1.0, inf
        results[rate] = (-hits, loss, rate)
    return min(rates, key=results.__getitem__)


def _leave_out(
    task: _Task[Any], rate: float, rest: NDArray[np.int64], left_out: NDArray[np.int64]
) -> tuple[int, float]:
    return task.score(task.train(rest, rate), rest, left_out)


# ------------------------------------------------------------------------------------------------------ the training


def _rows_of(source: Source, rows: NDArray[np.int64]) -> Source:
    """Some of the samples, ascending; all of them are not copied."""
    return source if len(rows) == len(source) else source[rows]


class _Task(Generic[N]):
    """A support set with its augmented views, on any subset of which a fresh net can be trained.

    Views are drawn for the whole support, one generator each, and a subset sees its rows of them: candidates of the
    learning rate are compared on equal draws, and cached outputs of the frozen layers serve all of them.
    """

    def __init__(
        self,
        fresh: Callable[[], N],
        spec: InputSpec,
        x: Floats,
        labels: NDArray[np.int64],
        how: Adapting,
        seed: int,
        on_step: Callable[[int], None],
        stop: Callable[[], int],
        store: Store,
        follow: Callable[[], Follower] | None,
    ) -> None:
        self.fresh, self.spec, self.how, self.seed, self.follow = fresh, spec, how, seed, follow
        self.x, self.labels, self.ways = x, labels, int(labels.max()) + 1
        self.on_step, self.stop, self.done = on_step, stop, 0
        self.untrained: N | None = None
        """A net whose frozen part alone has run: the first to be trained."""
        drawn = [x, *(self._draw(number) for number in range(how.views))]
        lots: Sequence[Source] = store(drawn, lambda: self._cached(drawn)) if how.cache_prefix else drawn
        # the support itself never changes: its frozen part runs once, not in every iteration
        self.support = lots[0] if how.cache_prefix else self._cached([x])[0]
        self.views = lots[1:]

    def train(self, rows: NDArray[np.int64], rate: float) -> Trained[N]:
        """A fresh net trained on these rows of the support."""
        follower = self.follow() if self.follow is not None and rate else None
        net = self._first(follower)
        support, views = self.support, self.views
        if rate == 0 or not net.parameters():
            return Trained(net, (), support)
        how = replace(self.how.optimizing, learning_rate=rate)
        optimizer = make_optimizer(net.parameters(), how)
        if follower is not None:
            follower.hold(optimizer)
        losses: list[float] = []
        while len(losses) < self.how.iterations and not self.stop():
            iteration = len(losses)
            net.draw(self.seed + iteration)
            loss = self._gradients(net, support, views, rows, iteration)
            if follower is not None:
                follower.about_to_step()
            where = f"iteration {iteration}"
            checked_step(optimizer, loss, rate=learning_rate(iteration, how), clip_norm=how.clip_norm, where=where)
            losses.append(loss)
            self.done += 1
            self.on_step(self.done)
            if follower is not None and (revised := follower.after(optimizer, loss)) is not net:
                before, net = net, cast(N, revised)
                if boundary_of(revised) != boundary_of(cast(TrainedNet, before)):
                    support, views = self._again(net)
            if follower is not None and not follower.updates:
                break
        return Trained(net, tuple(losses), support, follower)

    def _first(self, follower: Follower | None) -> N:
        if follower is not None:
            return cast(N, follower.begin())
        net, self.untrained = self.untrained or self.fresh(), None
        return net

    def prototypes(self, trained: Trained[N], rows: NDArray[np.int64]) -> Floats:
        """Class means (C, D) of these rows of the support, without gradients."""
        features = features_of(trained.net, _rows_of(trained.support, rows), micro_batch=self.how.micro_batch)
        return prototypes(features, self.labels[rows], self.ways)

    def score(self, trained: Trained[N], rest: NDArray[np.int64], left_out: NDArray[np.int64]) -> tuple[int, float]:
        """Right answers among the samples left out, and their summed cross-entropy, with prototypes of the rest."""
        features = features_of(trained.net, trained.support[left_out], micro_batch=self.how.micro_batch)
        logits = cosine_logits(features, self.prototypes(trained, rest), self.how.scale)
        labels = self.labels[left_out]
        losses, _ = cross_entropy(logits, labels)
        return int((logits.argmax(1) == labels).sum()), float(losses.sum())

    def _gradients(
        self, net: N, whole: Source, views: Sequence[Source], rows: NDArray[np.int64], iteration: int
    ) -> float:
        """Gradients of one iteration's loss in the net's parameters; the loss."""
        view = views[iteration % len(views)] if views else self._draw(iteration)
        support, query, labels = _rows_of(whole, rows), _rows_of(view, rows), self.labels[rows]
        size = self.how.micro_batch
        if self.how.detach_prototypes:
            means = prototypes(features_of(net, support, micro_batch=size), labels, self.ways)
            return gradient_update(net, query, query_loss(means, labels, self.how.scale), micro_batch=size)
        loss = support_loss(labels, labels, self.ways, self.how.scale)
        return gradient_update(net, [support, query], loss, micro_batch=size)

    def _cached(self, lots: Sequence[Floats]) -> Caches:
        """The frozen layers' outputs of these inputs."""
        net = self.untrained = self.untrained or self.fresh()
        return [cache_prefix(net, lot, micro_batch=self.how.micro_batch) for lot in lots]

    def _again(self, net: N) -> tuple[Source, Sequence[Source]]:
        """The support and its views for a net whose frozen part is another than at first."""
        support, views = cache_prefix(net, self.x, micro_batch=self.how.micro_batch), self.views
        if self.how.cache_prefix:
            drawn = (self._draw(number) for number in range(len(views)))
            views = [cache_prefix(net, lot, micro_batch=self.how.micro_batch) for lot in drawn]
        return support, views

    def _draw(self, number: int) -> Floats:
        """One augmented copy of the whole support."""
        return augment(self.x, self.spec, generator(self.seed, "view", number), self.how.augmentation)
