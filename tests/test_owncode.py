"""Criteria and strategies of the user's own: found by name, checked, and refused in one line where they do not work."""

import sys
from types import ModuleType

import numpy as np
import pytest

from stages.artifacts.records import Block
from stages.errors import PartMissing, UsageError
from stages.filtering import Filtering, filter_stream
from stages.importance.criteria import Evidence, criterion_named
from stages.owncode import answers, own
from stages.settings.scoring import Scoring
from stages.settings.selection import Selection
from stages.valuation.coarse import Filter, filter_named
from stages.valuation.fine import Chosen, GradientView, Strategy, selection_named


@pytest.fixture
def mine(monkeypatch):
    """A module of the user's, `mine`."""
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def test_names_lead_to_objects_or_to_one_line(mine):
    mine.number = 3
    assert own("mine:number", "--strategy") == 3
    with pytest.raises(UsageError, match=r"--strategy: mine has no 'other'"):
        own("mine:other", "--strategy")
    with pytest.raises(PartMissing, match=r"no module 'not_there'.*PYTHONPATH"):
        own("not_there:f", "--strategy")
    for name in ("mine", ":f", "mine:"):
        with pytest.raises(UsageError, match=r"package\.module:function"):
            own(name, "--strategy")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (3, "a int, expected a function"),
        (lambda: [1.0], r"shape \(1,\), expected 2 finite numbers"),
        (lambda: [1.0, float("nan")], "2 finite numbers"),
        (lambda: 1 / 0, "failed: ZeroDivisionError"),
    ],
    ids=["no function", "too few", "not finite", "fails"],
)
def test_what_a_function_answers_is_checked(function, message):
    with pytest.raises(UsageError, match=message):
        answers(function, "mine:f", 2)


def test_settings_take_names_of_ones_own_where_the_table_may_be_extended():
    assert Filtering(strategy="mine:f").strategy == Selection(strategy="mine:g").strategy.replace("g", "f")
    assert Scoring(criterion="mine:f").criterion == "mine:f"
    with pytest.raises(UsageError, match="--importance"):
        Selection(importance="mine:f")


def test_a_filter_keeps_what_the_users_function_prefers(mine):
    mine.brightest = lambda arrivals: arrivals.inputs.reshape(len(arrivals.labels), -1).mean(axis=1)
    x = np.arange(20, dtype=np.float32)[::-1, None].copy()
    block = Block(x, np.zeros(20, np.int64), "ND")
    first, end = filter_stream([block], Filtering(window=20, keep=3, strategy="mine:brightest"))
    assert sorted(first.x[:, 0].tolist()) == [17.0, 18.0, 19.0]
    assert end.rounds == 1


def test_a_filter_may_say_for_itself_what_it_needs(mine):
    mine.whole = Filter(lambda arrivals: np.ones(len(arrivals.labels)), "window", "labels", False, "mine")
    assert filter_named("mine:whole") is mine.whole


def test_a_selection_of_ones_own_is_checked(mine):
    mine.first = lambda view, places, epsilon, rng: Chosen(
        np.arange(places), np.ones(places, int), np.full(places, 1 / places), "fixed"
    )
    mine.twice = lambda view, places, epsilon, rng: Chosen(np.zeros(2, int), np.ones(2, int), np.ones(2), "fixed")
    mine.nothing = lambda view, places, epsilon, rng: None
    pool, rng = GradientView(np.zeros(4, np.int64), np.full(4, 0.25)), np.random.default_rng(0)
    assert selection_named("mine:first").choose(pool, 2, 0.2, rng).rows.tolist() == [0, 1]
    with pytest.raises(UsageError, match="rows that are no batch"):
        selection_named("mine:twice").choose(pool, 2, 0.2, rng)
    with pytest.raises(UsageError, match="returned a NoneType, expected a Chosen batch"):
        selection_named("mine:nothing").choose(pool, 2, 0.2, rng)
    mine.ready = Strategy(mine.first, "labels", True, "mine")
    assert selection_named("mine:ready") is mine.ready


def test_a_criterion_of_ones_own_ranks_layers(mine):
    mine.cheapest = lambda evidence: evidence.fisher / evidence.macs
    ones = np.ones(2)
    evidence = Evidence(np.array([4.0, 6.0]), ones, np.array([1.0, 3.0]), 1.0, 3.0, ones, np.random.default_rng(0))
    assert criterion_named("mine:cheapest")(evidence).tolist() == [4.0, 2.0]
