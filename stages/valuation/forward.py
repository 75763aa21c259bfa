"""The forward pass over candidates: frozen layers prepared once, their outputs kept for the trainer if it wants them,
and, where time is short, only as many candidates as there is time for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from stages.artifacts.records import Array, Block, LayerUpdate
from stages.engines.choice import TrainedNet, make_net
from stages.engines.parameter import Boundary, Floats
from stages.errors import DataError, require
from stages.graphs.updates import whole_update
from stages.models.deploy import Backbone
from stages.models.inputs import adapt_block
from stages.training.updates import PrefixCache, boundary_of
from stages.valuation.scoring import CHUNK, Weights

ANYTIME_CHUNK = 8
"""Candidates between two looks at the clock."""
CHUNK_VALUES = 500_000
"""Input values of the candidates that pass at once, for the memory of large inputs: 10 pictures of 3 x 128 x 128."""


@dataclass(frozen=True)
class Looked:
    """Candidates that have been passed forward, in the pool's order, standing for the whole pool."""

    pool: Block
    mass: Array
    """float64 (n,): masses; those of candidates that were left out are their classes'."""
    features: Floats
    """float32 (n, D)."""


class Forward:
    """Features of candidates under the weights of the moment.

    `updates` says what trains, so that the layers below are prepared once; layers that turn out to change as well are
    added when they do. With `send` the pool gets the frozen layers' outputs as columns `boundary0`, ...

    Raises `UsageError` when `send` is asked for and nothing is frozen below the first layer that trains.
    """

    def __init__(self, start: Backbone, updates: Sequence[LayerUpdate] | None, *, send: bool = False) -> None:
        self._start, self._send = start, send
        self._chunk = max(1, min(CHUNK, CHUNK_VALUES // prod(start.input.shape)))
        self._updates = tuple(updates or ())
        self._layers = {update.layer for update in self._updates}
        self._net: TrainedNet = make_net(start, self._updates)
        inputs = (start.graph.ops[0].name,)
        require(
            not send or (updates is not None and self._net.boundary != inputs),
            "--send",
            "features without a frozen part",
            "a plan whose first live layer is not the model's first",
            "leave --send out, or make such a plan with `edgetrain score-layers`",
        )

    def look(
        self,
        pool: Block,
        mass: Array,
        weights: Weights,
        *,
        ready: Callable[[], bool] | None = None,
        rng: np.random.Generator,
    ) -> Looked:
        """Pass the pool forward, chunk by chunk; where `ready` is given, until it says that the batch is wanted.

        At least one candidate of every class is looked at, in an order drawn by chance within classes. With m of a
        class's n candidates looked at, each weighs n / m times its mass: the estimate stays unbiased for any m that
        does not depend on what the candidates look like, as the time they take does not.
        """
        self._follow(weights)
        self._load(weights.backbone)
        size = len(pool)
        order, step = (np.arange(size), self._chunk) if ready is None else (scoring_order(pool.y, rng), ANYTIME_CHUNK)
        pieces: list[tuple[Block, Floats]] = []
        done, least = 0, len(np.unique(pool.y))
        while done < size:
            end = min(max(done + step, least), done + self._chunk, size)
            pieces.append(self._pass(pool.take(order[done:end])))
            done = end
            if ready is not None and done >= least and ready():
                break
        back = np.argsort(order[:done])
        features = np.concatenate([features for _, features in pieces])[back]
        boundary = {name: np.concatenate([piece.columns[name] for piece, _ in pieces])[back]
                    for name in self._columns()}  # fmt: skip
        rows = order[:done][back]
        kept = self._labelled(pool.take(rows), boundary)
        return Looked(kept, standing_for(pool.y, mass, rows), features)

    def attach(self, block: Block) -> Block:
        """The block with the frozen layers' outputs as columns, if they are to be sent."""
        if not self._send or not len(block):
            return block
        pieces = [PrefixCache(self._frozen(piece)).arrays() for piece in block.slices(self._chunk)]
        return self._labelled(block, {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]})

    def _frozen(self, piece: Block) -> Boundary:
        return self._net.prefix(adapt_block(piece, self._start.input))

    def _pass(self, piece: Block) -> tuple[Block, Floats]:
        boundary = self._frozen(piece)
        features = self._net.suffix(boundary)
        arrays = PrefixCache(boundary).arrays() if self._send else {}
        return replace(piece, columns={**piece.columns, **arrays}), features

    def _columns(self) -> list[str]:
        return [f"boundary{i}" for i in range(len(self._net.boundary))] if self._send else []

    def _labelled(self, block: Block, columns: Mapping[str, Array]) -> Block:
        if not self._send:
            return block
        facts = {**block.facts, "boundary": boundary_of(self._net)}
        return replace(block, columns={**block.columns, **columns}, facts=facts)

    def _follow(self, weights: Weights) -> None:
        """Another plan, where the trainer's policy has made one: what has left it is frozen as it is now."""
        if weights.updates is None or weights.updates == self._updates:
            return
        self._updates, self._start = weights.updates, weights.backbone
        self._layers = {update.layer for update in weights.updates}
        self._net = make_net(self._start, weights.updates)

    def _load(self, backbone: Backbone) -> None:
        """Take over the weights of the moment; what changed beside what may is found by comparing values."""
        self._net.load_whole(backbone.tensors)
        held = {**self._start.tensors, **self._net.changed_tensors()}
        same = {
            name for name, value in backbone.tensors.items() if value is held[name] or np.array_equal(value, held[name])
        }
        if beside := backbone.tensors.keys() - same:
            self._train({name.rpartition(".")[0] for name in beside})
            self._net.load_whole(backbone.tensors)

    def _train(self, layers: Set[str]) -> None:
        """Let all of these layers change, and of those that did before."""
        graph, before = self._start.graph, boundary_of(self._net)
        self._layers |= layers
        in_order = sorted(self._layers, key=graph.position.__getitem__)
        self._net = make_net(self._start, [whole_update(graph[name]) for name in in_order])
        if self._send and boundary_of(self._net) != before:
            raise DataError(
                "live directory",
                "weights that changed beside the plan's live channels",
                "those of the plan that `select` was given",
                "leave --send out, or train the same plan",
            )


def scoring_order(labels: Array, rng: np.random.Generator) -> Array:
    """A random order within classes, the classes interleaved in proportion to their sizes: int64 (n,).

    Every beginning that has one of each class is a random sample of each class whose size depends on the number alone.
    """
    stratum = np.unique(labels, return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(stratum)
    by_class = np.lexsort((rng.random(len(labels)), stratum))
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.asarray(by_class[np.lexsort((np.arange(len(rank)), rank / sizes[stratum[by_class]]))])


def standing_for(labels: Array, mass: Array, rows: Array) -> Array:
    """Masses of some rows of a pool that stand for all of it: q_i n_c / m_c, float64 (m,) (Horvitz and Thompson)."""
    stratum = np.unique(labels, return_inverse=True)[1].reshape(-1)
    sizes, taken = np.bincount(stratum), np.bincount(stratum[rows])
    return np.asarray(mass[rows] * (sizes / np.maximum(taken, 1))[stratum[rows]])
