"""Titan's rivals (arXiv:2505.16563, section 4.1): deterministic choices of `places` candidates, biased by design."""

from __future__ import annotations

import numpy as np

from stages.artifacts.records import Array

TINY = 1e-30
"""Smallest probability whose logarithm is taken."""


def losses(probabilities: Array, targets: Array) -> Array:
    """Cross-entropy -log p_y: float64 (n,)."""
    return np.asarray(-np.log(np.maximum(probabilities[np.arange(len(targets)), targets], TINY)))


def entropies(probabilities: Array) -> Array:
    """Entropy of the predicted distribution, -sum p log p: float64 (n,)."""
    return np.asarray(-(probabilities * np.log(np.maximum(probabilities, TINY))).sum(axis=1))


def ocs_scores(products: Array) -> Array:
    """Similarity to the pool's mean gradient plus diversity within the pool: float64 (n,).

    Online Coreset Selection (Yoon et al., ICLR 2022, arXiv:2106.01085), equations 2 and 3: cos(g_i, mean g) minus the
    mean of cos(g_i, g_j) over j != i. The paper's third term compares with a replay buffer, of which a stream has none.

    Args:
        products: float64 (n, n): <g_i, g_j>.
    """
    norms = np.sqrt(np.maximum(np.diagonal(products), 0.0))
    cosines = _ratio(products, norms[:, None] * norms)
    mean_norm = np.sqrt(max(float(products.mean()), 0.0))
    similarity = _ratio(products.mean(axis=1), norms * mean_norm)
    others = (cosines.sum(axis=1) - np.diagonal(cosines)) / max(len(products) - 1, 1)
    return np.asarray(similarity - others)


def highest(scores: Array, places: int) -> Array:
    """Rows of the `places` highest scores, ascending; equal scores in order of arrival: int64 (m,)."""
    return np.sort(np.argsort(-scores, kind="stable")[:places])


def _ratio(numerator: Array, denominator: Array) -> Array:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
