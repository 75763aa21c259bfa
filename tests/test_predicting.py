"""`predict`: labels and probabilities for blocks and folders of images, in every form."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Array, Block, Head, Preparation
from stages.data.doors import blocks_for_model
from stages.errors import DataError, UsageError
from stages.importing import Importing, import_model
from stages.models.deploy import Backbone, deploy
from stages.models.heads import probabilities
from stages.models.inputs import adapt
from stages.predicting import (
    Predictions,
    chunks_of_blocks,
    csv_header,
    csv_lines,
    format_of,
    head_for,
    json_lines,
    known,
    predict,
    rows,
    with_columns,
)
from tests.rounding import check_probabilities, exact_features, longest_sum, no_worse, plain_features

NAMES = ("cat", "dog, small", "emu")
LABELS = np.array([2, 4, 9])


@pytest.fixture(scope="module", params=["native", "torch"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return deploy(import_model(Importing(arch="cnn4", arch_args={"width": 8})).model, engine=request.param)


@pytest.fixture
def head(backbone: Backbone) -> Head:
    weight = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    return Head("linear", LABELS, weight, np.zeros(3, np.float32), np.ones(3, bool), NAMES)


def images(n: int = 7) -> Array:
    return np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)


def block(n: int = 7) -> Block:
    return Block(images(n), LABELS[np.arange(n) % 3], "NHW", labels=LABELS, names=NAMES)


def answers(backbone: Backbone, head: Head, size: int = 3) -> list[Predictions]:
    return list(predict(backbone, head, chunks_of_blocks([block(4), block(3)], size)))


def test_answers_are_the_heads_in_order_and_in_any_chunks(backbone: Backbone, head: Head) -> None:
    x = np.concatenate([images(4), images(3)])
    inputs = adapt(x, "NHW", backbone.input)
    expected = probabilities(head, backbone.features(inputs))
    for size in (1, 3, 100):
        found = answers(backbone, head, size)
        assert max(len(part.predicted) for part in found) <= size
        check_probabilities(np.concatenate([part.probability for part in found]), head, backbone, inputs)
        labels = np.concatenate([part.predicted for part in found])
        assert labels.tolist() == LABELS[expected.argmax(1)].tolist()
        assert [name for part in found for name in part.chunk.names] == [str(i) for i in range(7)]


def test_progress_counts_samples_and_nothing_runs_ahead(backbone: Backbone, head: Head) -> None:
    seen: list[int] = []
    stream = predict(backbone, head, chunks_of_blocks([block(7)], 3), on_step=seen.append)
    next(stream)
    assert seen == [3]
    list(stream)
    assert seen == [3, 6, 7]


def test_csv_can_be_read_back(backbone: Backbone, head: Head) -> None:
    found = answers(backbone, head)
    text = csv_header(head) + "".join(csv_lines(part, head) for part in found)
    table = list(csv.DictReader(io.StringIO(text)))
    assert len(table) == 7
    assert table[1]["label"] == "dog, small"
    for row, probability in zip(table, np.concatenate([part.probability for part in found]), strict=True):
        assert row["predicted"] == NAMES[int(probability.argmax())]
        values = [float(row[f"p({name})"]) for name in NAMES]
        np.testing.assert_allclose(values, probability, rtol=1e-4)
        assert float(row["probability"]) == max(values)


def test_json_lines_can_be_read_back(backbone: Backbone, head: Head) -> None:
    found = answers(backbone, head)
    lines = "".join(json_lines(part, head) for part in found).splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 7
    assert first.keys() == {"sample", "predicted", "label", "probability", "probabilities"}
    assert first["probabilities"].keys() == set(NAMES)
    assert first["predicted"] == max(first["probabilities"], key=first["probabilities"].get)
    assert first["label"] == "cat"


def test_hdf5_is_the_samples_with_two_columns(backbone: Backbone, head: Head) -> None:
    answer = answers(backbone, head, 100)[0]
    found = decode(encode(with_columns(answer)))
    assert isinstance(found, Block)
    np.testing.assert_array_equal(np.asarray(found.x), images(4))
    assert found.columns["predicted"].dtype == np.int64
    assert found.columns["probability"].dtype == np.float32
    np.testing.assert_array_equal(found.columns["probability"], answer.probability)
    np.testing.assert_array_equal(found.columns["predicted"], answer.predicted)


def test_rows_show_names_or_labels(backbone: Backbone, head: Head) -> None:
    nameless = replace(head, names=None)
    answer = answers(backbone, nameless, 100)[0]
    assert {row[1] for row in rows(answer, nameless)} <= {"2", "4", "9"}
    assert [row[0] for row in rows(answer, nameless)] == ["0", "1", "2", "3"]
    assert csv_header(nameless) == "sample,predicted,label,probability,p(2),p(4),p(9)\n"


# -------------------------------------------------------------------------------------------------- folders of images


def folder_of_images(folder: Path) -> Array:
    """Three grey 28x28 pictures, one of them in a sub-folder, and a file that is none."""
    x = images(3)
    (folder / "sub").mkdir()
    for name, picture in zip(("b.png", "a.PNG", "sub/c.bmp"), x, strict=True):
        Image.fromarray(picture).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return x[[1, 0, 2]]


def test_a_folder_of_images_is_read_in_order_of_name(backbone: Backbone, head: Head, tmp_path: Path) -> None:
    x = folder_of_images(tmp_path)
    blocks = blocks_for_model(tmp_path, backbone.input, labelled=False)
    found = list(predict(backbone, head, chunks_of_blocks(blocks, 2)))
    assert [name for part in found for name in part.chunk.names] == ["a.PNG", "b.png", "sub/c.bmp"]
    answered = np.concatenate([part.probability for part in found])
    check_probabilities(answered, head, backbone, adapt(x, "NHW", backbone.input))
    assert {row[2] for row in rows(found[0], head)} == {""}
    assert "label" not in json.loads(json_lines(found[0], head).splitlines()[0])
    written = decode(encode(with_columns(found[0])))
    assert isinstance(written, Block)
    assert written.y.tolist() == [-1, -1]
    assert written.columns["source"].tolist() == [b"a.PNG", b"b.png"]


def test_samples_that_were_prepared_in_another_way_are_refused(backbone: Backbone, head: Head) -> None:
    learnt = Preparation(of="pictures", invert=True)
    other = replace(block(), prepared=Preparation(of="pictures"))
    with pytest.raises(DataError, match="pictures as they are, expected inverted, as in those that the model learnt"):
        list(predict(backbone, head, chunks_of_blocks([other], 9), learnt=learnt))
    for same in (block(), replace(other, prepared=learnt)):
        assert list(predict(backbone, head, chunks_of_blocks([same], 9), learnt=learnt))


# ------------------------------------------------------------------------------------------------------------- heads


def test_the_head_is_the_records_or_that_of_the_support(backbone: Backbone, head: Head) -> None:
    model = import_model(Importing(arch="cnn4", arch_args={"width": 8})).model
    with pytest.raises(UsageError, match="no head"):
        head_for(model, backbone, None, 4)
    assert head_for(replace(model, head=head), backbone, None, 4) is head
    made = head_for(replace(model, head=head), backbone, block(7), 2)
    assert made.names == NAMES
    inputs, members = adapt(images(7), "NHW", backbone.input), np.arange(7) % 3 == 0
    plain, exact = (features(backbone, inputs)[members].mean(0) for features in (plain_features, exact_features))
    no_worse(made.weight[0], plain, exact, longest_sum(backbone.graph))


@pytest.mark.parametrize(("kind", "scale"), [("prototypes", 25.0), ("linear", 10.0)])
def test_a_supports_head_has_the_scale_that_the_record_has_learned(backbone, head, kind, scale) -> None:
    """Meta-training learns it with the backbone: another one makes the same answers surer or less sure."""
    model = replace(import_model(Importing(arch="cnn4", arch_args={"width": 8})).model, head=replace(head, kind=kind))
    known = replace(model, head=replace(model.head, scale=25.0))
    assert head_for(known, backbone, block(7), 2).scale == scale


@pytest.mark.parametrize(
    ("out", "wanted", "expected"),
    [
        ("-", None, "table"),
        ("a.csv", None, "csv"),
        ("a.CSV", None, "csv"),
        ("a.h5", None, "hdf5"),
        ("a.txt", None, "table"),
        ("/dev/null", None, "table"),
        ("a.csv", "jsonl", "jsonl"),
        ("a.json", "jsonl", "jsonl"),
    ],
)
def test_format_by_name(out: str, wanted: str | None, expected: str) -> None:
    assert format_of(out, wanted) == expected


def test_wrong_settings(backbone: Backbone) -> None:
    wrong: Any = "xml"
    with pytest.raises(UsageError, match="'xml', expected table, csv, jsonl, hdf5"):
        format_of("-", wrong)
    for name in ("a.json", "a.tsv", "b.png"):
        with pytest.raises(UsageError, match=r"suffix '\.\w+', expected \.txt, \.csv, \.jsonl.*--format"):
            format_of(name, None)
    with pytest.raises(UsageError, match="--micro-batch"):
        list(chunks_of_blocks([block()], 0))
    with pytest.raises(DataError, match="no run record before the samples"):
        known(None)
