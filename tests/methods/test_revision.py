"""Policies at work: what they are told, what an optimiser carries over, and that nothing frozen ever moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Array, LayerUpdate, Run
from stages.engines.torch.reference import apply
from stages.graphs.graph import Graph
from stages.graphs.updates import whole_update
from stages.methods.observing import Observer
from stages.methods.revision import Revising, probe_rows
from stages.models.deploy import Backbone, deploy
from stages.models.inputs import adapt as model_input
from stages.operators import Op
from stages.planning.policies import parse_policy, room_of, turns_of
from stages.sparse_training import REVISIONS, STAGE, Checkpointing, StreamTraining, train_stream, train_support
from stages.training.optimizers import OPTIMIZERS, Optimizing, checked_step, make_optimizer
from stages.training.revising import carry
from tests.engines.protocol import in_turns, live_entries, net_of, on_every_engine
from tests.engines.random_graphs import cases, random_backbone, random_input
from tests.engines.torch.test_net import chain
from tests.rounding import no_worse
from tests.test_sparse_training import LIVE, block, conv4, fixed, new_run, rng, sgd, stream

FEW = settings(max_examples=25, deadline=None, derandomize=True)
MIDDLE, LAST = LayerUpdate("middle", "output", (0, 2), 4, (1,)), LayerUpdate("last", "input", (1, 3), 4)


def every(name: str, engine: str = "auto", rate: float = 0.05) -> StreamTraining:
    return StreamTraining(policy=name, engine=engine, optimizing=Optimizing(optimizer="adam", learning_rate=rate))


# --------------------------------------------------------------------------------------------------------- observations


@on_every_engine
@FEW
@given(cases(), st.booleans())
def test_outputs_are_those_of_the_reference(engine: str, case, full: bool) -> None:  # type: ignore[no-untyped-def]
    graph, updates, batch, seed = case
    backbone, x = random_backbone(graph, seed, torch.float32), random_input(graph, batch, seed, torch.float32)
    layers = [update.layer for update in updates]
    observer = Observer(replace(backbone, engine=net_engine(engine)), layers, layers, x.numpy(), full=full)
    found = observer.look(backbone.tensors)
    values = {kind: reference(graph, backbone, x, kind) for kind in (torch.float32, torch.float64)}
    longest = sum(op.weights // op.out_channels + prod(op.shape) for op in graph.layers)
    for name in layers:
        plain, exact = (channels(graph[name], values[kind][name], full=full) for kind in values)
        no_worse(torch.from_numpy(found[name]), plain, exact, longest)


def reference(graph: Graph, backbone: Backbone, x: torch.Tensor, kind: torch.dtype) -> dict[str, torch.Tensor]:
    """Every value of the graph."""
    tensors = {name: torch.from_numpy(np.asarray(value)).to(kind) for name, value in backbone.tensors.items()}
    values = {graph.ops[0].name: x.to(kind)}
    for op in graph.ops[1:]:
        values[op.name] = apply(op, [values[name] for name in op.inputs], tensors)
    return values


def channels(op: Op, value: torch.Tensor, *, full: bool) -> torch.Tensor:
    """(C, n) means, or (C, n * positions)."""
    moved = value.movedim(op.channel_axis % len(op.shape) + 1, 0).reshape(op.out_channels, len(value), -1)
    return moved.reshape(op.out_channels, -1) if full else moved.mean(2)


def net_engine(name: str):  # type: ignore[no-untyped-def]
    from stages.engines.choice import Engine

    return Engine(name)


def test_the_probe_is_the_first_sample_of_every_class() -> None:
    assert probe_rows(np.array([2, 2, 0, 1, 0])).tolist() == [0, 2, 3]
    assert probe_rows(np.array([], np.int64)).tolist() == []


# ---------------------------------------------------------------------------------------------------- optimiser's state


@on_every_engine
@pytest.mark.parametrize("rule", sorted(OPTIMIZERS))
def test_every_value_goes_on_as_under_an_optimiser_of_its_own(engine: str, rule: str) -> None:
    """Plans that follow each other: a value moves as one that was alone with its gradients since it joined."""
    backbone = random_backbone(chain(), 3, torch.float32)
    how = Optimizing(optimizer=rule, momentum=0.9 if rule == "sgd" else 0.0, weight_decay=0.01)
    plans = [(MIDDLE,), (MIDDLE, LAST), (replace(MIDDLE, channels=(2, 3)), LAST), (LAST,), (MIDDLE, LAST)]
    draw = np.random.default_rng(0)
    whole = {name: np.array(value) for name, value in backbone.tensors.items()}
    alone: dict[tuple[str, int], tuple[object, object]] = {}
    net = net_of(backbone, plans[0], engine)
    optimizer = make_optimizer(net.parameters(), how)
    for number, plan in enumerate(plans):
        if number:
            backbone = replace(backbone, tensors=net.tensors())
            after = net_of(backbone, plan, engine)
            carry(optimizer, net, after)
            net = after
        live = {name: np.flatnonzero(mark) for name, mark in live_entries(chain(), plan, whole).items()}
        alone = {key: value for key, value in alone.items() if key[1] in live[key[0]]}
        for _ in range(3):
            gradients = {name: draw.standard_normal(value.size).astype(np.float32) for name, value in whole.items()}
            for place in net.places():
                place.parameter.gradient.reshape(-1)[place.at] = gradients[place.name][place.ids]
            checked_step(optimizer, 1.0, rate=0.1, clip_norm=0.0, where="step")
            for name, ids in live.items():
                for i in ids.tolist():
                    one = alone.setdefault((name, i), single(whole[name].reshape(-1)[i], how))
                    parameter, own = one
                    parameter.gradient[...] = gradients[name][i]  # type: ignore[attr-defined]
                    checked_step(own, 1.0, rate=0.1, clip_norm=0.0, where="step")  # type: ignore[arg-type]
                    whole[name].reshape(-1)[i] = parameter.value[0]  # type: ignore[attr-defined]
        found = net.tensors()
        assert all(np.array_equal(found[name], value) for name, value in whole.items())


def single(value: float, how: Optimizing):  # type: ignore[no-untyped-def]
    from stages.engines.parameter import Parameter

    parameter = Parameter(np.array([value], np.float32))
    return parameter, make_optimizer([parameter], how)


@on_every_engine
@pytest.mark.parametrize("rule", sorted(OPTIMIZERS))
def test_what_rests_for_a_turn_keeps_its_values_and_state(engine: str, rule: str) -> None:
    backbone = random_backbone(chain(), 3, torch.float32)
    how = Optimizing(optimizer=rule, momentum=0.9 if rule == "sgd" else 0.0, weight_decay=0.1)
    room = room_of(chain(), None, (MIDDLE, LAST), ("middle", "last"))
    revising = Revising(parse_policy("rotate"), replace(backbone, engine=net_engine(engine)), (MIDDLE, LAST), room)
    net = revising.begin()
    optimizer = make_optimizer(net.parameters(), how)
    revising.hold(optimizer)
    turns = turns_of(chain(), (MIDDLE, LAST), 2)
    x = random_input(chain(), 5, 3, torch.float32).numpy()
    for update in range(4):
        before = {name: np.array(value) for name, value in net.tensors().items()}
        features, kept = net.forward(net.prefix(x))
        net.backward(kept, np.ones_like(features))
        checked_step(optimizer, 1.0, rate=0.05, clip_norm=0.0, where="step")
        marked = live_entries(chain(), turns[update % 2], before)
        for name, value in net.tensors().items():
            assert np.array_equal(value[~marked[name]], before[name][~marked[name]]), (update, name)
            assert (value[marked[name]] != before[name][marked[name]]).all(), (update, name)
        assert revising.after(optimizer, 1.0) is net


@on_every_engine
def test_the_gradients_of_all_turns_are_the_plans(engine: str) -> None:
    backbone = random_backbone(chain(), 3, torch.float32)
    x = random_input(chain(), 5, 3, torch.float32).numpy()
    plan = (MIDDLE, LAST)
    found: dict[str, Array] = {}
    net = net_of(backbone, plan, engine, in_turns(plan, 2))
    for number in (0, 1):
        net.turn(number)
        features, kept = net.forward(net.prefix(x))
        net.backward(kept, np.ones_like(features))
    for place in net.places():
        whole = found.setdefault(place.name, np.zeros(backbone.tensors[place.name].size, np.float32))
        whole[place.ids] = place.parameter.gradient.reshape(-1)[place.at]
    whole_net = net_of(backbone, plan, engine)
    features, kept = whole_net.forward(whole_net.prefix(x))
    whole_net.backward(kept, np.ones_like(features))
    for place in whole_net.places():
        assert np.allclose(found[place.name][place.ids], place.parameter.gradient.reshape(-1)[place.at], rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize(
    "policy",
    ["velocity:every=2,threshold=0.01", "velocity:every=2,by=budget", "rotate:every=1", "rotate:every=2,parts=3",
     "rescore:every=3", "rescore:every=2,criterion=random", "velocity:every=2,learn=0.001,threshold=0.05"],
)  # fmt: skip
def test_a_run_that_was_stopped_ends_with_the_same_bits(engine: str, policy: str) -> None:
    blocks, config, saved = stream(9), every(policy, engine), list[Run]()
    straight = train_stream(new_run(), blocks, config)
    for cut in (1, 2, 5):
        train_stream(new_run(), blocks[:cut], config, checkpoint=Checkpointing(write=saved.append, every=5))
        resumed = train_stream(new_run(), blocks, config, resume=saved[-1])
        assert encode(resumed) == encode(straight)
    if policy.startswith("re"):
        assert len(np.unique(straight.metrics[REVISIONS]["version"])) > 1


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_revisions_that_change_nothing_change_no_bit(engine: str) -> None:
    blocks = stream(5)
    plain = train_stream(new_run(), blocks, every("static", engine))
    watched = train_stream(new_run(), blocks, every("velocity:every=1,threshold=0", engine))
    for name, value in plain.model.tensors.items():
        assert np.array_equal(value, watched.model.tensors[name])
    table = watched.metrics[REVISIONS]
    assert table["version"].tolist() == [0, 0]
    assert table["live_channels"].tolist() == [3, 4]


def test_an_infinite_threshold_stops_all_training_and_a_strange_block_wakes_it() -> None:
    start, blocks = new_run(), stream(9)
    strange = [block(9, 77, weighted=False)]
    result = train_stream(start, [*blocks, *strange, *blocks], every("velocity:every=2,threshold=9"))
    rates = result.metrics[STAGE]["learning_rate"]
    asleep = np.flatnonzero(rates == 0)
    assert asleep.size
    assert asleep[0] == 4  # looked at before the first update, after two and after four: the first velocity
    table = result.metrics[REVISIONS]
    assert -1 in table["layer"]
    stopped = train_stream(start, blocks, every("velocity:every=2,threshold=9"))
    quiet = train_stream(start, blocks[:4], every("velocity:every=2,threshold=9"))
    for name, value in stopped.model.tensors.items():
        if not rates[4:9].any():
            assert np.array_equal(value, quiet.model.tensors[name])


def test_what_leaves_the_plan_stays_as_it_is_and_is_published() -> None:
    published: dict[int, dict[str, Array]] = {}
    plans: dict[int, Sequence[LayerUpdate] | None] = {}

    def publish(number: int, tensors, head, updates) -> None:  # type: ignore[no-untyped-def]
        published[number] = {name: np.array(value) for name, value in tensors.items()}
        plans[number] = updates

    start = new_run()
    result = train_stream(start, stream(8), every("rescore:every=2,criterion=random"), publish=publish)
    assert len({str(plan) for plan in plans.values()}) > 1
    for number in range(1, 9):
        weights = {**start.model.tensors, **published[number]}
        if number == 8:
            assert all(np.array_equal(weights[name], value) for name, value in result.model.tensors.items())
        if number > 1:
            marked = live_entries(deploy(start.model).graph, plans[number - 1] or (), start.model.tensors)
            before = {**start.model.tensors, **published[number - 1]}
            for name, live in marked.items():
                assert np.array_equal(weights[name][~live], before[name][~live])


# ---------------------------------------------------------------------------------------------------- support sets


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_first_half_that_cannot_move_is_recognised_within_three_revisions(engine: str) -> None:
    """Its gradients are erased: velocity 0 from the third look on, and the boundary moves behind it."""
    run = new_run((whole_update(deploy(conv4()).graph["blocks.00.conv"]), *LIVE))
    backbone = replace(deploy(run.model), engine=net_engine(engine))
    assert run.plan is not None
    x = model_input(block(9).x, "NHW", run.model.input)
    room = room_of(backbone.graph, run.plan, run.plan.updates, tuple(update.layer for update in run.plan.updates))
    revising = Revising(parse_policy("velocity:every=1"), backbone, run.plan.updates, room, probe=x[:3])
    net = revising.begin()
    optimizer = make_optimizer(net.parameters(), Optimizing(optimizer="sgd"))
    first = net.boundary
    for _ in range(3):
        features, kept = net.forward(net.prefix(x))
        net.backward(kept, np.cos(np.arange(features.size)).astype(np.float32).reshape(features.shape))
        for place in net.places():
            if place.name.startswith("blocks.00"):
                place.parameter.gradient.reshape(-1)[place.at] = 0
        checked_step(optimizer, 1.0, rate=0.5, clip_norm=0.0, where="step")
        net = revising.after(optimizer, 1.0)
    assert [update.layer for update in revising.updates] == ["blocks.02.conv", "blocks.03.conv"]
    assert net.boundary != first


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_support_set_adapts_under_every_policy(engine: str, cached: bool) -> None:
    support = block(9, weighted=False)
    for name in ("velocity:every=1,threshold=9", "rotate", "rescore:every=2", "velocity:every=1,by=budget"):
        options = {"views": 2, "cache_prefix": True} if cached else {}
        config = replace(fixed(0.02, engine, iterations=6, **options), policy=name)  # type: ignore[arg-type]
        result = train_support(new_run(), support, config, rng=rng())
        assert REVISIONS in result.metrics
        assert result.model.head is not None
        losses = result.metrics[STAGE]["loss"]
        assert np.isfinite(losses).all()
        assert len(losses) == (2 if "=9" in name else 6)  # the third look finds velocities, and all below 9
        again = train_support(new_run(), support, config, rng=rng())
        assert encode(again) == encode(result)


def test_rotating_in_one_part_of_time_is_static_training_of_that_part() -> None:
    """Two turns of two updates each: what trains in the first two is what a plan of that turn alone trains."""
    support = block(9, weighted=False)
    backbone: Backbone = deploy(conv4())
    first = turns_of(backbone.graph, LIVE, 2)[0]
    turned = train_support(
        new_run(), support, replace(fixed(0.02, "native", iterations=2), policy="rotate:every=2"), rng=rng()
    )
    alone = train_support(new_run(first), support, fixed(0.02, "native", iterations=2), rng=rng())
    for name, value in alone.model.tensors.items():
        assert np.allclose(turned.model.tensors[name], value, rtol=1e-5, atol=1e-6), name


def test_sgd_is_what_streams_train_by() -> None:
    assert sgd().policy == "static"
