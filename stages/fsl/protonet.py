"""Prototypical networks with the cosine classifier of P>M>F: prototypes, logits and the loss that adaptation uses.

Prototypes: TinyTrain Eq. 1 (arXiv:2307.09988), after Snell et al. (arXiv:1703.05175). Distance: cosine with a scale, as
Hu et al. (P>M>F, arXiv:2204.07305) use it. Changed: their learnable bias is left out, because one number added to every
class's logit changes neither the softmax nor its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from stages.errors import DataError


def prototypes(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Class means: features (N, D), labels int64 (N,) in 0..ways-1 -> (ways, D). Differentiable.

    Raises `DataError` where a label is out of range or a class has no sample: its mean does not exist.
    """
    _check_labels(labels, len(features), ways)
    member = functional.one_hot(labels, ways).to(features.dtype)
    counts = member.sum(dim=0)
    if bool((counts == 0).any()):
        empty = torch.nonzero(counts == 0).flatten().tolist()
        raise DataError("support", f"no sample of class {empty[0]}", f"at least one for each of the {ways} classes")
    return (member / counts).T @ features


def cosine_logits(features: Tensor, prototypes: Tensor, scale: float | Tensor) -> Tensor:
    """scale * cos(feature, prototype): (N, D), (C, D) -> (N, C). A zero vector has cosine 0 to everything."""
    return scale * (functional.normalize(features, dim=1) @ functional.normalize(prototypes, dim=1).T)


def episode_loss(
    features_support: Tensor,
    labels_support: Tensor,
    features_query: Tensor,
    labels_query: Tensor,
    ways: int,
    scale: float | Tensor,
    *,
    detach: bool = False,
) -> Tensor:
    """Mean cross-entropy of the query against the support's prototypes: a scalar.

    `detach` stops the gradient that would flow through the prototypes; P>M>F lets it flow.
    """
    means = prototypes(features_support, labels_support, ways)
    logits = cosine_logits(features_query, means.detach() if detach else means, scale)
    _check_labels(labels_query, len(logits), ways)
    return functional.cross_entropy(logits, labels_query)


def support_loss(
    labels_support: Tensor, labels_query: Tensor, ways: int, scale: float | Tensor, *, detach: bool = False
) -> Callable[[Tensor], Tensor]:
    """The same loss as a function of the features of [support; pseudo-query] in one tensor (N_s + N_q, D).

    This is the form that `stages.training.updates.gradient_update` takes: it computes the features of the whole batch
    without a graph, asks this function for the gradient at the features, and back-propagates in micro-batches.
    """
    size = len(labels_support)

    def loss(features: Tensor) -> Tensor:
        return episode_loss(features[:size], labels_support, features[size:], labels_query, ways, scale, detach=detach)

    return loss


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's: (N, C), (N,) -> 0..1."""
    return float((logits.argmax(dim=1) == labels).double().mean())


def _check_labels(labels: Tensor, rows: int, ways: int) -> None:
    if len(labels) != rows:
        raise DataError("episode", f"{len(labels)} labels for {rows} feature rows", "one label per row")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < ways:
        raise DataError("episode", f"labels {int(labels.min())}..{int(labels.max())}", f"0..{ways - 1}")
