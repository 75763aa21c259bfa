"""What a model forgets: which samples of data that is gone through several times are worth another presentation.

The example level of Tri-Level E-ViT (Kong et al., AAAI 2023, arXiv:2211.10801), whose signal is the forgetting event of
Toneva et al. (ICLR 2019): an answer that was right and is wrong the next time. A share of the data is left out; now and
then the samples with the fewest events leave and as many of those left out, drawn by chance, return.

The paper weighs what is left evenly, which shifts the loss towards hard samples. Here every sample that stays stands
for its group: a group of n_g samples of which n_g - m_g, drawn by chance, stay weighs n_g / (n_g - m_g) each, so the
weighted loss has the loss of everything as expectation, given all that came before. Samples leave out of the group of
the easiest ones by chance, not by rank, so that those of the group that stay can stand for them.

`Rehearsal` is ours: the nearest form for a stream, in which nothing comes twice by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Protocol

import numpy as np

from stages.artifacts.records import Array, Block
from stages.data.blocks import join_blocks
from stages.errors import DataError

UNKNOWN = -1
"""The last answer of a sample that has not been presented."""

STATE = np.dtype(
    [
        ("last", "i1"),  # last answer: 1 right, 0 wrong, UNKNOWN
        ("transitions", "i2"),  # from right to wrong, since the last exchange
        ("presentations", "i2"),  # since the last exchange
        ("met", "i4"),  # the pass in which the sample came last; 0 never
        ("factor", "f8"),  # how many samples it stands for; 0 where it is left out
    ]
)
"""What is remembered of a sample: 17 bytes."""

MOST = 1 << 22
"""Samples that can be told apart: bounds memory to 71 MB."""


class Settings(Protocol):
    """What a memory is told: `stages.settings.selection.Selection` has it."""

    @property
    def remove(self) -> float:
        """Share that is left out."""

    @property
    def exchange(self) -> float:
        """Share of that which returns at a time."""

    @property
    def period(self) -> int:
        """Passes between exchanges."""

    @property
    def epsilon(self) -> float:
        """No sample stands for more than 1 / epsilon."""

    @property
    def buffer(self) -> int | None:
        """Samples held, for a stream."""

    @property
    def streak(self) -> int:
        """Right answers in a row after which a held sample is dropped."""


class Memory(Protocol):
    """What a strategy remembers from block to block."""

    def offer(self, block: Block, mass: Array, rng: np.random.Generator) -> tuple[Block, Array]:
        """The samples that the model is to look at, which may be none, and their masses, float64 (m,).

        `mass`, float64 (n,): what the block's samples weigh. Raises `DataError` for a block that cannot be told apart.
        """

    def note(self, offered: Block, right: Array) -> None:
        """Take in the answers to what was offered: bool (m,)."""

    def advice(self) -> str:
        """One line for a user whose stream gave the strategy nothing to go by; else empty."""


# ---------------------------------------------------------------------------------------------------------- counting


def forgotten(last: Array, right: Array) -> Array:
    """Where an answer that was right is wrong now: bool (n,).

    >>> forgotten(np.array([1, 1, 0, -1]), np.array([False, True, False, False]))
    array([ True, False, False, False])
    """
    return np.asarray((last == 1) & ~right)


def forgetting_counts(state: Array) -> Array:
    """Forgetting events of each sample since the last exchange (section "Example level" of the paper): int64 (n,).

    A sample that was never right counts as forgotten at every presentation; one that was not presented is the hardest.
    """
    counts = state["transitions"].astype(np.int64)
    never_right = (state["last"] == 0) & (counts == 0)
    counts[never_right] = state["presentations"][never_right]
    counts[state["last"] == UNKNOWN] = np.iinfo(np.int64).max
    return counts


def easiest(counts: Array, places: int, epsilon: float) -> Array:
    """The group out of which `places` samples may leave by chance: int64 rows, ascending.

    The lowest counts, whole levels of them, so that no tie is broken; so many that a sample which stays stands for at
    most 1 / epsilon. None where there are not enough.

    >>> easiest(np.array([0, 3, 1, 0, 0, 1]), 2, 0.2)
    array([0, 3, 4])
    """
    needed = max(places + 1, ceil(places / (1.0 - epsilon)))
    if needed > len(counts):
        return np.zeros(0, np.int64)
    return np.flatnonzero(counts <= np.partition(counts, needed - 1)[needed - 1])


def exchanged(active: Array, counts: Array, share: float, epsilon: float, rng: np.random.Generator) -> Array | None:
    """How many samples each one stands for after an exchange: float64 (n,), 0 where it is left out.

    A `share` of the samples left out returns, as many of the easiest leave. Three groups, of each of which a random
    part stays: those left out, the easiest, and the rest, which stays whole. None: too few samples for it.

    Args:
        active: bool (n,): who is not left out.
        counts: int64 (n,): `forgetting_counts`.
    """
    out, staying = np.flatnonzero(~active), np.flatnonzero(active)
    places = round(share * len(out))
    easy = staying[easiest(counts[staying], places, epsilon)] if places else out[:0]
    if not len(easy):
        return None
    factor = active.astype(np.float64)
    factor[easy] = len(easy) / (len(easy) - places)
    factor[rng.choice(easy, places, replace=False)] = 0.0
    factor[rng.choice(out, places, replace=False)] = len(out) / places
    return factor


# ------------------------------------------------------------------------------------------- data gone through often


class Forgetting:
    """Leaves a share of repeated data out, and exchanges the easiest for some of those every few passes.

    Samples are told apart by their column `index`; a pass ends where one comes again. What is left out at first is
    drawn by chance as samples appear. Bookkeeping is a few vectorised operations per block.
    """

    def __init__(self, config: Settings) -> None:
        self._config = config
        self._state = np.zeros(0, STATE)
        self._known = 0
        self._offset: float | None = None
        self.passes = 1
        """The pass that is under way, from 1."""

    def offer(self, block: Block, mass: Array, rng: np.random.Generator) -> tuple[Block, Array]:
        """The samples of the block that are not left out, and their masses times what they stand for.

        Raises `DataError` where there is no `index`, or one outside 0..`MOST` - 1.
        """
        index = _index_of(block)
        self._grow(int(index.max(initial=0)) + 1)
        self._meet(np.unique(index), rng)
        factor = self._state["factor"][index]
        stays = factor > 0
        return block.take(stays), (mass * factor)[stays]

    def note(self, offered: Block, right: Array) -> None:
        """Count presentations and transitions; a sample twice in a block is presented once."""
        index, state = offered.columns["index"], self._state
        state["transitions"][index] += forgotten(state["last"][index], right)
        state["presentations"][index] += 1
        state["last"][index] = right

    def advice(self) -> str:
        if self.passes > 1 or not self._known:
            return ""
        return (
            "no sample came twice, so nothing can be known of what is forgotten: give the data several times "
            "(cat run.h5 b.h5 b.h5), or --buffer N for a stream"
        )

    def _grow(self, size: int) -> None:
        if size > len(self._state):
            more = np.zeros(min(max(size, 2 * len(self._state)), MOST) - len(self._state), STATE)
            self._state = np.concatenate([self._state, more])

    def _meet(self, index: Array, rng: np.random.Generator) -> None:
        """Notice a new pass, of which there may be both the end of one and the beginning of the next in a block."""
        met = self._state["met"][index]
        again = met == self.passes
        self._admit(index[met == 0], rng)
        self._state["met"][index] = self.passes + again
        if again.any():
            self._end_pass(rng)

    def _end_pass(self, rng: np.random.Generator) -> None:
        self.passes += 1
        if (self.passes - 1) % self._config.period:
            return
        rows = np.flatnonzero(self._state["met"] > 0)
        known, config = self._state[rows], self._config
        counts = forgetting_counts(known)
        factor = exchanged(known["factor"] > 0, counts, config.exchange, config.epsilon, rng)
        if factor is not None:
            known["factor"] = factor
            known["last"] = UNKNOWN
            known["transitions"] = known["presentations"] = 0
            self._state[rows] = known

    def _admit(self, new: Array, rng: np.random.Generator) -> None:
        """Leave out a share of samples that come for the first time; over all blocks exactly, up to one sample.

        Systematic sampling over the blocks from a random start, and by chance within each: every sample is left out
        with probability `remove`.
        """
        share = self._config.remove
        if self._offset is None:
            self._offset = float(rng.random())
        before, after = (int(share * known + self._offset) for known in (self._known, self._known + len(new)))
        self._known += len(new)
        self._state["last"][new] = UNKNOWN
        self._state["factor"][new] = 1.0 / (1.0 - share)
        self._state["factor"][rng.permutation(new)[: after - before]] = 0.0


def _index_of(block: Block) -> Array:
    if "index" not in block.columns:
        raise DataError(
            "block", "no column `index`", "what tells samples apart", "pack the samples with edgetrain pack"
        )
    index = block.columns["index"]
    bad = (index < 0) | (index >= MOST)
    if bad.any():
        fix = "number the samples of repeated data from 0, or give --buffer N for a stream"
        raise DataError("block", f"index {int(index[bad][0])}", f"0 to {MOST - 1}", fix)
    return index


# -------------------------------------------------------------------------------------------------------- streams


class Rehearsal:
    """A buffer for streams, which is ours: what was right and is wrong again stays until it has been learnt.

    Every sample that arrives is on trial as long as there is room, the newest first; one that has been forgotten takes
    precedence; what is right `streak` times in a row goes. All that is held is presented with every block, and the
    weighted loss stands for the mean loss of both together. Holds `buffer` samples.
    """

    def __init__(self, config: Settings, room: int) -> None:
        self._room, self._streak = room, config.streak
        self._held: Block | None = None
        self._last = np.zeros(0, np.int8)
        self._transitions = np.zeros(0, np.int32)
        self._in_a_row = np.zeros(0, np.int32)

    def offer(self, block: Block, mass: Array, rng: np.random.Generator) -> tuple[Block, Array]:
        """The block and behind it what is held; each held sample weighs what the block's do on average."""
        if self._held is None or not len(self._held):
            return block, mass
        share = 1.0 / (len(block) + len(self._held))
        held = np.full(len(self._held), mass.sum() * share)
        return _behind(block, self._held), np.concatenate([mass * len(block) * share, held])

    def note(self, offered: Block, right: Array) -> None:
        """Drop what is known by now, and of the others as many as there is no room for."""
        arrived = len(offered) - len(self._last)
        last = np.concatenate([np.full(arrived, UNKNOWN, np.int8), self._last])
        transitions = np.concatenate([np.zeros(arrived, np.int32), self._transitions]) + forgotten(last, right)
        in_a_row = np.where(right, np.concatenate([np.zeros(arrived, np.int32), self._in_a_row]) + 1, 0)
        wanted = np.flatnonzero(in_a_row < self._streak)
        stays = wanted[np.argsort(transitions[wanted] == 0, kind="stable")[: self._room]]
        self._held = replace(offered.take(stays), round=None, facts={}, per_class={})
        self._last, self._transitions = right[stays].astype(np.int8), transitions[stays].astype(np.int32)
        self._in_a_row = in_a_row[stays].astype(np.int32)

    def advice(self) -> str:
        return ""


def _behind(block: Block, held: Block) -> Block:
    """The block with held samples at its end; its counts per class are 0 for classes that only these have."""
    both = join_blocks([block, held], where="stream")
    per_class = block.per_class if block.labels is None else _spread(block.per_class, block.labels, both.labels)
    return replace(block, x=both.x, y=both.y, columns=both.columns, labels=both.labels, names=both.names,
                   per_class=per_class)  # fmt: skip


def _spread(per_class: Mapping[str, Array], labels: Array, wider: Array | None) -> Mapping[str, Array]:
    """Values of classes among more classes."""
    if wider is None or len(wider) == len(labels):
        return per_class
    at = np.searchsorted(wider, labels)
    spread = {name: np.zeros(len(wider), values.dtype) for name, values in per_class.items()}
    for name, values in per_class.items():
        spread[name][at] = values
    return spread


def remembering(config: Settings) -> Memory:
    """The memory of `--strategy forgetting`: of repeated data, or with `--buffer` of a stream."""
    return Forgetting(config) if config.buffer is None else Rehearsal(config, config.buffer)
