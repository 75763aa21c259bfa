"""The candidate buffer of one window: constant memory, filled by arrival chunks, emptied into one block per round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from stages.artifacts.records import Array, Block
from stages.data.blocks import join_blocks
from stages.errors import DataError
from stages.randomness import generator
from stages.valuation.class_statistics import ClassStatistics
from stages.valuation.coarse import Arrivals, Filter, filter_named, keys_of
from stages.valuation.coreset import coreset
from stages.valuation.shares import ClassShares

Features = Callable[[Block], Array]
"""Samples -> shallow features, float (n, F)."""


class CandidateBuffer:
    """Holds at most `keep` samples of the current window; statistics of features outlive the window.

    `add` takes chunks of any size in order of arrival; `close_round` returns the candidates and starts a new window.
    Memory: `keep` samples and one chunk. Not safe for threads: guard it where one adds and another closes.
    """

    def __init__(self, strategy: str, keep: int, *, features: Features | None, decay: float, seed: int) -> None:
        self.name, self.keep, self.seed = strategy, keep, seed
        self.strategy: Filter = filter_named(strategy)
        self.features = features
        self.statistics = ClassStatistics(decay)
        self.position = 0
        """Samples that have arrived since the stream began."""
        self.round = 0
        self._open()

    def _open(self) -> None:
        self.arrived = 0
        """Samples of the current window."""
        self._rng = generator(self.seed, "filter", self.round)
        self._kept: Block | None = None
        self._keys = np.zeros(0)
        self._worth = np.zeros(0)
        self._mass = np.zeros(0)
        self._seen: dict[int, int] = {}
        self._shares = ClassShares(self.keep)

    def add(self, chunk: Block) -> None:
        """Take in samples in order of arrival.

        Raises:
            DataError: a sample without label, or whose features are not finite; it is named by its position.
        """
        if not len(chunk):
            return
        chunk = self._numbered(chunk)
        self._count(chunk.y)
        draws = 1.0 - self._rng.random(len(chunk))
        worth = self.strategy.worth(self._arrivals(chunk, draws))
        self._keys = np.concatenate([self._keys, keys_of(self.strategy, worth, draws)])
        self._worth = np.concatenate([self._worth, worth])
        self._mass = np.concatenate([self._mass, np.ones(len(chunk))])
        self._drop(chunk)
        self._advance(len(chunk))

    def miss(self, labels: Array) -> None:
        """Count samples of the window that were dropped unseen: the candidates of their classes stand for them too."""
        if len(labels):
            self._count(labels)
            self._advance(len(labels))

    def _count(self, labels: Array) -> None:
        present, numbers = np.unique(labels, return_counts=True)
        for label, number in zip(present.tolist(), numbers.tolist(), strict=True):
            self._seen[label] = self._seen.get(label, 0) + number
        self._shares.arrive(labels)

    def _advance(self, samples: int) -> None:
        self.position += samples
        self.arrived += samples

    def close_round(self) -> Block:
        """The candidates, with their weights in the window's mean loss, and the counts of the window's classes.

        Columns `index` (position in the stream, or what the samples brought) and `weight` (in place of any they had),
        per class `seen`, fact `filter`. The weights sum to one.
        """
        if self._kept is None:
            raise ValueError("close_round: nothing has arrived since the last round")
        block = self._kept
        labels = np.unique(np.concatenate([np.array(list(self._seen), np.int64), _listed(block)]))
        seen = np.array([self._seen.get(label, 0) for label in labels.tolist()], np.int64)
        columns = {**block.columns, "weight": self._weights(block.y).astype(np.float32)}
        facts = {**block.facts, "filter": self.name}
        block = replace(block, columns=columns, labels=labels, per_class={"seen": seen}, round=self.round, facts=facts)
        self.round += 1
        self._open()
        return block

    # -- arriving

    def _numbered(self, chunk: Block) -> Block:
        """The chunk with `index`; labels checked."""
        if int(chunk.y.min()) < 0:
            bad = self.position + int(np.argmax(chunk.y < 0))
            raise DataError(
                f"sample {bad}",
                f"label {int(chunk.y.min())}",
                "a class label >= 0",
                "filter needs labels: pack the samples with theirs",
            )
        places = np.arange(self.position, self.position + len(chunk), dtype=np.int64)
        return replace(chunk, columns={"index": places, **chunk.columns})

    def _arrivals(self, chunk: Block, draws: Array) -> Arrivals:
        if self.strategy.needs == "labels":
            return Arrivals(chunk.y, draws)
        if self.strategy.needs == "inputs":
            return Arrivals(chunk.y, draws, inputs=np.asarray(chunk.x))
        if self.features is None:
            raise ValueError(f"filter strategy {self.name!r} needs features")
        features = self._finite(self.features(chunk))
        if self.strategy.needs == "directions":
            lengths = np.sqrt(np.einsum("nf,nf->n", features, features))[:, None]
            features = np.divide(features, lengths, out=np.zeros_like(features), where=lengths > 0)
        self.statistics.update(chunk.y, features)
        return Arrivals(chunk.y, draws, features, self.statistics)

    def _finite(self, values: Array) -> Array:
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            at = self.position + int(np.argmax(bad))
            raise DataError(
                f"sample {at}",
                "features not finite",
                "finite numbers",
                "is the sample finite, and the model sound?",
            )
        return values

    # -- keeping

    def _drop(self, chunk: Block) -> None:
        """Reduce what is kept and the chunk to `keep` samples; `_keys`, `_worth` and `_mass` cover both."""
        held = 0 if self._kept is None else len(self._kept)
        labels = chunk.y if self._kept is None else np.concatenate([self._kept.y, chunk.y])
        if self.strategy.scope == "cover":
            rows, self._mass = self._cover(chunk)
        elif self.strategy.scope == "class":
            rows = self._shares.keep(labels, self._keys)
            self._mass = self._mass[rows]
        else:
            rows = np.sort(np.argsort(-self._keys, kind="stable")[: self.keep])
            self._mass = self._mass[rows]
        self._keys, self._worth = self._keys[rows], self._worth[rows]
        fresh = chunk.take(rows[rows >= held] - held)
        self._kept = (
            fresh if self._kept is None else join_blocks([self._kept.take(rows[rows < held]), fresh], where="stream")
        )

    def _cover(self, chunk: Block) -> tuple[Array, Array]:
        """Rows of what is kept and the chunk that cover both, and the samples that each stands for."""
        points = self._finite(_flat(chunk))
        if self._kept is not None:
            points = np.concatenate([_flat(self._kept), points])
        return coreset(points, self._mass, self.keep)

    # -- weighing

    def _weights(self, labels: Array) -> Array:
        """What each candidate weighs in the window's mean loss, summing to one: float64 (m,).

        By class: the class's share of the window, divided among its candidates, evenly or for `priority` by
        max(1, dropped key / worth). By window: evenly. By cover: the samples that each stands for.
        """
        if self.strategy.scope != "class":
            return np.asarray(self._mass / self._mass.sum())
        stratum = self._shares.of(labels)
        stands_for = np.ones(len(labels))
        if self.strategy.chance:
            stands_for = np.maximum(self._shares.dropped[stratum] / self._worth, 1.0)
        total = np.bincount(stratum, weights=stands_for, minlength=len(self._shares.counts))
        return np.asarray(stands_for / total[stratum] * self._shares.counts[stratum] / self.arrived)


def _flat(block: Block) -> Array:
    return np.asarray(block.x, np.float32).reshape(len(block), -1)


def _listed(block: Block) -> Array:
    return np.zeros(0, np.int64) if block.labels is None else block.labels
