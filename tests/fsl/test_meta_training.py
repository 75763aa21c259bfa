"""The steps of meta-training's losses between torch and the closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stages.artifacts.records import Array
from stages.fsl.episodes import Episode, FixedShape, Pool
from stages.fsl.meta_training import BatchUnits, DataSet, EpisodeUnits, Learner, protonet_loss, validate
from stages.fsl.protonet import episode_loss
from stages.fsl.team import ALONE
from tests.rounding import gamma

SCALE = 7.0


def task(rng: np.random.Generator, ways: int = 3, shots: int = 2, queries: int = 4) -> Episode:
    """A task over the samples 0, 1, ..., the support first."""
    support, query = np.repeat(np.arange(ways), shots), rng.integers(ways, size=queries)
    samples = np.arange(len(support) + queries)
    return Episode(np.arange(ways), samples[: len(support)], support, samples[len(support) :], query)


def test_the_loss_hands_its_gradients_to_autograd() -> None:
    rng = np.random.default_rng(0)
    drawn = task(rng)
    count = len(drawn.support)
    rows = rng.normal(size=(count + len(drawn.query), 5)).astype(np.float32)
    features, scale = torch.from_numpy(rows).requires_grad_(), torch.tensor(SCALE, requires_grad=True)
    loss = protonet_loss(features, scale, drawn)
    (loss / 4).backward()  # a step's mean over its units
    exact = episode_loss(rows[:count], drawn.support_labels, rows[count:], drawn.query_labels, drawn.ways, SCALE)
    assert loss.item() == np.float32(exact.value)
    expected = np.concatenate([exact.support_gradient, exact.query_gradient]) / 4
    np.testing.assert_array_equal(features.grad.numpy(), expected)
    assert scale.grad.item() == np.float32(exact.scale_gradient) / 4
    assert expected.all()


@pytest.fixture
def data() -> DataSet:
    """Five samples of each of four classes: features of noise around the corners of a square."""
    rng = np.random.default_rng(1)
    y = np.repeat(np.arange(4), 5)
    x = (np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])[y] + rng.normal(0, 0.1, (20, 2))).astype(np.float32)

    def inputs(rows: Array) -> Array:
        return x[rows]

    return DataSet(inputs, Pool(np.arange(4), tuple(np.flatnonzero(y == c) for c in range(4))))


@pytest.mark.parametrize("kind", ["episodes", "batches"])
def test_units_distort_what_the_learner_sees_by_the_number_alone(kind: str, data: DataSet) -> None:
    seen: list[Array] = []

    class Recorder(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.numpy())
            return x

    def distort(x: Array, rng: np.random.Generator) -> Array:
        return x + np.float32(rng.integers(10, 1000))

    learner = Learner(Recorder(), SCALE, torch.ones(8, 2))
    units = (
        EpisodeUnits(learner, [data], FixedShape(ways=2, shots=2, queries=1), distort, 3)
        if kind == "episodes"
        else BatchUnits(learner, [data, data], 6, distort, 3)
    )
    losses = [units.loss(number).item() for number in (0, 1, 0)]
    assert losses[0] == losses[2]
    np.testing.assert_array_equal(seen[0], seen[2])
    assert not np.array_equal(seen[0], seen[1])
    assert min(x.min() for x in seen) > 5
    assert all(x.dtype == np.float32 for x in seen)


def test_the_batch_loss_is_the_cosine_classifiers(data: DataSet) -> None:
    rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])

    def centred(x: Array, rng: np.random.Generator) -> Array:
        return np.sign(x) * np.float32(3)

    learner = Learner(nn.Identity(), 2.0, rows)
    found = BatchUnits(learner, [data], 5, centred, 0).loss(0)
    # cosines 1, 0, 0, -1 with the four rows: whatever was drawn, -ln(e^2 / (e^2 + 2 + e^-2))
    expected = np.log(np.exp(2) + 2 + np.exp(-2)) - 2
    assert found.item() == pytest.approx(expected, rel=gamma(64))


def test_validation_counts_right_answers(data: DataSet) -> None:
    learner = Learner(nn.Identity(), SCALE, torch.zeros(0, 2))
    pool, shape = data.pool, FixedShape(ways=4, shots=1, queries=2)
    tasks = [(data, shape.draw(pool, np.random.default_rng(seed))) for seed in range(3)]
    assert validate(learner, tasks, ALONE).mean == 1.0
    wrong = DataSet(lambda rows: np.zeros((len(rows), 2), np.float32), pool)  # all the same: the first class is named
    assert validate(learner, [(wrong, each) for _, each in tasks], ALONE).mean == 0.25
