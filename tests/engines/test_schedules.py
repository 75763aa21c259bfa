"""Values that are made again, or paged: the same bits as with everything kept, in the memory that was said."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.artifacts.records import LayerUpdate
from stages.engines.choice import Engine, TrainedNet, make_net
from stages.engines.native.lowering import lower
from stages.engines.native.memory import memory_of
from stages.engines.native.net import NativeNet
from stages.engines.paging import PageFile
from stages.engines.torch.net import SparseNet
from stages.errors import OutputError, TransferError
from stages.graphs.graph import Graph
from stages.graphs.updates import every_layer, whole_update
from stages.models.deploy import Backbone
from stages.planning.links import chain_of
from stages.planning.schedules import Costs, best_schedule, kept_bytes, least_bytes, peak_bytes
from tests.engines.protocol import named_gradients, on_every_engine
from tests.engines.random_graphs import cases, random_backbone, random_input
from tests.engines.torch.test_net import kept_bytes as kept_by_autograd
from tests.native.images import blocks, part

FEW = settings(max_examples=60, deadline=None, derandomize=True)
How = dict[str, str]


def net_by(backbone: Backbone, updates, engine: str, how: How, **more: object) -> TrainedNet:  # type: ignore[no-untyped-def]
    kept = Engine(engine, how=tuple(sorted(how.items())), **more)  # type: ignore[arg-type]
    return make_net(replace(backbone, engine=kept), updates)


def results(net: TrainedNet, x: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    found = []
    for _ in range(2):  # what the first pass left behind must not reach the second
        features, kept = net.forward(net.prefix(x))
        net.backward(kept, np.cos(np.arange(features.size, dtype=np.float32)).reshape(features.shape))
        found.append((features, named_gradients(net)))
    assert all(np.array_equal(value, found[1][1][name]) for name, value in found[0][1].items())
    return found[0]


def assert_same(backbone: Backbone, updates, engine: str, how: How, x: np.ndarray, **more: object) -> None:  # type: ignore[no-untyped-def]
    features, gradients = results(net_by(backbone, updates, engine, how, **more), x)
    whole, exact = results(net_by(backbone, updates, engine, {}, **more), x)
    assert np.array_equal(features, whole)
    for name, value in exact.items():
        assert np.array_equal(gradients[name], value), name


@st.composite
def scheduled(draw, ways: tuple[str, ...] = ("keep", "recompute", "page")):  # type: ignore[no-untyped-def]
    """A graph, a plan, and something for each value that the backward pass needs."""
    graph, updates, batch, seed = draw(cases())
    problem = chain_of(graph, updates)
    how = {name: draw(st.sampled_from([way for way in ways if way != "recompute"])) for name in problem.before}
    for link in problem.links:
        for item in link.items:
            if item not in how:
                how[item] = draw(st.sampled_from(ways))
    return graph, updates, batch, seed, how


@on_every_engine
@FEW
@given(scheduled())
def test_gradients_are_those_of_keeping_everything_to_the_bit(engine: str, case) -> None:  # type: ignore[no-untyped-def]
    graph, updates, batch, seed, how = case
    backbone = random_backbone(graph, seed, torch.float32)
    assert_same(backbone, updates, engine, how, random_input(graph, batch, seed, torch.float32).numpy())


PLANS = {
    "all": lambda graph: tuple(every_layer(graph)),
    "input channels": lambda graph: (
        part(graph, "block0.expand", "input", 2),
        part(graph, "block2.project", "input", 2),
    ),
    "depthwise": lambda graph: (
        part(graph, "block1.depthwise", "output", 3),
        part(graph, "block2.expand", "output", 2),
    ),
}


@on_every_engine
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("way", ["recompute", "page"])
def test_whatever_is_not_kept(engine: str, plan: str, way: str) -> None:
    """Every single value, and every slice, in its turn; and all of them."""
    graph = blocks()
    updates = PLANS[plan](graph)
    backbone = random_backbone(graph, 1, torch.float32)
    x = random_input(graph, 3, 1, torch.float32).numpy()
    problem = chain_of(graph, updates)
    items = dict.fromkeys(
        item for link in problem.links for item in link.items if item not in problem.before or way == "page"
    )
    entries = dict.fromkeys(problem.before, "keep")
    for some in (*([item] for item in items), list(items)):
        assert_same(backbone, updates, engine, entries | dict.fromkeys(some, way), x)


def test_the_arena_is_what_was_said_and_shrinks() -> None:
    graph = blocks()
    updates = tuple(every_layer(graph))
    problem = chain_of(graph, updates)
    costs = Costs([1.0] * len(problem.links))
    least, _ = least_bytes(problem, ("keep", "recompute"))
    found = best_schedule(problem, costs, least, ("keep", "recompute"))
    assert found is not None
    memory, whole = memory_of(graph, updates, how=found.how), memory_of(graph, updates)
    net = NativeNet(graph, random_backbone(graph, 0, torch.float32).tensors, updates, how=found.how, threads=1)
    assert net.sizes.arena_bytes == memory.arena < whole.arena
    assert net.sizes.kept_bytes == memory.kept < whole.kept
    paged = memory_of(graph, updates, how=dict.fromkeys((i for link in problem.links for i in link.items), "page"))
    assert paged.pages > 0
    assert paged.kept < memory.kept


@FEW
@given(cases(), st.floats(0, 1))
def test_torch_keeps_what_was_said(case, share: float) -> None:  # type: ignore[no-untyped-def]
    graph, updates, _, seed = case
    assume(not any(op.operator.made_again(op) for op in graph.ops))
    problem, ways = chain_of(graph, updates), ("keep", "recompute")
    least, most = least_bytes(problem, ways)[0], peak_bytes(problem, {})
    found = best_schedule(problem, Costs([1.0] * len(problem.links)), int(least + share * (most - least)), ways)
    assert found is not None
    backbone, x = random_backbone(graph, seed, torch.float32), random_input(graph, 1, seed, torch.float32)
    net = SparseNet(replace(backbone, engine=Engine("torch", how=tuple(found.how.items()))), updates)
    assert kept_by_autograd(net, x) == kept_bytes(problem, found.how)


@on_every_engine
def test_values_in_8_bits_are_paged_and_made_again_as_they_are(engine: str) -> None:
    graph = blocks()
    updates = tuple(every_layer(graph))
    backbone = random_backbone(graph, 1, torch.float32)
    x = random_input(graph, 2, 1, torch.float32).numpy()
    items = {item for link in chain_of(graph, updates).links for item in link.items} - {"input"}
    _, exact = results(net_by(backbone, updates, engine, {}), x)
    _, found = results(
        net_by(backbone, updates, engine, dict.fromkeys(items, "recompute"), keep_bits=8, keep_rounding="nearest"), x
    )
    for name in exact:
        if not name.startswith("stem"):  # whose input alone is kept, in 8 bits
            assert np.array_equal(found[name], exact[name]), name


def test_in_place_updates_do_not_reach_what_is_made_again() -> None:
    """Steps of the forward pass stand before the weight gradients of the layers that they run."""
    graph = blocks()
    updates = tuple(every_layer(graph))
    items = {item for link in chain_of(graph, updates).links for item in link.items} - {"input"}
    program = lower(graph, updates, how=dict.fromkeys(items, "recompute"))
    updated: set[str] = set()
    for step in program.backward:
        if step.kind in ("conv", "depthwise"):
            assert step.op not in updated
        elif step.kind.endswith("_dw"):
            updated.add(step.op)
    assert updated


# ----------------------------------------------------------------------------------------------------------- the file


def test_a_folder_that_is_not_there_or_full_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        PageFile(str(tmp_path / "nowhere"), 10)
    with pytest.raises(OutputError, match="name another folder"):
        PageFile(str(tmp_path), 1 << 60)
    if os.path.exists("/dev/full"):
        assert not list(tmp_path.iterdir())


def test_a_page_that_is_lost_ends_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(blocks().ops)
    updates: tuple[LayerUpdate, ...] = (whole_update(graph["block2.project"]),)
    backbone = random_backbone(graph, 0, torch.float32)
    item = chain_of(graph, updates).links[-2].items[0]
    net = NativeNet(graph, backbone.tensors, updates, how={item: "page"}, page_dir=str(tmp_path))
    x = random_input(graph, 1, 0, torch.float32).numpy()
    assert not list(tmp_path.iterdir())  # the file has no name

    def fails(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PageFile, "move", fails)
    with pytest.raises(TransferError, match="No space left on device"):
        net.forward(net.prefix(x))
