"""The two kinds of task: what is looked at, and under which loss."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from stages.artifacts.records import Block, Head
from stages.errors import DataError, UsageError
from stages.importance.tasks import TASKS, Task, build_task
from stages.models.heads import prototype_head
from stages.models.inputs import adapt
from tests.importance.nets import INPUT, deployed, mixed
from tests.rounding import (
    Bounded,
    check_features,
    exact_features,
    exact_logits,
    gamma,
    longest_sum,
    no_worse,
    plain_features,
)

BACKBONE = deployed(mixed())
DOUBLE = torch.float64


def support(samples=12, classes=3, seed=0, **changes):
    rng = np.random.default_rng(seed)
    fields = {
        "x": rng.normal(size=(samples, *INPUT.shape)).astype(np.float32),
        "y": np.arange(samples) % classes * 7 + 3,  # labels 3, 10, 17
        "layout": "NCHW",
    }
    return Block(**fields | changes)


def build(kind, block, head=None, seed=0):
    return build_task(kind, BACKBONE, block, head, np.random.default_rng(seed))


def linear_head(labels, names=None, dim=5):
    count = len(labels)
    weight = np.random.default_rng(1).normal(size=(count, dim)).astype(np.float32)
    return Head("linear", np.array(labels), weight, np.zeros(count, np.float32), np.ones(count, bool), names)


# ------------------------------------------------------------------------------------------------------- prototypes


def test_prototypes_are_class_means_of_the_support_as_it_is():
    block = support()
    task = build("prototypes", block)
    inputs = adapt(block.x, "NCHW", INPUT)
    plain, exact = (
        torch.stack([features[block.y == label].mean(0) for label in (3, 10, 17)])
        for features in (plain_features(BACKBONE, inputs), exact_features(BACKBONE, inputs))
    )
    no_worse(task.head.weight, plain, exact, longest_sum(BACKBONE.graph))
    assert task.head.labels.tolist() == [3, 10, 17]
    assert task.targets.tolist() == [0, 1, 2] * 4


def test_the_query_is_the_augmented_support_and_some_samples_are_left_as_they_are():
    block = support(200)
    inputs = adapt(block.x, "NCHW", INPUT)
    changed = (build("prototypes", block).inputs != inputs).reshape(200, -1).any(1)
    assert 0.8 < changed.mean() < 0.98  # nine in ten, one coin per sample


def test_a_seed_decides_the_query():
    block = support()
    first = build("prototypes", block, seed=1)
    np.testing.assert_array_equal(first.inputs, build("prototypes", block, seed=1).inputs)
    assert not np.array_equal(first.inputs, build("prototypes", block, seed=2).inputs)


@pytest.mark.parametrize(("head", "scale"), [(None, 10.0), (linear_head([3, 10]), 10.0), ("prototypes", 4.0)])
def test_the_scale_is_that_of_the_runs_prototypes(head, scale):
    if head == "prototypes":
        head = prototype_head(np.eye(2, 5, dtype=np.float32), np.array([0, 1]), None, scale=4.0)
    assert build("prototypes", support(), head).head.scale == scale


def test_a_class_of_one_sample_is_its_own_prototype():
    block = support(3, classes=3)
    task = build("prototypes", block)
    check_features(task.head.weight, BACKBONE, adapt(block.x, "NCHW", INPUT))


# ----------------------------------------------------------------------------------------------------------- linear


def test_a_stream_is_seen_as_it_is_under_the_runs_head():
    head = linear_head([3, 10, 17, 99])
    task = build("linear", support(), head)
    np.testing.assert_array_equal(task.inputs, adapt(support().x, "NCHW", INPUT))
    np.testing.assert_array_equal(task.head.weight, head.weight)
    assert task.targets.tolist() == [0, 1, 2] * 4


def test_classes_find_their_rows_by_name():
    names = ("owl", "cat", "dog")
    block = support(labels=np.array([3, 10, 17]), names=("dog", "owl", "cat"))
    task = build("linear", block, linear_head([0, 1, 2], names))
    assert task.targets.tolist() == [2, 0, 1] * 4


def test_classes_without_a_row_are_imprinted():
    head = linear_head([3, 10])
    task = build("linear", support(), head)
    assert task.head.known.all()
    assert task.head.labels.tolist() == [3, 10, 17]
    np.testing.assert_array_equal(task.head.weight[:2], head.weight)
    assert np.abs(task.head.weight[2]).max() > 0
    assert build("linear", support(), None).head.known.all()


# ------------------------------------------------------------------------------------------------------------- both


def test_the_loss_is_cross_entropy_sample_by_sample():
    head = linear_head([0, 1, 2])
    features, targets = np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32), np.array([0, 2, 1, 1])
    exact = torch.from_numpy(features).double().requires_grad_()
    losses = functional.cross_entropy(exact_logits(head, exact), torch.from_numpy(targets), reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    weight = torch.from_numpy(head.weight).double().abs()
    # in float64: a loss moves by at most twice what the scores do, a probability likewise
    moved = 2 * gamma(5 + 3, DOUBLE) * (exact.detach().abs() @ weight.T).amax(1) + gamma(8, DOUBLE)
    found, pulled = Task(features, targets, head).loss(features, targets)
    Bounded(losses.detach(), moved).check(found)
    rounded = gamma(1) * gradient.abs()  # to float32
    Bounded(gradient, rounded + 2 * moved[:, None] * weight.sum(0)).check(pulled)
    assert (found.dtype, pulled.dtype) == (np.float64, np.float32)


def test_batches_hold_every_sample_once_in_order():
    task = build("prototypes", support(12))
    pieces = list(task.batches(5))
    assert [len(x) for x, _ in pieces] == [5, 5, 2]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in pieces]), task.inputs)
    np.testing.assert_array_equal(np.concatenate([y for _, y in pieces]), task.targets)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize(
    ("block", "message"),
    [
        (support(4, classes=1), "single class"),
        (support(0), "no samples"),
        (support(layout="NHWC"), "channels"),
        (support(x=np.full((12, *INPUT.shape), np.nan, np.float32)), "not finite"),
    ],
    ids=["one class", "empty", "layout", "nan"],
)
def test_a_support_that_says_nothing_is_an_error(kind, block, message):
    with pytest.raises(DataError, match=message):
        build(kind, block)


def test_one_class_of_a_stream_is_enough_for_a_head_that_knows_more():
    assert build("linear", support(4, classes=1), linear_head([3, 10])).targets.tolist() == [0] * 4


def test_an_unknown_kind_of_head_is_an_error():
    with pytest.raises(UsageError, match="prototypes, linear"):
        build("softmax", support())
