"""Which channels of a layer train: how many, along which axis, and by which rule they are ranked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import Array, LayerUpdate
from stages.errors import DataError, UsageError, require
from stages.graphs.checking import AXES
from stages.operators import Op


def channel_count(ratio: float, channels: int) -> int:
    """How many of `channels` channels a ratio in (0, 1] keeps: round half up, at least one. The one rounding rule.

    >>> [channel_count(ratio, 20) for ratio in (1, 0.5, 0.125, 0.01)]
    [20, 10, 3, 1]

    Raises:
        UsageError: the ratio is outside (0, 1].
    """
    require(0 < ratio <= 1, "channel ratio", f"{ratio}", "more than 0 and at most 1")
    return max(1, floor(ratio * channels + 0.5))


@dataclass(frozen=True)
class ChannelEvidence:
    """What the rules may look at for one layer along one axis; vectors have one entry per channel."""

    op: Op
    axis: str
    channels: int
    fisher: Array | None
    """Fisher information of the channels (TinyTrain Eq. 2), or None where no pass was made."""
    weight: Array | None
    """The layer's weight, (out, in / groups, *kernel) or (out, in), or None."""
    rng: np.random.Generator | None


ChannelRule = Callable[[ChannelEvidence], NDArray[np.float64]]


def fisher(evidence: ChannelEvidence) -> NDArray[np.float64]:
    """Fisher information of each channel (TinyTrain section 2.2)."""
    if evidence.fisher is None:
        raise DataError(
            "/scores",
            f"no Fisher information for {evidence.op.name}",
            "a scored layer",
            "run `edgetrain score-layers` with --support, or choose channels by l2",
        )
    return np.asarray(evidence.fisher, dtype=np.float64)


def l2(evidence: ChannelEvidence) -> NDArray[np.float64]:
    """Euclidean norm of each channel's weights: SparseUpdate's `magnitude+` (Lin et al. 2022)."""
    if evidence.weight is None:
        raise UsageError(evidence.op.name, "no weights to rank channels by", "the model's tensors")
    weight = np.asarray(evidence.weight, dtype=np.float64)
    if evidence.axis == "output" or evidence.op.is_depthwise:
        return np.asarray(np.sqrt((weight.reshape(len(weight), -1) ** 2).sum(1)))
    groups = evidence.op.groups
    grouped = weight.reshape(groups, evidence.op.out_channels // groups, evidence.op.in_channels // groups, -1)
    return np.asarray(np.sqrt((grouped**2).sum((1, 3)))).reshape(-1)


def random(evidence: ChannelEvidence) -> NDArray[np.float64]:
    """Uniform numbers: the control."""
    if evidence.rng is None:
        raise UsageError("channel rule", "random without a generator", "a generator")
    return evidence.rng.random(evidence.channels)


CHANNEL_RULES: Mapping[str, ChannelRule] = {"fisher": fisher, "l2": l2, "random": random}


def channel_rule(name: str) -> ChannelRule:
    """The rule of that name. Raises UsageError that lists the names there are."""
    if name not in CHANNEL_RULES:
        raise UsageError("channel rule", repr(name), "one of " + ", ".join(CHANNEL_RULES))
    return CHANNEL_RULES[name]


def axis_of(op: Op, axis: str) -> tuple[str, int]:
    """The axis an update of this layer counts along, and its channels: a depthwise layer's channels are both axes.

    A recurrent layer's and an embedding's are hidden units and features: the output axis, whatever is asked for.

    Raises:
        UsageError: no such axis.
    """
    require(axis in AXES, "channel axis", repr(axis), "one of " + ", ".join(AXES))
    if axis == "output" or op.is_depthwise or op.operator.by_output:
        return "output", op.out_channels
    return "input", op.in_channels


def top_channels(ranking: Array, count: int) -> tuple[int, ...]:
    """The `count` channels of highest rank, ascending; of equals the first.

    >>> import numpy as np
    >>> top_channels(np.array([1.0, 3.0, 2.0, 3.0]), 2)
    (1, 3)
    """
    order = np.argsort(-np.asarray(ranking, dtype=np.float64), kind="stable")
    return tuple(sorted(int(channel) for channel in order[:count]))


def make_update(
    op: Op, axis: str, ranking: Array | None, ratio: float, *, bias: bool = False, groups: Array | None = None
) -> LayerUpdate:
    """The update of one layer at a channel ratio: its best channels by `ranking` (C,), which a full ratio needs not.

    With `bias` the biases of the live output channels train too (along the input axis, every bias). With `groups` (C,),
    whole numbers from 0, the ratio is one of groups, and these live or freeze as a whole.

    Raises:
        UsageError: a ratio outside (0, 1], an unknown axis, or a partial ratio without a ranking.
    """
    axis, channels = axis_of(op, axis)
    if ratio == 1 or (groups is None and channel_count(ratio, channels) == channels):
        live = tuple(range(channels))
    elif ranking is None:
        raise UsageError(op.name, f"ratio {ratio:g} without a channel ranking", "scores or weights to rank channels by")
    elif groups is not None:
        best = top_channels(np.bincount(groups, ranking), channel_count(ratio, int(groups.max()) + 1))
        live = tuple(int(channel) for channel in np.flatnonzero(np.isin(groups, best)))
    else:
        live = top_channels(ranking, channel_count(ratio, channels))
    biases = live if axis == "output" else tuple(range(op.out_channels))
    return LayerUpdate(op.name, axis, live, channels, biases if bias and op.bias else ())
