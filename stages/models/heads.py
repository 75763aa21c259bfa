"""Heads: what turns features into class scores, and how classes find their rows.

Rows are indices into `Head.labels`. Class labels become rows by name where both sides have names, else by integer
(`rows`); everything else here speaks of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages import losses
from stages.artifacts.records import Array, Block, Head, check_labelled
from stages.errors import DataError
from stages.losses import Doubles, Floats, cosines, quiet, single

Names = Mapping[int, str]
"""Class label -> class name."""

COSINE_SCALE = 10.0
"""P>M>F's initial value (arXiv:2204.07305), where nothing has been learned."""


def logits(head: Head, features: Floats) -> Doubles:
    """Class scores (N, C), float64, of features (N, D); their softmax are the probabilities.

    A linear row that nobody has seen yet counts as probability 1 / C: with u such rows its logit is
    logsumexp(known logits) - ln(C - u). Raises `DataError` for features of another width.
    """
    _check_width(head, features)
    if head.kind == "prototypes":
        return head.scale * cosines(features, head.weight).values
    return even_unknown(_linear(head, features), head.known)


def cross_entropy(head: Head, features: Floats, rows: Array) -> tuple[Doubles, Floats]:
    """Each sample's own cross-entropy under the head, float64 (N,), and its gradient at its features, float32 (N, D).

    With r the residual at the scores (`training.losses.cross_entropy`): W^T r for linear rows W, where a row that
    nobody has seen has no part in it; for prototypes, scale times the gradient of the cosines, whose rows stand still.
    Raises `DataError` for features of another width.
    """
    _check_width(head, features)
    if head.kind == "prototypes":
        angles = cosines(features, head.weight)
        values, residuals = losses.cross_entropy(head.scale * angles.values, rows)
        return values, single(head.scale * angles.pull(residuals))
    values, residuals = losses.cross_entropy(_linear(head, features), rows, head.known)
    return values, single(residuals @ head.weight.astype(np.float64))


@quiet
def _linear(head: Head, features: Floats) -> Doubles:
    return features.astype(np.float64) @ head.weight.astype(np.float64).T + head.bias


def _check_width(head: Head, features: Floats) -> None:
    if features.shape[1] != head.weight.shape[1]:
        expected = f"{features.shape[1]}, the backbone's"
        raise DataError("/model/head", f"rows of {head.weight.shape[1]} features", expected)


@quiet
def even_unknown(scores: NDArray[Any], known: NDArray[np.bool_]) -> Doubles:
    """Scores (N, C) with the columns that are not `known` (C,) set so that their softmax is 1 / C each; float64.

    With k known columns the others get logsumexp(known scores) - ln k; where none is known, all are 0.
    """
    scores = np.asarray(scores, np.float64)
    if known.all():
        return scores
    if not known.any():
        return np.zeros_like(scores)
    seen = scores[:, known]
    largest = seen.max(axis=1, keepdims=True)
    total = largest + np.log(np.exp(seen - largest).sum(axis=1, keepdims=True))
    return np.where(known, scores, total - np.log(seen.shape[1]))


def probabilities(head: Head, features: Floats) -> Doubles:
    """Class probabilities (N, C), float64: the softmax of `logits`."""
    return losses.softmax(logits(head, features))


@quiet
def class_means(features: Floats, rows: Array, count: int) -> Doubles:
    """Mean feature of each class, float64 (count, D): features (N, D), rows (N,) in 0..count-1, each of them there."""
    means = np.empty((count, features.shape[1]))
    for row in range(count):
        np.mean(features[rows == row], axis=0, dtype=np.float64, out=means[row])
    return means


def empty_head(labels: Array, names: Names | None, dim: int) -> Head:
    """A linear head over these class labels that has seen none of them."""
    check_labelled(labels, "y")
    distinct = np.unique(np.asarray(labels, dtype=np.int64))
    shape = (len(distinct), dim)
    return Head(
        "linear",
        distinct,
        np.zeros(shape, np.float32),
        np.zeros(len(distinct), np.float32),
        np.zeros(len(distinct), bool),
        _names_of(distinct, names),
    )


@quiet
def imprint(head: Head, features: Floats, rows: Array, weights: Array) -> Head:
    """The linear head with a row for each class among `rows` that had none, from its weighted mean feature.

    features (N, D), rows (N,) head rows of the samples, weights (N,) > 0. Row c = scale * m_c / (|m_c| * r), m_c the
    weighted mean feature of the class and r the weighted mean norm of all features: a feature of ordinary length then
    scores scale * cosine, as with prototypes. After weight imprinting (arXiv:1712.07136); changed: the backbone's
    features are not normalised, so r is divided out. Rows already known stay as they are.
    """
    x = features.astype(np.float64)
    w = np.asarray(weights, dtype=np.float64)
    radius = float((w * np.linalg.norm(x, axis=1)).sum() / w.sum()) if w.sum() > 0 else 0.0
    weight, bias, known = head.weight.copy(), head.bias.copy(), head.known.copy()
    for row in np.unique(rows[~head.known[rows]]):
        mine = rows == row
        mean = w[mine] @ x[mine]
        length = float(np.linalg.norm(mean))
        weight[row] = head.scale * mean / (length * radius) if length * radius > 0 else 0.0
        bias[row], known[row] = 0.0, True
    return replace(head, weight=weight, bias=bias, known=known)


def cosine_scale(head: Head | None, otherwise: float = COSINE_SCALE) -> float:
    """The cosine scale that meta-training left in a run's head; `otherwise` where it has no head of prototypes."""
    return head.scale if head is not None and head.kind == "prototypes" else otherwise


def prototype_head(features: Floats, labels: Array, names: Names | None, *, scale: float = COSINE_SCALE) -> Head:
    """Class means of features (N, D) as a `prototypes` head over the distinct class labels."""
    check_labelled(labels, "y")
    distinct, row = np.unique(np.asarray(labels, dtype=np.int64), return_inverse=True)
    count = len(distinct)
    return Head(
        "prototypes",
        distinct,
        single(class_means(features, row, count)),
        np.zeros(count, np.float32),
        np.ones(count, bool),
        _names_of(distinct, names),
        scale,
    )


def rows(head: Head, y: Array, names: Names | None = None) -> Array:
    """Head row (N,) of each class label, by name where both sides have names, else by integer.

    Raises `DataError` for a class that the head does not have, and where integers agree but names do not.
    """
    check_labelled(y, "y")
    distinct, back = np.unique(np.asarray(y, dtype=np.int64), return_inverse=True)
    known = _rows_by_key(head, names)
    found = np.array([known.get(_key(int(label), head, names), -1) for label in distinct], dtype=np.int64)
    if (found < 0).any():
        label = int(distinct[np.flatnonzero(found < 0)[0]])
        raise DataError(
            "y",
            f"class {_shown(label, names)}",
            f"one of the {len(head.labels)} classes of the head",
            "are names and labels those the model was trained with?",
        )
    return found[back]


def extend(head: Head, y: Array, names: Names | None = None) -> Head:
    """The head with an unknown row for each class of `y` that it lacks; labels stay ascending.

    Names are kept while both sides have them. Raises `DataError` where a new class would take the integer of another.
    """
    check_labelled(y, "y")
    distinct = np.unique(np.asarray(y, dtype=np.int64))
    known = _rows_by_key(head, names)
    new = np.array([int(c) for c in distinct if _key(int(c), head, names) not in known], dtype=np.int64)
    taken = np.intersect1d(new, head.labels)
    if len(taken):
        there = head.names[int(np.flatnonzero(head.labels == taken[0])[0])] if head.names else "?"
        raise DataError(
            "y",
            f"class {_shown(int(taken[0]), names)}",
            f"{there!r}, the head's class {taken[0]}",
            "give the new class a label of its own",
        )
    labels = np.concatenate([head.labels, new])
    order = np.argsort(labels)
    blank = np.zeros((len(new), head.weight.shape[1]), np.float32)
    both = head.names is not None and (names is not None or not len(new))
    all_names = [*(head.names or ()), *(_name(int(c), names) for c in new)]
    return replace(
        head,
        labels=labels[order],
        weight=np.concatenate([head.weight, blank])[order],
        bias=np.concatenate([head.bias, np.zeros(len(new), np.float32)])[order],
        known=np.concatenate([head.known, np.zeros(len(new), bool)])[order],
        names=tuple(all_names[i] for i in order) if both else None,
    )


def class_names(block: Block) -> Names | None:
    """Names of a block's classes by label; None when it has none."""
    if block.names is None or block.labels is None:
        return None
    return {int(label): name for label, name in zip(block.labels, block.names, strict=True)}


def _rows_by_key(head: Head, names: Names | None) -> dict[int | str, int]:
    """Row by name when both sides have names, else by integer: by the one that a name is, where all of them are."""
    if head.names is None or names is None:
        numbers = numbers_of(head.names or ()) or head.labels.tolist()
        return {int(label): row for row, label in enumerate(numbers)}
    return {name: row for row, name in enumerate(head.names)}


def _key(label: int, head: Head, names: Names | None) -> int | str:
    if names is None or (head.names is None and not numbers_of(tuple(names.values()))):
        return label
    return _name(label, names) if head.names is not None else int(_name(label, names))


def numbers_of(names: tuple[str, ...]) -> list[int] | None:
    """The integers that class names are, where every name is one and no two are the same; None otherwise.

    Arrays call a class 2 that a folder calls "2", whatever label the folders' order gave it.

    >>> numbers_of(("0", "10", "2")), numbers_of(("cat", "2"))
    ([0, 10, 2], None)
    """
    numbers = [int(name) for name in names if name.isascii() and name.isdigit()]
    return numbers if names and len(set(numbers)) == len(names) else None


def _name(label: int, names: Names | None) -> str:
    if names is None:
        return str(label)
    if label not in names:
        raise DataError("y", f"class {label} without a name", "a name for every class, or none")
    return names[label]


def _names_of(labels: Array, names: Names | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(_name(int(label), names) for label in labels)


def _shown(label: int, names: Names | None) -> str:
    return f"{label} ({names[label]})" if names and label in names else str(label)
