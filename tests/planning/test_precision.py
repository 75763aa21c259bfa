"""FracTrain's indicator by hand, and widths that move while training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stages.artifacts.hdf5 import encode
from stages.errors import UsageError
from stages.planning.precision import PrecisionSchedule, advance, begin, parse_schedule
from stages.settings.training import Training
from stages.sparse_training import WIDTHS, Checkpointing, StreamTraining, train_stream, train_support
from stages.training.optimizers import Optimizing
from tests.test_sparse_training import block, fixed, new_run, rng, stream


def stages(schedule: PrecisionSchedule, losses: list[float]) -> tuple[list[int], list[float]]:
    memory, found, eps = begin(schedule), [], []
    for loss in losses:
        memory = advance(schedule, memory, loss)
        found.append(int(memory["stage"]))
        eps.append(float(memory["eps"]))
    return found, eps


def test_the_fifth_equal_loss_moves_on_and_then_five_more_are_needed() -> None:
    found, eps = stages(PrecisionSchedule((8, 16, 32)), [1.0] * 12)
    assert found == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    assert eps[3] == 0.05
    assert eps[4:9] == pytest.approx([0.015] * 5)
    assert eps[9:] == pytest.approx([0.0045] * 3)


def test_a_loss_that_falls_stays_and_its_scale_is_that_of_the_first_ones() -> None:
    falling = [1.0, 0.8, 0.6, 0.4, 0.2, 0.1]
    assert stages(PrecisionSchedule((8, 32)), falling)[0] == [0] * 6
    # |0.104 - 0.1| / mean of the losses so far = 0.004 / 0.1008 is within 0.05, and 0.106 is not
    assert stages(PrecisionSchedule((8, 32)), [0.104, 0.1, 0.1, 0.1, 0.1])[0][-1] == 1
    assert stages(PrecisionSchedule((8, 32)), [0.106, 0.1, 0.1, 0.1, 0.1])[0][-1] == 0
    # ten losses give the scale: after losses around 10 a difference of 0.2 is small
    late = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 1.2, 1.0, 1.0, 1.0, 1.0]
    assert stages(PrecisionSchedule((8, 32)), late)[0][-1] == 1


@pytest.mark.parametrize(
    "text", ["8", "16,8", "8,8", "4,8", "8,sixteen", "8,16:speed=1", "8,16:turn=0", "8,16:decay=2"]
)
def test_other_schedules_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="precision-schedule"):
        parse_schedule(text)
    with pytest.raises(UsageError, match="precision-schedule"):
        Training(precision_schedule=text)


def test_it_has_no_place_beside_a_fixed_width() -> None:
    assert Training(precision_schedule="8,32:turn=0.2").on_stream().precision == "8,32:turn=0.2"
    with pytest.raises(UsageError, match="keep-bits"):
        Training(precision_schedule="8,32", keep_bits=8)


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("policy", ["static", "rotate"])
def test_widths_move_while_a_support_set_trains(engine: str, policy: str) -> None:
    support = block(9, weighted=False)
    config = replace(fixed(1e-6, engine, iterations=12), precision="8,16,32:turn=0.5", policy=policy)
    result = train_support(new_run(), support, config, rng=rng())
    table = result.metrics[WIDTHS]
    assert table["version"].tolist() == [0, 5, 10]
    assert table["keep_bits"].tolist() == [8, 16, 32]
    assert encode(train_support(new_run(), support, config, rng=rng())) == encode(result)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_stream_goes_on_with_the_width_that_it_had(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.sparse_training.BLOCKS", 2)
    how = Optimizing(optimizer="adam", learning_rate=1e-6)
    config = StreamTraining(engine=engine, precision="8,32:turn=5", optimizing=how)
    blocks, saved = stream(14), []
    straight = train_stream(new_run(), blocks, config)
    assert straight.metrics[WIDTHS]["version"].tolist() == [0, 10]
    for cut in (5, 10, 11):
        train_stream(new_run(), blocks[:cut], config, checkpoint=Checkpointing(write=saved.append, every=99))
        assert encode(train_stream(new_run(), blocks, config, resume=saved[-1])) == encode(straight)
    plain = train_stream(new_run(), blocks, replace(config, precision=None, keep_bits=8))
    assert not all(np.array_equal(v, plain.model.tensors[k]) for k, v in straight.model.tensors.items())
