"""Random planning problems over small graphs."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from stages.artifacts.records import LayerUpdate, Scores
from stages.cost.latency import Durations
from stages.cost.model import full_backward_macs
from stages.cost.training import MEMORY_MODELS, OPTIMIZER_STATE, memory_bytes, plan_backward_macs
from stages.graphs.graph import Graph
from stages.graphs.keeping import KEEP_BITS
from stages.graphs.updates import whole_update
from stages.planning.budget import Budget
from stages.planning.problem import Channels, Evidence, Problem, pose
from tests.cost.nets import HAND_MADE, conv, op_input, unary


def random_scores(graph: Graph, seed: int, layers: tuple[str, ...] | None = None) -> Scores:
    """Log-normal Fisher information per channel; a layer's score is a random multiple of its sum."""
    rng = np.random.default_rng(seed)
    names = layers or tuple(op.name for op in graph.layers)
    output = tuple(rng.lognormal(0, 2, graph[name].out_channels).astype(np.float32) for name in names)
    given = tuple(rng.lognormal(0, 2, graph[name].in_channels).astype(np.float32) for name in names)
    fisher = np.array([float(values.sum()) for values in output])
    return Scores("score", names, fisher * rng.lognormal(0, 1, len(names)), fisher, output, given)


def random_durations(graph: Graph, seed: int) -> Durations:
    rng = np.random.default_rng(seed)
    names = [op.name for op in graph.layers]
    columns = [dict(zip(names, map(int, rng.integers(1000, 9000, len(names))), strict=True)) for _ in range(2)]
    return Durations(int(rng.integers(10_000, 90_000)), *columns)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A small graph, random scores, and budgets between nothing and everything, one of them perhaps missing."""
    graph = HAND_MADE[draw(st.sampled_from(sorted(HAND_MADE)))]()
    seed = draw(st.integers(0, 10_000))
    model = draw(st.sampled_from(sorted(MEMORY_MODELS)))
    optimizer = draw(st.sampled_from(sorted(OPTIMIZER_STATE)))
    batch = draw(st.integers(1, 3))
    bits = draw(st.sampled_from(KEEP_BITS))
    fixed: tuple[LayerUpdate, ...] = ()
    scored = [op.name for op in graph.layers]
    if draw(st.booleans()):
        fixed = (whole_update(graph[scored.pop()]),)
    everything = [whole_update(op) for op in graph.layers]
    accounting: dict[str, Any] = {"model": model, "batch": batch, "optimizer": optimizer, "keep_bits": bits}
    most_bytes = memory_bytes(graph, everything, **accounting)
    least_bytes = memory_bytes(graph, fixed, **accounting)
    share = st.one_of(st.none(), st.floats(0, 1))
    memory, macs, latency = draw(share), draw(share), draw(share)
    measured = random_durations(graph, seed) if latency is not None else None
    slowest_s = (
        0.0
        if measured is None
        else 1e-9
        * (measured.forward_ns + sum(measured.input_gradient_ns.values()) + sum(measured.weight_gradient_ns.values()))
    )
    budget = Budget(
        memory_bytes=None if memory is None else max(1, int(least_bytes + memory * (most_bytes - least_bytes))),
        backward_macs=None if macs is None else max(1, int(macs * full_backward_macs(graph))),
        latency_s=None if latency is None else max(1e-9, latency * slowest_s),
        memory_model=model,
        batch=batch,
        optimizer=optimizer,
        keep_bits=bits,
    )
    how = Channels(
        axis=draw(st.sampled_from(["output", "input"])),
        bias=draw(st.booleans()),
        ratios=draw(st.sampled_from([(1.0, 0.5, 0.25, 0.125), (1.0, 0.3), (0.5,)])),
    )
    some = st.sets(st.sampled_from([op.name for op in graph.layers]), max_size=3)
    detached = frozenset(draw(some.filter(lambda names: all_heard(graph, names))))
    return pose(
        graph, random_scores(graph, seed, tuple(scored)), budget, how, Evidence(),
        fixed=fixed, measured=measured, detached=detached,
    )  # fmt: skip


def chain_problem(seed: int, layers: int = 7) -> Problem:
    """A chain of random convolutions under a memory and a MAC budget, both tight: `exhaustive` is soon done."""
    rng = np.random.default_rng(seed)
    ops = [op_input(3, 8)]
    for i in range(layers):
        kernel, stride = int(rng.choice([1, 3])), int(rng.choice([1, 1, 1, 2]))
        layer = conv(f"c{i}", ops[-1], int(rng.integers(2, 9)), k=kernel, stride=stride)
        ops += [layer, unary("relu", layer)]
    graph = Graph(tuple(ops))
    everything = [whole_update(op) for op in graph.layers]
    shares = rng.uniform(0.2, 0.7, 2)
    budget = Budget(
        memory_bytes=int(memory_bytes(graph, everything, model="saved") * shares[0]),
        backward_macs=int(plan_backward_macs(graph, everything) * shares[1]),
        memory_model="saved",
    )
    return pose(graph, random_scores(graph, seed), budget, Channels(ratios=(1.0, 0.5)), Evidence())


def all_heard(graph: Graph, detached: set[str]) -> bool:
    """Whether every layer gets a gradient when it trains."""
    return all(op.name in graph.gradient_flow({op.name}, detached) for op in graph.layers)


def costs(problem: Problem, updates: tuple[LayerUpdate, ...]) -> tuple[int, int]:
    """Memory and MACs, computed from the cost functions directly."""
    budget, together = problem.budget, problem.complete((*updates, *problem.fixed))
    memory = memory_bytes(
        problem.graph, together, model=budget.memory_model, batch=budget.batch, optimizer=budget.optimizer,
        keep_bits=budget.keep_bits,
    )  # fmt: skip
    return memory, plan_backward_macs(problem.graph, together)
