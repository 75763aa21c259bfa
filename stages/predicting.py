"""`predict`: labels and probabilities for sample blocks or images, chunk by chunk."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from stages.artifacts.records import Array, Block, Head, InputSpec, Model, Run
from stages.data.images import SUFFIXES, ImageForm, read_image
from stages.errors import DataError, InputMissing, UsageError, require
from stages.models import heads
from stages.models.deploy import Backbone
from stages.models.inputs import adapt

FORMATS = ("table", "csv", "jsonl", "hdf5")
SUFFIX_FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".h5": "hdf5", ".hdf5": "hdf5"}


@dataclass(frozen=True)
class Chunk:
    """Samples to predict, at most a few hundred."""

    block: Block
    """For images without labels `y` is all zeros; nothing reads it."""
    names: tuple[str, ...]
    """File name, or position in the input as text."""
    labelled: bool
    """Whether `block.y` are true classes."""


@dataclass(frozen=True)
class Predictions:
    """Answers for one chunk."""

    chunk: Chunk
    predicted: Array
    """int64 (N,): class labels."""
    probability: Array
    """float32 (N, C): one column per row of the head."""


def predict(
    backbone: Backbone, head: Head, chunks: Iterable[Chunk], *, on_step: Callable[[int], object] = lambda done: None
) -> Iterator[Predictions]:
    """Class probabilities of every sample; `on_step` gets the number of samples done.

    Raises `DataError` for samples that the model cannot read.
    """
    done = 0
    for chunk in chunks:
        features = backbone.features(adapt(np.asarray(chunk.block.x), chunk.block.layout, backbone.input))
        probability = heads.probabilities(head, features)
        predicted = head.labels[torch.argmax(probability, 1).numpy()]
        done += len(predicted)
        on_step(done)
        yield Predictions(chunk, predicted, probability.numpy())


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
    inputs = (adapt(np.asarray(part.x), part.layout, backbone.input) for part in support.slices(chunk))
    features = torch.cat([backbone.features(x) for x in inputs])
    scale = heads.cosine_scale(model.head)
    return heads.prototype_head(features, support.y, heads.class_names(support), scale=scale)


def known(run: Run | None) -> Run:
    """The run record that a stream begins with. Raises `DataError` when it has none."""
    if run is None:
        raise DataError("stream", "no run record before the samples", "the model first", "name it, or give --run FILE")
    return run


def chunks_of_blocks(blocks: Iterable[Block], size: int) -> Iterator[Chunk]:
    """The samples of blocks, numbered through, at most `size` at a time."""
    require(size > 0, "--micro-batch", str(size), "a positive number of samples")
    first = 0
    for block in blocks:
        for part in block.slices(size):
            names = tuple(str(first + i) for i in range(len(part)))
            first += len(part)
            yield Chunk(part, names, labelled=True)


def chunks_of_images(folder: Path, spec: InputSpec, size: int) -> Iterator[Chunk]:
    """The image files of a folder and its sub-folders in order of name, brought to the model's size.

    Raises `InputMissing` when there is none, `UsageError` for a model that reads no images.
    """
    require(size > 0, "--micro-batch", str(size), "a positive number of samples")
    require(
        spec.kind == "image", str(folder), f"a folder of images for a model that reads {spec.kind}", "sample blocks"
    )
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise InputMissing(str(folder), "no images", ", ".join(sorted(SUFFIXES)))
    channels, height, width = spec.shape
    form = ImageForm(size=(height, width), colour="gray" if channels == 1 else "rgb")
    for start in range(0, len(paths), size):
        some = paths[start : start + size]
        x = np.stack([read_image(path, form) for path in some])
        block = Block(x, np.zeros(len(some), np.int64), "NHW" if channels == 1 else "NHWC")
        yield Chunk(block, tuple(str(path.relative_to(folder)) for path in some), labelled=False)


# ------------------------------------------------------------------------------------------------------------- forms


def class_names(head: Head) -> tuple[str, ...]:
    """A name for each row of the head: its class's name, or its label as text."""
    return head.names or tuple(str(label) for label in head.labels)


def rows(predictions: Predictions, head: Head) -> Iterator[tuple[str, str, str, float]]:
    """Sample, predicted class, true class (empty if unknown) and the probability of the predicted one."""
    by_label = dict(zip(head.labels.tolist(), class_names(head), strict=True))
    chunk = predictions.chunk
    for i, (sample, label) in enumerate(zip(chunk.names, predictions.predicted.tolist(), strict=True)):
        true = chunk.block.name_of(int(chunk.block.y[i])) if chunk.labelled else ""
        yield sample, by_label[label], true, float(predictions.probability[i].max())


def format_of(out: str, wanted: str | None) -> str:
    """The wanted format, or the one that the output's name asks for; a table otherwise."""
    require(wanted is None or wanted in FORMATS, "--format", repr(wanted), ", ".join(FORMATS))
    return wanted or SUFFIX_FORMATS.get(Path(out).suffix, "table")


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
        known = {"label": true} if predictions.chunk.labelled else {}
        answer = {"sample": sample, "predicted": name, **known, "probability": round(p, 6), "probabilities": by_class}
        lines.append(json.dumps(answer, ensure_ascii=False) + "\n")
    return "".join(lines)


def with_columns(predictions: Predictions) -> Block:
    """The samples as a block with the columns `predicted` (int64) and `probability` (float32, one per class)."""
    if not predictions.chunk.labelled:
        raise DataError(
            "--format",
            "hdf5 for images without labels",
            "csv or jsonl",
            "or make labelled blocks of them with `edgetrain pack`",
        )
    block = predictions.chunk.block
    columns = {"predicted": predictions.predicted, "probability": predictions.probability}
    return replace(block, columns={**block.columns, **columns})
