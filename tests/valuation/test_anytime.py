"""When anytime selection stops: hand-computed moments of a trainer and a selector on a clock that the test moves."""

import pytest

from stages.valuation.anytime import Anytime


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def published():
    return {}


@pytest.fixture
def anytime(clock, published):
    return Anytime(published.get, clock)


def finish(anytime, clock, published, number, seconds):
    """A round that stops because its version is there, and takes so long to be delivered."""
    published[number] = clock.now_s
    assert anytime.wanted(number)
    clock.now_s += seconds
    anytime.delivered()


def test_a_trainer_that_waits_is_never_kept_waiting(anytime, clock, published):
    assert not anytime.wanted(1)
    published[1] = clock.now_s
    assert anytime.wanted(1)


def test_nothing_is_foreseen_before_both_sides_have_been_measured(anytime, clock, published):
    published[1] = clock.now_s
    anytime.updates([(10, 0.5)])
    clock.now_s += 50.0
    assert not anytime.wanted(2)  # how long finishing takes is not known
    finish(anytime, clock, published, 2, 0.1)
    other = Anytime(published.get, clock)
    finish(other, clock, published, 3, 0.1)
    clock.now_s += 50.0
    assert not other.wanted(4)  # how long updates take is not known


def test_scoring_stops_so_early_that_the_batch_is_there_when_the_update_ends(anytime, clock, published):
    finish(anytime, clock, published, 1, 0.2)  # delivered at 100.2, the update of round 1 begins
    anytime.updates([(10, 1.0), (8, 3.0), (10, 2.0)])  # median 2.0: it ends at 102.2, so scoring must end at 102.0
    clock.now_s = 101.9
    assert not anytime.wanted(2)
    clock.now_s = 101.95  # the next chunk, of 0.05, would be half done by 101.975
    assert not anytime.wanted(2)
    clock.now_s = 101.98  # the next, of 0.03, would be half done by 101.995
    assert not anytime.wanted(2)
    clock.now_s = 102.0
    assert anytime.wanted(2)


def test_a_chunk_that_would_mostly_lie_beyond_the_moment_is_not_begun(anytime, clock, published):
    finish(anytime, clock, published, 1, 0.2)
    anytime.updates([(10, 2.0)])
    clock.now_s = 100.5
    assert not anytime.wanted(2)
    clock.now_s = 101.4  # the next chunk, of 0.9, would be half done by 101.85
    assert not anytime.wanted(2)
    clock.now_s = 102.3
    assert anytime.wanted(2)
    clock.now_s = 102.4
    anytime.delivered()  # the update of round 2 begins; finishing took 0.1, in the median 0.15
    published[2] = 102.2
    clock.now_s = 103.0  # a new round: how long its first chunk took is not known yet
    assert not anytime.wanted(3)
    clock.now_s = 103.9  # the next chunk, of 0.9, would be half done at 104.35, after 104.25
    assert anytime.wanted(3)


def test_an_update_that_begins_late_because_its_version_was_late(anytime, clock, published):
    finish(anytime, clock, published, 1, 0.1)  # 100.1
    anytime.updates([(10, 1.0)])
    clock.now_s = 100.2
    published[2] = 100.15
    assert anytime.wanted(2)
    clock.now_s = 100.3
    anytime.delivered()
    published[2] = 105.0  # the trainer was held up; it begins the update of round 2 at 105.0
    clock.now_s = 105.5
    assert not anytime.wanted(3)
    clock.now_s = 105.9
    assert anytime.wanted(3)


def test_batches_of_no_sample_say_nothing_of_updates(anytime, clock, published):
    finish(anytime, clock, published, 1, 0.1)
    anytime.updates([(0, 0.001)])
    clock.now_s += 10.0
    assert not anytime.wanted(2)
