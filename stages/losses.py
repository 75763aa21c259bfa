"""Losses over class scores in closed form: values and gradients in float64, whatever precision the features have.

Everything here is a softmax over scores (N, C). Its cross-entropy has the gradient p - e_y at the scores, with p the
softmax and e_y the one-hot target; its Shannon entropy H has -p (ln p + H). Scores that are not finite give NaN, which
whoever takes a step refuses (`training.optimizers.checked_step`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

Loss = Callable[[Floats], tuple[float, Floats]]
"""Features float32 (N, D) of all samples -> the loss, and its gradient at the features, float32 (N, D)."""

SHORTEST = 1e-12
"""A vector is divided by its length or by this, whichever is more: torch's `normalize`, and so a zero vector's cosine
is 0 to everything."""

P = ParamSpec("P")
R = TypeVar("R")


def quiet(function: Callable[P, R]) -> Callable[P, R]:
    """Where training diverges, NaN and infinity pass without a warning: the step refuses them with a message.

    An `errstate` of its own for every call: one that decorates functions which call each other never ends in numpy 1.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return function(*args, **kwargs)

    return call


@quiet
def single(values: Doubles) -> Floats:
    """The values in float32; what is too large for it becomes infinite."""
    return values.astype(np.float32)


@quiet
def log_softmax(scores: NDArray[Any]) -> Doubles:
    """ln softmax of each row of scores (N, C): float64 (N, C)."""
    logs = np.array(scores, np.float64)
    logs -= logs.max(axis=1, keepdims=True, initial=-np.inf)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    return logs


def softmax(scores: NDArray[Any]) -> Doubles:
    """Probabilities (N, C) of scores (N, C), float64."""
    return np.asarray(np.exp(log_softmax(scores)))


@quiet
def cross_entropy(
    scores: NDArray[Any], rows: NDArray[np.integer[Any]], known: NDArray[np.bool_] | None = None
) -> tuple[Doubles, Doubles]:
    """Each sample's cross-entropy and its gradient at the sample's own scores.

    Args:
        scores: (N, C).
        rows: the target columns (N,), in 0..C-1.
        known: (C,), the columns that have a score of their own; None for all. The others count as probability 1 / C
            (`models.heads.even_unknown`): the loss of a known target is then ln(C / k) more than among the k known
            columns alone, so that its gradient is the softmax over these minus one-hot, and 0 at the others; that of
            another target is ln C whatever the scores, and has no gradient.

    Returns:
        Losses (N,) and gradients (N, C), float64; with all columns known the latter are softmax - one-hot.
    """
    scores = np.asarray(scores, np.float64)
    if known is None or known.all():
        return _cross_entropy(scores, rows)
    losses, residuals = np.full(len(scores), np.log(scores.shape[1])), np.zeros(scores.shape)
    samples = np.flatnonzero(known[rows])
    columns = np.flatnonzero(known)
    if len(samples):
        own, inner = _cross_entropy(scores[np.ix_(samples, columns)], np.searchsorted(columns, rows[samples]))
        losses[samples] = own + np.log(scores.shape[1] / len(columns))
        residuals[np.ix_(samples, columns)] = inner
    return losses, residuals


def _cross_entropy(scores: Doubles, rows: NDArray[np.integer[Any]]) -> tuple[Doubles, Doubles]:
    logs, each = log_softmax(scores), np.arange(len(rows))
    losses = -logs[each, rows]
    residuals = np.exp(logs, out=logs)
    residuals[each, rows] -= 1
    return losses, residuals


@quiet
def entropy(scores: NDArray[Any]) -> tuple[Doubles, Doubles]:
    """Shannon entropy in nats of each row's softmax (N,), and its gradient at the row's scores (N, C), float64."""
    logs = log_softmax(scores)
    shares = np.exp(logs)
    values = -(shares * logs).sum(axis=1)
    return values, -shares * (logs + values[:, None])


@dataclass(frozen=True)
class Cosines:
    """Cosines of N vectors with C others, and what their gradients need."""

    values: Doubles
    """(N, C)."""
    vectors: Doubles
    """(N, D), each divided by its length (or by `SHORTEST`)."""
    lengths: Doubles
    """(N,)."""
    others: Doubles
    """(C, D), divided likewise."""
    other_lengths: Doubles
    """(C,)."""

    @quiet
    def pull(self, gradient: Doubles) -> Doubles:
        """The gradient at the N vectors (N, D) from the one at the cosines (N, C)."""
        return _pull(gradient, self.values, self.vectors, self.lengths, self.others)

    @quiet
    def pull_others(self, gradient: Doubles) -> Doubles:
        """The gradient at the C others (C, D) from the one at the cosines (N, C)."""
        return _pull(gradient.T, self.values.T, self.others, self.other_lengths, self.vectors)


@quiet
def cosines(vectors: NDArray[Any], others: NDArray[Any]) -> Cosines:
    """Cosines of vectors (N, D) with others (C, D)."""
    one, lengths = _normalized(vectors)
    other, other_lengths = _normalized(others)
    return Cosines(one @ other.T, one, lengths, other, other_lengths)


def _normalized(vectors: NDArray[Any]) -> tuple[Doubles, Doubles]:
    """The vectors (N, D) divided by their lengths, and the lengths (N,)."""
    units = np.array(vectors, np.float64)
    lengths = np.sqrt(np.einsum("nd,nd->n", units, units))
    units /= np.maximum(lengths, SHORTEST)[:, None]
    return units, lengths


def _pull(gradient: Doubles, values: Doubles, units: Doubles, lengths: Doubles, others: Doubles) -> Doubles:
    """Through u = v / |v|: (g - u <u, g>) / |v| with g = sum_c gradient_c o_c, so that <u, g> = sum_c gradient_c cos_c.

    Below `SHORTEST` the divisor is constant, and the second term falls away.
    """
    along = np.where(lengths >= SHORTEST, np.einsum("nc,nc->n", gradient, values), 0.0)
    pulled = gradient @ others
    pulled -= along[:, None] * units
    pulled /= np.maximum(lengths, SHORTEST)[:, None]
    return pulled
