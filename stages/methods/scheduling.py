"""Schedules of memory for a plan on this machine: from measured times, fitted to what the engine really allocates."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from zlib import crc32

import numpy as np

from stages.artifacts.records import LayerUpdate, Profile
from stages.artifacts.updates import updates_text
from stages.engines.choice import layer_times
from stages.engines.native.memory import memory_of
from stages.errors import BudgetError, OutputError, PartMissing
from stages.graphs.graph import Graph
from stages.measurement.energy import ENERGY_PASSES, find_meter, joules_per_run
from stages.models.deploy import Backbone
from stages.planning.budget import format_bytes
from stages.planning.links import Chain, chain_of
from stages.planning.schedules import (
    KEEP,
    PAGE,
    RECOMPUTE,
    Costs,
    How,
    Schedule,
    Stretches,
    best_schedule,
    kept_bytes,
    least_bytes,
    peak_bytes,
    price,
)

REPEATS = 5
"""Runs that a layer's time is the median of where no profile has measured it."""
PROBE_BYTES = 4 << 20
"""What is written and read back to learn what paging takes."""
ROUNDS = 8
"""Budgets that are tried until what the engine allocates fits."""
POINTS = 8
"""Budgets of a frontier."""


def mark_of_plan(graph: Graph, updates: Sequence[LayerUpdate]) -> str:
    """What tells plans and models apart, for a schedule that is read back."""
    return f"{crc32(updates_text(updates).encode(), crc32(repr(graph.ops).encode())):08x}"


def costs_here(backbone: Backbone, chain: Chain, profile: Profile | None, page_dir: str | None) -> Costs:
    """What the links of a chain take on this machine for one sample, and a byte that is paged.

    Raises `OutputError` for a folder that cannot be written.
    """
    if profile is not None and "forward_s" in profile.columns:
        seconds = dict(zip(profile.layer, profile.columns["forward_s"].tolist(), strict=True))
    else:
        x = np.zeros((1, *backbone.graph.input_shape), np.float32)
        times = layer_times(backbone, x, REPEATS)
        seconds = {name: float(np.median(each.forward)) for name, each in times.items()}
    links = [sum(seconds.get(backbone.graph[name].owner, 0.0) for name in link.ops) for link in chain.links]
    return Costs(links, 0.0 if page_dir is None else page_seconds(page_dir))


def joules_here(backbone: Backbone, costs: Costs, page_dir: str | None, machine: Path = Path("/")) -> Costs:
    """What the same takes in joules, where this machine counts them: links at the power that a forward pass draws.

    Raises `PartMissing` where it does not, `OutputError` for a folder that cannot be written.
    """
    meter, source = find_meter(machine)
    if meter is None:
        raise PartMissing("--ram-least energy", f"energy {source}", "a RAPL or INA3221 sensor", "use time")
    x = np.zeros((1, *backbone.graph.input_shape), np.float32)
    began = time.perf_counter()
    joules = joules_per_run(meter, lambda: backbone.features(x))
    watts = joules * ENERGY_PASSES / (time.perf_counter() - began)
    page = 0.0 if page_dir is None else joules_per_run(meter, lambda: page_seconds(page_dir), REPEATS) / PROBE_BYTES
    return Costs([watts * seconds for seconds in costs.links], page)


def page_seconds(folder: str) -> float:
    """Seconds of a byte that is written to a folder, through to the device, and read back."""
    data, began = bytes(PROBE_BYTES), time.perf_counter()
    try:
        with TemporaryFile(dir=folder or None) as file:
            file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
            file.seek(0)
            file.read()
    except OSError as error:
        raise OutputError(f"--page-dir {folder}", str(error.strerror), "a folder that can be written") from error
    return (time.perf_counter() - began) / PROBE_BYTES


@dataclass(frozen=True)
class Scheduling:
    """What a schedule is made for."""

    backbone: Backbone
    updates: tuple[LayerUpdate, ...]
    chain: Chain
    costs: Costs
    """In seconds."""
    aim: Costs
    """What is to be least."""
    ways: tuple[str, ...]
    known: Stretches

    def allocated(self, how: How) -> int:
        """Bytes of one sample's values at their most: what the native engine's arena takes, or what is counted."""
        if self.backbone.engine.name == "native":
            bits = self.backbone.engine.keep_bits
            return memory_of(self.backbone.graph, self.updates, bits, how).arena
        return peak_bytes(self.chain, how)

    def within(self, budget_bytes: int) -> Schedule | None:
        """The schedule of least cost whose values fit into so many bytes as they are allocated."""
        budget = budget_bytes
        for _ in range(ROUNDS):
            found = best_schedule(self.chain, self.aim, budget, self.ways, self.known)
            if found is None:
                break
            if (beyond := self.allocated(found.how) - budget_bytes) <= 0:
                seconds = price(self.chain, self.costs, found.how)
                taken = self.allocated(found.how)
                return replace(found, seconds=seconds, budget_bytes=budget_bytes, peak_bytes=taken)
            budget = min(budget, found.peak_bytes) - beyond
        least, _ = self.smallest
        taken = self.allocated(least.how)
        return replace(least, budget_bytes=budget_bytes, peak_bytes=taken) if taken <= budget_bytes else None

    @cached_property
    def smallest(self) -> tuple[Schedule, str]:
        """The schedule that needs the least, whatever time it takes, and the operator that sets that."""
        budget, where = least_bytes(self.chain, self.ways)
        free = Costs([0.0] * len(self.chain.links))
        found = best_schedule(self.chain, free, budget, self.ways, self.known)
        assert found is not None
        seconds = price(self.chain, self.costs, found.how)
        return replace(found, seconds=seconds), where

    def least(self) -> tuple[int, str]:
        """The smallest budget that has a schedule, and the operator that sets it."""
        schedule, where = self.smallest
        return self.allocated(schedule.how), where


def scheduling(
    backbone: Backbone,
    updates: Sequence[LayerUpdate],
    *,
    profile: Profile | None = None,
    page_dir: str | None = None,
    least: str = "time",
) -> Scheduling:
    """What schedules of a plan are made from; values are paged only where a folder for it is named.

    `least`: `time`, or `energy`, which raises `PartMissing` where this machine does not count it.
    """
    chain = chain_of(backbone.graph, updates, backbone.engine.keep_bits)
    if backbone.engine.name == "native":
        chain = replace(chain, floor_bytes=0)  # the frozen layers run row by row: what they take is in the arena
    ways = (KEEP, RECOMPUTE) if page_dir is None else (KEEP, RECOMPUTE, PAGE)
    costs = costs_here(backbone, chain, profile, page_dir)
    aim = costs if least == "time" else joules_here(backbone, costs, page_dir)
    return Scheduling(backbone, tuple(updates), chain, costs, aim, ways, Stretches())


def schedule_within(made: Scheduling, budget_bytes: int) -> Schedule:
    """The schedule of least time within a budget.

    Raises:
        BudgetError: there is none; the smallest budget is named, with the operator that sets it.
    """
    found = made.within(budget_bytes)
    if found is None:
        least, where = made.least()
        said = f"{format_bytes(budget_bytes)} are too few for a sample's values"
        raise BudgetError("--ram", said, f"at least {format_bytes(least)} (for {where})", "raise --ram, or train less")
    return found


@dataclass(frozen=True)
class Point:
    """A budget of the frontier and what its schedule takes."""

    budget_bytes: int
    allocated_bytes: int
    kept_bytes: int
    """Between the forward and the backward pass."""
    seconds: float
    """Beyond keeping everything."""
    again: int
    """Values that are made again."""
    paged: int


def frontier(made: Scheduling, points: int = POINTS) -> list[Point]:
    """Budgets from what keeping everything takes down to the smallest that has a schedule."""
    most, (least, _) = made.allocated({}), made.least()
    found: list[Point] = []
    for budget in np.linspace(most, min(least, most), points).astype(int).tolist():
        schedule = made.within(budget)
        if schedule is not None:
            ways = list(schedule.how.values())
            kept = kept_bytes(made.chain, schedule.how)
            point = Point(budget, made.allocated(schedule.how), kept, schedule.seconds, ways.count(RECOMPUTE),
                          ways.count(PAGE))  # fmt: skip
            if not found or point != replace(found[-1], budget_bytes=budget):
                found.append(point)
    return found
