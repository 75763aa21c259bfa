"""Scoring: a block of candidates and a model's weights -> what selection strategies look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.artifacts.live import Version
from stages.artifacts.records import Array, Block, Head, LayerUpdate
from stages.engines.parameter import Floats
from stages.errors import DataError
from stages.graphs.updates import every_layer
from stages.models import heads
from stages.models.deploy import Backbone
from stages.models.inputs import adapt_block
from stages.valuation.costs import Times
from stages.valuation.fine import GradientView
from stages.valuation.gradients import Gradients, Kernel, LastLayer
from stages.valuation.live_gradients import live_products

CHUNK = 32
"""Candidates per forward pass: bounds memory; fixed, because results depend on it in the last bit."""

IMPORTANCES: Mapping[str, str] = {
    "last-layer": "gradient of the head, in closed form",
    "live": "gradient of the plan's live parameters and the head",
    "full": "gradient of all parameters: the slow reference",
}


@dataclass(frozen=True)
class Weights:
    """What scores a round's candidates."""

    backbone: Backbone
    head: Head | None
    """None before any class is known: all probabilities are uniform."""
    update_times: Times = ()
    """(samples, seconds) of the trainer's latest updates, where it says."""
    updates: tuple[LayerUpdate, ...] | None = None
    """What the trainer trains, where its policy has revised the plan."""

    def at(self, version: Version) -> Weights:
        """These weights with a published version's tensors and head in place."""
        backbone = replace(self.backbone, tensors={**self.backbone.tensors, **version.tensors})
        head = self.head if version.head is None else version.head
        return Weights(backbone, head, version.update_times, version.updates)


def masses(block: Block) -> Array:
    """What each candidate weighs in the loss of its pool: float64 (n,).

    Its `weight` where the block has one (`filter` writes them); else its class's share of `seen`, divided among the
    class's candidates; else 1/n.
    """
    _check_labels(block)
    if "weight" in block.columns:
        mass = block.columns["weight"].astype(np.float64)
        bad = ~(np.isfinite(mass) & (mass >= 0))
        if bad.any() or not mass.any():
            row = int(np.argmax(bad))
            raise DataError(_sample(block, row), f"weight {mass[row]}", "finite weights >= 0, not all zero")
        return mass
    if "seen" not in block.per_class or block.labels is None:
        return np.full(len(block), 1.0 / len(block))
    rows = np.searchsorted(block.labels, block.y)
    counts = block.per_class["seen"][rows]
    if (counts == 0).any():
        row = int(np.argmax(counts == 0))
        raise DataError(
            _sample(block, row),
            f"class {block.name_of(int(block.y[row]))} with `seen` 0",
            "counts that cover the block's classes",
        )
    mass = counts / np.bincount(rows)[rows]
    return np.asarray(mass / mass.sum())


def flat_inputs(block: Block) -> Array:
    """Raw samples as float32 rows (n, d). Raises `DataError` where one is not finite."""
    flat = np.asarray(block.x, np.float32).reshape(len(block), -1)
    _check_finite(flat.sum(axis=1), block, "input")
    return flat


def scored(
    block: Block,
    mass: Array,
    weights: Weights,
    importance: str,
    updates: Sequence[LayerUpdate] | None,
    features: Floats | None = None,
) -> GradientView:
    """Probabilities and gradients of candidates under `weights`; `features` (n, D) where they are known already."""
    names = heads.class_names(block)
    features = _features(weights.backbone, block) if features is None else features
    _check_finite(features.sum(1), block, "features")
    head = _head_for(block, weights.head, names, features.shape[1])
    targets = heads.rows(head, block.y, names)
    probabilities = heads.probabilities(head, features)
    residuals = probabilities.copy()
    residuals[np.arange(len(targets)), targets] -= 1.0
    gradients: Gradients = LastLayer(residuals, features.astype(np.float64))
    if weights.updates is not None:
        updates = weights.updates
    if importance != "last-layer":
        live = every_layer(weights.backbone.graph) if importance == "full" else updates
        inputs = adapt_block(block, weights.backbone.input)
        behind = live_products(weights.backbone, live or (), head, inputs, targets)
        gradients = Kernel(gradients.inner_products() + behind)
    _check_finite(gradients.squared_norms, block, "gradient")
    return GradientView(block.y, mass, gradients, probabilities, targets)


def _features(backbone: Backbone, block: Block) -> Floats:
    """Backbone features: float32 (n, D)."""
    inputs = (adapt_block(part, backbone.input) for part in block.slices(CHUNK))
    return np.concatenate([backbone.features(x) for x in inputs])


def _head_for(block: Block, head: Head | None, names: heads.Names | None, dim: int) -> Head:
    """The head with a row for every class of the block; the rows it adds count as uniform probability."""
    labels = block.y if block.labels is None else block.labels
    return heads.empty_head(labels, names, dim) if head is None else heads.extend(head, labels, names)


def _check_labels(block: Block) -> None:
    """Raise `DataError` for a sample without label, or of a class that the block does not list."""
    listed = block.y >= 0 if block.labels is None else np.isin(block.y, block.labels)
    bad = ~(listed & (block.y >= 0))
    if bad.any():
        row = int(np.argmax(bad))
        expected = "a class label >= 0" if block.y[row] < 0 else "one of the block's `labels`"
        fix = "select needs labels: pack the samples with theirs"
        raise DataError(_sample(block, row), f"label {int(block.y[row])}", expected, fix)


def _check_finite(values: Array, block: Block, what: str) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        raise DataError(
            _sample(block, int(np.argmax(bad))),
            f"{what} not finite",
            "finite numbers",
            "is the sample finite, and the model sound?",
        )


def _sample(block: Block, row: int) -> str:
    """How to name a sample in a message: by its place in the stream where that is known."""
    place = f"sample {int(block.columns['index'][row])}" if "index" in block.columns else f"sample {row}"
    return place if block.round is None else f"round {block.round}, {place}"
