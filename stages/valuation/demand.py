"""Rounds on demand: a candidate buffer that takes whatever arrives and closes a round when somebody wants one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from stages.artifacts.records import Array, Block
from stages.data.blocks import join_blocks
from stages.randomness import generator
from stages.valuation.buffer import CandidateBuffer
from stages.valuation.shares import ClassShares

BACKLOG = 512
"""Samples that may wait for scoring; beyond that half of them are dropped, at random within classes."""


@dataclass(frozen=True)
class Arrived:
    """What has come in since the last look."""

    samples: Block
    missed: Array
    """int64 (m,): labels of the samples that had to be dropped unseen."""


class DemandBuffer:
    """A `CandidateBuffer` whose rounds end when downstream asks, not after a number of samples.

    `arrive` is cheap and never waits; `take` hands over what has arrived. These two belong to whoever guards the
    backlog; `score` and `close` belong to the scorer. No decision depends on what a sample looks like: a round ends by
    the clock, what overflows the backlog is chosen by chance. So the candidates' weighted loss has the window's mean
    loss as expectation; classes of which samples were missed count with all that arrived, those of their
    class that were seen standing for them.

    Memory: `BACKLOG` samples and one block that arrives, and what the buffer holds.
    """

    def __init__(self, buffer: CandidateBuffer, least: int, *, backlog: int = BACKLOG) -> None:
        self.buffer, self.least, self.backlog = buffer, least, backlog
        self._waiting: list[Block] = []
        self._count = self._position = 0
        self._lost: list[Array] = []
        self._missed = np.zeros(0, np.int64)
        self._chance = generator(buffer.seed, "backlog")

    # -- the sensor's side

    def arrive(self, block: Block) -> None:
        """Take in samples as they come; what exceeds the backlog is dropped and counted."""
        places = np.arange(self._position, self._position + len(block), dtype=np.int64)
        self._waiting.append(replace(block, x=np.asarray(block.x[:]), columns={"index": places, **block.columns}))
        self._position += len(block)
        self._count += len(block)
        if self._count > self.backlog:
            self._thin()

    def take(self) -> Arrived | None:
        """What waits, in order of arrival; None when nothing does."""
        if not self._count:
            return None
        arrived = Arrived(join_blocks(self._waiting, where="stream"), np.concatenate([np.zeros(0, int), *self._lost]))
        self._waiting, self._lost, self._count = [], [], 0
        return arrived

    def _thin(self) -> None:
        """Keep half a backlog: of each class a random sample, places shared evenly."""
        block = join_blocks(self._waiting, where="stream")
        shares = ClassShares(max(self.backlog // 2, 1))
        shares.arrive(block.y)
        rows = shares.keep(block.y, self._chance.random(len(block)))
        self._lost.append(np.delete(block.y, rows))
        self._waiting, self._count = [block.take(rows)], len(rows)

    # -- the scorer's side

    def score(self, arrived: Arrived) -> None:
        """Take samples into the current window. Raises what `CandidateBuffer.add` raises."""
        self.buffer.add(arrived.samples)
        self.buffer.miss(arrived.missed)
        self._missed = np.concatenate([self._missed, arrived.missed])

    def wants_to_close(self) -> bool:
        """Whether the window has enough samples for a round."""
        return self.buffer.arrived >= self.least

    def close(self) -> Block | None:
        """The round's candidates, None for an empty window.

        As `CandidateBuffer.close_round`, and per class `dropped` (samples of the window that are no candidates) and
        `missed` (those among them that were never looked at).
        """
        if not self.buffer.arrived:
            return None
        block = self.buffer.close_round()
        labels = np.zeros(0, np.int64) if block.labels is None else block.labels
        kept, missed = (np.bincount(np.searchsorted(labels, y), minlength=len(labels)) for y in (block.y, self._missed))
        per_class = {**block.per_class, "dropped": block.per_class["seen"] - kept, "missed": missed}
        weight = block.columns["weight"]
        if len(self._missed):  # a class may have been missed altogether
            weight = (weight / weight.sum(dtype=np.float64)).astype(np.float32)
        self._missed = self._missed[:0]
        return replace(block, per_class=per_class, columns={**block.columns, "weight": weight})
