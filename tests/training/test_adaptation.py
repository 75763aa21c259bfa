"""Adaptation: the folds, and a choice of the learning rate that sees nothing it must not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts.records import InputSpec, LayerUpdate
from stages.engines.choice import Engine, TrainedNet
from stages.engines.parameter import Floats
from stages.errors import DataError, UsageError
from stages.fsl.augment import Augmentation
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.operators import Op
from stages.training.adaptation import FALLBACK, Adapting, _Task, adapt, choose_rate, leave_out_folds, total_iterations
from stages.training.optimizers import NotFinite, Optimizing
from tests.engines.protocol import needs_native, net_of, on_every_engine
from tests.rounding import Bounded, gamma, value_bounds

NOTHING = Augmentation(probability=0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(2, 6), st.integers(0, 9))
def test_folds_leave_out_each_sample_once_and_no_class_wholly(labels: list[int], folds: int, seed: int) -> None:
    y = np.array(labels)
    pairs = leave_out_folds(y, folds, np.random.default_rng(seed))
    for rest, left_out in pairs:
        assert sorted([*rest, *left_out]) == list(range(len(y)))
        assert len(left_out) > 0
        assert set(y[rest]) == set(y)
    left = sorted(i for _, left_out in pairs for i in left_out)
    assert left == [i for i in range(len(y)) if labels.count(labels[i]) > 1]
    sizes = [len(left_out) for _, left_out in pairs]
    assert not sizes or max(sizes) - min(sizes) <= 1 or len(pairs) < folds


class Trials:
    """A task whose results are written down: rate -> (hits, loss) of every fold, or an error."""

    def __init__(self, results: dict[float, Any]) -> None:
        self.how, self.results = SimpleNamespace(learning_rates=tuple(results)), results
        self.trained: list[Any] = []
        self.scored: list[Any] = []

    def train(self, rows: Any, rate: float) -> float:
        self.trained.append(rows)
        if isinstance(self.results[rate], Exception):
            raise self.results[rate]
        return rate

    def score(self, net: float, rest: Any, left_out: Any) -> tuple[int, float]:
        self.scored.append((rest, left_out))
        return self.results[net]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("results", "best"),
    [
        ({0.0: (5, 1.0), 1e-3: (6, 9.0)}, 1e-3),  # accuracy first
        ({0.0: (5, 2.0), 3e-3: (5, 1.0)}, 3e-3),  # then loss
        ({3e-3: (5, 1.0), 1e-3: (5, 1.0)}, 1e-3),  # then the smallest
        ({3e-3: NotFinite("iteration 3", "loss"), 0.0: (0, 99.0)}, 0.0),  # divergence is out
    ],
)
def test_the_best_rate(results: dict[float, Any], best: float) -> None:
    fold = (np.array([0]), np.array([1]))
    assert choose_rate(Trials(results), [fold, fold]) == best  # type: ignore[arg-type]


def test_candidates_train_on_the_rest_and_are_scored_on_what_was_left_out() -> None:
    folds = leave_out_folds(np.array([0, 0, 1, 1]), 2, np.random.default_rng(0))
    trials = Trials({0.0: (1, 1.0), 1e-3: (1, 2.0)})
    choose_rate(trials, folds)  # type: ignore[arg-type]
    expected = [*folds, *folds]
    assert [list(rows) for rows in trials.trained] == [list(rest) for rest, _ in expected]
    assert [(list(rest), list(out)) for rest, out in trials.scored] == [
        (list(rest), list(out)) for rest, out in expected
    ]


def test_where_nothing_can_be_left_out_the_rate_is_the_fallback() -> None:
    rates = {0.0: None, 3e-4: None, FALLBACK: None, 3e-3: None}
    assert choose_rate(Trials(rates), []) == FALLBACK  # type: ignore[arg-type]
    assert choose_rate(Trials({3e-4: None, 0.01: None}), []) == 3e-4  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- a net of two layers


def backbone(engine: str) -> Backbone:
    ops = (
        Op("input", "input", (), (4,)),
        Op("one", "linear", ("input",), (6,), ((4,),), bias=True),
        Op("act", "relu", ("one",), (6,), ((6,),)),
        Op("two", "linear", ("act",), (5,), ((6,),), bias=True),
    )
    draw = np.random.default_rng(0)
    tensors = {
        f"{op.name}.{part}": draw.standard_normal(shape, dtype=np.float32)
        for op in ops
        if op.is_layer
        for part, shape in (("weight", op.weight_shape), ("bias", (op.out_channels,)))
    }
    return Backbone(Graph(ops), tensors, InputSpec("features", (4,)), Engine(engine))


UPDATES = (LayerUpdate("two", "output", (1, 3), 5),)
Y = np.arange(12) % 3
X: Floats = np.random.default_rng(1).standard_normal((12, 4), dtype=np.float32) + Y[:, None].astype(np.float32)


def fixed(**options: Any) -> Adapting:
    return Adapting(**{"iterations": 3, "optimizing": Optimizing(optimizer="adam"), **options})


def task(engine: str, x: Floats, how: Adapting) -> _Task[TrainedNet]:
    def compute(lots: Sequence[Floats], cached: Callable[[], Any]) -> Any:
        return cached()

    base = backbone(engine)
    fresh: Callable[[], TrainedNet] = lambda: net_of(base, UPDATES, engine)  # noqa: E731
    return _Task(fresh, base.input, x, Y, how, 0, lambda done: None, lambda: 0, compute, None)


@on_every_engine
def test_what_is_left_out_does_not_reach_training(engine: str) -> None:
    """Other values in the samples left out change their score and nothing of what is trained on the rest."""
    rest, left_out = leave_out_folds(Y, 3, np.random.default_rng(0))[0]
    results = []
    for noise in (0.0, 5.0):
        x = X.copy()
        x[left_out] += noise
        net, losses, *_ = task(engine, x, fixed(augmentation=NOTHING)).train(rest, 0.1)
        results.append((losses, net.tensors()["two.weight"].tolist()))
    assert results[0] == results[1]
    how = fixed(learning_rates=(0.1,), augmentation=NOTHING)
    alone = adapt(backbone(engine), UPDATES, X[rest], Y[rest], how, rng())
    if engine == "native":  # in torch the last bits of the frozen layers depend on the batch around a sample
        assert results[0][0] == alone.losses


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@on_every_engine
def test_choosing_among_one_rate_costs_nothing_and_gives_the_same_as_the_chosen_one(engine: str) -> None:
    counts: list[int] = []
    chosen = adapt(backbone(engine), UPDATES, X, Y, fixed(), rng(), counts.append)
    assert chosen.learning_rate in Adapting().learning_rates
    assert len(counts) <= total_iterations(fixed()) == 3 * (3 * 4 + 1)
    again = adapt(backbone(engine), UPDATES, X, Y, fixed(learning_rates=(chosen.learning_rate,)), rng())
    assert again.losses == chosen.losses
    assert np.array_equal(again.prototypes, chosen.prototypes)


@on_every_engine
def test_rate_zero_is_no_adaptation(engine: str) -> None:
    base = backbone(engine)
    net, means, rate, losses, _ = adapt(base, UPDATES, X, Y, fixed(learning_rates=(0.0,)), rng())
    assert (rate, losses) == (0.0, ())
    for name, tensor in base.tensors.items():
        assert np.array_equal(net.tensors()[name], tensor)
    features = value_bounds(base.graph, base.tensors, X, torch.float32)["two"]
    members = torch.from_numpy(np.stack([(label == Y) / (label == Y).sum() for label in range(3)]))
    rounding = gamma(len(X) + 2) * (members @ features.size)  # a sum over the class, a division, and a cast
    Bounded(members @ features.value, members @ features.error + rounding).check(means)


@on_every_engine
def test_stopping_keeps_the_weights_reached(engine: str) -> None:
    steps: list[int] = []
    how = fixed(learning_rates=(0.1,))
    stopped = adapt(backbone(engine), UPDATES, X, Y, how, rng(), steps.append, lambda: int(len(steps) == 2))
    whole = adapt(backbone(engine), UPDATES, X, Y, how, rng())
    assert stopped.losses == whole.losses[:2]
    assert not np.array_equal(stopped.net.tensors()["two.weight"], whole.net.tensors()["two.weight"])


@needs_native
def test_caches_and_micro_batches_are_other_ways_to_the_same() -> None:
    """A cache gives the same bits. Micro-batches add gradients up in another order, but begin at the same features."""

    def losses(**options: Any) -> tuple[float, ...]:
        how = fixed(learning_rates=(0.01,), views=2, **options)
        return adapt(backbone("native"), UPDATES, X, Y, how, rng()).losses

    assert losses() == losses(cache_prefix=True)
    assert losses()[0] == losses(micro_batch=5)[0] == losses(micro_batch=5, cache_prefix=True)[0]
    assert losses(micro_batch=5) == losses(micro_batch=5, cache_prefix=True)


@on_every_engine
def test_training_lowers_the_loss(engine: str) -> None:
    how = fixed(learning_rates=(0.05,), iterations=20, augmentation=NOTHING)
    losses = adapt(backbone(engine), UPDATES, X, Y, how, rng()).losses
    assert losses[-1] < 0.9 * losses[0]


@on_every_engine
def test_the_callers_backbone_and_samples_are_left_alone(engine: str) -> None:
    mine, x, y = backbone(engine), X.copy(), Y.copy()
    adapt(mine, UPDATES, x, y, fixed(learning_rates=(0.1,)), rng())
    for name, tensor in backbone(engine).tensors.items():
        assert np.array_equal(mine.tensors[name], tensor)
    assert np.array_equal(x, X)
    assert np.array_equal(y, Y)


def test_a_missing_class_is_an_error() -> None:
    with pytest.raises(DataError, match="no sample of class 1"):
        adapt(backbone("torch"), UPDATES, X, Y * 2, fixed(learning_rates=(0.1,)), rng())


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"learning_rates": ()},
        {"learning_rates": (float("nan"),)},
        {"folds": 1},
        {"cache_prefix": True},
        {"scale": 0.0},
        {"micro_batch": -1},
    ],
    ids=str,
)
def test_configurations_check_themselves(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Adapting(**wrong)
