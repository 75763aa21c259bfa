"""Schedules of memory: by hand, against all of them on small nets, and what the published page derived for MCUNet."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.artifacts.records import Model
from stages.cost.training import saved_activation_bytes
from stages.errors import DataError
from stages.graphs.graph import Graph
from stages.graphs.updates import every_layer, whole_update
from stages.models import registry
from stages.models.deploy import deploy, with_graph
from stages.models.modules import state
from stages.operators import Op
from stages.planning.baselines import named_plan
from stages.planning.links import Chain, chain_of
from stages.planning.schedules import (
    KEEP,
    PAGE,
    RECOMPUTE,
    Costs,
    Schedule,
    best_schedule,
    kept_bytes,
    least_bytes,
    nothing_fits,
    peak_bytes,
    read_schedule,
    stretches,
)
from tests.engines.random_graphs import cases

FEW = settings(max_examples=40, deadline=None, derandomize=True)


def chain(widths: list[int]) -> Graph:
    """Linear layers of these widths."""
    ops = [Op("input", "input", (), (widths[0],))]
    for number, width in enumerate(widths[1:]):
        ops.append(Op(f"l{number}", "linear", (ops[-1].name,), (width,), (ops[-1].shape,), bias=True))
    return Graph(tuple(ops))


def residual() -> Graph:
    """conv, a block of two with a shortcut, conv."""
    ops = [Op("input", "input", (), (2, 4, 4))]

    def conv(name: str, source: Op, width: int) -> Op:
        return Op(name, "conv", (source.name,), (width, 4, 4), (source.shape,), (3, 3), (1, 1), (1, 1), (1, 1),
                  bias=True)  # fmt: skip

    first = conv("first", ops[0], 4)
    wide = conv("wide", first, 12)
    act = Op("act", "relu", ("wide",), (12, 4, 4), ((12, 4, 4),))
    narrow = conv("narrow", act, 4)
    both = Op("both", "add", ("narrow", "first"), (4, 4, 4), ((4, 4, 4),) * 2)
    last = conv("last", both, 3)
    pool = Op("pool", "global_pool", ("last",), (3,), ((3, 4, 4),))
    return Graph((ops[0], first, wide, act, narrow, both, last, pool))


# ------------------------------------------------------------------------------------------------------- one by one


def naive(problem: Chain, how: dict[str, str]) -> int:
    """What a schedule takes, moment by moment, from sets of what lies in memory."""
    links, again = problem.links, stretches(problem, how)
    where = {number: each for each in again for number in range(each.first, each.end)}

    def size(name: str, *, worked: bool) -> int:
        return problem.whole[name] if worked else problem.sizes[name]

    def together(alive: set[str], stored: set[str]) -> int:
        same = {name for name in alive & stored if problem.sizes[name] == problem.whole[name]}
        return sum(size(n, worked=True) for n in alive) + sum(size(n, worked=False) for n in stored - same)

    def wanted(number: int) -> set[str]:
        return set(where[number].entries) if number in where else set(links[number].items)

    def ram(names: set[str]) -> set[str]:
        return {name for name in names if how.get(name, KEEP) == KEEP}

    def outs(number: int) -> set[str]:
        link = links[number]
        return {name for name in link.crossing if name in link.ops} or {link.name}

    own = [sum(link.own_bytes for link in links[: number + 1]) for number in range(len(links))]
    peak, stored = problem.floor_bytes, set[str]()
    for number, link in enumerate(links):
        stored |= ram(wanted(number))
        before = links[number - 1].crossing if number else problem.before
        alive = {*before, *link.reads, *outs(number), *link.crossing}
        peak = max(peak, own[number] + together(alive, stored))
    replayed: dict[int, set[str]] = {}
    for number in reversed(range(len(links))):
        link, held = links[number], set().union(*(ram(wanted(n)) for n in range(number + 1)))
        made: set[str] = set()
        if number in where:
            stretch = where[number]
            inside = set().union(*(links[n].makes for n in range(stretch.first, stretch.end)))
            needed = {item for n in range(stretch.first, stretch.end) for item in links[n].items} & inside
            if stretch.first not in replayed:
                replayed[stretch.first] = needed
                got: set[str] = set()
                read = {n for m in range(stretch.first, stretch.end) for n in (*links[m].reads, *links[m].items)}
                brought = room(problem, how, read - inside)
                held_then = set().union(*(ram(wanted(n)) for n in range(stretch.end)))
                for n in range(stretch.first, stretch.first + stretch.last + 1):
                    got |= links[n].makes & needed
                    alive = {*links[n].reads, *outs(n)} - got - set(stretch.entries)
                    now = own[stretch.end - 1] + links[stretch.end - 1].pending_bytes + brought
                    now += sum(problem.sizes[name] for name in held_then) + sum(problem.whole[x] for x in got | alive)
                    peak = max(peak, now)
            made = needed & {item for n in range(stretch.first, number + 1) for item in links[n].items}
        now = own[number] + link.gradient_bytes + sum(problem.sizes[name] for name in held)
        now += sum(problem.whole[name] for name in made) + room(problem, how, set(link.items) - made)
        peak = max(peak, now)
    return peak


def room(problem: Chain, how: dict[str, str], names: set[str]) -> int:
    """For stored values that are read from a file, or from fewer bits."""
    paged = {name for name in names if how.get(name, KEEP) == PAGE}
    packed = {n for n in names if how.get(n, KEEP) == KEEP and problem.sizes[n] != problem.whole[n]}
    return sum(problem.whole[name] for name in paged | packed)


def price(problem: Chain, costs: Costs, how: dict[str, str]) -> float:
    again = stretches(problem, how)
    names = {name for each in again for name in each.entries}
    inside = {number for each in again for number in range(each.first, each.end)}
    names |= {item for number, link in enumerate(problem.links) if number not in inside for item in link.items}
    run = sum(sum(costs.links[each.first : each.first + each.last + 1]) for each in again)
    return run + costs.page * sum(problem.sizes[name] for name in names if how.get(name, KEEP) == PAGE)


def all_of_them(problem: Chain, ways: tuple[str, ...]):  # type: ignore[no-untyped-def]
    """Every schedule: something for each item; of other values that cross some may be stored too."""
    items = sorted({item for link in problem.links for item in link.items})
    others = sorted({name for link in problem.links for name in link.crossing} - set(items))
    outer = set(problem.before)
    options = [tuple(way for way in ways if way != RECOMPUTE or name not in outer) for name in items]
    options += [(None, *(way for way in ways if way != RECOMPUTE))] * len(others)  # type: ignore[list-item]
    for picked in product(*options):
        how = {name: way for name, way in zip([*items, *others], picked, strict=True) if way is not None}
        read = {name for each in stretches(problem, how) for name in each.entries}
        if all(how.get(name, KEEP) != RECOMPUTE for name in read) and set(how) <= read | set(items):
            yield how


@FEW
@given(
    st.lists(st.integers(1, 12), min_size=4, max_size=7), st.integers(0, 2**31), st.floats(0, 1),
    st.sampled_from([(KEEP, RECOMPUTE), (KEEP, PAGE), (KEEP, RECOMPUTE, PAGE)]), st.sampled_from([32, 8]),
)  # fmt: skip
def test_no_schedule_is_cheaper_within_the_budget(widths, seed, share, ways, bits) -> None:  # type: ignore[no-untyped-def]
    graph = chain(widths)
    optimal(graph, tuple(map(whole_update, graph.layers)), seed, share, ways, bits)


@pytest.mark.parametrize("ways", [(KEEP, RECOMPUTE), (KEEP, RECOMPUTE, PAGE)])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_additions_hold_their_other_source(ways, share: float) -> None:  # type: ignore[no-untyped-def]
    graph = residual()
    for seed in range(3):
        optimal(graph, tuple(map(whole_update, graph.layers)), seed, share, ways, 32)
    optimal(graph, (whole_update(graph["wide"]), whole_update(graph["last"])), 0, share, ways, 32)


@FEW
@given(cases(), st.floats(0, 1))
def test_random_graphs_too(case, share: float) -> None:  # type: ignore[no-untyped-def]
    graph, updates, _, seed = case
    problem = chain_of(graph, updates)
    assume(len({name for link in problem.links for name in (*link.items, *link.crossing)}) <= 9)
    optimal(graph, updates, seed, share, (KEEP, RECOMPUTE), 32)


def optimal(graph, updates, seed: int, share: float, ways, bits: int) -> None:  # type: ignore[no-untyped-def]
    problem = chain_of(graph, updates, bits)
    prices = [((seed * 7 + 13 * number) % 17 + 1) / 10 for number in range(len(problem.links))]
    costs = Costs(prices, page=(seed % 5) / 100)
    found = {(naive(problem, how), price(problem, costs, how)) for how in all_of_them(problem, ways)}
    peaks = sorted(peak for peak, _ in found)
    budget = int(peaks[0] + share * (peaks[-1] - peaks[0]))
    best = best_schedule(problem, costs, budget, ways)
    assert best is not None
    assert naive(problem, dict(best.how)) == best.peak_bytes == peak_bytes(problem, best.how) <= budget
    assert price(problem, costs, dict(best.how)) == pytest.approx(best.seconds, abs=1e-9)
    assert best.seconds == pytest.approx(min(cost for peak, cost in found if peak <= budget), abs=1e-9)
    least, where = least_bytes(problem, ways)
    assert least <= peaks[0]
    assert best_schedule(problem, costs, least, ways) is not None
    if least > problem.floor_bytes:
        assert best_schedule(problem, costs, least - 1, ways) is None
        assert where in graph.by_name


# ---------------------------------------------------------------------------------------------------------- properties


@FEW
@given(cases())
def test_all_kept_is_what_a_plan_keeps(case) -> None:  # type: ignore[no-untyped-def]
    graph, updates, _, _ = case
    assume(not any(op.operator.made_again(op) for op in graph.ops))
    problem = chain_of(graph, updates)
    assert kept_bytes(problem, {}) == saved_activation_bytes(graph, updates, 1)
    names = [name for link in problem.links for name in link.ops]
    assert sorted(names, key=graph.position.__getitem__) == names


def test_a_smaller_budget_never_costs_less() -> None:
    graph = chain([8, 9, 4, 7, 12, 3, 6, 5])
    problem = chain_of(graph, tuple(map(whole_update, graph.layers)))
    costs = Costs([1.0] * len(problem.links), page=0.01)
    least, _ = least_bytes(problem)
    found = [best_schedule(problem, costs, budget) for budget in range(least, peak_bytes(problem, {}) + 8, 4)]
    seconds = [each.seconds for each in found if each is not None]
    assert len(seconds) == len(found)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == 0


def mcunet() -> Model:
    args = {"size": 128}
    module = registry.build("mcunet-5fps", args)
    return with_graph(Model("mcunet-5fps", args, registry.input_spec("mcunet-5fps", args), "batchnorm", state(module)))


def test_mcunet_needs_what_was_derived_for_it() -> None:
    """POET on MCUNet-5fps at 128 x 128, everything live, batch 1: kept 3,392 KiB; by MACs 3.8, 8.4, 14.8, 19.5 and 27.4
    percent of a forward pass within 3,072, 2,560, 2,048, 1,792 and 1,536 KiB, and nothing within 1,472."""
    from stages.cost.ops import macs

    graph = deploy(mcunet()).graph
    problem = chain_of(graph, named_plan("full", graph))
    assert kept_bytes(problem, {}) // 1024 == 3392
    per_link = [sum(macs(graph[name]) for name in link.ops) for link in problem.links]
    costs = Costs([each / sum(per_link) for each in per_link])
    found = {
        kib: best_schedule(problem, costs, kib * 1024, (KEEP, RECOMPUTE)) for kib in (3072, 2560, 2048, 1792, 1536)
    }
    assert [round(100 * each.seconds, 1) for each in found.values() if each] == [3.8, 8.4, 14.8, 19.5, 27.4]
    assert best_schedule(problem, costs, 1472 * 1024, (KEEP, RECOMPUTE)) is None
    assert found[1536] is not None
    assert kept_bytes(problem, found[1536].how) <= 0.45 * kept_bytes(problem, {})
    least, where = least_bytes(problem, (KEEP, RECOMPUTE))
    assert 1472 * 1024 < least <= 1536 * 1024
    assert where.startswith("blocks.01")
    said = str(nothing_fits(problem, 1472 * 1024, (KEEP, RECOMPUTE)))
    assert f"{least:,}" in said
    assert where in said


def test_tinytrains_own_plans_have_nothing_to_win() -> None:
    graph = deploy(mcunet()).graph
    problem = chain_of(graph, named_plan("last-3", graph))
    assert problem.floor_bytes > kept_bytes(problem, {})  # running the frozen layers takes more than all that is kept


def test_a_schedule_is_read_for_its_own_plan_alone() -> None:
    schedule = Schedule({"a": RECOMPUTE, "slice b": PAGE}, 0.5, 100, 120)
    assert read_schedule(schedule.text("x"), "x", "file") == schedule
    with pytest.raises(DataError, match="another plan"):
        read_schedule(schedule.text("x"), "y", "file")
    for text in ("", "{}", '{"values": {"a": "lose"}, "seconds": 0, "peak_bytes": 1, "budget_bytes": 1}'):
        with pytest.raises(DataError, match="cannot be read"):
            read_schedule(text, "x", "file")


def test_every_layer_is_a_link_of_its_own_on_residual_chains() -> None:
    graph = residual()
    problem = chain_of(graph, tuple(every_layer(graph)))
    assert [link.name for link in problem.links] == ["first", "act", "both", "last", "pool"]
    assert [link.crossing for link in problem.links] == [
        ("first",), ("act", "first"), ("both",), ("last",), (),
    ]  # fmt: skip
