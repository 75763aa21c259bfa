import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Block, Model, Preparation, Run
from stages.errors import DataError, PartMissing, UsageError
from stages.fsl.episodes import FixedShape
from stages.fsl.meta_training import Epoch, Learner, _gradients, train_epoch
from stages.fsl.schedule import WarmCosine
from stages.fsl.slicing import Slicing
from stages.fsl.team import ALONE, Team
from stages.models.deploy import deploy, store
from stages.models.modules import state
from stages.models.registry import build, input_spec
from stages.pretraining import CHECKPOINT, STAGE, Pretraining, pretrain, trainable
from tests.rounding import longest_sum, no_worse

ARGS = {"width": 4, "size": 16}
SHAPE = FixedShape(ways=3, shots=2, queries=2)
CONFIG = Pretraining(
    epochs=3,
    lr=0.05,
    warmup_epochs=1,
    steps=3,
    per_step=2,
    ways=3,
    shots=2,
    queries=2,
    repeat=False,
    batchnorm="train",
    validation_tasks=4,
    validation_ways=3,
    validation_shots=2,
    validation_queries=2,
    validation_share=0.3,
)


def random_run(form="batchnorm"):
    spec = input_spec("cnn4", ARGS)
    run = Run(Model("cnn4", ARGS, spec, "batchnorm", state(build("cnn4", ARGS, seed=3))))
    return run if form == "batchnorm" else replace(run, model=store(run.model, deploy(run.model)))


def squares(classes=10, each=6, seed=0):
    """Pictures of noise around one pattern per class: easy to tell apart."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 255, (classes, 16, 16))
    x = np.clip(np.repeat(patterns, each, 0) + rng.normal(0, 40, (classes * each, 16, 16)), 0, 255)
    return Block(x.astype(np.uint8), np.repeat(np.arange(classes), each).astype(np.int64), "NHW")


def tensors_equal(one, other):
    return all(np.array_equal(array, other.model.tensors[name]) for name, array in one.model.tensors.items())


def test_two_trainings_with_one_seed_write_equal_artifacts():
    one, again, other = (pretrain(random_run(), [squares()], CONFIG, seed=seed) for seed in (1, 1, 2))
    assert encode(one) == encode(again)
    assert not tensors_equal(one, other)


def test_training_learns_and_leaves_the_run_alone():
    start = random_run()
    before = encode(start)
    config = replace(
        CONFIG,
        epochs=4,
        warmup_epochs=0,
        steps=5,
        augment="none",
        validation_tasks=0,
    )
    result = pretrain(start, [squares()], config, seed=0)
    assert encode(start) == before
    loss = result.metrics[STAGE]["loss"]
    assert loss[-1] < 0.7 * loss[0]
    assert result.model.form == "batchnorm"
    assert np.isnan(result.metrics[STAGE]["validation_accuracy"]).all()


def test_the_scale_is_learned_and_kept_in_a_head_without_classes():
    result = pretrain(random_run(), [squares()], CONFIG, seed=0)
    back = decode(encode(result))
    assert len(back.model.head.labels) == 0
    assert back.model.head.scale in result.metrics[STAGE]["scale"]
    assert back.model.head.scale != CONFIG.scale
    # a second training starts from the scale of the first
    still = replace(CONFIG, epochs=1, lr=0.0, warmup_epochs=0, least_lr=0.0)
    again = pretrain(back, [squares()], still, seed=0)
    assert again.model.head.scale == back.model.head.scale


def statistics(run):
    return {name: array for name, array in run.model.tensors.items() if "running" in name}


def test_frozen_statistics_stay_bit_equal_and_trained_ones_move():
    start = random_run()
    for mode, moves in (("frozen", False), ("train", True)):
        result = pretrain(start, [squares()], replace(CONFIG, batchnorm=mode), seed=0)
        changed = [not np.array_equal(array, start.model.tensors[name]) for name, array in statistics(result).items()]
        assert changed == [moves] * len(changed)
        assert not tensors_equal(start, result)


def test_the_deploy_form_trains_too():
    start = random_run("deploy")
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    backbone, module = deploy(start.model), trainable(start.model)
    with torch.no_grad():
        plain, exact = module(x), module.double()(x.double())
    no_worse(torch.from_numpy(backbone.features(x.numpy())), plain, exact, longest_sum(backbone.graph))
    result = pretrain(start, [squares()], replace(CONFIG, batchnorm="frozen"), seed=0)
    assert result.model.form == "deploy"
    assert set(result.model.tensors) == set(start.model.tensors)
    assert not tensors_equal(start, result)


def test_the_best_weights_on_validation_are_kept():
    saved = []
    result = pretrain(random_run(), [squares()], CONFIG, seed=0, save=saved.append)
    accuracy = result.metrics[STAGE]["validation_accuracy"]
    best = int(np.argmax(accuracy))
    assert len(saved) == 3
    assert saved[best].extra.groups[CHECKPOINT].groups["kept"].attrs["epoch"] == best
    assert tensors_equal(result, saved[best])


def test_patience_ends_training():
    flat = replace(CONFIG, epochs=9, lr=0.0, warmup_epochs=5, warmup_lr=0.0, least_lr=0.0)
    config = replace(flat, batchnorm="frozen", patience=2)
    result = pretrain(random_run(), [squares()], config, seed=0)
    # nothing ever gets better than the first epoch: two more are waited for
    assert len(result.metrics[STAGE]["epoch"]) == 3


@pytest.mark.parametrize("slice", [1.0, 0.5])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_training_is_bit_equal(stop_after, slice):
    config = replace(CONFIG, supervised_epochs=2, supervised_batch=8, epochs=2, warmup_epochs=0, slice=slice)
    saved = []
    whole = pretrain(random_run(), [squares()], config, seed=0, save=lambda run: saved.append(encode(run)))
    assert len(saved) == 4
    resumed = pretrain(random_run(), [squares()], config, seed=0, resume=decode(saved[stop_after - 1]))
    assert encode(resumed) == encode(whole)


def test_slices_train_and_the_last_epochs_are_whole(monkeypatch):
    steps = []
    monkeypatch.setattr(Slicing, "cut", lambda self, step, cut=Slicing.cut: steps.append(step) or cut(self, step))
    config = replace(CONFIG, epochs=11, slice=0.5)
    run = random_run()
    result = pretrain(run, [squares()], config, seed=0)
    assert steps == list(range(9 * config.steps))  # of 11 epochs the last 2, a tenth, are whole
    plain = pretrain(run, [squares()], replace(config, slice=1.0), seed=0)
    assert not tensors_equal(result, plain)
    assert result.metrics[STAGE]["loss"][-1] < result.metrics[STAGE]["loss"][0]


def test_a_net_without_hidden_widths_cannot_be_sliced():
    args = {"dim": 9, "width": 5, "depth": 1}
    run = Run(Model("mlp", args, input_spec("mlp", args), "batchnorm", state(build("mlp", args, seed=0))))
    block = Block(np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32), np.arange(40) % 10, "ND")
    with pytest.raises(UsageError, match="hidden widths"):
        pretrain(run, [block], replace(CONFIG, slice=0.5, augment="none"), seed=0)


def test_a_checkpoint_of_another_training_is_refused():
    saved = []
    pretrain(random_run(), [squares()], CONFIG, seed=0, save=saved.append)
    with pytest.raises(UsageError, match="another training"):
        pretrain(random_run(), [squares()], CONFIG, seed=1, resume=saved[0])
    with pytest.raises(DataError, match="a checkpoint of pretraining"):
        pretrain(random_run(), [squares()], CONFIG, seed=0, resume=random_run())


def test_data_sets_are_mixed():
    sets = [squares(seed=0), squares(classes=12, each=8, seed=1)]
    result = pretrain(random_run(), sets, CONFIG, seed=0)
    alone = pretrain(random_run(), sets[:1], CONFIG, seed=0)
    assert not tensors_equal(result, alone)


def test_progress_counts_steps():
    steps = []
    pretrain(random_run(), [squares()], CONFIG, seed=0, on_step=lambda progress: steps.append(progress.steps))
    assert steps[-1] == CONFIG.total_steps == 9
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (squares(classes=4), "to hold out and others"),
        (squares(each=3), "to hold out and others"),
        (Block(np.zeros((4, 5), np.float32), np.arange(4), "ND"), "layout ND"),
    ],
    ids=["few classes", "few samples", "features"],
)
def test_data_that_does_not_suffice(data, message):
    with pytest.raises(DataError, match=message):
        pretrain(random_run(), [data], CONFIG, seed=0)


def test_small_classes_are_refused_or_left_out():
    data = squares()
    data = data.take(np.flatnonzero((data.y != 4) | (np.arange(len(data)) % 6 == 0)))
    config = replace(CONFIG, validation_tasks=0)
    with pytest.raises(DataError, match="class 4: 1 samples"):
        pretrain(random_run(), [data], config, seed=0)
    pretrain(random_run(), [data], replace(config, on_bad="skip"), seed=0)


def test_a_loss_that_is_not_finite_ends_training():
    config = replace(CONFIG, lr=1e30, warmup_epochs=0, validation_tasks=0)
    with pytest.raises(DataError, match="a loss of"):
        pretrain(random_run(), [squares()], config, seed=0)


READS = {"__bool__": False, "__int__": 0, "__float__": 0.0, "item": 0.0}


@pytest.mark.filterwarnings("ignore:.*no-op")
def test_everything_is_computed_on_the_device(monkeypatch):
    """The meta device stands for an accelerator: it refuses operands from elsewhere. It has no values, so whoever reads
    one gets zero."""

    def of_meta(answer, original):
        return lambda tensor: answer(tensor) if tensor.is_meta else original(tensor)

    for name, value in READS.items():
        monkeypatch.setattr(torch.Tensor, name, of_meta(lambda tensor, value=value: value, getattr(torch.Tensor, name)))
    zeros = of_meta(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype), torch.Tensor.cpu)
    monkeypatch.setattr(torch.Tensor, "cpu", zeros)
    config, saved = replace(CONFIG, supervised_epochs=1, supervised_batch=8), []
    found = pretrain(random_run(), [squares()], config, seed=0, device="meta", save=saved.append)
    assert len(found.metrics[STAGE]["epoch"]) == len(saved) == 4
    pretrain(random_run(), [squares()], config, seed=0, device="meta", resume=saved[1])


def test_no_such_device():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(PartMissing, match="--device cpu"):
        pretrain(random_run(), [squares()], CONFIG, seed=0, device="cuda")


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"batchnorm": "on"}, {"augment": "magic"}, {"momentum": 1.0}, {"scale": 0}], ids=str
)
def test_settings_are_checked(settings):
    with pytest.raises(UsageError):
        Pretraining(**settings)


# ------------------------------------------------------------------------------------------------------- the loop


class Numbered:
    """Units whose gradient at the scale is the unit's number."""

    def __init__(self, learner):
        self.learner = learner

    def loss(self, number):
        return self.learner.scale * number


def test_a_step_follows_the_mean_gradient_of_its_units():
    learner = Learner(torch.nn.BatchNorm1d(2), 0.0, torch.zeros(0, 2))
    assert _gradients(learner, Numbered(learner), range(3, 7), ALONE) == (0.0, 1.0)
    assert learner.scale.grad.item() == pytest.approx((3 + 4 + 5 + 6) / 4)


def test_epochs_use_their_own_units_and_rates():
    learner = Learner(torch.nn.BatchNorm1d(2), 0.0, torch.zeros(0, 2))
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)
    schedule = WarmCosine(epochs=2, rate=0.1, warmup_epochs=0, least_rate=0.1)
    train_epoch(learner, Numbered(learner), optimizer, Epoch(1, 2, 2, schedule, False), ALONE, lambda done: None)
    # epoch 1 of two steps of two units: units 4, 5 and 6, 7
    assert learner.scale.item() == pytest.approx(-0.1 * (4.5 + 6.5))


# ------------------------------------------------------------------------------------------------------ two processes

WORKER = """
import sys
import torch
from stages.artifacts.hdf5 import encode
from stages.fsl.team import joined
from stages.pretraining import pretrain
from tests.test_pretraining import CONFIG, random_run, squares
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
with joined(rank, 2, init_method=f"file://{store}") as team:
    run = pretrain(random_run(), [squares()], CONFIG, seed=0, team=team)
with open(f"{out}{rank}", "wb") as file:
    file.write(encode(run))
"""


def test_two_processes_train_as_one(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(tmp_path / "run")], cwd=root, stderr=-1)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    images = [(tmp_path / f"run{rank}").read_bytes() for rank in range(2)]
    assert images[0] == images[1]
    start, alone = random_run(), pretrain(random_run(), [squares()], CONFIG, seed=0)
    together = decode(images[0])
    for name, array in alone.model.tensors.items():  # another order of sums; a lost or doubled share would be the half
        moved = np.linalg.norm(array - start.model.tensors[name])
        assert np.linalg.norm(together.model.tensors[name] - array) <= 1e-2 * moved, name
    for name, column in alone.metrics[STAGE].items():
        np.testing.assert_allclose(together.metrics[STAGE][name], column, rtol=1e-2)


def test_a_team_needs_a_fair_share():
    with pytest.raises(UsageError, match="a multiple of their number"):
        pretrain(random_run(), [squares()], CONFIG, seed=0, team=Team(0, 4))


def test_the_run_keeps_how_all_its_samples_were_prepared():
    config = replace(CONFIG, epochs=1, warmup_epochs=0, validation_tasks=0)
    ink, paper = (Preparation(of="pictures", size=(16, 16), invert=invert) for invert in (True, False))
    sets = [replace(squares(seed=seed), prepared=ink) for seed in (0, 1)]
    assert pretrain(random_run(), sets, config, seed=0).model.input.prepared == ink
    mixed = [sets[0], replace(sets[1], prepared=paper)]
    assert pretrain(random_run(), mixed, config, seed=0).model.input.prepared is None
