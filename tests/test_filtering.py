"""`filter` as a stage: rounds, laziness, and independence of how the stream is cut into blocks."""

import numpy as np
import pytest

from stages.artifacts.records import Block, End
from stages.errors import DataError, UsageError
from stages.filtering import CHUNK, Filtering, filter_stream
from stages.valuation.coarse import FILTERS


def stream(n=250, cuts=(), classes=4, **others):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 5)).astype(np.float32), rng.integers(0, classes, n)
    return [Block(x[rows], y[rows], "ND", **others) for rows in np.split(np.arange(n), list(cuts))]


def raw(block):
    return np.asarray(block.x, np.float64)


def rounds(blocks, **settings):
    *found, end = filter_stream(blocks, Filtering(**settings), features=raw, seed=3)
    assert end == End(len(found))
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.x, b.x)
        np.testing.assert_array_equal(a.columns["weight"], b.columns["weight"])
        np.testing.assert_array_equal(a.per_class["seen"], b.per_class["seen"])


def test_a_round_per_window_and_the_rest():
    found = rounds(stream())
    assert [block.round for block in found] == [0, 1, 2]
    assert [len(block) for block in found] == [30, 30, 30]
    assert [int(block.per_class["seen"].sum()) for block in found] == [100, 100, 50]
    for block in found:
        window = range(100 * block.round, 100 * block.round + 100)
        assert all(place in window for place in block.columns["index"].tolist())


def test_a_last_window_smaller_than_the_places_is_kept_whole():
    assert [len(block) for block in rounds(stream(107))] == [30, 7]


def test_a_window_that_is_just_full_is_emitted_once():
    assert len(rounds(stream(200))) == 2
    assert len(rounds(stream(2 * CHUNK), window=4 * CHUNK, keep=10)) == 1


def test_nothing_in_nothing_out():
    assert rounds([]) == []
    assert rounds(stream(0)) == []


@pytest.mark.parametrize("strategy", FILTERS)
def test_how_the_stream_is_cut_changes_nothing(strategy):
    expected = rounds(stream(), strategy=strategy, keep=20)
    assert_same(rounds(stream(cuts=(1, 2, 99, 100, 230)), strategy=strategy, keep=20), expected)
    assert_same(rounds(stream(cuts=range(10, 250, 10)), strategy=strategy, keep=20), expected)


@pytest.mark.parametrize("cuts", [(), range(300, 1200, 300)])
def test_windows_longer_than_a_chunk(cuts):
    """More classes than places, so that the order of arrival matters to the strata."""
    found = rounds(stream(1200, cuts, classes=40), window=600, keep=20)
    assert_same(found, rounds(stream(1200, range(7, 1200, 7), classes=40), window=600, keep=20))
    assert [int(block.per_class["seen"].sum()) for block in found] == [600, 600]


def test_the_stream_is_read_as_rounds_are_taken():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield stream(40)[0]

    found = filter_stream(endless(), Filtering(), seed=0)
    next(found)
    assert len(taken) == 3
    next(found)
    assert len(taken) == 5


def test_a_large_block_is_read_slice_by_slice():
    class OnDisk:
        """Samples that only come in slices no longer than a window."""

        shape, dtype = (1000, 2), np.dtype(np.float32)

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            rows = range(1000)[index]
            assert len(rows) <= 100
            return np.zeros((len(rows), 2), np.float32)

    block = Block(OnDisk(), np.arange(1000) % 3, "ND")
    assert len(rounds([block])) == 10


def test_the_seed_decides():
    one = list(filter_stream(stream(), Filtering(), seed=1))
    assert_same(one[:-1], list(filter_stream(stream(), Filtering(), seed=1))[:-1])
    other = list(filter_stream(stream(), Filtering(), seed=2))
    assert not np.array_equal(one[0].columns["index"], other[0].columns["index"])


def test_progress_and_warnings_are_callbacks():
    steps, notes = [], []
    list(filter_stream(stream(), Filtering(), on_step=steps.append, on_note=notes.append))
    assert (steps, notes) == ([1, 2, 3], [])
    list(filter_stream(stream(), Filtering(strategy="rep-div"), features=raw, on_note=notes.append))
    assert "constant within a class" in notes[0]


def test_blocks_that_do_not_fit_are_refused():
    mixed = [stream(50)[0], Block(np.zeros((9, 4), np.float32), np.zeros(9, np.int64), "ND")]
    with pytest.raises(DataError, match="sample shape"):
        rounds(mixed)


def test_features_need_a_model():
    with pytest.raises(UsageError, match="without a model"):
        next(filter_stream(stream(), Filtering(strategy="rep")))
    next(filter_stream(stream(), Filtering(strategy="quota")))


@pytest.mark.parametrize(
    "wrong",
    [{"window": 0}, {"keep": 0}, {"keep": 101}, {"strategy": "best"}, {"decay": 0.0}, {"decay": 1.5}],
    ids=str,
)
def test_settings_check_themselves(wrong):
    with pytest.raises(UsageError, match=f"--{next(iter(wrong))}"):
        Filtering(**wrong)
