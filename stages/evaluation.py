"""The command `evaluate` on samples: accuracy of a run record; its head answers, or class means of a support set do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from stages.artifacts.records import Array, Block, Head, Run
from stages.data.blocks import check_prepared
from stages.errors import DataError, UsageError
from stages.fsl.intervals import Interval, wilson
from stages.losses import cross_entropy
from stages.measurement.need import to_infer
from stages.measurement.room import Fit, fit
from stages.models import heads
from stages.models.deploy import Backbone, deploy
from stages.models.inputs import adapt_block
from stages.settings.evaluation import Tasks as Tasks

CHUNK = 256
"""Most samples that are answered at once, unless told otherwise."""


@dataclass(frozen=True)
class ClassAccuracy:
    """One class's share of right answers."""

    label: int
    name: str
    samples: int
    hits: int

    @property
    def interval(self) -> Interval:
        return wilson(self.hits, self.samples)


@dataclass(frozen=True)
class Accuracy:
    """Right answers on labelled samples, by class."""

    classes: tuple[ClassAccuracy, ...]
    loss: float
    """Mean cross-entropy."""

    @property
    def samples(self) -> int:
        return sum(each.samples for each in self.classes)

    @property
    def hits(self) -> int:
        return sum(each.hits for each in self.classes)

    @property
    def interval(self) -> Interval:
        """Share of right answers with Wilson's 95 % interval."""
        return wilson(self.hits, self.samples)


def evaluate(
    run: Run,
    blocks: Iterable[Block],
    *,
    support: Block | None = None,
    chunk: int | None = None,
    on_step: Callable[[int], None] = lambda done: None,
    on_fit: Callable[[Fit], None] = lambda fit: None,
    on_note: Callable[[str], None] = lambda text: None,
    allow: str | None = None,
    engine: str = "auto",
    device: str = "cpu",
    same_bits: bool = False,
) -> Accuracy:
    """Accuracy on labelled samples, `chunk` of them in memory at a time (None: as many as fit).

    `on_step` gets the number done, `on_fit` how many are in memory at once; `engine` runs the backbone on
    `device` (with `same_bits` as on any machine); `on_note` hears where it is another one than a user would expect.

    With `support` its class means answer, instead of the record's head.

    Raises:
        DataError: no samples, samples that the model cannot read, or a class that the head does not know.
        UsageError: no head and no support.
    """
    backbone = deploy(run.model, allow=allow, engine=engine, device=device, same_bits=same_bits, on_note=on_note)
    held = fit(to_infer(backbone), chunk or CHUNK, wanted=chunk)
    on_fit(held)
    chunk = held.samples
    head = _support_head(backbone, run.model.head, support, chunk) if support is not None else run.model.head
    if head is None or not len(head.labels):
        fix = "adapt it with `edgetrain train-sparse`, or name labelled samples with --support"
        raise UsageError("/model/head", "the model knows no class", "classes to tell apart", fix)
    learnt = backbone.input.prepared if support is None else support.prepared
    counts = {int(label): np.zeros(2, np.int64) for label in head.labels}
    names: dict[int, str] = {}
    loss, done = 0.0, 0
    for block in (part for whole in blocks for part in whole.slices(chunk)):
        check_prepared(block.prepared, learnt, "samples", "those that the model learnt from", backbone.input)
        rows, scores = _scores(backbone, head, block)
        loss += float(cross_entropy(scores, rows)[0].sum())
        for row, right in zip(rows.tolist(), (scores.argmax(1) == rows).tolist(), strict=True):
            counts[int(head.labels[row])] += (1, right)
        names.update(heads.class_names(block) or {})
        done += len(block)
        on_step(done)
    if not done:
        raise DataError("samples", "none", "labelled samples to evaluate on")
    return Accuracy(tuple(_class_rows(head, counts, names)), loss / done)


def _scores(backbone: Backbone, head: Head, block: Block) -> tuple[Array, Array]:
    """Head rows (N,) of the samples' classes, and class scores (N, C)."""
    features = backbone.features(adapt_block(block, backbone.input))
    return heads.rows(head, block.y, heads.class_names(block)), heads.logits(head, features)


def _support_head(backbone: Backbone, known: Head | None, support: Block, chunk: int) -> Head:
    """Class means of a support set, with the cosine scale that the record has learned."""
    if not len(support):
        raise DataError("support", "no samples", "at least one per class")
    parts = [adapt_block(part, backbone.input) for part in support.slices(chunk)]
    features = np.concatenate([backbone.features(part) for part in parts])
    return heads.prototype_head(features, support.y, heads.class_names(support), scale=heads.cosine_scale(known))


def _class_rows(head: Head, counts: Mapping[int, Array], names: Mapping[int, str]) -> Iterator[ClassAccuracy]:
    for row, (label, (samples, hits)) in enumerate(sorted(counts.items())):
        name = head.names[row] if head.names else names.get(label, str(label))
        if samples:
            yield ClassAccuracy(label, name, int(samples), int(hits))
