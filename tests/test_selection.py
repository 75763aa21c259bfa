"""`select` as a stage: masses, scoring, what blocks carry, and every odd pool."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.artifacts.hdf5 import encode
from stages.artifacts.live import Version
from stages.artifacts.records import Block, End, Head, InputSpec, LayerUpdate
from stages.engines.choice import Engine
from stages.engines.torch.reference import run
from stages.errors import DataError, UsageError
from stages.filtering import Filtering, filter_stream
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.operators import Op
from stages.selection import Selection, Weights, _tuner, select_block, select_stream
from stages.valuation.costs import Costs, Line
from stages.valuation.efficiency import Decision, Option, Tuner, recorded
from stages.valuation.fine import SELECTIONS
from stages.valuation.forgetting import forgetting_counts
from stages.valuation.scoring import IMPORTANCES, masses, scored
from tests.rounding import as_tensors, no_worse

DIM, CLASSES = 4, 3


def backbone(engine="native"):
    """Features (4,) -> linear -> relu -> linear, (4,)."""
    rng = np.random.default_rng(7)
    ops = (
        Op("input", "input", (), (DIM,)),
        Op("blocks.0", "linear", ("input",), (DIM,), ((DIM,),), bias=True, block=0),
        Op("relu", "relu", ("blocks.0",), (DIM,), ((DIM,),), block=0),
        Op("blocks.1", "linear", ("relu",), (DIM,), ((DIM,),), bias=True, block=1),
    )
    tensors = {f"blocks.{i}.{n}": rng.normal(size=s).astype(np.float32)
               for i in (0, 1) for n, s in (("weight", (DIM, DIM)), ("bias", (DIM,)))}  # fmt: skip
    spec = InputSpec("features", (DIM,))
    return Backbone(Graph(ops, ("blocks.0", "blocks.1")), tensors, spec, Engine(engine))


def head(known=True, names=None, seed=1):
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(CLASSES, DIM)), rng.normal(size=CLASSES)
    return Head("linear", np.arange(CLASSES), weight.astype(np.float32), bias.astype(np.float32),
                np.full(CLASSES, known), names)  # fmt: skip


WEIGHTS = Weights(backbone(), head())
ENGINES = pytest.mark.parametrize("engine", ["native", "torch"])


def candidates(n=12, classes=CLASSES, seed=0, **others):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, DIM)).astype(np.float32)
    return Block(x, np.arange(n, dtype=np.int64) % classes, "ND", **others)


def choose(block, weights=WEIGHTS, seed=0, updates=None, **settings):
    return select_block(block, Selection(**settings), weights, updates, np.random.default_rng(seed))


def chosen_rows(block, batch):
    return np.array([int(np.flatnonzero((block.x == row).all(1))[0]) for row in batch.x])


# ---------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("strategy", SELECTIONS)
def test_contract(strategy):
    block = candidates(labels=np.arange(CLASSES), per_class={"seen": np.array([50, 30, 20])}, round=4,
                       facts={"filter": "quota"}, columns={"index": np.arange(100, 112)})  # fmt: skip
    found = choose(block, strategy=strategy, batch=5)
    rows = found.columns["index"] - 100
    np.testing.assert_array_equal(found.x, block.x[rows])
    np.testing.assert_array_equal(found.y, block.y[rows])
    assert found.columns["weight"].dtype == np.float32
    assert found.columns["weight"].min() > 0
    assert found.round == 4
    assert found.facts["strategy"] == strategy
    assert found.facts["filter"] == "quota"
    np.testing.assert_array_equal(found.per_class["seen"], [50, 30, 20])
    scores = SELECTIONS[strategy].needs == "gradients"
    assert ("score" in found.columns) == scores
    assert ({"variance", "variance_is", "variance_random"} <= found.facts.keys()) == scores
    assert found.per_class["allocation"].sum() == {"all": 12, "forgetting": len(found)}.get(strategy, 5)


@ENGINES
def test_score_is_the_norm_of_the_heads_gradient(engine):
    block = candidates()
    found = choose(block, Weights(backbone(engine), head()), strategy="is", batch=4)
    norms = {}
    for dtype in (torch.float32, torch.float64):
        tensors = as_tensors(WEIGHTS.backbone.tensors, dtype)
        rows = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (WEIGHTS.head.weight, WEIGHTS.head.bias)]
        norms[dtype] = []
        for x, y in zip(found.x, found.y, strict=True):
            features = run(WEIGHTS.backbone.graph, tensors, torch.tensor(x, dtype=dtype)[None])
            loss = torch.nn.functional.cross_entropy(features @ rows[0].T + rows[1], torch.tensor([int(y)]))
            norms[dtype].append(sum(g.square().sum() for g in torch.autograd.grad(loss, rows)).sqrt())
    no_worse(found.columns["score"], *map(torch.stack, norms.values()), longest=64)


@pytest.mark.parametrize("strategy", [name for name, strategy in SELECTIONS.items() if strategy.unbiased])
def test_the_weighted_batch_stands_for_the_window(strategy):
    """filter | select, over many seeds: each sample of the window weighs 1 / window on average."""
    window, repeats = candidates(40), 300
    weights = np.zeros((repeats, 40))
    for seed in range(repeats):
        pool, _ = filter_stream([window], Filtering(window=40, keep=15), seed=seed)
        found = choose(pool, strategy=strategy, batch=6, seed=seed)
        weights[seed, found.columns["index"]] = found.columns["weight"]
    often = (weights > 0).sum(0) >= 20  # enough draws to know the standard error
    error = np.abs(weights.mean(0) - 1 / 40)[often] / (weights.std(0)[often] / np.sqrt(repeats))
    assert often.sum() >= 20
    assert error.max() < 4.5
    for label, share in enumerate(np.bincount(window.y) / 40):
        of_class = weights[:, window.y == label].sum(1)
        assert abs(of_class.mean() - share) < 4.5 * of_class.std() / np.sqrt(repeats) + 1e-6


def test_unweighted_draws_weigh_alike():
    found = choose(candidates(), batch=40, strategy="is", weighted=False)
    draws = found.columns["weight"] * 40
    np.testing.assert_allclose(draws, np.round(draws), atol=1e-5)
    assert found.columns["weight"].sum() == pytest.approx(1.0, abs=1e-6)


def test_bias_is_reported_apart_from_variance():
    found = choose(candidates(), strategy="high-loss", batch=3)
    assert found.facts["variance"] == 0.0
    assert found.facts["squared_bias"] > 0
    assert "squared_bias" not in choose(candidates(), strategy="titan", batch=3).facts


def test_variances_are_in_order():
    facts = choose(candidates(30), batch=10).facts
    assert facts["variance"] <= facts["variance_is"] <= facts["variance_random"]


# ------------------------------------------------------------------------------------------------------------- masses


def test_masses_come_from_weights_then_counts_then_nothing():
    y = np.array([5, 5, 9], np.int64)
    plain = Block(np.zeros((3, DIM), np.float32), y, "ND")
    np.testing.assert_allclose(masses(plain), 1 / 3)
    counts = {"labels": np.array([5, 7, 9]), "per_class": {"seen": np.array([60, 10, 30])}}
    np.testing.assert_allclose(masses(Block(plain.x, y, "ND", **counts)), [1 / 3, 1 / 3, 1 / 3])
    counts["per_class"] = {"seen": np.array([20, 10, 60])}
    np.testing.assert_allclose(masses(Block(plain.x, y, "ND", **counts)), [1 / 8, 1 / 8, 3 / 4])
    weighted = Block(plain.x, y, "ND", columns={"weight": np.array([0.5, 0.25, 0.5], np.float32)}, **counts)
    np.testing.assert_allclose(masses(weighted), [0.5, 0.25, 0.5])


def test_candidates_without_mass_are_never_chosen():
    weight = np.array([0, 1] * 6, np.float32)
    for seed in range(20):
        found = choose(candidates(columns={"weight": weight}), batch=5, seed=seed)
        assert found.columns["weight"].min() > 0
        assert (chosen_rows(candidates(), found) % 2 == 1).all()


@pytest.mark.parametrize("weight", [[1, -1, 1], [1, np.nan, 1], [0, 0, 0]], ids=["negative", "nan", "all zero"])
def test_weights_that_make_no_sense_are_refused(weight):
    with pytest.raises(DataError, match="finite weights >= 0"):
        masses(candidates(3, columns={"weight": np.array(weight, np.float32)}))


def test_counts_that_miss_a_class_are_refused():
    block = candidates(3, labels=np.array([0, 1, 2]), per_class={"seen": np.array([4, 0, 5])})
    with pytest.raises(DataError, match="sample 1: class 1 with `seen` 0"):
        masses(block)
    with pytest.raises(DataError, match="sample 2: label 2, expected one of the block's `labels`"):
        masses(candidates(3, labels=np.array([0, 1]), per_class={"seen": np.array([4, 1])}))


# ---------------------------------------------------------------------------------------------------------- odd pools


def test_without_a_head_all_classes_are_as_likely():
    view = scored(candidates(), np.full(12, 1 / 12), Weights(backbone(), None), "last-layer", None)
    np.testing.assert_allclose(view.probabilities, 1 / 3)


def test_a_class_the_head_has_never_met_counts_as_uniform():
    block = candidates(classes=4)
    view = scored(block, np.full(12, 1 / 12), WEIGHTS, "last-layer", None)
    assert view.probabilities.shape == (12, 4)
    np.testing.assert_allclose(view.probabilities[:, 3], 1 / 4, rtol=1e-6)
    assert choose(block, batch=6).per_class["allocation"][3] > 0


def test_classes_are_found_by_name():
    named = Weights(backbone(), head(names=("a", "b", "c")))
    block = candidates(labels=np.arange(3), names=("c", "a", "b"))
    view = scored(block, np.full(12, 1 / 12), named, "last-layer", None)
    assert view.targets.tolist() == [2, 0, 1] * 4


def test_an_empty_block_stays_one():
    found = choose(candidates(0, round=7, columns={"index": np.zeros(0, np.int64)}))
    assert len(found) == 0
    assert found.round == 7
    assert found.columns["weight"].shape == (0,)


@pytest.mark.parametrize("strategy", SELECTIONS)
@pytest.mark.parametrize("n", [1, 3])
def test_pools_smaller_than_the_batch(strategy, n):
    found = choose(candidates(n, columns={"index": np.arange(n)}), strategy=strategy, batch=10)
    assert len(found) == n or SELECTIONS[strategy].unbiased
    if strategy in ("titan", "stratified", "random", "all"):  # all of them, so there is nothing left to estimate
        np.testing.assert_allclose(found.columns["weight"], 1 / n, rtol=1e-6)


def test_duplicate_samples():
    block = candidates()
    double = Block(np.repeat(block.x[:1], 12, axis=0), np.zeros(12, np.int64), "ND")
    found = choose(double, batch=4)
    assert found.facts["variance"] == 0.0
    assert found.columns["weight"].sum() == pytest.approx(1.0, abs=1e-6)


def test_certain_predictions_have_no_gradient_and_are_drawn_uniformly():
    sure = Head(
        "linear", np.arange(2), np.zeros((2, DIM), np.float32), np.array([1000, 0], np.float32), np.ones(2, bool)
    )
    block = Block(candidates().x, np.zeros(12, np.int64), "ND")
    found = choose(block, weights=Weights(backbone(), sure), batch=4)
    np.testing.assert_array_equal(found.columns["score"], 0.0)
    np.testing.assert_allclose(found.columns["weight"], 1 / 4, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["titan", "camel"])
def test_samples_that_are_not_finite_are_refused(strategy):
    block = candidates(columns={"index": np.arange(50, 62)}, round=2)
    block.x[3, 1] = np.inf
    with pytest.raises(DataError, match=r"sample (53|3)\b"):
        choose(block, strategy=strategy)


def test_features_that_are_not_finite_name_the_sample():
    broken = backbone()
    broken.tensors["blocks.0.weight"][:] = 1e38
    block = candidates(columns={"index": np.arange(50, 62)}, round=2)
    block.x[:] = 0
    block.x[3] = 10
    with pytest.raises(DataError, match="round 2, sample 53: features not finite"):
        choose(block, weights=Weights(broken, head()))


# ---------------------------------------------------------------------------------------------------------- importance


def dense_gradients(block, names, dtype):
    """Per-sample gradients over these backbone tensors and the head, by plain autograd in this precision: (n, d)."""
    tensors = as_tensors(WEIGHTS.backbone.tensors, dtype)
    tensors |= {name: tensors[name].clone().requires_grad_() for name in names}
    weight, bias = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (WEIGHTS.head.weight, WEIGHTS.head.bias))
    rows = []
    for x, y in zip(torch.from_numpy(block.x).to(dtype), block.y, strict=True):
        features = run(WEIGHTS.backbone.graph, tensors, x[None])
        loss = torch.nn.functional.cross_entropy(features @ weight.T + bias, torch.tensor([int(y)]))
        found = torch.autograd.grad(loss, [*(tensors[name] for name in names), weight, bias])
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows)


def check_products(view, block, names, live=slice(None)):
    """All inner products of the live gradients are those of plain autograd, whose sums are at most so long."""
    plain, exact = (dense_gradients(block, names, dtype)[:, live] for dtype in (torch.float32, torch.float64))
    no_worse(view.gradients.inner_products(), plain @ plain.T, exact @ exact.T, exact.shape[1])


@ENGINES
def test_full_importance_is_the_gradient_of_everything(engine):
    block = candidates()
    view = scored(block, np.full(12, 1 / 12), Weights(backbone(engine), head()), "full", None)
    check_products(view, block, list(WEIGHTS.backbone.tensors))


@ENGINES
def test_live_importance_is_the_gradient_of_what_trains(engine):
    block = candidates()
    updates = (LayerUpdate("blocks.1", "output", (0, 2), DIM, bias=(2,)),)
    size = 20 + WEIGHTS.head.weight.size + WEIGHTS.head.bias.size
    live = [*range(4), *range(8, 12), 16 + 2, *range(20, size)]  # rows 0 and 2, bias 2, the head
    view = scored(block, np.full(12, 1 / 12), Weights(backbone(engine), head()), "live", updates)
    check_products(view, block, ["blocks.1.weight", "blocks.1.bias"], live)


@ENGINES
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_selects(importance, engine):
    updates = (LayerUpdate("blocks.1", "output", (0,), DIM),)
    weights = Weights(backbone(engine), head())
    found = choose(candidates(), weights, batch=5, importance=importance, updates=updates)
    assert found.facts["variance"] <= found.facts["variance_is"]


# -------------------------------------------------------------------------------------------------------------- stream


def test_stream_asks_for_weights_once_per_round_and_closes():
    asked, steps = [], []

    def weights(number):
        asked.append(number)
        return WEIGHTS

    blocks = [candidates(round=number) for number in (5, 6, 8)]
    *found, end = select_stream(blocks, Selection(), weights=weights, seed=1, on_step=steps.append)
    assert asked == [block.round for block in found] == [5, 6, 8]
    assert steps == [1, 2, 3]
    assert end == End(3)


def test_plain_blocks_are_rounds_in_order():
    *found, _ = select_stream([candidates(), candidates()], Selection(batch=4), weights=lambda number: WEIGHTS)
    assert [block.round for block in found] == [0, 1]
    assert not np.array_equal(found[0].x, found[1].x)  # each round has a generator of its own


def test_a_round_does_not_depend_on_the_ones_before():
    blocks = [candidates(seed=number, round=number) for number in range(3)]
    whole = list(select_stream(blocks, Selection(), weights=lambda number: WEIGHTS, seed=2))
    last = next(select_stream(blocks[2:], Selection(), weights=lambda number: WEIGHTS, seed=2))
    np.testing.assert_array_equal(whole[2].x, last.x)


def test_new_weights_take_part():
    moved = WEIGHTS.at(Version(1, {"blocks.1.weight": np.zeros((DIM, DIM), np.float32)}, None))
    assert moved.head is WEIGHTS.head
    assert not moved.backbone.tensors["blocks.1.weight"].any()
    assert WEIGHTS.backbone.tensors["blocks.1.weight"].all()
    assert not np.array_equal(choose(candidates(), strategy="is", weights=moved).columns["score"],
                              choose(candidates(), strategy="is").columns["score"])  # fmt: skip


def test_unscored_strategies_need_no_model():
    found = next(select_stream([candidates()], Selection(strategy="stratified", batch=6)))
    assert found.per_class["allocation"].tolist() == [2, 2, 2]
    with pytest.raises(UsageError, match="without a model"):
        next(select_stream([candidates()], Selection()))


def test_live_importance_needs_a_plan():
    with pytest.raises(UsageError, match="without a plan"):
        next(select_stream([candidates()], Selection(importance="live"), weights=lambda number: WEIGHTS))


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"strategy": "best"}, {"importance": "some"}, {"epsilon": 1.5}, {"epsilon": -0.1},
     {"max_batch": 9}, {"update_cost": 0.9}],
    ids=str,
)  # fmt: skip
def test_settings_check_themselves(wrong):
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        Selection(**wrong)


# ---------------------------------------------------------------------------------------------------------------- auto


def test_auto_observes_then_chooses_and_says_so():
    asked, notes = [], []

    def weights(number):
        asked.append(number)
        return WEIGHTS

    config = Selection(strategy="auto", batch=4)
    blocks = [candidates(30, seed=number, round=number) for number in range(7)]
    *found, end = select_stream(blocks, config, weights=weights, on_note=notes.append)
    assert end == End(7)
    assert [block.facts["auto_observed"] for block in found] == [1, 1, 0, 0, 1, 0, 0]
    assert {block.facts["strategy"] for block in found} <= {"random", "stratified", "is", "titan"}
    assert notes[0].startswith(f"round 0: {found[0].facts['strategy']}, batch 4")
    scored_rounds = [block.round for block in found if "score" in block.columns]
    assert asked == scored_rounds


def test_auto_stands_for_all_candidates_also_when_it_scores_only_some(monkeypatch):
    decide = lambda self, number, size: Decision(Option("titan", size // 2, 4), self.due(number), 0.0, 0.0, "")  # noqa: E731
    monkeypatch.setattr(Tuner, "decide", decide)
    config = Selection(strategy="auto", batch=4)
    shares = np.array([0.6, 0.3, 0.1])
    weight = shares[np.arange(30) % 3].astype(np.float32) / 10  # as filter writes them
    block = candidates(30, columns={"index": np.arange(30), "weight": weight})
    repeats = 100
    weights = np.zeros((repeats, 30))
    for seed in range(repeats):
        *_, found, _ = select_stream([block] * 4, config, weights=lambda number: WEIGHTS, seed=seed)
        weights[seed, found.columns["index"]] = found.columns["weight"]
    assert found.facts["auto_candidates"] == 15
    for label, share in enumerate(shares):
        of_class = weights[:, block.y == label].sum(1)
        assert abs(of_class.mean() - share) < 4.5 * of_class.std() / np.sqrt(repeats)


@pytest.mark.parametrize(
    ("settings", "updates", "expected"),
    [
        ({}, None, 3.0),
        ({"update_cost": 7.5}, None, 7.5),
        ({}, (LayerUpdate("blocks.1", "output", (0, 1), DIM),), 1 + 8 / 32),  # 2 of 4 rows of the second 4 x 4 layer
    ],
)
def test_the_cost_of_an_update_is_the_plans(settings, updates, expected):
    tuner = _tuner(Selection(strategy="auto", **settings), backbone().graph, updates)
    assert tuner.meter.costs() == Costs(update=Line(0.0, expected))


def test_auto_measures_and_takes_what_the_trainer_measured():
    """A clock that moves by one at each look: every timed piece of work takes a second."""
    ticks = iter(range(10**6))
    told = replace(WEIGHTS, update_times=[(4, 50.0), (8, 90.0), (4, 50.0)])
    config = Selection(strategy="auto", batch=4, max_batch=8)
    blocks = [candidates(30, seed=number, round=number) for number in range(7)]
    *found, _ = select_stream(blocks, config, weights=lambda number: told, clock=lambda: float(next(ticks)))
    units = [block.facts["auto_unit"] for block in found]
    assert units == [*["forward passes"] * 4, *["seconds"] * 3]  # what is decided in round 1 stands until round 4
    trained = [block.facts["auto_batch"] for block in found]
    assert {4, 8} <= set(trained)
    assert [found[number].facts["scored"] for number in (0, 1, 4)] == [30, 30, 30]
    last = found[-1].facts
    assert last["auto_update_cost"] == pytest.approx(10 + 10 * last["auto_batch"], rel=0.3)  # fewer where some repeat
    assert last["auto_select_cost"] > 0


def test_a_replayed_run_is_bit_equal_whatever_the_clock():
    config = Selection(strategy="auto", batch=4, max_batch=8)
    blocks = [candidates(30, seed=number, round=number) for number in range(9)]
    ticks = np.random.default_rng(0).exponential(size=10**4).cumsum()
    *first, _ = select_stream(blocks, config, weights=lambda number: WEIGHTS, clock=iter(ticks).__next__)
    rows = [{"round": block.round, **block.facts} for block in first]
    assert len({(row["strategy"], row["auto_batch"]) for row in rows}) > 1
    *again, _ = select_stream(blocks, config, weights=lambda number: WEIGHTS, clock=iter(ticks[::-1]).__next__,
                              replay=recorded(rows, "metrics"))  # fmt: skip
    assert [encode(block) for block in first] == [encode(block) for block in again]


# ---------------------------------------------------------------------------------------------------------- forgetting


def passes(count, size=30, length=10):
    data = candidates(size, columns={"index": np.arange(size)})
    return [data.take(slice(start, start + length)) for _ in range(count) for start in range(0, size, length)]


def moved(seed):
    return Weights(backbone(), head(seed=seed))


def test_forgetting_looks_only_at_what_it_does_not_leave_out():
    config = Selection(strategy="forgetting", remove=0.2, period=2)
    *found, end = select_stream(passes(6), config, weights=lambda number: moved(number // 3), backbone=backbone())
    assert end == End(18)
    shown = [np.concatenate([block.columns["index"] for block in found[at : at + 3]]) for at in range(0, 18, 3)]
    assert {len(rows) for rows in shown} <= {23, 24, 25}
    assert {*shown[0]} == {*shown[1]} != {*shown[2]}
    assert all(block.facts["scored"] == len(block) for block in found)
    assert all(block.facts["candidates"] == 10 for block in found)
    np.testing.assert_allclose(np.concatenate([block.columns["weight"] for block in found[:6]]), 0.1 / 0.8, rtol=1e-6)
    third = np.concatenate([block.columns["weight"] for block in found[6:9]])
    assert len(np.unique(third)) == 3  # those that returned, the easiest, the rest


def test_forgetting_counts_the_models_own_answers():
    """Heads that change from pass to pass: what is forgotten is what their predictions say."""
    config = Selection(strategy="forgetting", remove=0.0, period=100)
    memory = config_memory(config)
    right = []
    for number in range(6):
        for block in passes(1):
            select_block(block, config, moved(number), None, np.random.default_rng(0), memory=memory)
        view = scored(candidates(30), np.full(30, 1 / 30), moved(number), "last-layer", None)
        right.append(view.probabilities.argmax(1) == view.targets)
    right = np.array(right)
    events = (right[:-1] & ~right[1:]).sum(0)
    expected = np.where(right.any(0), events, 6)
    assert 0 < (expected > 0).sum() < 30
    np.testing.assert_array_equal(forgetting_counts(memory._state[:30]), expected)


def config_memory(config):
    return SELECTIONS[config.strategy].memory(config)


def test_forgetting_of_everything_is_what_all_chooses():
    config = Selection(strategy="forgetting", remove=0.0)
    left, whole = (
        list(select_stream(passes(2), how, weights=lambda number: WEIGHTS))
        for how in (config, Selection(strategy="all"))
    )
    for ours, plain in zip(left[:-1], whole[:-1], strict=True):
        np.testing.assert_array_equal(ours.x, plain.x)
        np.testing.assert_array_equal(ours.columns["weight"], plain.columns["weight"])


def test_forgetting_may_leave_nothing_of_a_block():
    config = Selection(strategy="forgetting", remove=0.5, epsilon=0.5, exchange=0.5)
    *found, _ = select_stream(passes(1, length=1), config, weights=lambda number: WEIGHTS)
    assert {len(block) for block in found} == {0, 1}
    assert [block.round for block in found] == list(range(30))
    assert all(block.columns["weight"].dtype == np.float32 for block in found)


@pytest.mark.parametrize(("count", "said"), [(1, 1), (2, 0)])
def test_forgetting_says_so_where_nothing_comes_twice(count, said):
    notes = []
    list(
        select_stream(passes(count), Selection(strategy="forgetting"), weights=lambda n: WEIGHTS, on_note=notes.append)
    )
    assert len([note for note in notes if "no sample came twice" in note]) == said


def test_forgetting_is_not_cut_short():
    with pytest.raises(UsageError, match=r"--until-ready.*forgetting"):
        next(select_stream(passes(1), Selection(strategy="forgetting"), weights=lambda number: WEIGHTS,
                           ready=lambda number: True))  # fmt: skip


def test_a_stream_is_rehearsed_from_a_buffer():
    """filter | select with --buffer: batches grow by what is held, which are earlier samples."""
    config = Selection(strategy="forgetting", buffer=6)
    rounds = list(filter_stream([candidates(100)], Filtering(window=20, keep=8)))[:-1]
    *found, _ = select_stream(rounds, config, weights=moved)
    assert len(found[0]) == 8
    assert all(8 < len(block) <= 14 for block in found[1:])
    for number, block in enumerate(found):
        assert block.columns["weight"].sum() == pytest.approx(1.0, abs=1e-6)
        assert (block.columns["index"][8:] < 20 * number).all()
        np.testing.assert_array_equal(block.columns["index"][:8], rounds[number].columns["index"])
        np.testing.assert_array_equal(block.x[:, 0], candidates(100).x[block.columns["index"], 0])


@pytest.mark.parametrize("y", [[0, -1, 2], [0, 7, 2]], ids=["unlabelled", "unlisted"])
def test_labels_that_make_no_sense_are_refused(y):
    block = Block(candidates(3).x, np.array(y, np.int64), "ND", labels=np.arange(3))
    with pytest.raises(DataError, match=rf"sample 1: label {y[1]}, .*pack"):
        choose(block)


@pytest.mark.parametrize(("n", "classes"), [(1, 1), (3, 3), (4, 1), (5, 2), (30, 1)])
@pytest.mark.parametrize("known", [True, False])
def test_auto_takes_odd_pools(n, classes, known):
    """Fewer candidates than places, one class, fewer places than classes, no class met yet."""
    weights = Weights(backbone(), head(known=known))
    config = Selection(strategy="auto", batch=2, max_batch=4)
    blocks = [candidates(n, classes, seed=number, round=number) for number in range(10)]
    *found, _ = select_stream(blocks, config, weights=lambda number: weights)
    for block in found:
        assert 1 <= len(block) <= 4
        assert np.isfinite(block.columns["weight"]).all()
        assert block.columns["weight"].min() > 0
    if n <= config.batch:
        assert {block.facts["strategy"] for block in found} == {"all"}


def test_auto_where_all_gradients_are_zero():
    """Nothing varies, so no choice is better than another, and none fails."""
    certain = Head("linear", np.arange(1), np.zeros((1, DIM), np.float32), np.zeros(1, np.float32), np.ones(1, bool))
    blocks = [candidates(12, 1, seed=number, round=number) for number in range(4)]
    *found, _ = select_stream(
        blocks, Selection(strategy="auto", batch=4), weights=lambda n: Weights(backbone(), certain)
    )
    assert [len(block) for block in found] == [4] * 4
    assert {block.facts["strategy"] for block in found} == {"random"}
    assert found[0].facts["variance"] == 0


def test_auto_names_a_sample_that_is_not_finite():
    block = candidates(12, round=0)
    block.x[5, 1] = np.nan
    with pytest.raises(DataError, match=r"sample 5"):
        list(select_stream([block], Selection(strategy="auto", batch=4), weights=lambda number: WEIGHTS))
