"""Blocks joined, cut to another length and checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block, InputSpec, Preparation
from stages.artifacts.stream import open_records
from stages.data.blocks import check_labels, check_prepared, finite_rows, join_blocks, rebatch
from stages.errors import DataError


def block(y: list[int], names: dict[int, str] | None = None, **columns: list[float]) -> Block:
    """Samples whose features are 10 * label + position, so that every row can be recognised."""
    labels = np.array(y, np.int64)
    x = (10 * labels + np.arange(len(y)))[:, None].astype(np.float32)
    return Block(
        x=x,
        y=labels,
        layout="ND",
        columns={name: np.array(values) for name, values in columns.items()},
        labels=None if names is None else np.array(sorted(names), np.int64),
        names=None if names is None else tuple(names[label] for label in sorted(names)),
    )


# ---------------------------------------------------------------------------------------------------------------- join


def test_join_keeps_order_common_columns_and_agreeing_facts() -> None:
    a = replace(block([0, 1], index=[0, 1], score=[0.5, 0.6]), facts={"rate": 8, "round_fact": 1}, round=3)
    b = replace(block([2], index=[2]), facts={"rate": 8, "round_fact": 2})
    joined = join_blocks([a, b])
    assert joined.y.tolist() == [0, 1, 2]
    assert joined.x[:, 0].tolist() == [0, 11, 20]
    assert {name: values.tolist() for name, values in joined.columns.items()} == {"index": [0, 1, 2]}
    assert joined.facts == {"rate": 8}
    assert joined.round is None


def test_join_unites_names_and_finds_conflicts() -> None:
    joined = join_blocks([block([0], {0: "cat", 1: "dog"}), block([4], {1: "dog", 4: "emu"}), block([1])])
    assert joined.labels is not None
    assert dict(zip(joined.labels.tolist(), joined.names or (), strict=True)) == {0: "cat", 1: "dog", 4: "emu"}
    with pytest.raises(DataError, match=r"\[1\]: label 0 is 'dog', expected label 0 to be 'cat'.*--by-name"):
        join_blocks([block([0], {0: "cat"}), block([0], {0: "dog"})])
    with pytest.raises(DataError, match="'cat' to be label 0"):
        join_blocks([block([0], {0: "cat"}), block([1], {1: "cat"})])
    with pytest.raises(DataError, match="label 7 has no name"):
        join_blocks([block([0], {0: "cat"}), block([7])])


def test_join_by_name_renumbers_what_conflicts() -> None:
    joined = join_blocks([block([0, 1], {0: "dog", 1: "cat"}), block([0, 5], {0: "emu", 5: "dog"})], by_name=True)
    assert [joined.name_of(label) for label in joined.y.tolist()] == ["dog", "cat", "emu", "dog"]
    assert joined.y.tolist() == [1, 0, 2, 1]
    with pytest.raises(DataError, match="without class names"):
        join_blocks([block([0], {0: "dog"}), block([0])], by_name=True)


def test_join_keeps_listed_labels_without_names() -> None:
    listed = replace(block([3]), labels=np.array([3, 9]))
    joined = join_blocks([listed, block([1])])
    assert joined.labels is not None
    assert joined.labels.tolist() == [1, 3, 9]
    assert joined.names is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(block([0]), x=np.zeros((1, 2), np.float32)), "sample shape"),
        (replace(block([0]), x=np.zeros((1, 1), np.uint8)), "dtype"),
        (replace(block([0]), layout="NT"), "layout"),
    ],
)
def test_join_refuses_blocks_of_another_form(other: Block, message: str) -> None:
    with pytest.raises(DataError, match=message):
        join_blocks([block([0]), other])


def test_join_of_nothing() -> None:
    with pytest.raises(DataError, match="no blocks"):
        join_blocks([])


# ------------------------------------------------------------------------------------------------------------- rebatch


@given(st.lists(st.integers(0, 7), max_size=8), st.integers(1, 9))
def test_rebatch_keeps_every_sample_and_its_columns(lengths: list[int], size: int) -> None:
    total = sum(lengths)
    x = np.arange(total, dtype=np.float32)[:, None]
    pieces = [
        Block(x[stop - n : stop], np.arange(stop - n, stop), "ND", {"index": np.arange(stop - n, stop)})
        for n, stop in zip(lengths, np.cumsum(lengths), strict=True)
    ]
    out = list(rebatch(pieces, size))
    assert [len(b) for b in out] == [size] * (total // size) + [total % size] * (total % size > 0)
    assert [int(v) for b in out for v in b.x[:, 0]] == list(range(total))
    assert [int(v) for b in out for v in b.columns["index"]] == list(range(total))
    assert [int(v) for b in out for v in b.y] == list(range(total))


def test_rebatch_reads_no_further_than_it_must() -> None:
    asked = []

    def pieces():
        for i in range(10):
            asked.append(i)
            yield block([i, i])

    stream = rebatch(pieces(), 3)
    assert next(stream).y.tolist() == [0, 0, 1]
    assert asked == [0, 1]


# -------------------------------------------------------------------------------------------------------------- checks


def test_finite_rows() -> None:
    x = np.zeros((4, 2, 2), np.float32)
    x[1, 0, 1], x[3, 1, 1] = np.nan, -np.inf
    assert finite_rows(x).tolist() == [True, False, True, False]
    assert finite_rows(np.zeros((2, 3), np.uint8)).all()


def test_labels_below_zero_and_beyond_the_names() -> None:
    check_labels(np.array([0, 4, -1]), range(5), "ok")
    with pytest.raises(DataError, match=r"here: label -3 \(of 2"):
        check_labels(np.array([0, -1, -3, -2]), (), "here")
    with pytest.raises(DataError, match=r"label 5.*one of the 5 that have names"):
        check_labels(np.array([5]), range(5), "here")


GREY = InputSpec("image", (1, 8, 8))
PICTURE = Preparation(of="pictures", size=(8, 8), fit="crop", colour="gray")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"invert": True}, "pictures as they are, expected inverted"),
        ({"fit": "pad"}, "brought to their size by crop, expected by pad"),
        ({"colour": "rgb"}, "--colour gray, expected --colour rgb"),
        ({"sample_rate_hz": 8000}, "16000 samples per second, expected 8000"),
    ],
)
def test_what_was_done_to_the_same_kind_of_file_must_agree(other: dict[str, Any], message: str) -> None:
    mine, yours = replace(PICTURE, sample_rate_hz=16000), replace(PICTURE, **{"sample_rate_hz": 16000, **other})
    with pytest.raises(DataError, match=message):
        check_prepared(mine, yours, "here", "others")
    check_prepared(mine, None, "here", "others")
    check_prepared(replace(PICTURE, of="arrays"), replace(yours, sample_rate_hz=0), "here", "others")


def test_sizes_may_differ_and_colours_where_the_model_reads_grey() -> None:
    check_prepared(PICTURE, replace(PICTURE, size=(9, 9), scale=3.0, seconds=1.0), "here", "others")
    check_prepared(PICTURE, replace(PICTURE, size=None, fit="pad"), "here", "others")
    check_prepared(PICTURE, replace(PICTURE, colour="rgb"), "here", "others", GREY)
    with pytest.raises(DataError, match="--colour"):
        check_prepared(PICTURE, replace(PICTURE, colour="rgb"), "here", "others", replace(GREY, shape=(3, 8, 8)))


@pytest.mark.parametrize(
    "rows", [slice(None), slice(2, 7), slice(6, 3), slice(1, None, 3), slice(3, 5), slice(-2, None)]
)
def test_blocks_left_on_disk_join_as_those_in_memory_do(rows: slice, tmp_path: Path) -> None:
    parts = [block([0, 1, 2]), block([3, 4]), block([5, 6, 7, 8])]
    path = tmp_path / "parts.h5"
    path.write_bytes(b"".join(map(encode, parts)))
    lazy = join_blocks([each for each in open_records(path) if isinstance(each, Block)], in_memory=False)
    whole = join_blocks(parts)
    assert not isinstance(lazy.x, np.ndarray)
    assert (lazy.x.shape, lazy.x.dtype, len(lazy)) == (whole.x.shape, whole.x.dtype, len(whole))
    np.testing.assert_array_equal(lazy.take(rows).x, whole.take(rows).x)
    picked = np.array([8, 0, 3, 3, 4, 0])
    np.testing.assert_array_equal(lazy.take(picked).x, whole.take(picked).x)
    np.testing.assert_array_equal(lazy.take(whole.y % 2 == 1).x, whole.x[whole.y % 2 == 1])
    assert lazy.take(np.zeros(0, int)).x.shape == (0, 1)
    np.testing.assert_array_equal(np.asarray(lazy.x), whole.x)
    assert isinstance(join_blocks([lazy, parts[0]], in_memory=False).x, np.ndarray)
