"""`train-sparse --ram`: the same bits within the memory that was said, replayed, refused with the least that works."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block, Model, Plan, Profile, Run
from stages.engines.choice import Engine
from stages.engines.native.memory import memory_of
from stages.errors import BudgetError, DataError, OutputError, PartMissing, UsageError
from stages.methods.scheduling import costs_here, frontier, joules_here, page_seconds, schedule_within, scheduling
from stages.models.deploy import deploy
from stages.planning.baselines import named_plan
from stages.planning.schedules import Costs, best_schedule, peak_bytes, price
from stages.profiling import frontier_of
from stages.settings.profiling import Profiling
from stages.settings.training import Training
from stages.sparse_training import Checkpointing, StreamTraining, schedule_of, train_stream, train_support
from tests.test_exporting import record
from tests.test_sparse_training import fixed, rng, sgd

ENGINES = pytest.mark.parametrize("engine", ["native", "torch"])


@cache
def model() -> Model:
    """A small net of inverted residual blocks."""
    return record("mcunet-5fps", "deploy")


def new_run(plan: str | None = "last-6") -> Run:
    if plan is None:
        return Run(model())
    return Run(model(), plan=Plan(plan, tuple(named_plan(plan, deploy(model()).graph)), 0, "paper", 0))


def block(size: int, seed: int = 0, **fields: object) -> Block:
    y = np.arange(size) % 3
    x = np.random.default_rng(seed).integers(0, 90, (size, 32, 32, 3)) + 50 * y[:, None, None, None]
    return Block(x.astype(np.uint8), y.astype(np.int64), "NHWC", **fields)  # type: ignore[arg-type]


def stream(count: int) -> list[Block]:
    return [block(4, seed, round=seed) for seed in range(count)]


def least_and_most(engine: str) -> tuple[int, int]:
    backbone = replace(deploy(new_run().model), engine=Engine(engine))
    made = scheduling(backbone, named_plan("full", backbone.graph))
    return made.least()[0], made.allocated({})


def same(first: Run, second: Run) -> bool:
    tensors = second.model.tensors
    return all(np.array_equal(value, tensors[name]) for name, value in first.model.tensors.items())


@ENGINES
def test_a_support_set_within_less_memory_gives_the_same_bits(engine: str) -> None:
    support, notes = block(9), list[str]()
    least, most = least_and_most(engine)
    assert least < most
    plain = replace(fixed(0.02, engine, iterations=3, micro_batch=1), plan="full")
    tight = replace(plain, ram_bytes=least)
    whole = train_support(new_run(), support, plain, rng=rng())
    result = train_support(new_run(), support, tight, rng=rng(), on_note=notes.append)
    assert same(whole, result)
    assert any("made again" in note for note in notes)
    replayed = train_support(new_run(), support, replace(plain, schedule=schedule_of(result)), rng=rng())
    assert same(whole, replayed)
    assert schedule_of(replayed) == schedule_of(result)
    with pytest.raises(DataError, match="another plan"):
        train_support(new_run(), support, replace(plain, plan=None, schedule=schedule_of(result)), rng=rng())
    with pytest.raises(BudgetError, match="at least"):
        train_support(new_run(), support, replace(tight, ram_bytes=least // 2), rng=rng())


@ENGINES
def test_a_stream_within_less_memory_goes_on_from_a_checkpoint(engine: str) -> None:
    least, _ = least_and_most(engine)
    config = StreamTraining(engine=engine, optimizing=sgd().optimizing, plan="full", micro_batch=1, ram_bytes=least)
    blocks, saved = stream(5), list[Run]()
    whole = train_stream(new_run(), blocks, replace(config, ram_bytes=None))
    straight = train_stream(new_run(), blocks, config)
    assert same(whole, straight)
    train_stream(new_run(), blocks[:3], config, checkpoint=Checkpointing(write=saved.append, every=3))
    assert same(train_stream(new_run(), blocks, config, resume=saved[-1]), straight)
    rotating = train_stream(new_run(), blocks, replace(config, policy="rotate"))
    assert same(rotating, train_stream(new_run(), blocks, replace(config, policy="rotate", ram_bytes=None)))
    with pytest.raises(UsageError, match="revises the plan"):
        train_stream(new_run(), blocks, replace(config, policy="rescore"))


@ENGINES
def test_values_may_go_to_a_file(engine: str, tmp_path: Path) -> None:
    backbone = replace(deploy(new_run().model), engine=Engine(engine))
    updates = named_plan("full", backbone.graph)
    made = scheduling(backbone, updates, page_dir=str(tmp_path))
    least, where = made.least()
    assert least < least_and_most(engine)[0]  # than without a file
    assert where in backbone.graph.by_name
    support = block(9)
    plain = replace(fixed(0.02, engine, iterations=2, micro_batch=1), plan="full")
    paged = train_support(new_run(), support, replace(plain, ram_bytes=least, page_dir=str(tmp_path)), rng=rng())
    assert '"page"' in schedule_of(paged)
    assert same(paged, train_support(new_run(), support, plain, rng=rng()))
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="page-dir"):
        train_support(
            new_run(), support, replace(plain, ram_bytes=least, page_dir=str(tmp_path / "nowhere")), rng=rng()
        )


def test_budgets_hold_for_what_the_engine_allocates() -> None:
    backbone = deploy(new_run().model, engine="native")
    updates = tuple(named_plan("full", backbone.graph))
    made = scheduling(backbone, updates)
    least, most = least_and_most("native")
    for budget in np.linspace(least, most, 7).astype(int).tolist():
        found = schedule_within(made, budget)
        assert memory_of(backbone.graph, updates, how=found.how).arena == found.peak_bytes <= budget
    assert schedule_within(made, most).how == {}
    assert best_schedule(made.chain, made.costs, 1 << 40, made.ways) is not None


def test_a_frontier_falls_from_all_that_is_kept_to_the_least() -> None:
    points = frontier_of(new_run(None), Profiling(repeats=1))
    taken, seconds = [point.allocated_bytes for point in points], [point.seconds for point in points]
    assert taken == sorted(taken, reverse=True)
    assert seconds == sorted(seconds)
    assert (points[0].again, points[0].seconds) == (0, 0)
    assert points[-1].again > 0
    assert all(point.allocated_bytes <= point.budget_bytes for point in points)
    backbone = deploy(new_run().model, engine="torch")
    made = scheduling(backbone, named_plan("full", backbone.graph))
    assert frontier(made, 3)[0].allocated_bytes == peak_bytes(made.chain, {})


def test_times_come_from_the_profile_where_there_is_one(tmp_path: Path) -> None:
    backbone = deploy(new_run().model, engine="native")
    made = scheduling(backbone, named_plan("full", backbone.graph))
    layers = tuple(op.name for op in backbone.graph.layers)
    profile = Profile(layers, {"forward_s": np.arange(1.0, 1 + len(layers))}, {})
    costs = costs_here(backbone, made.chain, profile, None)
    assert sum(costs.links) == sum(range(1, 1 + len(layers)))
    assert costs.page == 0
    assert page_seconds(str(tmp_path)) > 0


def test_a_budget_means_samples_one_by_one() -> None:
    assert Training(ram="1MB").on_stream().micro_batch == 1
    assert Training(ram="1MB", micro_batch=3).on_stream().micro_batch == 3
    assert Training().on_stream().micro_batch is None
    config = Training(ram="1MB").on_support(10.0)
    assert (config.adapting.micro_batch, config.fitting, config.ram_bytes) == (1, False, 1 << 20)
    with pytest.raises(UsageError, match="--ram"):
        Training(ram="much")


def test_the_schedule_is_a_fact_of_the_plan_that_trained() -> None:
    start = new_run()
    backbone = deploy(start.model, engine="native")
    assert start.plan is not None
    made = scheduling(backbone, start.plan.updates)
    config = replace(fixed(0.02, "native", iterations=1, micro_batch=1), ram_bytes=made.allocated({}))
    result = train_support(start, block(9), config, rng=rng())
    assert result.plan is not None
    assert "schedule" in result.plan.facts
    assert encode(result)


class Joules:
    """A sensor that counts two joules a poll."""

    source, joules = "none", 0.0

    def poll(self) -> None:
        self.joules += 2.0


def test_what_is_least_may_be_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a byte paged costs next to nothing and layers much, everything is paged; the price stays in seconds."""
    backbone = deploy(new_run().model, engine="native")
    made = scheduling(backbone, named_plan("full", backbone.graph), page_dir=str(tmp_path))
    slow = replace(made.costs, page=1.0)
    by_time, by_energy = (
        replace(made, costs=slow, aim=aim)
        for aim in (slow, Costs([1.0] * len(made.chain.links), page=1e-12))
    )  # fmt: skip
    budget = (made.allocated({}) + made.least()[0]) // 2
    found = schedule_within(by_time, budget), schedule_within(by_energy, budget)
    assert [set(each.how.values()) & {"recompute", "page"} for each in found] == [{"recompute"}, {"page"}]
    assert found[1].seconds == price(made.chain, slow, found[1].how) > found[0].seconds

    monkeypatch.setattr("stages.methods.scheduling.find_meter", lambda root: (Joules(), "a sensor"))
    links = Costs([0.5, 0.25], page=1.0)
    measured = joules_here(backbone, links, str(tmp_path))
    assert measured.links[0] == 2 * measured.links[1] > 0
    assert measured.page * (4 << 20) == pytest.approx(2.0)  # two joules for each probe that was written and read


def test_energy_needs_a_sensor(tmp_path: Path) -> None:
    backbone = deploy(new_run().model, engine="native")
    with pytest.raises(PartMissing, match="RAPL"):
        joules_here(backbone, Costs([1.0]), None, machine=tmp_path)
