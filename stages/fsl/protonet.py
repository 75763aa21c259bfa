"""Prototypical networks with the cosine classifier of P>M>F: prototypes, logits and the losses that adaptation uses.

Prototypes: TinyTrain Eq. 1 (arXiv:2307.09988), after Snell et al. (arXiv:1703.05175). Distance: cosine with a scale, as
Hu et al. (P>M>F, arXiv:2204.07305) use it. Changed: their learnable bias is left out, because one number added to every
class's logit changes neither the softmax nor its gradient.

Losses are closed forms, computed in float64. With logits z = scale * cos(feature, prototype) and the gradient r of the
loss at them, the gradient at a feature and at a prototype is that of `training.losses.Cosines`, times the scale; a
sample of the support gets its class's prototype's, divided by the samples of the class; the scale gets sum r cos.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import Array
from stages.errors import DataError
from stages.losses import Cosines, Doubles, Floats, Loss, cosines, cross_entropy, entropy, quiet, single
from stages.models.heads import class_means


def prototypes(features: Floats, labels: Array, ways: int) -> Floats:
    """Class means: features (N, D), labels int64 (N,) in 0..ways-1 -> float32 (ways, D).

    Raises `DataError` where a label is out of range or a class has no sample: its mean does not exist.
    """
    return single(_means(features, labels, ways)[0])


def cosine_logits(features: Floats, prototypes: Floats, scale: float) -> Doubles:
    """scale * cos(feature, prototype): (N, D), (C, D) -> float64 (N, C). A zero vector has cosine 0 to everything."""
    return scale * cosines(features, prototypes).values


class EpisodeLoss(NamedTuple):
    """The loss of an episode, and its gradient at all that it depends on."""

    value: float
    support_gradient: Floats
    """(N_s, D); zeros where the prototypes are detached."""
    query_gradient: Floats
    """(N_q, D)."""
    scale_gradient: float


def episode_loss(
    features_support: Floats,
    labels_support: Array,
    features_query: Floats,
    labels_query: Array,
    ways: int,
    scale: float,
    *,
    detach: bool = False,
) -> EpisodeLoss:
    """Mean cross-entropy of the query (N_q, D) against the prototypes of the support (N_s, D), labels in 0..ways-1.

    `detach` stops the gradient that would flow through the prototypes; P>M>F lets it flow. Raises `DataError` for
    labels that do not fit, or a class without a sample in the support.
    """
    means, counts = _means(features_support, labels_support, ways)
    angles = cosines(features_query, means)
    _check_labels(labels_query, len(features_query), ways)
    value, residuals = _mean(*cross_entropy(scale * angles.values, labels_query))
    at_scale = float((residuals * angles.values).sum())
    residuals *= scale
    at_support = np.zeros(features_support.shape, np.float32)
    if not detach:
        at_support = single(_to_support(angles, residuals, labels_support, counts))
    return EpisodeLoss(value, at_support, single(angles.pull(residuals)), at_scale)


def support_loss(labels_support: Array, labels_query: Array, ways: int, scale: float, *, detach: bool = False) -> Loss:
    """The same loss as a function of the features of [support; pseudo-query] in one array (N_s + N_q, D).

    This is the form that `stages.training.updates.gradient_update` takes: it computes the features of the whole batch,
    asks this function for the gradient at the features, and back-propagates in micro-batches.
    """
    size = len(labels_support)

    def loss(features: Floats) -> tuple[float, Floats]:
        found = episode_loss(features[:size], labels_support, features[size:], labels_query, ways, scale, detach=detach)
        return found.value, np.concatenate([found.support_gradient, found.query_gradient])

    return loss


def query_loss(means: Floats, labels: Array, scale: float) -> Loss:
    """Mean cross-entropy of features (N, D) against prototypes that stand still, float32 (C, D); labels in 0..C-1."""

    def loss(features: Floats) -> tuple[float, Floats]:
        angles = cosines(features, means)
        _check_labels(labels, len(features), len(means))
        value, residuals = _mean(*cross_entropy(scale * angles.values, labels))
        return value, single(angles.pull(scale * residuals))

    return loss


def transductive_loss(features: Floats, labels: Array, ways: int, scale: float) -> tuple[float, Floats]:
    """Mean cross-entropy of the support plus mean Shannon entropy of the query, both against the support's prototypes.

    features: of [support; query] in one array (N_s + N_q, D); labels: the support's, int64 (N_s,) in 0..ways-1. Gives
    the loss and its gradient at the features. After Dhillon et al. (arXiv:1909.02729).
    Raises `DataError` as `prototypes` does.
    """
    size = len(labels)
    means, counts = _means(features[:size], labels, ways)
    angles = cosines(features, means)
    of_support, at_support = _mean(*cross_entropy(scale * angles.values[:size], labels))
    of_query, at_query = _mean(*entropy(scale * angles.values[size:]))
    at_cosines = scale * np.concatenate([at_support, at_query])
    gradient = angles.pull(at_cosines)
    gradient[:size] += _to_support(angles, at_cosines, labels, counts)
    return of_support + of_query, single(gradient)


def accuracy(logits: NDArray[Any], labels: Array) -> float:
    """Share of rows whose largest logit is the label's: (N, C), (N,) -> 0..1."""
    return float((logits.argmax(axis=1) == labels).mean())


def _means(features: Floats, labels: Array, ways: int) -> tuple[Doubles, Array]:
    """Class means (ways, D) and how many samples each is of (ways,)."""
    _check_labels(labels, len(features), ways)
    counts = np.bincount(labels, minlength=ways)
    if (counts == 0).any():
        empty = int(np.flatnonzero(counts == 0)[0])
        raise DataError("support", f"no sample of class {empty}", f"at least one for each of the {ways} classes")
    return class_means(features, labels, ways), counts


@quiet
def _mean(values: Doubles, gradients: Doubles) -> tuple[float, Doubles]:
    """The mean of losses (N,), and its gradient (N, C) from the losses' own; NaN where there is none."""
    return float(np.divide(values.sum(), len(values))), gradients / len(values)


@quiet
def _to_support(angles: Cosines, gradient: Doubles, labels: Array, counts: Array) -> Doubles:
    """The gradient at the support's features (N_s, D) from the one at the cosines with their means (N, C)."""
    return (angles.pull_others(gradient) / counts[:, None])[labels]


def _check_labels(labels: Array, rows: int, ways: int) -> None:
    if len(labels) != rows:
        raise DataError("episode", f"{len(labels)} labels for {rows} feature rows", "one label per row")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < ways:
        raise DataError("episode", f"labels {int(labels.min())}..{int(labels.max())}", f"0..{ways - 1}")
