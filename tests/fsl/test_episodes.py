import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts.records import Block
from stages.errors import DataError, SchemaError, UsageError
from stages.fsl.episode_list import data_hash, from_tree, to_tree
from stages.fsl.episodes import (
    FixedShape,
    VariousShape,
    check_pool,
    draw_episodes,
    pool_of,
    query_size,
    shots_per_class,
    support_size,
)


def block(sizes, names=None, **columns):
    """A block with so many samples per class, mixed up."""
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)) * 3, sizes)).astype(np.int64)
    labels = np.arange(len(sizes), dtype=np.int64) * 3
    columns = {name: np.asarray(values) for name, values in columns.items()}
    return Block(np.zeros((len(y), 2), np.float32), y, "ND", columns, labels if names else None, names)


def check_episode(data, task):
    assert len(np.intersect1d(task.support, task.query)) == 0
    assert len(np.unique(task.support)) == len(task.support)
    assert len(np.unique(task.query)) == len(task.query)
    assert len(np.unique(task.classes)) == task.ways
    assert np.array_equal(data.y[task.support], task.classes[task.support_labels])
    assert np.array_equal(data.y[task.query], task.classes[task.query_labels])
    assert set(task.support_labels) == set(task.query_labels) == set(range(task.ways))


def test_sizes_by_hand():
    # Meta-Dataset's formulas (Triantafillou et al., arXiv:1903.03096, appendix)
    assert query_size(np.array([30, 7, 100]), 10) == 3
    assert query_size(np.array([30, 40]), 10) == 10
    # floor(.5 * 20 + 1) + floor(.5 * 100 + 1) = 11 + 51, then the cap
    assert support_size(np.array([20, 250]), 0.5, 500, 100) == 62
    assert support_size(np.array([20, 250]), 0.5, 50, 100) == 50
    # R = (1/4, 3/4) of (10 - 2) = 2, 6, plus one each; the second class has only 4 left
    assert shots_per_class(np.array([10, 30]), np.array([8, 4]), 10, np.zeros(2)).tolist() == [3, 4]
    # alpha = log 3 for the smaller class makes them equal
    assert shots_per_class(np.array([10, 30]), np.array([8, 28]), 10, np.array([np.log(3), 0])).tolist() == [5, 5]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=5, max_size=12), st.integers(0, 1000))
def test_various_tasks_are_well_formed(sizes, number):
    data = block(sizes)
    (task,) = draw_episodes(pool_of(data), VariousShape(), 7, [number])
    check_episode(data, task)
    of_class = np.array(sizes)[task.classes // 3]
    assert 5 <= task.ways <= len(sizes)
    queries = np.bincount(task.query_labels)
    assert (queries == min(10, of_class.min() // 2)).all()
    assert len(task.support) <= 500


def test_statistics_over_many_tasks_match_the_formulas():
    """20 classes of 20 samples, as in Omniglot: the means over 10,000 tasks against numerical expectations."""
    pool = pool_of(block([20] * 20))
    tasks = list(draw_episodes(pool, VariousShape(), 0, range(10_000)))
    ways = np.array([task.ways for task in tasks])
    support = np.array([len(task.support) for task in tasks])
    assert ways.min() == 5
    assert ways.max() == 20
    assert ways.mean() == pytest.approx(12.5, abs=4 * np.std(ways) / 100)
    assert all(len(task.query) == 10 * task.ways for task in tasks)
    # an independent simulation of them, vectorised over tasks with plain numpy
    rng = np.random.default_rng(1)
    expected = []
    for _ in range(10_000):
        c = rng.integers(5, 21)
        total = min(500, c * np.floor(rng.random() * 10 + 1))
        weight = np.exp(rng.uniform(np.log(0.5), np.log(2), c))
        expected.append(np.minimum(np.floor(weight / weight.sum() * (total - c)) + 1, 10).sum())
    error = np.hypot(np.std(support), np.std(expected)) / 100
    assert support.mean() == pytest.approx(np.mean(expected), abs=4 * error)


def test_a_task_depends_on_its_number_alone():
    pool = pool_of(block([20] * 8))
    shape = VariousShape()
    alone = next(iter(draw_episodes(pool, shape, 3, [5])))
    among = list(draw_episodes(pool, shape, 3, range(8)))[5]
    other = next(iter(draw_episodes(pool, shape, 4, [5])))
    assert np.array_equal(alone.support, among.support)
    assert not np.array_equal(alone.support, other.support)


def test_fixed_shape():
    data = block([9] * 6)
    (task,) = draw_episodes(pool_of(data), FixedShape(ways=4, shots=3, queries=6), 0, [0])
    check_episode(data, task)
    assert task.ways == 4
    assert (np.bincount(task.support_labels) == 3).all()
    assert (np.bincount(task.query_labels) == 6).all()


def test_repeat_fills_small_classes_up():
    data = block([2, 30, 2])
    shape = FixedShape(ways=3, shots=5, queries=5, repeat=True)
    (task,) = draw_episodes(pool_of(data), shape, 0, [0])
    assert (np.bincount(task.support_labels) == 5).all()
    assert np.array_equal(data.y[task.support], task.classes[task.support_labels])
    large = task.classes[task.support_labels] == 3
    assert len(np.intersect1d(task.support[large], task.query)) == 0


def test_tasks_of_a_hierarchy_keep_to_one_family():
    names = [f"{family}/{i}" for family in "abc" for i in range(6)] + ["small/0"]
    pool, left_out = check_pool(pool_of(block([4] * 19, names=tuple(names)), hierarchical=True), VariousShape())
    families = [{names[c // 3][0] for c in task.classes} for task in draw_episodes(pool, VariousShape(), 0, range(30))]
    assert all(len(family) == 1 for family in families)
    assert set.union(*families) == {"a", "b", "c"}
    assert left_out == 0


@pytest.mark.parametrize("shape", [VariousShape(), FixedShape(ways=5, shots=4, queries=4)], ids=["various", "fixed"])
def test_groups_never_stand_on_both_sides(shape):
    drawers = np.tile(np.arange(20), 8)  # every class has one sample per drawer
    data = block([20] * 8)
    order = np.argsort(data.y, kind="stable")
    groups = np.empty(160, np.int64)
    groups[order] = drawers
    data = Block(data.x, data.y, "ND", {"drawer": groups})
    for task in draw_episodes(pool_of(data, group="drawer"), shape, 0, range(20)):
        check_episode(data, task)
        assert len(np.intersect1d(groups[task.support], groups[task.query])) == 0


def test_groups_that_leave_a_side_empty_are_an_error():
    data = block([6] * 5, track=np.zeros(30, np.int64))
    with pytest.raises(DataError, match="its groups split into"):
        list(draw_episodes(pool_of(data, group="track"), VariousShape(), 0, [0]))


def test_a_missing_group_column_is_an_error():
    with pytest.raises(DataError, match="no column 'track'"):
        pool_of(block([4, 4]), group="track")


def test_small_classes_are_refused_or_left_out():
    pool = pool_of(block([9, 3, 9, 9]))
    shape = FixedShape(ways=3, shots=4, queries=4)
    with pytest.raises(DataError, match="class 3: 3 samples"):
        check_pool(pool, shape)
    left, count = check_pool(pool, shape, skip=True)
    assert (len(left.classes), count) == (3, 1)
    with pytest.raises(DataError, match="3 classes, expected at least 4"):
        check_pool(pool, FixedShape(ways=4, shots=4, queries=4), skip=True)


def test_names_without_families_are_no_hierarchy():
    with pytest.raises(DataError, match="alphabet/character"):
        pool_of(block([2, 2], names=("a/1", "b")), hierarchical=True)


@pytest.mark.parametrize("settings", [{"ways": 1}, {"shots": 0}, {"queries": 0}], ids=str)
def test_shapes_are_checked(settings):
    with pytest.raises(UsageError):
        FixedShape(**settings)


# ------------------------------------------------------------------------------------------------------ lists of tasks


def tasks_and_data():
    data = block([12] * 8)
    return data, list(draw_episodes(pool_of(data), VariousShape(), 0, range(4)))


def test_a_list_of_tasks_survives_an_artifact():
    from io import BytesIO

    from stages.artifacts.hdf5 import encode_tree, read_tree

    data, tasks = tasks_and_data()
    tree = read_tree(BytesIO(encode_tree(to_tree(tasks, data_hash(data)))), "tasks.h5")
    back = from_tree(tree, data_hash(data), len(data), "tasks.h5")
    assert len(back) == 4
    for one, other in zip(tasks, back, strict=True):
        for name in ("classes", "support", "support_labels", "query", "query_labels"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def spoiled(name, change):
    data, tasks = tasks_and_data()
    tree = to_tree(tasks, data_hash(data))
    array = tree.arrays[name].copy()
    change(array)
    return data, type(tree)(tree.attrs, {**tree.arrays, name: array})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda a: a.__setitem__(0, 10_000), "beyond the samples"),
        ("support_labels", lambda a: a.__setitem__(0, 99), "class 99"),
        ("ways", lambda a: a.__setitem__(0, a[0] + 1), "entries"),
        ("support", lambda a: a.__setitem__(0, -1), "malformed"),
    ],
)
def test_a_list_that_does_not_fit_together_is_refused(name, change, message):
    data, tree = spoiled(name, change)
    with pytest.raises(SchemaError, match=message):
        from_tree(tree, data_hash(data), len(data), "tasks.h5")


def test_a_list_over_other_samples_is_refused():
    data, tasks = tasks_and_data()
    with pytest.raises(SchemaError, match="other samples"):
        from_tree(to_tree(tasks, data_hash(data)), data_hash(block([3, 3])), 6, "tasks.h5")


def test_a_task_that_asks_what_it_shows_is_refused():
    data, tasks = tasks_and_data()
    tree = to_tree(tasks, data_hash(data))
    tree.arrays["query"][0] = tree.arrays["support"][0]
    with pytest.raises(SchemaError, match="both in support and in query"):
        from_tree(tree, data_hash(data), len(data), "tasks.h5")


def tracks(classes: int = 3, groups: int = 6, frames: int = 30) -> Block:
    """Traffic signs: tracks of `frames` pictures, whose numbers start anew in every class."""
    y = np.repeat(np.arange(classes), groups * frames)
    track = np.tile(np.repeat(np.arange(groups), frames), classes)
    return Block(np.zeros((len(y), 1), np.float32), y, "ND", {"track": track})


def test_groups_within_classes_are_apart_from_those_of_the_same_number_elsewhere() -> None:
    block = tracks(groups=2, frames=4)
    nested, shared = pool_of(block, group="class+track").groups, pool_of(block, group="track").groups
    assert nested is not None
    assert shared is not None
    assert (len(np.unique(nested)), len(np.unique(shared))) == (6, 2)
    assert (np.unique(nested, return_index=True)[1] == np.arange(0, 24, 4)).all()
    with pytest.raises(DataError, match=r"no column 'frame', expected one of its columns \(class, track\)"):
        pool_of(block, group="class+frame")


@pytest.mark.parametrize("shape", [FixedShape(ways=3, shots=5, queries=10), VariousShape(least_ways=3)], ids=str)
def test_queries_come_from_more_than_one_group_where_there_are_enough(shape: FixedShape | VariousShape) -> None:
    block = tracks()
    pool = pool_of(block, group="class+track")
    for episode in draw_episodes(pool, shape, 0, range(5)):
        for way in range(3):
            asked = block.columns["track"][episode.query[episode.query_labels == way]]
            given = block.columns["track"][episode.support[episode.support_labels == way]]
            assert len(np.unique(asked)) >= 2
            assert not {*asked.tolist()} & {*given.tolist()}


def test_groups_stay_on_the_supports_side_where_it_needs_them() -> None:
    pool = pool_of(tracks(groups=6, frames=10), group="class+track")
    (episode,) = draw_episodes(pool, FixedShape(ways=3, shots=45, queries=5), 0, range(1))
    assert len(episode.support) == 3 * 45
    with pytest.raises(DataError, match=r"class\+COLUMN"):
        next(draw_episodes(pool, FixedShape(ways=3, shots=55, queries=5), 0, range(1)))


def test_samples_without_a_label_are_no_class() -> None:
    block = tracks()
    with pytest.raises(DataError, match="1 of 540 samples have no label"):
        pool_of(Block(block.x, np.where(np.arange(540) == 7, -1, block.y), "ND"))


@pytest.mark.parametrize(
    ("wrong", "option"), [({"most_ways": 3}, "--max-ways"), ({"most_support": 20}, "--max-support")]
)
def test_shapes_name_their_options(wrong: dict[str, int], option: str) -> None:
    with pytest.raises(UsageError, match=option):
        VariousShape(**wrong)
