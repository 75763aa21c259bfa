"""The streaming pipeline in one process: what the lag means, round by round."""

from dataclasses import replace

import numpy as np
import pytest

from stages.artifacts.live import Version, version_for
from stages.artifacts.records import Block
from stages.errors import DataError, UsageError
from stages.filtering import filter_stream
from stages.models.deploy import deploy
from stages.pipeline import Pipeline, simulate
from stages.randomness import generator
from stages.selection import Selection, Weights, select_block
from stages.sparse_training import train_stream
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


def test_training_behind_the_frozen_layers_equals_training_from_the_input():
    plain, sent = (
        simulate(new_run(), [samples(110)], pipeline(1, selection=Selection(batch=4, send=send)))
        for send in ("samples", "features")
    )
    assert plain.model.version == sent.model.version == 6
    before = new_run().model.tensors
    for name, tensor in plain.model.tensors.items():  # to the digit: tests.sparse.test_updates
        moved = np.linalg.norm(tensor - before[name])
        assert np.linalg.norm(sent.model.tensors[name] - tensor) <= 1e-3 * moved, name
    np.testing.assert_allclose(sent.metrics["train-sparse"]["loss"], plain.metrics["train-sparse"]["loss"], rtol=1e-3)


def test_features_of_another_plan_are_refused():
    settings = pipeline(1, selection=Selection(batch=4, send="features"))
    with pytest.raises(DataError, match="features of"):
        simulate(new_run(), [samples(110)], replace(settings, training=replace(settings.training, plan="full")))
