"""Plans whose parts live or freeze as one: heads of an attention, and whole blocks."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts.records import LayerUpdate
from stages.cost.training import memory_bytes, plan_backward_macs
from stages.errors import BudgetError, UsageError
from stages.graphs.capture import capture
from stages.graphs.graph import Graph
from stages.graphs.updates import every_layer
from stages.models import registry
from stages.planning.baselines import is_plan, named_plan
from stages.planning.branching import best_by_branching
from stages.planning.budget import Budget
from stages.planning.channels import make_update
from stages.planning.layers import select_layers
from stages.planning.problem import Channels, Evidence, pose
from tests.cost.nets import inverted_residual
from tests.planning.problems import random_scores

BLOCKS = 5
OWN = {"norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


@cache
def vit() -> Graph:
    return capture(registry.build("vit-tiny", {"size": 32, "depth": BLOCKS}, seed=0), (3, 32, 32)).graph


def block_problem(seed: int, memory: float, macs: float):
    graph = vit()
    everything = every_layer(graph)
    budget = Budget(
        memory_bytes=int(memory * memory_bytes(graph, everything, model="saved")),
        backward_macs=int(macs * plan_backward_macs(graph, everything)),
        memory_model="saved",
    )
    return pose(graph, random_scores(graph, seed), budget, Channels(unit="blocks"), Evidence())


# -------------------------------------------------------------------------------------------------------------- blocks


def test_a_block_is_all_layers_of_its_module():
    updates = named_plan("blocks:3,0", vit())
    assert [update.layer for update in updates[:6]] == [op.name for op in vit().layers if ".0." in op.name]
    assert {update.layer for update in updates} == {f"blocks.{block}.{own}" for block in (0, 3) for own in OWN}
    assert all(update.ratio == 1 and len(update.bias) == update.axis_channels for update in updates)


def test_bsr_is_every_fourth_block_and_the_last_normalisation():
    names = {update.layer for update in named_plan("bsr", vit())}
    assert names == {f"blocks.3.{own}" for own in OWN} | {"norm"}


def test_bsrs_share_of_deit_small():
    """bsr.md, section 2: three blocks of 12 C^2 + 13 C and a norm of 2 C; here C = 192 and one block of five."""
    updates = named_plan("bsr", vit())
    values = sum(np.prod(vit()[u.layer].weight_shape) + len(u.bias) for u in updates)
    assert values == 12 * 192**2 + 13 * 192 + 2 * 192


@pytest.mark.parametrize("name", ["blocks:5", "blocks:", "blocks:1,x", "blocks"])
def test_blocks_that_are_not_there(name):
    with pytest.raises(UsageError, match="blocks"):
        named_plan(name, vit())
    assert is_plan(name) == (name == "blocks:5")


def test_bsr_needs_four_blocks():
    with pytest.raises(UsageError, match="at least 4"):
        named_plan("bsr", inverted_residual())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 1), st.floats(0.05, 1))
def test_branching_finds_what_trying_everything_finds(seed, memory, macs):
    problem = block_problem(seed, memory, macs)
    found = best_by_branching(problem)
    assert found.optimal
    try:
        certain = select_layers(problem, "exhaustive")
    except BudgetError:
        assert found.updates == ()
        return
    assert found.score == pytest.approx(certain.score, rel=1e-12)
    assert problem.fits(found.updates)
    assert len(found.updates) % len(OWN) == 0
    order = [vit().position[update.layer] for update in found.updates]
    assert order == sorted(order)


def test_branching_says_when_it_gave_up():
    assert not best_by_branching(block_problem(0, 0.6, 0.6), most=3).optimal


def test_knapsack_and_greedy_take_blocks():
    problem = block_problem(1, 0.6, 0.6)
    best, first = select_layers(problem, "knapsack"), select_layers(problem, "greedy")
    assert best == best_by_branching(problem)
    assert 0 < first.score <= best.score


def test_a_block_is_worth_the_sum_of_its_layers():
    problem = block_problem(2, 1, 1)
    scores = random_scores(vit(), 2)
    worth = dict(zip(scores.layer, scores.score, strict=True))
    assert [one.score for one in problem.candidates] == pytest.approx(
        [sum(worth[f"blocks.{block}.{own}"] for own in OWN) for block in range(BLOCKS)]
    )


def test_no_block_fits():
    with pytest.raises(BudgetError, match=r"the block blocks\.4"):
        select_layers(block_problem(0, 1e-6, 1), "knapsack")


# --------------------------------------------------------------------------------------------------------------- heads


def test_heads_live_as_a_whole():
    """Three heads, of which the second ranks highest in sum though no channel of it does."""
    op = vit()["blocks.0.attn.proj"]
    heads = np.arange(192) // 64
    ranking = np.where(heads == 1, 2.0, 1.0)
    ranking[0] = 50
    update = make_update(op, "input", ranking, 1 / 3, groups=heads)
    assert update == LayerUpdate(op.name, "input", tuple(range(64, 128)), 192)
    assert make_update(op, "input", ranking, 0.01, groups=heads).channels == tuple(range(64, 128))  # at least one
    assert make_update(op, "input", None, 1, groups=heads).channels == tuple(range(192))


def test_a_plan_by_heads():
    graph = vit()
    budget = block_problem(0, 1, 1).budget
    problem = pose(graph, random_scores(graph, 3), budget, Channels(ratios=(1, 2 / 3), unit="heads"), Evidence())
    by_layer = {one.options[1].update.layer: one.options[1].update for one in problem.candidates}
    qkv, proj, fc1 = (by_layer[f"blocks.1.{name}"] for name in ("attn.qkv", "attn.proj", "mlp.fc1"))
    lived = {channel % 192 // 64 for channel in qkv.channels}
    assert len(lived) == 2
    assert len(qkv.channels) == 2 * 3 * 64  # of queries, keys and values
    assert proj.axis == "input"
    assert len(proj.channels) == 2 * 64
    assert fc1.axis == "output"
    assert len(fc1.channels) == 512


def test_units_have_names():
    with pytest.raises(UsageError, match="channels, heads, blocks"):
        Channels(unit="tokens")
