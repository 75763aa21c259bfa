"""Reading samples by position: in any order, from arrays, chains of arrays and files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data import samples
from stages.data.samples import (
    Chain,
    FileReader,
    Notes,
    Prepared,
    Source,
    class_numbers,
    classes_of_texts,
    column_of,
    gather,
)
from stages.errors import DataError


class OnDisk:
    """An array that, as a file does, takes slices only; it counts what is read."""

    def __init__(self, x: np.ndarray) -> None:
        self._x, self.read = x, 0

    shape = property(lambda self: self._x.shape)
    dtype = property(lambda self: self._x.dtype)

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: Any) -> np.ndarray:
        assert isinstance(index, slice)
        self.read += len(self._x[index])
        return self._x[index]


@given(st.integers(1, 40), st.lists(st.integers(0, 39), max_size=60), st.integers(1, 9))
def test_gather_equals_plain_indexing(length: int, rows: list[int], slab_rows: int) -> None:
    x = np.arange(length * 4, dtype=np.int16).reshape(length, 2, 2)
    wanted = np.array([row % length for row in rows], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "SLAB_BYTES", slab_rows * 8)
        file = OnDisk(x)
        assert np.array_equal(gather(file, wanted), x[wanted])
    assert file.read <= length
    assert np.array_equal(gather(x, wanted), x[wanted])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_a_chain_is_the_concatenation(lengths: list[int], data: st.DataObject) -> None:
    whole = np.arange(sum(lengths) * 2).reshape(-1, 2)
    chain = Chain(np.split(whole, np.cumsum(lengths)[:-1]), "here")
    start, stop = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole)))
    assert chain.shape == whole.shape
    assert np.array_equal(chain[start:stop], whole[start:stop])
    rows = np.array(data.draw(st.permutations(range(len(whole)))), np.int64)
    assert np.array_equal(gather(chain, rows), whole[rows])


def test_files_of_different_shapes_need_one_size() -> None:
    shapes = {0: (2,), 1: (3,), 2: (2,)}
    reader = FileReader(lambda row: np.zeros(shapes[row]), lambda row: f"file{row}", "state one size with `--size`")
    bad: list[DataError] = []
    x, good = reader.read(np.array([0, 1, 2]), bad.append)
    assert (x.shape, good.tolist()) == ((2, 2), [0, 2])
    assert str(bad[0]) == "file1: shape (3,), expected (2,) as the first; state one size with `--size`"
    assert reader.read(np.array([1]), bad.append)[0].shape == (0, 2)


def test_prepared_brings_samples_to_a_form() -> None:
    reader = Prepared(samples.ArrayReader(np.ones((4, 6))), lambda x: x.reshape(-1, 2, 3))
    x, good = reader.read(np.array([3, 1]), lambda error: None)
    assert (x.shape, good.tolist()) == ((2, 2, 3), [0, 1])
    assert reader.span == samples.AHEAD_BYTES // 48


def test_a_column_as_long_as_the_labels() -> None:
    with pytest.raises(DataError, match="column user: 2 values, expected 3"):
        Source("here", np.zeros(3, np.int64), samples.ArrayReader(np.zeros((3, 1))), "ND", None, {"user": np.zeros(2)})


def test_columns_take_the_narrowest_type_that_holds_them() -> None:
    assert column_of(["1", "-2"]).dtype == np.int64
    assert column_of(["1", "2.5"]).dtype == np.float64
    assert column_of(["1", "é"]).tolist() == [b"1", "é".encode()]
    assert column_of([str(2**70), "1"]).dtype.kind == "S"


@pytest.mark.parametrize("texts", [["007", "12"], ["1e5", "2"], ["1_000"], ["1.10", "1.1"], ["", "1"], ["+1"], ["nan"]])
def test_ids_that_numbers_would_change_stay_texts(texts: list[str]) -> None:
    assert column_of(texts).tolist() == [text.encode() for text in texts]


@given(st.lists(st.text(max_size=5), min_size=1))
def test_class_numbers_point_back_to_the_names(classes: list[str]) -> None:
    y, labels, names = class_numbers(classes)
    assert labels is not None
    assert names is not None
    name_of = dict(zip(labels.tolist(), names, strict=True))
    assert [name_of.get(label, "") for label in y.tolist()] == classes
    assert (np.diff(labels) > 0).all()
    assert set(names) == set(classes) - {""}


def test_names_that_are_numbers_keep_their_numbers() -> None:
    assert class_numbers(["10", "2", "2"]).y.tolist() == [10, 2, 2]
    assert class_numbers(["00010", "00002"]).names == ("00002", "00010")
    for not_numbers in (["10", "2", "x"], ["7", "007"], ["1" * 19, "2"], ["²", "1"]):
        assert sorted(class_numbers(not_numbers).y.tolist()) == list(range(len(not_numbers)))


def test_classes_of_a_tables_texts() -> None:
    assert classes_of_texts(["3", "1", ""], "t") == (pytest.approx(np.array([3, 1, -1])), None, None)
    assert classes_of_texts(["1.0", "2.0"], "t").y.tolist() == [1, 2]
    assert classes_of_texts(["a", "", "b"], "t").y.tolist() == [0, -1, 1]
    assert classes_of_texts(["007", "12"], "t").names == ("007", "12")
    with pytest.raises(DataError, match="t: labels: numbers with fractions"):
        classes_of_texts(["0.5", "1"], "t")


def test_notes_count_and_name_a_few() -> None:
    notes = Notes()
    notes.say("a guess")
    notes.say("a guess")
    for i in range(5):
        notes.count("left out {} files", f"{i}.txt")
    assert notes.lines() == ["a guess", "left out 5 files: 0.txt, 1.txt, 2.txt, ..."]
