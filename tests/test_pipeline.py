"""The streaming pipeline in one process: what the lag means, round by round."""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from torch import nn

from stages.artifacts.live import Version, version_for
from stages.artifacts.records import Block, InputSpec, LayerUpdate, Model, Plan, Run
from stages.errors import DataError, UsageError
from stages.filtering import filter_stream
from stages.graphs.record import graph_tree
from stages.models.deploy import deploy
from stages.pipeline import Pipeline, simulate
from stages.randomness import generator
from stages.selection import Selection, Weights, select_block
from stages.sparse_training import train_stream
from stages.valuation.forward import Forward
from tests.models.nets import folded, randomise
from tests.pipes.streaming import assert_same, new_run, pipeline, samples


def by_hand(run, blocks, settings):
    """Round after round with plain loops: choose with version max(0, r - lag), train on all batches so far."""
    pools = [record for record in filter_stream(blocks, settings.filtering) if isinstance(record, Block)]
    start = Weights(deploy(run.model), run.model.head)
    batches, versions, result = [], [], run
    for number, pool in enumerate(pools):
        wanted = version_for(number, settings.lag)
        known = start if wanted == 0 else start.at(versions[wanted - 1])
        batches.append(select_block(pool, settings.selection, known, None, generator(0, "select", number)))
        result = train_stream(run, batches, settings.training)
        versions.append(Version(number + 1, result.model.tensors, result.model.head))
    return result


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_batch_is_chosen_with_the_weights_that_the_lag_names(lag):
    blocks = [samples(110)]
    assert_same(simulate(new_run(), blocks, pipeline(lag)), by_hand(new_run(), blocks, pipeline(lag)))


def test_the_lag_matters():
    first, second = (simulate(new_run(), [samples(110)], pipeline(lag)) for lag in (0, 2))
    assert first.model.version == second.model.version == 6
    assert not np.array_equal(first.model.head.weight, second.model.head.weight)


def test_how_the_stream_is_cut_changes_nothing():
    whole = samples(110)
    expected = simulate(new_run(), [whole], pipeline(1))
    assert_same(simulate(new_run(), whole.slices(7), pipeline(1)), expected)


def test_every_update_is_reported():
    seen = []
    simulate(new_run(), [samples(110)], pipeline(1), on_step=seen.append)
    assert [update.version for update in seen] == [1, 2, 3, 4, 5, 6]
    assert [update.round for update in seen] == [0, 1, 2, 3, 4, 5]


def test_a_negative_lag_is_refused():
    with pytest.raises(UsageError, match="lag"):
        Pipeline(lag=-1)


# ----------------------------------------------------------------------------------------------------- features sent


def with_engine(settings, *, select="auto", train="auto", plan=None):
    """The same pipeline with these engines, and perhaps another plan trained than the run's."""
    training = replace(settings.training, engine=train, plan=plan)
    return replace(settings, selection=replace(settings.selection, engine=select), training=training)


def sending(send, strategy="titan"):
    return pipeline(1, selection=Selection(batch=4, send=send, strategy=strategy))


def pictures(count=80, seed=0):
    """Pictures of noise, brighter by class, the classes of unequal size."""
    rng = np.random.default_rng(seed)
    y = rng.choice(3, count, p=[0.5, 0.3, 0.2])
    return Block((rng.integers(0, 90, (count, 16, 16)) + 80 * y[:, None, None]).astype(np.uint8), y, "NHW")


@cache
def residual_run():
    """A net whose trained part begins inside a residual block: two values cross, and some channels train."""
    module = randomise(Residual(), 3)
    graph, tensors = folded(module, (1, 16, 16))
    spec = InputSpec("image", (1, 16, 16), scale=(1 / 255,), offset=(0.0,))
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    model = Model("tests.test_pipeline:Residual", {}, spec, "deploy", arrays, graph=graph_tree(graph))
    *_, inner, last = (op.name for op in graph.layers)
    updates = (LayerUpdate(inner, "output", (1, 2), 4, bias=(0, 1)), LayerUpdate(last, "output", (2, 6), 8, (2,)))
    return Run(model, plan=Plan("hand", updates, 0, "paper", 0))


class Residual(nn.Module):
    """A convolution, an inverted residual block, and a convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.last = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        x = self.stem(x)
        return self.last(x + self.down(self.up(x)))


RUNS = {"an MLP": (new_run, samples), "inside a residual block": (residual_run, pictures)}


@pytest.mark.parametrize(("run", "data"), RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("strategy", ["titan", "stratified"], ids=["scored", "not scored"])
def test_natively_training_behind_the_frozen_layers_gives_the_bits_of_training_from_the_input(run, data, strategy):
    """Whatever the batch around a sample, here of candidates and there of what was chosen."""
    plain, sent = (simulate(run(), [data(110)], sending(send, strategy)) for send in ("samples", "features"))
    assert plain.model.version == 6
    assert_same(sent, plain)
    assert any(not np.array_equal(value, run().model.tensors[name]) for name, value in plain.model.tensors.items())


def test_training_behind_the_frozen_layers_equals_training_from_the_input_in_torch():
    plain, sent = (
        simulate(new_run(), [samples(110)], with_engine(sending(send), select="torch", train="torch"))
        for send in ("samples", "features")
    )
    assert plain.model.version == sent.model.version == 6
    before = new_run().model.tensors
    for name, tensor in plain.model.tensors.items():  # to the digit: tests.training.test_updates
        moved = np.linalg.norm(tensor - before[name])
        assert np.linalg.norm(sent.model.tensors[name] - tensor) <= 1e-3 * moved, name
    np.testing.assert_allclose(sent.metrics["train-sparse"]["loss"], plain.metrics["train-sparse"]["loss"], rtol=1e-3)


def test_all_that_crosses_is_sent():
    """The block's input, which the addition reads, and the input of its layer that trains."""
    run, block = residual_run(), pictures()
    sent = Forward(deploy(run.model), run.plan.updates, send=True).attach(block)
    assert {name: value.shape for name, value in sent.columns.items()} == {
        "boundary0": (80, 8, 8, 4), "boundary1": (80, 8, 8, 6)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        ({"select": "torch", "train": "native"}, r"torch", r"native [0-9a-f]{8}"),
        ({"select": "native", "train": "torch"}, r"native [0-9a-f]{8}", r"torch"),
        ({"plan": "last-layer"}, r"native [0-9a-f]{8}", r"native [0-9a-f]{8}"),
    ],
    ids=["torch's for native", "native for torch's", "another plan's"],
)
def test_features_of_another_engine_or_plan_are_refused_in_a_line(changes, found, expected):
    with pytest.raises(DataError) as caught:
        simulate(new_run(), [samples(110)], with_engine(sending("features"), **changes))
    told = str(caught.value)
    line = rf"stream: features of (\S+) \({found}\), expected those of \1 \({expected}\); train the plan .* same engine"
    assert re.fullmatch(line, told), told
    assert caught.value.exit_code == 65


def test_features_of_a_plan_that_begins_elsewhere_are_refused():
    with pytest.raises(DataError, match=r"features of \S+ .*expected those of input "):
        simulate(new_run(), [samples(110)], with_engine(sending("features"), plan="full"))
