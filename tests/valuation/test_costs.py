"""What rounds and updates cost: lines through measured times, and what stands in for them before there are any."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts.records import Block
from stages.valuation.costs import RECENT, Costs, Line, Meter, Recent, UpdateClock, fit


class Scripted:
    """A clock that moves on only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds
        return seconds


@given(
    fixed=st.floats(0, 5),
    each=st.floats(0.01, 5),
    sizes=st.lists(st.integers(1, 30), min_size=5, max_size=20).filter(lambda sizes: len(set(sizes)) > 1),
)
def test_a_line_is_found_again(fixed, each, sizes):
    line = Line(fixed, each)
    found = fit([(n, line.of(n)) for n in sizes])
    assert found.fixed == pytest.approx(fixed, abs=1e-9)
    assert found.each == pytest.approx(each)


def test_a_page_fault_does_not_move_the_line():
    times = [(n, 2.0 + 0.5 * n) for n in (10, 30) * 4]
    assert fit([*times, (10, 500.0), (30, 90.0)]) == fit(times) == Line(2.0, 0.5)


def test_sizes_that_are_all_alike_say_nothing_of_a_fixed_part():
    assert fit([(10, 4.0), (10, 5.0), (10, 6.0)]) == Line(0.0, 0.5)


def test_neither_part_is_negative():
    assert fit([(10, 1.0), (20, 4.0)]) == Line(0.0, pytest.approx(0.15))  # a line through both would start at -2
    assert fit([(10, 4.0), (20, 1.0)]) == Line(2.5, 0.0)
    assert fit([(0, 4.0), (0, 6.0)]) == Line(5.0, 0.0)


def test_costs_by_hand():
    assert Costs(update=Line(0, 3)).of(30, 10) == 60.0
    assert Costs(update=Line(0, 3), overlap=True).of(30, 10) == 30.0
    assert Costs(update=Line(0, 1.5), overlap=True).of(30, 10) == 30.0  # scoring is the bottleneck
    assert Costs(score=Line(1, 0.5), update=Line(2, 1)).of(4, 10) == 15.0


def test_without_a_clock_costs_are_forward_passes():
    meter = Meter(2.5)
    for _ in range(3):
        assert meter.time(lambda: "done") == "done"
        meter.close_round(30)
    assert meter.costs() == Costs(score=Line(0, 1), update=Line(0, 2.5), unit="forward passes")


def test_rounds_are_measured_and_updates_follow_by_ratio_until_they_are_too():
    clock = Scripted()
    meter = Meter(3.0, clock=clock)
    for scored, seconds in ((30, 90.0), (30, 4.0), (0, 1.0), (30, 4.0)):  # the first one warms up
        meter.time(lambda seconds=seconds: clock.work(seconds / 2))
        clock.work(100.0)  # what is not timed does not count
        meter.time(lambda seconds=seconds: clock.work(seconds / 2))
        meter.close_round(scored)
    assert meter.costs().score == Line(1.0, pytest.approx(0.1))
    assert meter.costs().update.of(10) == pytest.approx(3.0)
    assert meter.costs().unit == "seconds, updates by ratio"
    meter.updates([(0, 9.0), (10, 7.0), (20, 12.0)])
    assert meter.costs().update == Line(2.0, 0.5)  # an empty block is no update
    assert meter.costs().unit == "seconds"
    meter.updates([])
    assert meter.costs().update == Line(2.0, 0.5)


def test_a_given_ratio_stands():
    clock = Scripted()
    meter = Meter(3.0, fixed_ratio=True, clock=clock)
    for _ in range(2):
        meter.time(lambda: clock.work(3.0))
        meter.close_round(30)
    meter.updates([(10, 7.0)])
    assert meter.costs().update == Line(0.0, pytest.approx(0.3))


def test_updates_are_timed_from_block_to_version():
    clock = Scripted()
    watch = UpdateClock(clock)
    blocks = [Block(np.zeros((n, 1), np.float32), np.zeros(n, np.int64), "ND") for n in (3, 5)]
    for number, _ in enumerate(watch.through(blocks)):
        clock.work(number + 1.0)
        watch.published()
        clock.work(50.0)
    assert watch.times() == [(3, 1.0), (5, 2.0)]


def test_sizes_not_seen_for_long_are_remembered():
    recent = Recent()
    recent.add(30, 40.0)
    for number in range(100):
        recent.add(10, float(number))
    assert recent.times() == [(30, 40.0), *((10, float(number)) for number in range(100 - RECENT, 100))]
