"""Checkpoints as records: what goes in comes out, and what does not belong is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Group, InputSpec, Model, Run
from stages.errors import DataError, UsageError
from stages.training.checkpoints import Checkpoint, read_checkpoint


def checkpoint() -> Checkpoint:
    model = Model("mlp", {}, InputSpec("features", (2,)), "deploy", {"a.weight": np.ones((2, 2), np.float32)})
    run = Run(model, extra=Group(groups={"mine": Group({"note": "kept"})}))
    state = {"0.step": np.array(3.0, np.float32), "0.exp_avg": np.full((2, 2), 0.5, np.float32)}
    return Checkpoint(run=run, blocks=3, start="abc", configuration='{"lr":1}', optimizer=state)


def stored(state: Checkpoint) -> Run:
    record = decode(encode(state.record()))
    assert isinstance(record, Run)
    return record


def test_a_checkpoint_survives_the_file() -> None:
    before = checkpoint()
    after = read_checkpoint(stored(before), start="abc", configuration='{"lr":1}')
    assert (after.blocks, after.start, after.configuration) == (3, "abc", '{"lr":1}')
    assert encode(after.run) == encode(before.run)
    assert after.optimizer.keys() == before.optimizer.keys()
    assert float(after.optimizer["0.step"][0]) == 3.0
    assert np.array_equal(after.optimizer["0.exp_avg"], before.optimizer["0.exp_avg"])


def test_an_optimizer_without_state_needs_none() -> None:
    plain = replace(checkpoint(), optimizer={})
    assert read_checkpoint(stored(plain), start="abc", configuration='{"lr":1}').optimizer == {}


@pytest.mark.parametrize(
    ("start", "configuration", "error", "message"),
    [
        ("xyz", '{"lr":1}', DataError, "started from model abc, expected model xyz"),
        ("abc", '{"lr":2}', UsageError, "training with lr 1, expected lr 2; use the same options"),
        ("abc", '{"lr":1,"engine":"torch"}', UsageError, 'with engine "not there", expected engine "torch"'),
    ],
)
def test_another_run_or_configuration_is_refused(
    start: str, configuration: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_checkpoint(stored(checkpoint()), start=start, configuration=configuration)


def test_a_run_record_is_no_checkpoint() -> None:
    with pytest.raises(DataError, match="expected a checkpoint"):
        read_checkpoint(checkpoint().run, start="abc", configuration="")
