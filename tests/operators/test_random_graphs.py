"""The torch engine, the costs, the planner and the Fisher pass on random graphs over all kinds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from stages.artifacts.records import detached_layers
from stages.cost.model import full_backward_macs
from stages.cost.training import MEMORY_MODELS, memory_bytes, saved_activation_bytes
from stages.engines.choice import Engine
from stages.engines.torch.inspector import Inspector
from stages.engines.torch.net import SparseNet
from stages.graphs.graph import Graph
from stages.graphs.keeping import KEEP_BITS
from stages.graphs.record import graph_tree, read_graph
from stages.graphs.updates import whole_update
from stages.importance.fisher import fisher_pass
from stages.losses import cross_entropy
from stages.operators import TABLE, Op
from stages.planning.budget import Budget
from stages.planning.layers import exhaustive, knapsack
from stages.planning.problem import Channels, Evidence, Problem, pose
from tests.engines.torch.test_net import expected_gradients, kept_bytes
from tests.operators.random_graphs import (
    SEEDS,
    cases,
    dense_gradients,
    graphs,
    heard_layers,
    mark,
    random_backbone,
    random_input,
)
from tests.planning.problems import random_scores
from tests.rounding import as_tensors

FEW = settings(max_examples=60, deadline=None, derandomize=True)
NEVER = {"drop_tokens", "input", "batchnorm", "flatten", "global_pool", "expand", "max", "sign", "log_softmax"}
"""Kinds that the generator does not draw: a choice jumps where scores nearly tie, the last of them have twins that it
does."""


def weighted(features: Tensor) -> Tensor:
    """A loss whose gradient differs for every feature of every sample."""
    weights = torch.linspace(-1, 2, features.numel(), dtype=features.dtype).reshape(features.shape)
    return (features * weights).sum() + (features**2).mean()


def test_the_generator_draws_most_kinds() -> None:
    found: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(graphs())
    def draw(graph: Graph) -> None:
        found.update({op.kind for op in graph.ops})
        found.update({"shared": any(op.shares for op in graph.ops)})

    draw()
    assert len(set(TABLE) - set(found) - NEVER) < 8
    assert found["shared"] > 5


@FEW
@given(graphs())
def test_the_record_reads_as_it_was(graph: Graph) -> None:
    assert read_graph(graph_tree(graph)) == graph


@settings(FEW, max_examples=150)
@given(cases())
def test_gradients_equal_dense_autograd(case) -> None:
    graph, updates, batch, seed = case
    backbone, x = random_backbone(graph, seed, torch.float64), random_input(graph, batch, seed, torch.float64)
    features, dense = dense_gradients(backbone, x, weighted, detached_layers(updates))
    assume(bool(features.isfinite().all()))
    net = SparseNet(backbone, updates)
    mine = net.suffix(net.prefix(x))
    torch.testing.assert_close(mine.detach(), features, rtol=1e-9, atol=1e-9)
    weighted(mine).backward()
    scale = max(float(value.abs().max()) for value in dense.values())
    for parameter, value in zip(net.parameters(), expected_gradients(net, backbone, dense, updates), strict=True):
        found = torch.zeros_like(value) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-7 * scale + 1e-12)


@settings(FEW, max_examples=150)
@given(cases(), st.sampled_from(KEEP_BITS))
def test_bytes_kept_are_the_predicted_ones(case, bits) -> None:
    graph, updates, batch, seed = case
    backbone = random_backbone(graph, seed, torch.float32)
    net = SparseNet(replace(backbone, engine=Engine("torch", keep_bits=bits)), updates)
    x = random_input(graph, batch, seed, torch.float32)
    assert kept_bytes(net, x) == saved_activation_bytes(graph, updates, batch, bits)


@FEW
@given(cases())
def test_only_live_values_move(case) -> None:
    graph, updates, batch, seed = case
    backbone = random_backbone(graph, seed, torch.float32)
    before = {name: torch.tensor(value) for name, value in backbone.tensors.items()}
    net = SparseNet(backbone, updates)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(2):
        optimizer.zero_grad()
        weighted(net.suffix(net.prefix(random_input(graph, batch, seed + step, torch.float32)))).backward()
        optimizer.step()
    after = net.tensors()
    allowed = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in before.items()}
    for update in updates:
        mark(graph[update.layer], update, allowed)
    for name, value in before.items():
        assert torch.equal(after[name][~allowed[name]], value[~allowed[name]]), name
        assert np.array_equal(backbone.tensors[name], value), "the caller's backbone changed"
    assert any(bool(((after[name] != value) & allowed[name]).any()) for name, value in before.items())


# ------------------------------------------------------------------------------------------------------------- planner


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A planning problem of two to five layers, with budgets between nothing and everything."""
    graph = draw(graphs().filter(lambda graph: 2 <= len(heard_layers(graph)) == len(graph.layers) <= 5))
    model, batch = draw(st.sampled_from(sorted(MEMORY_MODELS))), draw(st.integers(1, 2))
    everything = [whole_update(op) for op in graph.layers]
    most = memory_bytes(graph, everything, model=model, batch=batch)
    least = memory_bytes(graph, (), model=model, batch=batch)
    memory, macs = draw(st.floats(0, 1)), draw(st.one_of(st.none(), st.floats(0, 1)))
    budget = Budget(
        memory_bytes=max(1, int(least + memory * (most - least))),
        backward_macs=None if macs is None else max(1, int(macs * full_backward_macs(graph))),
        memory_model=model,
        batch=batch,
    )
    how = Channels(axis=draw(st.sampled_from(["output", "input"])), ratios=(1.0, 0.5), bias=draw(st.booleans()))
    return pose(graph, random_scores(graph, draw(SEEDS)), budget, how, Evidence())


@settings(FEW, max_examples=100)
@given(problems())
def test_the_knapsack_is_the_optimum(problem: Problem) -> None:
    """Its costs are taken apart (`planning.coupling`); those of the exhaustive search come from `cost.training`."""
    found = knapsack(problem)
    assert problem.fits(found.updates)
    assert found.score == pytest.approx(exhaustive(problem).score, rel=1e-7, abs=0)


# --------------------------------------------------------------------------------------------------------- Fisher pass


def per_channel(op: Op, products: Tensor, axis: str) -> Tensor:
    """Entries of weight times gradient, summed per channel."""
    if op.is_depthwise:
        return products.flatten(1).sum(1) if products.ndim > 1 else products
    first, second = products.shape[:2]
    grouped = products.reshape(op.groups, first // op.groups, second, -1).sum(3)
    along_first = (axis == "input") == op.operator.input_first
    return (grouped.sum(2) if along_first else grouped.sum(1)).flatten()


@FEW
@given(graphs(), SEEDS)
def test_fisher_potentials_are_those_of_each_samples_own_gradient(graph: Graph, seed: int) -> None:
    """sum_d a g = <W, dL/dW> (+ b dL/db at the output), also over the calls of a layer that is called twice."""
    assume(heard_layers(graph) and graph.feature_dim > 1)
    backbone, x = random_backbone(graph, seed, torch.float64), random_input(graph, 3, seed, torch.float64)
    tensors, y = as_tensors(backbone.tensors), torch.tensor([0, 1, 0])
    expected: dict[str, dict[str, Tensor]] = {"output": {}, "input": {}}
    for n in range(3):
        _, dense = dense_gradients(backbone, x[n : n + 1], lambda f, n=n: F.cross_entropy(f, y[n : n + 1]))
        for op in heard_layers(graph):
            products = tensors[f"{op.name}.weight"] * dense[f"{op.name}.weight"]
            for axis, into in expected.items():
                found = per_channel(op, products, axis)
                if op.bias and axis == "output":
                    found = found + tensors[f"{op.name}.bias"] * dense[f"{op.name}.bias"]
                into[op.name] = into.get(op.name, 0) + found**2 / 6
    names = [op.name for op in heard_layers(graph)]
    inspector = Inspector(graph, backbone.tensors, names)
    batches = [(x[part].numpy(), y[part].numpy()) for part in (slice(0, 2), slice(2, 3))]
    fisher = fisher_pass(inspector, batches, cross_entropy)
    for name in names:
        for found, wanted in ((fisher.output, expected["output"]), (fisher.input, expected["input"])):
            np.testing.assert_allclose(found[name], wanted[name].numpy(), rtol=1e-5, atol=1e-10)


def test_a_value_that_two_readers_want_is_kept_once() -> None:
    """x * x and tanh(x): the tanh's output, kept for itself, is the product's factor and the live layer's input."""
    shape = ((4,),)
    ops = (
        Op("input", "input", (), (4,)),
        Op("first", "linear", ("input",), (4,), shape),
        Op("bent", "tanh", ("first",), (4,), shape),
        Op("square", "multiply", ("bent", "bent"), (4,), shape * 2),
        Op("sum", "add", ("square", "bent"), (4,), shape * 2),
        Op("last", "linear", ("sum",), (3,), shape),
    )
    graph = Graph(ops)
    both = (whole_update(graph["first"]), whole_update(graph["last"]))
    backbone = random_backbone(graph, 0, torch.float32)
    x = random_input(graph, 2, 0, torch.float32)
    assert saved_activation_bytes(graph, both, 2) == 4 * 2 * (4 + 4 + 4)  # input, bent, sum
    assert kept_bytes(SparseNet(backbone, both), x) == 96
    assert replace(graph, ops=ops) == graph
