"""Selectors against each other, against every combination, and against budgets that are one unit too small."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given, settings

from stages.artifacts.records import Scores
from stages.cost.latency import predicted_latency_ns
from stages.cost.model import full_backward_macs, last_blocks
from stages.errors import BudgetError, DataError, UsageError
from stages.graphs.graph import Graph
from stages.planning.budget import Budget
from stages.planning.knapsack import Limits
from stages.planning.knapsack import _extended as extended
from stages.planning.layers import SELECTORS, exhaustive, greedy, knapsack, select_layers, strict_prefix
from stages.planning.problem import Channels, Evidence, Problem, nothing_fits, pose
from tests.cost.nets import backbone, conv, inverted_residual, op_input, unary
from tests.models.nets import dense_net, folded
from tests.planning.problems import chain_problem, costs, problems, random_durations, random_scores


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_knapsack_is_the_optimum(problem):
    assert knapsack(problem).score == pytest.approx(exhaustive(problem).score, rel=1e-7, abs=0)


def test_knapsack_is_the_optimum_of_longer_chains():
    """Long enough that a label which is cheaper in one resource only, and wrongly dropped, belongs to the optimum."""
    for problem in map(chain_problem, range(60)):
        assert knapsack(problem).score == pytest.approx(exhaustive(problem).score, rel=1e-7, abs=0)


def dense_problem() -> Problem:
    """A DenseNet, all of whose layers may train: what one keeps others share, so there are very many states."""
    graph, _ = folded(dense_net(), (3, 32, 32))
    scores = random_scores(graph, 0)
    costs = [op.weights * op.weights * int(np.prod(op.shape[1:])) for op in graph.layers]
    sized = replace(scores, score=scores.score / np.array(costs))
    budget = Budget(memory_bytes=2**19, backward_macs=full_backward_macs(graph) * 15 // 100)
    return pose(graph, sized, budget, Channels(), Evidence())


def test_a_search_that_would_take_too_long_is_given_up():
    """Work and memory are counted in labels, so the outcome is the same on every machine."""
    problem, limits = dense_problem(), Limits(200_000, 20_000)
    made, most = 0, 0

    def counted(*args, **options):
        nonlocal made, most
        fronts = extended(*args, **options)
        count = sum(len(labels.score) for labels in fronts.values())
        made, most = made + count, max(most, count)
        return fronts

    with patch("stages.planning.knapsack._extended", counted):
        found = knapsack(problem, limits)
    assert not found.optimal
    assert problem.fits(found.updates)
    assert found.score >= greedy(problem).score
    assert found == knapsack(problem, limits)
    step = 1 + len(problem.candidates[0].options) * 2  # each label frozen, or at one of the ratios, kept whole or not
    assert made <= limits.labels + limits.at_once * step
    assert most <= limits.at_once * step


def test_a_search_within_its_limits_is_the_same_as_without():
    for problem in map(chain_problem, range(5)):
        plain = knapsack(problem)
        assert plain.optimal
        assert knapsack(problem, Limits(10**9, 10**9)) == plain
        nothing = knapsack(problem, Limits(0, 0))
        assert not nothing.optimal
        assert nothing == greedy(problem)


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_a_narrow_beam_is_widened_until_nothing_is_left_out(problem):
    with patch("stages.planning.knapsack.BEAM", 1), patch("stages.planning.knapsack.RIVALS", 1):
        assert knapsack(problem).score == pytest.approx(exhaustive(problem).score, rel=1e-7, abs=0)


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_no_selector_overruns_a_budget_or_beats_the_optimum(problem):
    best = exhaustive(problem).score
    memory, macs, latency_ns = problem.budget.limits
    for name, selector in SELECTORS.items():
        found = selector(problem)
        if not found.updates:
            continue
        used_memory, used_macs = costs(problem, found.updates)
        assert memory is None or used_memory <= memory, name
        assert macs is None or used_macs <= macs, name
        if latency_ns is not None and problem.measured is not None:
            together = problem.complete(found.updates + problem.fixed)
            assert predicted_latency_ns(problem.graph, problem.measured, together) <= latency_ns
        assert found.score <= best * (1 + 1e-9), name
        positions = [problem.graph.position[update.layer] for update in found.updates]
        assert positions == sorted(set(positions)), name


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_nothing_fits_exactly_when_no_single_option_does(problem):
    singles = [o.update for one in problem.candidates for o in one.options]
    for name in SELECTORS:
        if any(problem.fits([update]) for update in singles):
            if name != "strict-prefix":
                assert select_layers(problem, name).updates
        else:
            with pytest.raises(BudgetError, match="no plan fits"):
                select_layers(problem, name)


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_greedy_is_at_least_strict_prefix(problem):
    assert greedy(problem).score >= strict_prefix(problem).score


def tight(graph: Graph, scores: Scores, **budget: object) -> Problem:
    return pose(graph, scores, Budget(**budget), Channels(), Evidence())


@pytest.mark.parametrize("selector", ["greedy", "knapsack"])
@pytest.mark.parametrize("which", ["memory_bytes", "backward_macs"])
def test_one_unit_less_gives_another_plan(selector, which):
    graph = backbone("mcunet-5fps")
    scores = random_scores(graph, 5, last_blocks(graph, 6))
    full = full_backward_macs(graph)
    loose = {"memory_bytes": 2**20, "backward_macs": full * 15 // 100}
    found = select_layers(tight(graph, scores, **loose), selector)
    used = dict(zip(("memory_bytes", "backward_macs"), costs(tight(graph, scores), found.updates), strict=True))
    same = select_layers(tight(graph, scores, **loose | {which: used[which]}), selector)
    assert same == found
    less = select_layers(tight(graph, scores, **loose | {which: used[which] - 1}), selector)
    assert less.updates != found.updates
    assert costs(tight(graph, scores), less.updates)[which == "backward_macs"] < used[which]


@pytest.mark.parametrize("model", ["paper", "saved", "peak"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_the_smallest_budget_is_named_and_suffices(selector, model):
    graph = inverted_residual()
    scores = random_scores(graph, 3)
    posed = tight(graph, scores, memory_model=model)
    singles = [o.update for one in posed.candidates for o in one.options]
    least = min(costs(posed, (update,))[0] for update in singles)
    # strict-prefix gives up at the first layer, so only the best-scored layer can satisfy it
    if selector != "strict-prefix":
        assert select_layers(tight(graph, scores, memory_bytes=least, memory_model=model), selector).updates
    with pytest.raises(BudgetError, match=f"at least {least:,} bytes") as caught:
        select_layers(tight(graph, scores, memory_bytes=least - 1, memory_model=model), selector)
    assert caught.value.exit_code == 75


def test_the_smallest_macs_are_named():
    graph = inverted_residual()
    with pytest.raises(BudgetError, match="at least 512 backward MACs"):  # one channel of b.project: 64 * 8
        select_layers(tight(graph, random_scores(graph, 3), memory_bytes=2**20, backward_macs=511), "knapsack")


def test_the_smallest_latency_is_named_in_milliseconds():
    graph = inverted_residual()
    measured = random_durations(graph, 3)
    problem = pose(graph, random_scores(graph, 3), Budget(latency_s=1e-9), Channels(), Evidence(), measured=measured)
    least_ns = min(problem.usage([option.update])[2] for one in problem.candidates for option in one.options)
    assert f"at least {least_ns / 1e6:g} ms" in str(nothing_fits(problem))


@pytest.mark.parametrize("ratios", [(), (0.0,), (1.0, -0.5), (1.5,)])
def test_channel_ratios_are_more_than_0_and_at_most_1(ratios):
    with pytest.raises(UsageError, match="channel ratio"):
        Channels(ratios=ratios)


def test_both_budgets_are_named_when_both_are_too_small():
    graph = inverted_residual()
    problem = tight(graph, random_scores(graph, 3), memory_bytes=10, backward_macs=10)
    assert "of memory and" in str(nothing_fits(problem))


def test_greedy_skips_what_does_not_fit_and_strict_prefix_stops():
    graph = inverted_residual()
    names = tuple(op.name for op in graph.layers)
    output = tuple(np.ones(graph[name].out_channels, np.float32) for name in names)
    given_ = tuple(np.ones(graph[name].in_channels, np.float32) for name in names)
    scores = Scores("score", names, np.array([4.0, 3.0, 2.0, 1.0]), np.ones(4), output, given_)
    macs = {name: graph[name].weights * 64 for name in names}
    # room for the third layer, not for the two that score best
    limit = macs["b.depthwise"] + macs["b.project"]
    problem = pose(graph, scores, Budget(backward_macs=limit), Channels(ratios=(1.0,)), Evidence())
    assert [update.layer for update in greedy(problem).updates] == ["b.depthwise"]
    assert strict_prefix(problem).updates == ()
    with pytest.raises(BudgetError, match="greedy"):
        select_layers(problem, "strict-prefix")


def test_knapsack_beats_greedy_where_the_best_layer_is_expensive_to_reach():
    graph = inverted_residual()
    scores = random_scores(graph, 0)
    early = replace(scores, score=np.array([10.0, 9.0, 9.0, 9.0]))
    macs = {op.name: op.weights * 64 for op in graph.layers}
    limit = macs["b.expand"] + 2 * macs["b.depthwise"] + 2 * macs["b.project"]
    problem = pose(graph, early, Budget(backward_macs=limit), Channels(ratios=(1.0,)), Evidence())
    assert knapsack(problem).score == 27
    assert strict_prefix(problem).score <= greedy(problem).score <= 27


def test_knapsack_copes_with_many_equal_layers():
    ops = [op_input(4, 4)]
    for i in range(40):
        layer = conv(f"c{i:02}", ops[-1], 4, k=3)
        ops += [layer, unary("relu", layer)]
    graph = Graph(tuple(ops))
    names = tuple(op.name for op in graph.layers)
    ones = tuple(np.ones(4, np.float32) for _ in names)
    scores = Scores("score", names, np.ones(40), np.ones(40), ones, ones)
    each = 4 * 4 * 9 * 16
    # the last n layers whole cost n weight gradients and n - 1 input gradients
    found = knapsack(tight(graph, scores, backward_macs=19 * each))
    assert found.score == pytest.approx(10)


def test_without_budgets_everything_trains():
    graph = inverted_residual()
    problem = tight(graph, random_scores(graph, 1))
    for name in SELECTORS:
        found = select_layers(problem, name)
        assert [update.ratio for update in found.updates] == [1.0] * 4, name


def test_exhaustive_refuses_large_problems():
    graph = backbone("mcunet-5fps")
    with pytest.raises(UsageError, match="combinations"):
        exhaustive(tight(graph, random_scores(graph, 1)))


def test_unknown_selector():
    with pytest.raises(UsageError, match="one of greedy"):
        select_layers(tight(inverted_residual(), random_scores(inverted_residual(), 1)), "best")


# ----------------------------------------------------------------------------------------------------------- problems


def test_a_partial_layer_is_worth_its_share_of_fisher():
    graph = inverted_residual()
    scores = random_scores(graph, 2)
    problem = pose(graph, scores, Budget(), Channels(ratios=(1.0, 0.25)), Evidence())
    whole, quarter = problem.candidates[1].options
    information = np.sort(scores.output_fisher[1].astype(float))[::-1]
    assert whole.score == pytest.approx(scores.score[1])
    assert quarter.score == pytest.approx(scores.score[1] * information[:2].sum() / information.sum())
    assert set(np.argsort(-scores.output_fisher[1])[:2]) == set(quarter.update.channels)


def test_a_partial_layer_without_information_is_worth_its_part_of_the_channels():
    """One channel of its four: a quarter of the score, not all of it and not nothing."""
    graph = inverted_residual()
    scores = random_scores(graph, 2)
    blank = replace(scores, output_fisher=tuple(np.zeros_like(values) for values in scores.output_fisher))
    problem = pose(graph, blank, Budget(), Channels(ratios=(1.0, 0.25)), Evidence())
    for one, score, channels in zip(problem.candidates, scores.score, (4, 8, 8, 4), strict=True):
        assert [option.score for option in one.options] == [score, score / 4]
        assert [len(option.update.channels) for option in one.options] == [channels, channels // 4]


def test_layers_that_score_nothing_are_left_out():
    graph = inverted_residual()
    scores = random_scores(graph, 2)
    some = replace(scores, score=np.array([0.0, 1.0, 0.0, 2.0]))
    problem = pose(graph, some, Budget(), Channels(), Evidence())
    assert [one.options[0].update.layer for one in problem.candidates] == ["b.expand", "b.project"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": np.zeros(4)}, "every layer scores 0"),
        ({"score": np.array([1.0, np.nan, 1, 1])}, "non-finite"),
        ({"score": np.array([1.0, -1, 1, 1])}, "negative"),
        ({"layer": ("stem", "b.expand", "b.depthwise", "head")}, "'head'"),
        ({"output_fisher": tuple(np.ones(3, np.float32) for _ in range(4))}, "3 output channels"),
    ],
)
def test_scores_that_cannot_be_planned_with(change, message):
    graph = inverted_residual()
    with pytest.raises(DataError, match=message):
        pose(graph, replace(random_scores(graph, 2), **change), Budget(), Channels(), Evidence())


def test_a_latency_budget_needs_measurements():
    graph = inverted_residual()
    with pytest.raises(UsageError, match="measured profile"):
        pose(graph, random_scores(graph, 2), Budget(latency_s=0.1), Channels(), Evidence())


@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_selectors_are_deterministic(problem):
    assume(problem.candidates)
    for selector in SELECTORS.values():
        assert selector(problem) == selector(problem)
