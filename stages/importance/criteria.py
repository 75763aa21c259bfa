"""What a layer is worth: the criteria that layer selection may maximise, in one table.

A criterion turns the evidence on all inspected layers into one number per layer; the larger, the sooner the layer is
chosen. To add one, write a function of `Evidence` and list it in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.owncode import answers, own

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """What is known about the inspected layers; vectors have one entry per layer, in execution order."""

    fisher: Vector
    """P_i: the layer's Fisher potential, the sum over its output channels."""
    parameters: Vector
    """Number of weights (bias not counted), as in the paper's tables."""
    macs: Vector
    """Forward multiply-accumulates per sample."""
    most_parameters: float
    """Largest number of weights of any layer of the model, inspected or not."""
    most_macs: float
    """Largest forward MACs of any layer of the model, inspected or not."""
    weight_l2: Vector
    """Euclidean norm of the weights."""
    rng: np.random.Generator
    """For criteria that draw."""


Criterion = Callable[[Evidence], Vector]


def score(e: Evidence) -> Vector:
    """TinyTrain's multi-objective score: s_i = P_i / [ (W_i / max W) (M_i / max M) ]  (Eq. 3)."""
    return e.fisher / (_memory_share(e) * _compute_share(e))


def fisher(e: Evidence) -> Vector:
    """The Fisher potential alone (Table 3, "Fisher only")."""
    return e.fisher


def fisher_memory(e: Evidence) -> Vector:
    """Fisher potential per share of the weights: Eq. 3 without the MACs (Table 3, "Fisher / Memory")."""
    return e.fisher / _memory_share(e)


def fisher_compute(e: Evidence) -> Vector:
    """Fisher potential per share of the MACs: Eq. 3 without the weights (Table 3, "Fisher / Compute")."""
    return e.fisher / _compute_share(e)


def l2(e: Evidence) -> Vector:
    """The norm of the weights: a choice that does not depend on the task (Table 3, "L2-norm")."""
    return e.weight_l2


def random(e: Evidence) -> Vector:
    """Uniform numbers: the control."""
    return e.rng.random(len(e.fisher))


def _memory_share(e: Evidence) -> Vector:
    return e.parameters / e.most_parameters


def _compute_share(e: Evidence) -> Vector:
    """A table that is read costs no MAC; one, so that its score is a number."""
    return np.maximum(e.macs, 1) / e.most_macs


def criterion_named(name: str) -> Criterion:
    """The criterion of the table, or the user's own function of `Evidence`: `package.module:function`."""
    if name in CRITERIA:
        return CRITERIA[name]
    found = own(name, "--criterion")
    return lambda evidence: answers(found, name, len(evidence.fisher), evidence)


CRITERIA: dict[str, Criterion] = {
    "score": score,
    "fisher": fisher,
    "fisher-memory": fisher_memory,
    "fisher-compute": fisher_compute,
    "l2": l2,
    "random": random,
}
