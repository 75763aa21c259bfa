"""Forgetting: counts and weights by hand, exchanges, unbiasedness by enumeration, and the buffer of a stream."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts.records import Block
from stages.errors import DataError, UsageError
from stages.settings.selection import Selection
from stages.valuation.forgetting import (
    MOST,
    STATE,
    UNKNOWN,
    Forgetting,
    Rehearsal,
    easiest,
    exchanged,
    forgetting_counts,
    remembering,
)

RNG = np.random.default_rng


def block(index, **others):
    index = np.asarray(index, np.int64)
    return Block(index[:, None].astype(np.float32), index % 3, "ND", columns={"index": index}, **others)


def settings(**changes):
    return Selection(strategy="forgetting", **changes)


def even(size):
    return np.full(size, 1 / size)


def told(answers, **changes):
    """A memory that leaves nothing out, after these answers to sample 0."""
    memory = Forgetting(settings(remove=0.0, **changes))
    for right in answers:
        offered, _ = memory.offer(block([0]), even(1), RNG(0))
        memory.note(offered, np.array([right], bool))
    return memory


# ------------------------------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize(
    ("answers", "events"), [("0110100", 2), ("0" * 30, 30), ("1" * 30, 0), ("1010", 2), ("01", 0), ("10", 1)]
)
def test_forgetting_events_by_hand(answers, events):
    """A transition is right then wrong; what was never right counts at every presentation."""
    state = told([a == "1" for a in answers], period=100)._state
    assert forgetting_counts(state[:1]).tolist() == [events]
    assert state["presentations"][0] == len(answers)


def test_a_sample_that_was_not_presented_is_the_hardest():
    state = np.zeros(2, STATE)
    state["last"] = UNKNOWN, 1
    hardest, easy = forgetting_counts(state).tolist()
    assert hardest > 10**9 > easy == 0


def test_answers_are_kept_apart_by_index_whatever_their_order():
    memory = Forgetting(settings(remove=0.0, period=100))
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1]):
        offered, _ = memory.offer(block(order), even(3), RNG(0))
        seen = memory._state["presentations"][offered.columns["index"]]
        memory.note(offered, np.array([i == 0 or (i == 1 and n % 2 == 0) for i, n in zip(order, seen, strict=True)]))
    assert forgetting_counts(memory._state[:3]).tolist() == [0, 2, 4]


# ----------------------------------------------------------------------------------------------------------- exchanges


def test_the_easiest_are_whole_levels_large_enough_to_stand_for_who_leaves():
    counts = np.array([2, 0, 1, 0, 1, 5, 0, 1])
    assert easiest(counts, 2, 0.2).tolist() == [1, 3, 6]  # 2 / 0.8 = 2.5 of the level 0
    assert easiest(counts, 2, 0.5).tolist() == [1, 2, 3, 4, 6, 7]  # 4: level 1 too
    assert easiest(counts, 3, 0.0).tolist() == [1, 2, 3, 4, 6, 7]  # somebody must stay
    assert easiest(counts, 8, 0.0).tolist() == []


def test_an_exchange_by_hand():
    """Ten samples, four left out, half of these return: 2 of 4; two leave of the three that were never forgotten."""
    active = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], bool)
    counts = np.array([0, 0, 0, 3, 1, 2, 9, 9, 9, 9])
    factor = exchanged(active, counts, 0.5, 0.2, RNG(1))
    assert sorted(factor[:3]) == [0, 0, 3]
    assert factor[3:6].tolist() == [1, 1, 1]
    assert sorted(factor[6:]) == [0, 0, 2, 2]
    assert exchanged(active, counts, 0.0, 0.2, RNG(1)) is None
    assert exchanged(active[[0, 6, 7, 8, 9]], counts[[0, 6, 7, 8, 9]], 0.5, 0.2, RNG(1)) is None


class Scripted:
    """Stands for a generator: `choice` gives what was scripted."""

    def __init__(self, *drawn):
        self.drawn = list(drawn)

    def choice(self, rows, size, replace):
        found = self.drawn.pop(0)
        assert not replace
        assert set(found) <= set(rows)
        assert len(found) == size
        return np.array(found)


def test_exchanges_are_unbiased_by_enumeration_and_the_papers_weights_are_not():
    """Over every outcome the weighted mean of the toy's gradients is their mean; weighed evenly the easy ones lack."""
    gradients = np.array([0.1, -0.2, 0.0, 3.0, 5.0, 4.0, 0.3, 0.2, 0.1])
    active = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0], bool)
    counts = np.array([0, 0, 0, 2, 4, 3, 0, 0, 0])
    weighted, even_ones = [], []
    for leaving in combinations(range(3), 1):
        for returning in combinations(range(6, 9), 1):
            factor = exchanged(active, counts, 1 / 3, 0.2, Scripted(leaving, returning))
            weighted.append((factor * gradients).mean())
            even_ones.append(gradients[factor > 0].mean())
    assert len(weighted) == 9
    assert np.mean(weighted) == pytest.approx(gradients.mean(), rel=1e-12)
    assert np.mean(even_ones) > 1.3 * gradients.mean()


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.sampled_from([0.0, 0.2, 0.5]), st.sampled_from([0.25, 0.5, 1]))
def test_exchanges_keep_the_sizes_and_bound_the_weights(seed, size, epsilon, share):
    rng = np.random.default_rng(seed)
    active, counts = rng.random(size) < 0.7, rng.integers(0, 4, size)
    factor = exchanged(active, counts, share, epsilon, rng)
    if factor is None:
        return
    now, places = factor > 0, round(share * (~active).sum())
    assert (active & ~now).sum() == (now & ~active).sum() == places
    assert counts[active & ~now].max() <= counts[active & (factor == 1)].min(initial=4)
    assert factor[active].sum() == pytest.approx(active.sum())
    assert factor[~active].sum() == pytest.approx((~active).sum())
    if epsilon:
        assert factor[active].max() <= 1 / epsilon + 1e-9
    if active.sum() > 0:
        assert factor[now].min() >= 1


# --------------------------------------------------------------------------------------------------------- whole passes


def gone_through(memory, size, passes, length, right, seed=0):
    """What each pass presented, and the weights: float64 (passes, size)."""
    weights = np.zeros((passes, size))
    for number in range(passes):
        for start in range(0, size, length):
            piece = block(range(start, min(start + length, size)))
            offered, mass = memory.offer(
                piece, np.full(len(piece), 1 / size), np.random.default_rng([seed, number, start])
            )
            weights[number, offered.columns["index"]] = mass
            memory.note(offered, right(offered.columns["index"], number))
    return weights


def test_a_pass_leaves_out_its_share_and_each_exchange_moves_so_many_each_way():
    memory = Forgetting(settings(remove=0.2, exchange=0.25, period=2))
    weights = gone_through(memory, 200, 9, 7, lambda index, number: index % 2 == 0)
    present = weights > 0
    assert set(present.sum(1)) <= {159, 160, 161}
    assert len(set(present.sum(1))) == 1
    first, last = present[0], present[-1]
    for now, then in pairwise(present):
        moved = round(0.25 * (~first).sum()) if (now != then).any() else 0
        assert (now & ~then).sum() == (then & ~now).sum() == moved
    changes = [(a != b).any() for a, b in pairwise(present)]
    assert changes.count(True) >= 3
    assert (first & ~last).sum() <= 4 * 10
    assert memory.passes == 9
    assert (first & ~last & (np.arange(200) % 2 == 1)).sum() == 0  # never right: never leaves


def test_an_exchange_begins_counting_anew():
    """Right before, wrong after: no event where there was an exchange in between, else one."""
    for period, events in ((1, 0), (100, 1)):
        memory = Forgetting(settings(period=period))
        weights = gone_through(memory, 20, 2, 5, lambda index, number: np.full(len(index), number == 0))
        presented = memory._state[:20][weights[1] > 0]
        assert presented["transitions"].tolist() == [events] * 16
        assert presented["presentations"].max() == 1 + events


def test_nothing_left_out_is_everything_as_it_came():
    memory = Forgetting(settings(remove=0.0, period=1))
    weights = gone_through(memory, 50, 4, 8, lambda index, number: index < 30)
    np.testing.assert_array_equal(weights, 1 / 50)


def test_a_pass_may_end_within_a_block():
    memory = Forgetting(settings(period=100))
    for start in range(0, 1000, 100):
        piece = block(np.arange(start, start + 100) % 250)
        offered, _ = memory.offer(piece, even(100), RNG(start))
        memory.note(offered, np.ones(len(offered), bool))
    assert memory.passes == 4


@pytest.mark.parametrize("length", [1, 3, 10])
def test_what_is_left_out_by_chance_is_unbiased(length):
    """Each weight is 0 or 1 / 0.8 with mean 1: over 2,000 draws the mean is within 5 standard deviations of it."""
    draws, size = 2000, 10
    kept = np.zeros(size)
    for seed in range(draws):
        weights = gone_through(Forgetting(settings()), size, 1, length, lambda i, n: np.ones(len(i), bool), seed)
        kept += weights[0] * size
    bound = 5 * np.sqrt((1 / 0.8 - 1) / draws)  # variance of a weight: 0.8 (1 / 0.8)^2 - 1
    assert np.abs(kept / draws - 1).max() < bound


def test_later_passes_stay_unbiased_given_what_came_before():
    """The exchange after the first pass, drawn 2,000 times from one state: groups of 8, 3 of 32 and 20 of 40."""
    draws, size = 2000, 40
    total, squares = np.zeros(size), np.zeros(size)
    for seed in range(draws):
        memory = Forgetting(settings(remove=0.2, exchange=0.5, period=1))
        gone_through(memory, size, 1, size, lambda index, number: index < 25, seed=0)
        weights = gone_through(memory, size, 1, size, lambda index, number: index < 25, seed=seed + 1)[0] * size
        total += weights
        squares += weights**2
    mean = total / draws
    spread = np.sqrt(np.maximum(squares / draws - mean**2, 0) / draws)
    assert (spread > 0).sum() > 20
    assert (np.abs(mean - 1) <= 5 * spread + 1e-9).all()


# ----------------------------------------------------------------------------------------------------------- odd input


def test_samples_that_cannot_be_told_apart_are_refused():
    memory = Forgetting(settings())
    with pytest.raises(DataError, match=r"no column `index`.*pack"):
        memory.offer(Block(np.zeros((2, 1), np.float32), np.zeros(2, np.int64), "ND"), even(2), RNG(0))
    for bad in (-1, MOST):
        with pytest.raises(DataError, match=rf"index {bad}, .*--buffer"):
            memory.offer(block([0, bad]), even(2), RNG(0))


def test_state_is_a_few_bytes_per_sample():
    memory = Forgetting(settings())
    memory.offer(block([MOST - 1]), even(1), RNG(0))
    assert memory._state.nbytes == 17 * MOST <= 72 << 20


def test_data_that_never_comes_again_is_answered_with_advice():
    memory = Forgetting(settings())
    assert memory.advice() == ""
    memory.offer(block([0, 1]), even(2), RNG(0))
    assert "--buffer" in memory.advice()
    memory.offer(block([0, 1]), even(2), RNG(0))
    assert memory.advice() == ""


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"remove": 0.9}, "--remove: 0.9, expected at most 0.8"), ({"remove": 1.0, "epsilon": 0.0}, "--remove"),
     ({"exchange": 0.1}, "--exchange: 0.1, expected at least 0.2"), ({"exchange": 0.0, "epsilon": 0.0}, "--exchange")],
    ids=str,
)  # fmt: skip
def test_settings_keep_the_bound_on_weights(wrong, words):
    with pytest.raises(UsageError, match=words):
        settings(**wrong)
    Selection(**wrong)  # other strategies do not look at them


# ------------------------------------------------------------------------------------------------------------- streams


def rounds(memory, answers):
    """Indices presented in each round, where `answers[round]` says which are right."""
    shown = []
    for arriving, right in answers:
        offered, mass = memory.offer(block(arriving), even(len(arriving)), RNG(0))
        assert mass.sum() == pytest.approx(1.0)
        index = offered.columns["index"]
        shown.append(index.tolist())
        memory.note(offered, np.isin(index, right))
    return shown


def test_the_buffer_holds_what_was_forgotten_until_it_is_learnt():
    memory = remembering(settings(buffer=2, streak=2))
    assert isinstance(memory, Rehearsal)
    shown = rounds(memory, [
        ([0, 1], [0]),      # both on trial
        ([2, 3], [2, 3]),   # 0 is forgotten and takes precedence; 2 is newer than 1
        ([4, 5], [0, 2]),   # 0 is right once; 2 right twice in a row goes, 4 takes its place
        ([6], [0, 6]),      # 0 is right twice in a row and goes
        ([7], []),          # 6 is forgotten
        ([8], []),
    ])  # fmt: skip
    assert shown == [[0, 1], [2, 3, 0, 1], [4, 5, 0, 2], [6, 0, 4], [7, 6, 4], [8, 6, 7]]


def test_held_samples_weigh_like_the_blocks():
    memory = remembering(settings(buffer=2))
    memory.note(memory.offer(block([0, 1, 2]), even(3), RNG(0))[0], np.zeros(3, bool))
    offered, mass = memory.offer(block([3, 4]), np.array([0.8, 0.2]), RNG(0))
    assert offered.columns["index"].tolist() == [3, 4, 0, 1]
    np.testing.assert_allclose(mass, [0.4, 0.1, 0.25, 0.25])


def test_classes_that_only_the_buffer_has_are_counted_as_none():
    memory = remembering(settings(buffer=4))
    memory.note(memory.offer(block([0, 1, 2]), even(3), RNG(0))[0], np.zeros(3, bool))
    arriving = block([3, 5], labels=np.array([0, 2]), per_class={"seen": np.array([7, 9])}, round=4)
    offered, _ = memory.offer(arriving, even(2), RNG(0))
    assert offered.labels.tolist() == [0, 1, 2]
    assert offered.per_class["seen"].tolist() == [7, 0, 9]
    assert offered.round == 4
