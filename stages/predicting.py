"""`predict`: labels and probabilities for samples of any kind, chunk by chunk."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stages.artifacts.codec import text_tuple
from stages.artifacts.records import Array, Block, Head, Model, Preparation, Run
from stages.data.blocks import check_prepared
from stages.errors import DataError, UsageError, require
from stages.models import heads
from stages.models.deploy import Backbone
from stages.models.inputs import adapt_block

FORMATS = ("table", "csv", "jsonl", "hdf5")
SUFFIX_FORMATS = {"": "table", ".txt": "table", ".csv": "csv", ".jsonl": "jsonl", ".h5": "hdf5", ".hdf5": "hdf5"}
STDOUT = "-"


@dataclass(frozen=True)
class Chunk:
    """Samples to predict, at most a few hundred."""

    block: Block
    names: tuple[str, ...]
    """The file that each came from, or its position in the input as text."""


@dataclass(frozen=True)
class Predictions:
    """Answers for one chunk."""

    chunk: Chunk
    predicted: Array
    """int64 (N,): class labels."""
    probability: Array
    """float32 (N, C): one column per row of the head."""


def predict(
    backbone: Backbone,
    head: Head,
    chunks: Iterable[Chunk],
    *,
    learnt: Preparation | None = None,
    on_step: Callable[[int], object] = lambda done: None,
) -> Iterator[Predictions]:
    """Class probabilities of every sample.

    Args:
        learnt: how the samples were prepared that the head learnt from.
        on_step: gets the number of samples done.

    Raises:
        DataError: samples that the model cannot read, or that were prepared in another way.
    """
    done = 0
    for chunk in chunks:
        check_prepared(chunk.block.prepared, learnt, "samples", "those that the model learnt from", backbone.input)
        probability = heads.probabilities(head, backbone.features(adapt_block(chunk.block, backbone.input)))
        predicted = head.labels[probability.argmax(1)]
        done += len(predicted)
        on_step(done)
        yield Predictions(chunk, predicted, probability.astype(np.float32))


def head_for(model: Model, backbone: Backbone, support: Block | None, chunk: int) -> Head:
    """The record's head, or prototypes of the classes of `support` with the cosine scale that the record has learned.

    Raises `UsageError` when there is neither.
    """
    if support is None:
        if model.head is None or not len(model.head.labels):
            raise UsageError(
                "/model/head",
                "the model has no head",
                "classes to tell apart",
                "adapt it with `edgetrain train-sparse`, or name labelled samples with --support",
            )
        return model.head
    features = np.concatenate([backbone.features(adapt_block(part, backbone.input)) for part in support.slices(chunk)])
    scale = heads.cosine_scale(model.head)
    return heads.prototype_head(features, support.y, heads.class_names(support), scale=scale)


def known(run: Run | None) -> Run:
    """The run record that a stream begins with. Raises `DataError` when it has none."""
    if run is None:
        raise DataError("stream", "no run record before the samples", "the model first", "name it, or give --run FILE")
    return run


def chunks_of_blocks(blocks: Iterable[Block], size: int) -> Iterator[Chunk]:
    """The samples of blocks, at most `size` at a time: by their files where blocks say them, else numbered through."""
    require(size > 0, "--micro-batch", str(size), "a positive number of samples")
    first = 0
    for block in blocks:
        for part in block.slices(size):
            files = part.columns.get("source")
            numbers = range(first, first + len(part))
            first += len(part)
            yield Chunk(part, text_tuple(files) if files is not None else tuple(map(str, numbers)))


# ------------------------------------------------------------------------------------------------------------- forms


def class_names(head: Head) -> tuple[str, ...]:
    """A name for each row of the head: its class's name, or its label as text."""
    return head.names or tuple(str(label) for label in head.labels)


def rows(predictions: Predictions, head: Head) -> Iterator[tuple[str, str, str, float]]:
    """Sample, predicted class, true class (empty if unknown) and the probability of the predicted one."""
    by_label = dict(zip(head.labels.tolist(), class_names(head), strict=True))
    chunk = predictions.chunk
    for i, (sample, label) in enumerate(zip(chunk.names, predictions.predicted.tolist(), strict=True)):
        true = chunk.block.name_of(int(chunk.block.y[i])) if chunk.block.y[i] >= 0 else ""
        yield sample, by_label[label], true, float(predictions.probability[i].max())


def format_of(out: str, wanted: str | None) -> str:
    """The wanted format, or the one that the output's name asks for, or a table on stdout.

    Raises `UsageError` for a name that asks for none that there is.
    """
    require(wanted is None or wanted in FORMATS, "--format", repr(wanted), ", ".join(FORMATS))
    suffix = "" if out == STDOUT else Path(out).suffix
    known = ", ".join(filter(None, SUFFIX_FORMATS))
    fix = "`--format` says what the file is to hold"
    require(wanted is not None or suffix.lower() in SUFFIX_FORMATS, "--out", f"suffix {suffix!r}", known, fix)
    return wanted or SUFFIX_FORMATS[suffix.lower()]


def csv_header(head: Head) -> str:
    """`sample,predicted,label,probability`, then one column `p(<class>)` per class."""
    return _csv_line(["sample", "predicted", "label", "probability", *(f"p({name})" for name in class_names(head))])


def csv_lines(predictions: Predictions, head: Head) -> str:
    """One line per sample."""
    return "".join(
        _csv_line([sample, name, true, f"{p:.6g}", *(f"{value:.6g}" for value in all_of_them)])
        for (sample, name, true, p), all_of_them in zip(rows(predictions, head), predictions.probability, strict=True)
    )


def _csv_line(values: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def json_lines(predictions: Predictions, head: Head) -> str:
    """One JSON object per sample: sample, predicted, label (if known), probability, probabilities by class."""
    lines = []
    for (sample, name, true, p), values in zip(rows(predictions, head), predictions.probability, strict=True):
        by_class = {key: round(float(value), 6) for key, value in zip(class_names(head), values, strict=True)}
        known = {"label": true} if true else {}
        answer = {"sample": sample, "predicted": name, **known, "probability": round(p, 6), "probabilities": by_class}
        lines.append(json.dumps(answer, ensure_ascii=False) + "\n")
    return "".join(lines)


def with_columns(predictions: Predictions) -> Block:
    """The samples as a block with the columns `predicted` (int64) and `probability` (float32, one per class)."""
    block = predictions.chunk.block
    columns = {"predicted": predictions.predicted, "probability": predictions.probability}
    return replace(block, columns={**block.columns, **columns})
