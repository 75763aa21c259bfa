"""The width of what is kept as a schedule: FracTrain's progressive quantisation (PFQ, arXiv:2012.13113).

Training begins with the coarsest width and moves up one when the loss stalls, by the published indicator
(`train_pfq.py`): of the last five losses since the last move, L_(e-4) .. L_e, all |L_(e-i) - L_e| / S, i = 1 .. 4, are
at most eps; S is the mean of the first losses, ten at most. After each of the first two moves eps is multiplied by
alpha. FracTrain's losses are means of epochs; here they are those of passes over a support set, or means of twenty
blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stages.artifacts.records import Array
from stages.errors import UsageError, require
from stages.graphs.keeping import KEEP_BITS

LOSSES, FIRST, DECAYS = 5, 10, 2
"""Losses that the indicator looks at; the first ones, that give their scale; moves after which eps shrinks."""
BLOCKS = 20
"""Blocks of a stream whose mean is one loss."""
Memory = Mapping[str, Array]


class Schedule(Protocol):
    """Widths of any kind in their order, and when to move on."""

    @property
    def bits(self) -> Sequence[object]: ...
    @property
    def turn(self) -> float: ...
    @property
    def decay(self) -> float: ...


@dataclass(frozen=True)
class PrecisionSchedule:
    """Widths in their order, and when to move on."""

    bits: tuple[int, ...]
    turn: float = 0.05
    """eps at first."""
    decay: float = 0.3
    """alpha."""

    def __post_init__(self) -> None:
        where, found = "--precision-schedule", ",".join(map(str, self.bits))
        rising = len(self.bits) > 1 and list(self.bits) == sorted(set(self.bits))
        require(rising and set(self.bits) <= set(KEEP_BITS), where, repr(found), "rising widths of 8, 16, 32")
        check_turning(where, self.turn, self.decay)


def check_turning(where: str, turn: float, decay: float) -> None:
    """Raise `UsageError` for an eps or alpha with which no schedule moves on as the indicator has it."""
    require(turn > 0, where, f"turn={turn}", "above 0")
    require(0 < decay <= 1, where, f"decay={decay}", "above 0, at most 1")


def parse_schedule(text: str) -> PrecisionSchedule:
    """Widths and, behind a colon, settings.

    >>> parse_schedule("8,16,32:turn=0.1").bits
    (8, 16, 32)

    Raises `UsageError` for anything else.
    """
    widths, _, rest = text.partition(":")
    expected = "8,16,32 or 8,32:turn=0.05,decay=0.3"
    try:
        bits = tuple(int(part) for part in widths.split(","))
    except ValueError:
        raise UsageError("--precision-schedule", repr(text), expected) from None
    return PrecisionSchedule(bits, **settings_of(rest, {"turn", "decay"}, "--precision-schedule", expected))


def settings_of(text: str, known: Set[str], where: str, expected: str) -> dict[str, float]:
    """Numbers by name, of those that are known.

    >>> settings_of("turn=0.1,decay=1", {"turn", "decay"}, "--schedule", "turn=0.1")
    {'turn': 0.1, 'decay': 1.0}

    Raises `UsageError` for anything else.
    """
    try:
        given = {key: float(value) for key, value in (pair.split("=") for pair in filter(None, text.split(",")))}
    except ValueError:
        raise UsageError(where, repr(text), expected) from None
    require(given.keys() <= known, where, repr(text), expected)
    return given


def begin(schedule: Schedule) -> dict[str, Array]:
    """What is remembered before the first loss."""
    return {"stage": np.array(0), "eps": np.array(schedule.turn), "recent": np.zeros(0), "first": np.zeros(0)}


def advance(schedule: Schedule, memory: Memory, loss: float) -> dict[str, Array]:
    """What is remembered after another loss; `stage` numbers the width."""
    first = np.append(memory["first"], loss)[:FIRST]
    recent = np.append(memory["recent"], loss)[-LOSSES:]
    stage, eps = int(memory["stage"]), float(memory["eps"])
    apart = np.abs(recent[:-1] - recent[-1]) / first.mean()
    if stage + 1 < len(schedule.bits) and len(recent) == LOSSES and (apart <= eps).all():
        stage, recent = stage + 1, np.zeros(0)
        if stage <= DECAYS:
            eps *= schedule.decay
    return {"stage": np.array(stage), "eps": np.array(eps), "recent": recent, "first": first}
