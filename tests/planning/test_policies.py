"""Policies as pure functions: velocities by hand, what leaves a plan and what joins it, always within the budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts.records import LayerUpdate, Plan, Scores
from stages.cost.training import memory_bytes, plan_backward_macs
from stages.errors import UsageError
from stages.graphs.graph import Graph
from stages.graphs.updates import whole_update
from stages.operators import Op
from stages.planning.policies import (
    POLICIES,
    Memory,
    Policy,
    Room,
    Seen,
    Velocity,
    neurons,
    parse_policy,
    room_of,
    search_text,
    similarity,
    turns_of,
    velocity_of,
)
from tests.engines.random_graphs import cases

FEW = settings(max_examples=40, deadline=None, derandomize=True)
RNG = np.random.default_rng(0)


def chain(width: int = 4, layers: int = 4) -> Graph:
    """Linear layers, one behind the other."""
    ops = [Op("input", "input", (), (width,))]
    for number in range(layers):
        ops.append(Op(f"l{number}", "linear", (ops[-1].name,), (width,), ((width,),), bias=True))
    return Graph(tuple(ops))


def plan_of(graph: Graph) -> tuple[LayerUpdate, ...]:
    return tuple(whole_update(op) for op in graph.layers)


def room(graph: Graph, plan: Plan | None = None) -> Room:
    return room_of(graph, plan, plan_of(graph), tuple(op.name for op in graph.layers))


def outputs(graph: Graph, value: float = 1.0) -> dict[str, np.ndarray]:
    return {op.name: np.full((op.out_channels, 3), value, np.float32) for op in graph.layers}


def revised(policy: Policy, graph: Graph, looks: list[Mapping[str, np.ndarray]]) -> list[tuple[LayerUpdate, ...]]:
    """What trains after each look."""
    now, memory, found = plan_of(graph), dict[str, np.ndarray](), []
    for each in looks:
        decision = policy.revise(Seen(plan_of(graph), now, room(graph), [1.0, 1.5], outputs=each), memory)
        now, memory = decision.updates, dict(decision.memory)
        found.append(now)
    return found


# ------------------------------------------------------------------------------------------------------ velocity


def test_velocities_by_hand() -> None:
    v, found = None, []
    for change in (1.0, 0.0, 0.0, 0.0):
        v = velocity_of(np.array([change]), v, 0.5)
        found.append(float(v[0]))
    assert found == [1, -0.5, 0.25, -0.125]
    v = None
    for _ in range(60):
        v = velocity_of(np.array([0.01]), v, 0.5)
    assert v is not None
    assert v[0] == pytest.approx(0.01 / 1.5)  # a channel that drifts never counts as settled


@FEW
@given(st.integers(0, 2**31), st.floats(0.01, 100), st.integers(1, 6))
def test_similarity_is_the_cosine_and_does_not_see_scale(seed: int, scale: float, samples: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = rng.standard_normal((5, samples)), rng.standard_normal((5, samples))
    exact = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(before, after, strict=True)]
    assert similarity(before, after) == pytest.approx(exact, abs=1e-12)
    assert similarity(before, scale * before) == pytest.approx(np.ones(5), abs=1e-12)
    assert (similarity(before, before.copy()) == 1).all()  # exactly: what did not move has no velocity


def test_silent_outputs_are_alike_and_one_that_falls_silent_is_not() -> None:
    nothing, something = np.zeros((1, 3)), np.ones((1, 3))
    assert similarity(nothing, nothing)[0] == 1
    assert similarity(something, nothing)[0] == similarity(nothing, something)[0] == 0


def test_settled_layers_leave_from_the_front_and_a_settled_one_behind_waits() -> None:
    graph = chain()
    moving = [dict(outputs(graph)) for _ in range(4)]
    for number, look in enumerate(moving):
        look["l1"] = RNG.standard_normal((4, 3)).astype(np.float32) + number
    plans = revised(parse_policy("velocity"), graph, moving)
    layers = [[update.layer for update in plan] for plan in plans]
    assert layers[:2] == [["l0", "l1", "l2", "l3"]] * 2  # no velocity is known yet
    assert layers[2:] == [["l1", "l2", "l3"]] * 2  # l2 and l3 are settled too, and behind one that is not


def test_one_channel_that_moves_keeps_its_layer_and_only_live_channels_count() -> None:
    graph = chain()
    looks = [outputs(graph) for _ in range(4)]
    for number, look in enumerate(looks):
        look["l0"][2] = RNG.standard_normal(3) * (number + 1)
    assert revised(parse_policy("velocity"), graph, looks)[-1] == plan_of(graph)
    seen = Seen(plan_of(graph), (replace(plan_of(graph)[0], channels=(0, 1), bias=()),), room(graph), [1.0])
    memory: Memory = {}
    for look in looks:
        decision = parse_policy("velocity").revise(replace(seen, outputs={"l0": look["l0"]}), memory)
        memory = decision.memory
    assert decision.updates == ()


def test_a_share_of_the_channels_may_be_enough() -> None:
    graph = chain()
    looks = [outputs(graph) for _ in range(4)]
    for number, look in enumerate(looks):
        look["l0"][2] = RNG.standard_normal(3) * (number + 1)
    assert revised(parse_policy("velocity:share=0.75"), graph, looks)[-1] == ()
    assert revised(parse_policy("velocity:share=0.76"), graph, looks)[-1] == plan_of(graph)


def test_where_all_has_settled_training_rests_and_a_loss_out_of_its_band_wakes_it() -> None:
    graph, policy = chain(), parse_policy("velocity:threshold=0")
    seen = Seen(plan_of(graph), plan_of(graph), room(graph), [1.0, 1.2, 0.8], outputs=outputs(graph))
    memory: Memory = {}
    for _ in range(3):
        decision = policy.revise(seen, memory)
        memory = decision.memory
    assert decision.updates == ()
    spread = float(np.std([1.0, 1.2, 0.8]))
    asleep = replace(seen, now=(), outputs={})
    assert policy.revise(replace(asleep, losses=[1 + 2.9 * spread]), memory).updates == ()
    woken = policy.revise(replace(asleep, losses=[1 + 3.1 * spread]), memory)
    assert woken.updates == plan_of(graph)
    assert policy.revise(seen, woken.memory).updates == plan_of(graph)  # and no velocity is known again


def test_the_threshold_is_learnt_by_the_derivative_of_a_straight_through_step() -> None:
    """dL/d eps through the previous update equals autograd's, with the indicator's derivative taken as 1."""
    torch.manual_seed(0)
    weight, direction, speed = torch.randn(6).double(), torch.randn(6).double(), torch.rand(6).double()
    eps = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rate = 0.1

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):  # type: ignore[no-untyped-def]
            return (z >= 0).double()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient

    moved = weight - rate * direction * Step.apply(speed - eps)
    moved.retain_grad()
    (moved.sin() * torch.arange(6)).sum().backward()
    gradient = moved.grad
    everything = float(gradient @ (rate * direction))  # every value's own step, as if all of them had moved
    assert eps.grad is not None
    assert float(eps.grad) == pytest.approx(everything, rel=1e-12)
    graph = chain()
    policy = parse_policy("velocity:threshold=0.3,learn=0.01")
    seen = Seen(plan_of(graph), plan_of(graph), room(graph), [1.0], outputs=outputs(graph))
    memory = policy.revise(replace(seen, descents=[everything, 2.0]), {}).memory
    first = everything
    second = 0.9 * first + 2.0
    assert float(memory["threshold"]) == pytest.approx(max(0.0, max(0.0, 0.3 - 0.01 * first) - 0.01 * second))


# ------------------------------------------------------------------------------------------------------ within budgets


def convolutions() -> tuple[Graph, Plan]:
    ops = [Op("input", "input", (), (3, 8, 8))]
    for number, width in enumerate((8, 16, 16, 8)):
        before = ops[-1]
        ops.append(Op(f"c{number}", "conv", (before.name,), (width, 8, 8), (before.shape,), (3, 3), (1, 1), (1, 1),
                      (1, 1), bias=True))  # fmt: skip
    ops.append(Op("pool", "global_pool", (ops[-1].name,), (8,), (ops[-1].shape,)))
    graph = Graph(tuple(ops))
    start = (whole_update(graph["c2"], bias=False),)
    facts = {"budget_memory_bytes": memory_bytes(graph, start), "budget_macs": plan_backward_macs(graph, start)}
    facts["search"] = search_text(select="knapsack", ratios=[1.0, 0.5], blocks=6)
    return graph, Plan("knapsack", start, facts["budget_memory_bytes"], "paper", facts["budget_macs"], facts)


@FEW
@given(st.integers(0, 2**31), st.sampled_from(["rescore", "velocity:by=budget"]))
def test_revised_plans_keep_the_budgets_of_the_first(seed: int, text: str) -> None:
    graph, plan = convolutions()
    rng, policy = np.random.default_rng(seed), parse_policy(text)
    within = room_of(graph, plan, plan.updates, tuple(op.name for op in graph.layers))
    worth = rng.random(4)
    fisher = tuple(rng.random(op.out_channels) for op in graph.layers)
    scores = Scores("score", tuple(op.name for op in graph.layers), worth, worth, fisher, fisher)
    seen, memory = Seen(plan.updates, plan.updates, within, [1.0], scores=scores), dict[str, np.ndarray]()
    for _ in range(3):
        look = {op.name: rng.standard_normal((op.out_channels, 2)).astype(np.float32) for op in graph.layers}
        decision = policy.revise(replace(seen, outputs=look), memory)
        memory = dict(decision.memory)
    updates = decision.updates
    assert updates
    assert memory_bytes(graph, updates) <= plan.facts["budget_memory_bytes"]
    assert plan_backward_macs(graph, updates) <= plan.facts["budget_macs"]


def test_a_named_plan_without_budgets_lends_its_own_cost() -> None:
    graph, plan = convolutions()
    within = room_of(graph, None, plan.updates, ("c0", "c1", "c2", "c3"))
    assert within.problem.budget.memory_bytes == memory_bytes(graph, plan.updates)
    assert within.problem.budget.backward_macs == plan_backward_macs(graph, plan.updates)


def test_a_plan_that_paid_for_a_linear_head_goes_on_paying() -> None:
    graph, plan = convolutions()
    paid = replace(plan, facts={**plan.facts, "search": search_text(head="linear")})
    assert room_of(graph, paid, plan.updates, ("c1",), classes=5).problem.fixed[0].channels == (0, 1, 2, 3, 4)
    assert room_of(graph, plan, plan.updates, ("c1",), classes=5).problem.fixed == ()


# ------------------------------------------------------------------------------------------------------ turns


@FEW
@given(cases(), st.integers(2, 5))
def test_turns_share_nothing_and_make_up_the_plan(case, parts: int) -> None:  # type: ignore[no-untyped-def]
    graph, updates, _, _ = case
    turns = turns_of(graph, tuple(updates), parts)
    assert 1 <= len(turns) <= parts
    assert all(any(update.trains for update in turn) for turn in turns)
    for update in updates:
        mine = [each for turn in turns for each in turn if each.layer == update.layer]
        assert sorted(channel for each in mine for channel in each.channels) == list(update.channels)
        assert sorted(channel for each in mine for channel in each.bias) == list(update.bias)
        assert all(each.detached == update.detached for each in mine)


def test_ranges_are_neighbours_of_nearly_equal_size_and_turns_come_round() -> None:
    graph = chain(width=64, layers=2)
    first, second = turns_of(graph, plan_of(graph), 2)
    assert [update.channels for update in first] == [tuple(range(32))] * 2
    assert [update.channels for update in second] == [tuple(range(32, 64))] * 2
    policy, memory, turns = parse_policy("rotate:parts=3"), {}, []
    for _ in range(4):
        decision = policy.revise(Seen(plan_of(graph), plan_of(graph), room(graph)), memory)
        memory = dict(decision.memory)
        turns.append(decision.turn)
        assert decision.updates == plan_of(graph)
    assert turns == [1, 2, 0, 1]


def test_all_outputs_move_with_input_channels() -> None:
    op = Op("l", "linear", ("input",), (3,), ((4,),), bias=True)
    assert neurons(op, LayerUpdate("l", "input", (1,), 4)) == [0, 1, 2]
    assert neurons(op, LayerUpdate("l", "output", (1,), 3, (2,))) == [1, 2]


# ------------------------------------------------------------------------------------------------------ the text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("velocities", "static, velocity, rotate, rescore"),
        ("velocity:speed=3", "every=..., threshold=..."),
        ("velocity:every", "every=..."),
        ("velocity:every=soon", "a number"),
        ("velocity:every=0", "at least 1"),
        ("velocity:mu=0.9", "0 to 0.5"),
        ("velocity:by=luck", "threshold or budget"),
        ("velocity:threshold=nan", "a finite number"),
        ("velocity:probe=some", "means or full"),
        ("rotate:parts=1", "2 to 255"),
        ("static:every=3", "no settings"),
    ],
)
def test_what_cannot_be_is_said_with_what_can(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_policy(text)
    assert told in str(caught.value)


def test_every_policy_can_be_named_alone() -> None:
    for name in POLICIES:
        assert parse_policy(name).name == name
    assert parse_policy("velocity:threshold=0.01,every=3").settings == Velocity(threshold=0.01, every=3)
