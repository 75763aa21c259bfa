"""The stage `train-sparse`: against dense torch, by hand, and as a process that stops, breaks and resumes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Array, Block, Group, Head, LayerUpdate, Model, Plan, Preparation, Run
from stages.engines.choice import Engine, make_net
from stages.engines.torch.reference import run as dense
from stages.errors import DataError, StreamBroken, TransferError, UsageError
from stages.fsl.augment import Augmentation
from stages.models import heads, registry
from stages.models.deploy import deploy, store
from stages.models.inputs import adapt as model_input
from stages.sparse_training import (
    Checkpointing,
    Holdout,
    StreamTraining,
    SupportTraining,
    TrainingStopped,
    Update,
    train_stream,
    train_support,
)
from stages.training.adaptation import LEARNING_RATES, Adapting
from stages.training.caching import worth_of
from stages.training.optimizers import Optimizing
from stages.training.prefix_file import PrefixFile
from tests.rounding import as_tensor, exact_features, gamma, no_worse, plain_features

ENGINES = pytest.mark.parametrize("engine", ["native", "torch"])

AS_IT_IS = Augmentation(probability=0)
"""The pseudo-query is the support itself."""
CLASSES = 3
LIVE = (
    LayerUpdate("blocks.02.conv", "output", (1, 4, 6), 8),
    LayerUpdate("blocks.03.conv", "output", (0, 2, 3, 7), 8, bias=(2, 5)),
)
NAMES = tuple(f"class {label}" for label in range(CLASSES))


@cache
def conv4() -> Model:
    """A Conv-4 of width 8 for 16 x 16 pictures, in deploy form."""
    arch, args = "cnn4-w8", {"size": 16}
    state = registry.build(arch, args, seed=1).state_dict()
    tensors = {name: tensor.numpy() for name, tensor in state.items() if tensor.is_floating_point()}
    model = Model(arch, args, registry.input_spec(arch, args), "batchnorm", tensors)
    return store(model, deploy(model))


def new_run(updates: tuple[LayerUpdate, ...] | None = LIVE, head: Head | None = None) -> Run:
    """The Conv-4 with a plan."""
    return Run(replace(conv4(), head=head), plan=None if updates is None else Plan("hand", updates, 0, "paper", 0))


def block(size: int, seed: int = 0, *, weighted: bool = True, **fields: object) -> Block:
    """Pictures whose brightness and stripes tell their class."""
    rng = np.random.default_rng(seed)
    y = np.arange(size) % CLASSES
    x = rng.integers(0, 60, (size, 16, 16)) + 40 * y[:, None, None]
    x[:, ::2, :] += (30 * y)[:, None, None]
    columns = {"weight": rng.uniform(0.02, 0.2, size).astype(np.float32)} if weighted else {}
    return Block(x.astype(np.uint8), y.astype(np.int64), "NHW", columns, **fields)  # type: ignore[arg-type]


def stream(count: int, size: int = 9) -> list[Block]:
    return [block(size, seed, round=seed) for seed in range(count)]


def sgd(rate: float = 0.05, **options: object) -> StreamTraining:
    return StreamTraining(optimizing=Optimizing(learning_rate=rate), **options)  # type: ignore[arg-type]


def fixed(rate: float = 0.05, engine: str = "auto", **options: object) -> SupportTraining:
    """One rate, plain SGD, no augmentation."""
    defaults = {"learning_rates": (rate,), "optimizing": Optimizing(), "augmentation": AS_IT_IS, "iterations": 1}
    return SupportTraining(adapting=Adapting(**{**defaults, **options}), engine=engine)  # type: ignore[arg-type]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def live_mask(run: Run, updates: tuple[LayerUpdate, ...] = LIVE) -> dict[str, Array]:
    """Tensor name -> bool array, True where the plan says that values train (output axis)."""
    masks = {name: np.zeros(value.shape, bool) for name, value in run.model.tensors.items()}
    for update in updates:
        masks[f"{update.layer}.weight"][list(update.channels)] = True
        masks[f"{update.layer}.bias"][list(update.bias)] = True
    return masks


DTYPES = (torch.float32, torch.float64)
LONGEST = 9 * 16 * 16
"""Most summands of a gradient: nine samples at all positions."""


def leaves(values: Mapping[str, Array], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in this precision that stock autograd differentiates by."""
    return {name: torch.tensor(value, dtype=dtype, requires_grad=True) for name, value in values.items()}


def dense_step(loss: Tensor, tensors: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """Plain SGD of all values by stock autograd."""
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    return {name: (old - rate * g).detach() for (name, old), g in zip(tensors.items(), gradients, strict=True)}


def assert_trained(result: Run, plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], start: Run) -> None:
    """Live values moved as by stock autograd in float32 and float64; frozen values bit-equal."""
    for name, mask in live_mask(start).items():
        after, before = result.model.tensors[name], start.model.tensors[name]
        assert np.array_equal(after[~mask], before[~mask]), name
        live = torch.from_numpy(mask)
        no_worse(as_tensor(after)[live], plain[name][live], exact[name][live], LONGEST)
        assert not mask.any() or not np.array_equal(after[mask], before[mask]), name


# ---------------------------------------------------------------------------------------------- one step, dense torch


@ENGINES
def test_a_streams_update_equals_dense_torch(engine: str) -> None:
    start, batch = new_run(), block(9)
    backbone = deploy(start.model)
    x = model_input(batch.x, "NHW", start.model.input)
    head = heads.imprint(heads.empty_head(batch.y, None, 8), backbone.features(x), batch.y, batch.columns["weight"])
    steps, losses = [], []
    for dtype in DTYPES:
        tensors = leaves({**start.model.tensors, "head.weight": head.weight, "head.bias": head.bias}, dtype)
        scores = (
            dense(backbone.graph, tensors, as_tensor(x).to(dtype)) @ tensors["head.weight"].T + tensors["head.bias"]
        )
        each = -torch.log_softmax(scores, 1)[torch.arange(9), torch.from_numpy(batch.y)]
        losses.append((torch.from_numpy(batch.columns["weight"]) * each).sum())
        steps.append(dense_step(losses[-1], tensors, 0.05))

    result = train_stream(start, [batch], sgd(engine=engine))

    assert_trained(result, *steps, start)
    trained = result.model.head
    assert trained is not None
    for name, values in (("head.weight", trained.weight), ("head.bias", trained.bias)):
        no_worse(values, *(step[name] for step in steps), LONGEST)
    found = torch.tensor(result.metrics["train-sparse"]["loss"][0])
    no_worse(found, *(loss.detach() for loss in losses), LONGEST)


@ENGINES
@pytest.mark.parametrize(("detached", "scale"), [(False, 10.0), (True, 10.0), (False, 25.0)])
def test_an_adaptation_step_equals_dense_torch(detached: bool, scale: float, engine: str) -> None:
    """The cosine scale is the one that the run's head of prototypes has learned."""
    learned = (
        heads.prototype_head(np.ones((3, 8), np.float32), np.arange(3), None, scale=scale) if scale != 10 else None
    )
    start, support = new_run(head=learned), block(7, weighted=False)
    backbone = deploy(start.model)
    x = model_input(support.x, "NHW", start.model.input)
    y, steps = torch.from_numpy(support.y), []
    for dtype in DTYPES:
        tensors = leaves(start.model.tensors, dtype)
        features = dense(backbone.graph, tensors, as_tensor(x).to(dtype))
        means = torch.stack([features[y == label].mean(0) for label in range(CLASSES)])
        means = means.detach() if detached else means
        cosine = functional.cosine_similarity(features[:, None], means[None], dim=2)
        steps.append(dense_step(functional.cross_entropy(scale * cosine, y), tensors, 0.05))

    result = train_support(start, support, fixed(engine=engine, detach_prototypes=detached), rng=rng())

    assert_trained(result, *steps, start)
    after = deploy(result.model)
    trained = result.model.head
    assert trained is not None
    assert (trained.kind, trained.scale, trained.labels.tolist()) == ("prototypes", scale, [0, 1, 2])
    plain, exact = (
        torch.stack([features[y == label].mean(0) for label in range(CLASSES)])
        for features in (plain_features(after, x), exact_features(after, x))
    )
    no_worse(trained.weight, plain, exact, longest=7 + 72)  # means of features of 72 products


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_frozen_values_stay_bit_equal_under_weight_decay(optimizer: str) -> None:
    start = new_run()
    how = Optimizing(optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0, weight_decay=0.1)
    result = train_stream(start, stream(4), StreamTraining(optimizing=how))
    for name, mask in live_mask(start).items():
        assert np.array_equal(result.model.tensors[name][~mask], start.model.tensors[name][~mask])
        assert not mask.any() or not np.array_equal(result.model.tensors[name][mask], start.model.tensors[name][mask])


@pytest.mark.parametrize(("plan", "frozen"), [("full", set()), ("last-layer", {0, 1, 2})])
def test_named_plans_stand_in_for_the_runs_own(plan: str, frozen: set[int]) -> None:
    start = new_run(None)
    result = train_stream(start, stream(1), replace(sgd(), plan=plan))
    unmoved = {
        number
        for number in range(4)
        if np.array_equal(
            result.model.tensors[f"blocks.0{number}.conv.weight"], start.model.tensors[f"blocks.0{number}.conv.weight"]
        )
    }
    assert unmoved == frozen


# ------------------------------------------------------------------------------------------------------ loss and head


def test_weights_scale_the_loss_and_default_to_the_mean() -> None:
    losses = []
    for weights in (None, np.full(9, 1 / 9), np.full(9, 3 / 9)):
        batch = block(9, weighted=False)
        columns = {} if weights is None else {"weight": weights.astype(np.float32)}
        table = train_stream(new_run(), [replace(batch, columns=columns)], sgd()).metrics["train-sparse"]
        losses.append((table["loss"][0], table["weight_sum"][0]))
    assert losses[0] == pytest.approx(losses[1], rel=gamma(LONGEST))
    assert losses[2] == pytest.approx((3 * losses[0][0], 3.0), rel=gamma(LONGEST))


def test_a_class_gets_its_row_from_the_batch_in_which_it_appears() -> None:
    start = new_run()
    features = deploy(start.model).features(model_input(block(9).x, "NHW", start.model.input)).astype(float)
    first = replace(block(9), columns={"weight": np.linspace(1, 2, 9).astype(np.float32)})
    known = first.take(first.y < 2)
    result = train_stream(start, [known, first], sgd(0.0))
    head = result.model.head
    assert head is not None
    assert head.labels.tolist() == [0, 1, 2]
    assert head.known.all()
    rows = {0: known, 1: known, 2: first}
    for label, batch in rows.items():
        inside = np.isin(first.columns["weight"], batch.columns["weight"])
        w, f = first.columns["weight"][inside].astype(float), features[inside]
        radius = np.average(np.linalg.norm(f, axis=1), weights=w)
        mean = np.average(f[batch.y == label], axis=0, weights=w[batch.y == label])
        expected = 10 * mean / np.linalg.norm(mean) / radius
        np.testing.assert_allclose(head.weight[label], expected, rtol=1e-4, err_msg=str(label))


def test_classes_are_matched_by_name() -> None:
    named = replace(block(9), labels=np.arange(3), names=NAMES)
    other = replace(named, labels=np.arange(3) + 10, y=named.y + 10, names=NAMES[::-1])
    head = train_stream(new_run(), [named, other], sgd()).model.head
    assert head is not None
    assert (head.names, head.labels.tolist()) == (NAMES, [0, 1, 2])


def test_prototypes_become_the_linear_head_that_a_stream_starts_from() -> None:
    means = np.array([[3.0, 4, 0, 0, 0, 0, 0, 0], [0, 0, 5, 0, 0, 0, 0, 0]], np.float32)
    head = Head("prototypes", np.array([0, 1]), means, np.zeros(2, np.float32), np.ones(2, bool), scale=20.0)
    result = train_stream(new_run(head=head), [block(9).take(slice(0, 2))], sgd(0.0)).model.head
    assert result is not None
    assert result.kind == "linear"
    np.testing.assert_allclose(result.weight, 20 * means / 25, rtol=1e-6)  # scale * m / (|m| * mean length)


def test_importance_weights_must_be_finite_and_not_negative() -> None:
    bad = replace(block(3), columns={"weight": np.array([1, -0.5, 1], np.float32)})
    with pytest.raises(DataError, match=r"weight\[1\]: -0.5"):
        train_stream(new_run(), [bad], sgd())


# ------------------------------------------------------------------------------------------------------------ updates


def test_every_block_is_a_version_an_empty_one_too() -> None:
    start = replace(new_run(), model=replace(new_run().model, version=5))
    published: dict[int, Mapping[str, Array]] = {}
    seen: list[Update] = []
    blocks = [*stream(2), block(0, round=2), block(9, 3, round=3)]
    config = StreamTraining(optimizing=Optimizing(learning_rate=0.04, warmup_updates=4))

    def publish(number: int, tensors: Mapping[str, Array], head: object, updates: object) -> None:
        published[number] = {name: tensor.copy() for name, tensor in tensors.items()}

    result = train_stream(start, blocks, config, publish=publish, on_step=seen.append)
    assert result.model.version == 9
    assert [update.learning_rate for update in seen] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert list(published) == [1, 2, 3, 4]
    assert [(update.version, update.round, update.samples) for update in seen] == [
        (6, 0, 9), (7, 1, 9), (8, 2, 0), (9, 3, 9)
    ]  # fmt: skip
    trained = {"blocks.02.conv.weight", "blocks.03.conv.weight", "blocks.03.conv.bias"}
    assert all(tensors.keys() == trained for tensors in published.values())
    for name in trained:
        assert np.array_equal(published[2][name], published[3][name])
        assert np.array_equal(published[4][name], result.model.tensors[name])
    assert not np.array_equal(published[1]["blocks.03.conv.weight"], published[2]["blocks.03.conv.weight"])


@ENGINES
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_give_the_update_of_the_whole(micro_batch: int, engine: str) -> None:
    before = new_run().model.tensors
    whole, parts = (
        train_stream(new_run(), stream(3), sgd(engine=engine, micro_batch=size)) for size in (0, micro_batch)
    )
    support = block(7, weighted=False)
    adapted, in_parts = (
        train_support(new_run(), support, fixed(engine=engine, iterations=3, micro_batch=size), rng=rng())
        for size in (0, micro_batch)
    )
    for one, other in ((whole, parts), (adapted, in_parts)):  # to the digit: tests.training.test_updates
        for name, tensor in one.model.tensors.items():
            moved = np.linalg.norm(tensor - before[name])
            assert np.linalg.norm(other.model.tensors[name] - tensor) <= 1e-3 * moved, name


def test_training_lowers_the_loss_and_metrics_accumulate() -> None:
    blocks = [block(9, round=number) for number in range(30)]
    result = train_stream(new_run(), blocks, sgd(), holdout=Holdout(block=block(30, 99), every=10))
    table = result.metrics["train-sparse"]
    assert table["loss"][-1] < 0.5 * table["loss"][0]
    assert np.flatnonzero(np.isfinite(table["accuracy"])).tolist() == [9, 19, 29]
    assert table["accuracy"][-1] > 0.6
    again = train_stream(result, blocks[:2], sgd())
    assert again.metrics["train-sparse"]["version"].tolist() == list(range(1, 33))
    assert np.isnan(again.metrics["train-sparse"]["accuracy"][30:]).all()
    assert again.model.version == 32


def test_accuracy_on_the_holdout_by_hand() -> None:
    """A class that the head never met counts as wrong."""
    seen = block(9).take(block(9).y < 2)
    result = train_stream(new_run(), [seen], sgd(0.0), holdout=Holdout(block=block(12, 5), every=1))
    held = block(12, 5)
    features = deploy(result.model).features(model_input(held.x, "NHW", result.model.input))
    head = result.model.head
    assert head is not None
    answers = (features @ head.weight.T + head.bias).argmax(1)
    assert result.metrics["train-sparse"]["accuracy"] == pytest.approx([np.mean(answers == held.y)])


# ------------------------------------------------------------------------------------------------- trouble and stopping


def test_without_a_plan_the_error_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"no plan.*score-layers.*--full or --last-layer"):
        train_stream(new_run(None), stream(1), sgd())
    with pytest.raises(DataError, match="no plan"):
        train_support(new_run(None), block(6), fixed(), rng=rng())


def test_a_plan_for_another_model_is_refused_by_the_layers_name() -> None:
    other = (LayerUpdate("blocks.13.project", "output", (0,), 160),)
    with pytest.raises(DataError, match=r"blocks\.13\.project"):
        train_stream(new_run(other), stream(1), sgd())


def test_a_plan_in_which_nothing_trains_is_refused() -> None:
    with pytest.raises(DataError, match="nothing trains"):
        train_stream(new_run(()), stream(1), sgd())


def test_a_stream_without_blocks_is_an_error() -> None:
    with pytest.raises(DataError, match="no blocks"):
        train_stream(new_run(), [], sgd())


def broken(count: int) -> Iterator[Block]:
    yield from stream(count)
    raise StreamBroken("stdin", f"the stream broke after round {count - 1}", "an end mark")


def test_a_broken_stream_keeps_the_updates_made() -> None:
    with pytest.raises(TrainingStopped, match="after 3 updates: stdin: the stream broke after round 2") as caught:
        train_stream(new_run(), broken(3), sgd())
    assert caught.value.exit_code == 65
    assert encode(caught.value.run) == encode(train_stream(new_run(), stream(3), sgd()))


def test_a_stream_broken_before_the_first_block_leaves_nothing_to_write() -> None:
    with pytest.raises(StreamBroken):
        train_stream(new_run(), broken(0), sgd())


@ENGINES
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_divergence_keeps_the_last_good_version(engine: str, micro_batch: int) -> None:
    """And says nothing beside: numpy's warnings are errors here."""
    config = sgd(engine=engine, micro_batch=micro_batch)
    blocks = stream(3)
    blocks[2] = replace(blocks[2], columns={"weight": np.full(9, 3e38, np.float32)})
    with pytest.raises(TrainingStopped, match=r"after 2 updates: update 2.*finite") as caught:
        train_stream(new_run(), blocks, config)
    assert caught.value.exit_code == 65
    assert encode(caught.value.run) == encode(train_stream(new_run(), stream(2), config))


def test_a_full_disk_in_the_live_directory_keeps_the_updates_made() -> None:
    def publish(number: int, tensors: Mapping[str, Array], head: Head, updates: object) -> None:
        if number == 2:
            raise OSError(28, "No space left on device", "live/2.h5")

    with pytest.raises(TrainingStopped, match=r"live/2.h5: No space left") as caught:
        train_stream(new_run(), stream(3), sgd(), publish=publish)
    assert (caught.value.exit_code, caught.value.run.model.version) == (74, 2)


def test_a_full_disk_under_the_checkpoint_keeps_the_updates_made() -> None:
    def write(record: Run) -> None:
        raise TransferError("check.h5", "writing failed (No space left on device)")

    with pytest.raises(TrainingStopped, match=r"after 3 updates: check.h5: writing failed") as caught:
        train_stream(new_run(), stream(3), sgd(), checkpoint=Checkpointing(write=write))
    assert (caught.value.exit_code, caught.value.run.model.version) == (74, 3)


def test_a_stream_that_breaks_because_it_was_told_to_stop_is_no_error() -> None:
    """A signal reaches all stages of a pipeline: the stream ends without its end mark, as it should."""
    seen: list[Update] = []
    result = train_stream(new_run(), broken(2), sgd(), stop=lambda: 2 * (len(seen) == 2), on_step=seen.append)
    assert result.model.version == 2
    late = iter([0, 0, 2, 2, 2, 2])
    assert train_stream(new_run(), broken(2), sgd(), stop=lambda: next(late)).model.version == 2
    assert train_stream(new_run(), broken(0), sgd(), stop=lambda: 2).model.version == 0


def test_a_request_to_stop_is_honoured_after_the_running_update() -> None:
    seen: list[Update] = []
    result = train_stream(new_run(), stream(5), sgd(), stop=lambda: 15 * (len(seen) == 2), on_step=seen.append)
    assert result.model.version == 2


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@ENGINES
def test_resuming_is_bit_equal_to_not_stopping(optimizer: str, engine: str) -> None:
    momentum = 0.9 if optimizer == "sgd" else 0.0
    how = Optimizing(optimizer=optimizer, learning_rate=0.01, momentum=momentum, schedule="cosine", total_updates=10)
    config = StreamTraining(optimizing=how, engine=engine)
    blocks = [b if b.round >= 5 else b.take(b.y < 2) for b in stream(10) if b.round is not None]
    straight = train_stream(new_run(), blocks, config)
    saved: list[bytes] = []
    keep = Checkpointing(write=lambda record: saved.append(encode(record)), every=2)
    train_stream(new_run(), blocks[:5], config, checkpoint=keep)
    assert len(saved) == 3  # after updates 2 and 4, and the last state
    checkpoint = decode(saved[-1])
    assert isinstance(checkpoint, Run)
    published: list[int] = []
    resumed = train_stream(
        new_run(),
        blocks,
        config,
        resume=checkpoint,
        publish=lambda number, *others: published.append(number),
    )
    assert encode(resumed) == encode(straight)
    assert published == [5, 6, 7, 8, 9, 10]
    continued = train_stream(new_run(), blocks[5:], config, resume=checkpoint, replayed=False)
    assert encode(continued) == encode(straight)


def checkpoint_of(run: Run, config: StreamTraining) -> Run:
    saved: list[Run] = []
    train_stream(run, stream(1), config, checkpoint=Checkpointing(write=saved.append))
    return saved[-1]


def test_a_checkpoint_of_another_run_or_configuration_is_refused() -> None:
    checkpoint = checkpoint_of(new_run(), sgd())
    with pytest.raises(UsageError, match=r"--resume.*same options"):
        train_stream(new_run(), stream(2), sgd(0.01), resume=checkpoint)
    other = replace(new_run(), model=replace(new_run().model, version=1))
    with pytest.raises(DataError, match="started from model"):
        train_stream(other, stream(2), sgd(), resume=checkpoint)
    with pytest.raises(DataError, match="a run record, expected a checkpoint"):
        train_stream(new_run(), stream(2), sgd(), resume=new_run())


def test_a_checkpoint_carries_foreign_groups_and_the_result_no_checkpoint() -> None:
    start = replace(new_run(), extra=Group(groups={"mine": Group({"note": "kept"})}))
    checkpoint = checkpoint_of(start, sgd())
    assert checkpoint.extra.groups.keys() == {"mine", "checkpoint"}
    resumed = train_stream(start, stream(2), sgd(), resume=checkpoint)
    assert resumed.extra.groups.keys() == {"mine"}


# ------------------------------------------------------------------------------------------------------ support, whole


def test_adaptation_chooses_its_rate_and_is_reproducible() -> None:
    support = block(15, weighted=False)
    config = SupportTraining(adapting=Adapting(iterations=4))
    first, second = (encode(train_support(new_run(), support, config, rng=rng(1))) for _ in range(2))
    assert first == second
    result = decode(first)
    assert isinstance(result, Run)
    other = train_support(new_run(), support, config, rng=rng(2))
    assert encode(other) != first
    rates = set(result.metrics["train-sparse"]["learning_rate"])
    assert len(rates) <= 1
    assert rates <= set(LEARNING_RATES) - {0.0}
    assert result.model.version == len(result.metrics["train-sparse"]["loss"])


def test_cached_frozen_outputs_change_nothing(tmp_path: Path) -> None:
    support = block(9, weighted=False)
    options = {"views": 2, "augmentation": Augmentation(), "learning_rates": (0.01, 0.05), "iterations": 4}
    plain, cached = (
        train_support(new_run(), support, fixed(**options, cache_prefix=cache), rng=rng()) for cache in (False, True)
    )
    assert encode(cached) == encode(plain)
    for changes, used in ((0, False), (0, True), (1, False)):
        file = PrefixFile(tmp_path / "cache.h5")
        other = replace(support, x=support.x + np.uint8(changes))
        before = file.path.read_bytes() if file.path.exists() else b""
        stored = train_support(new_run(), other, fixed(**options, cache_prefix=True), rng=rng(), cache_file=file)
        assert (encode(stored) == encode(plain)) == (changes == 0)
        assert (file.path.read_bytes() == before) == used
    fresh = train_support(new_run(), support, fixed(**{**options, "views": 0}), rng=rng())
    assert encode(fresh) != encode(plain)


@ENGINES
def test_a_cache_is_kept_where_it_pays(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    support, notes = block(9, weighted=False), list[str]()
    options = {"views": 2, "augmentation": Augmentation(), "learning_rates": (0.01, 0.05), "iterations": 4}
    plain = train_support(new_run(), support, fixed(engine=engine, **options), rng=rng())
    config = replace(fixed(engine=engine, **options), auto_cache=True)
    assert encode(train_support(new_run(), support, config, rng=rng(), on_note=notes.append)) == encode(plain)
    assert any("frozen layers' outputs" in note for note in notes)
    net = make_net(replace(deploy(new_run().model), engine=Engine(engine)), LIVE)
    x = model_input(support.x, "NHW", new_run().model.input)
    worth = worth_of(net, x, config.adapting, 1 << 30)
    assert worth.bytes == 9 * 3 * sum(value[0].nbytes for value in net.prefix(x))
    assert worth.uses == 4 * 7 / 2  # three folds of two rates, and the final training
    assert replace(worth, run_s=1e-3, read_s=1e-5).pays
    assert not replace(worth, run_s=1e-5, read_s=1e-3).pays
    assert not replace(worth, run_s=1e-3, read_s=1e-5, free_bytes=worth.bytes).pays
    assert not replace(worth, run_s=1e-3, read_s=1e-5, uses=1.0).pays
    assert worth_of(net, x, replace(config.adapting, views=0), None).uses == 0


def test_the_heads_classes_are_the_supports() -> None:
    support = replace(block(6, weighted=False), y=np.array([7, 4, 9] * 2), labels=np.array([4, 7, 9]), names=NAMES)
    head = train_support(new_run(), support, fixed(), rng=rng()).model.head
    assert head is not None
    assert (head.labels.tolist(), head.names) == ([4, 7, 9], NAMES)


def test_an_empty_support_is_an_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        train_support(new_run(), block(0), fixed(), rng=rng())


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def _signals() -> Iterator[None]:
    """The command takes over two signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_the_command_trains_on_a_stream_and_on_a_support(tmp_path: Path) -> None:
    from edgetrain_cli.commands.train_sparse import train_sparse

    records = [new_run(), *(replace(b, round=None) for b in stream(3))]
    (tmp_path / "stream.h5").write_bytes(b"".join(map(encode, records)))
    (tmp_path / "run.h5").write_bytes(encode(new_run()))
    (tmp_path / "support.h5").write_bytes(encode(block(6, weighted=False)))
    out, metrics = tmp_path / "out.h5", tmp_path / "metrics.jsonl"
    train_sparse(
        str(tmp_path / "stream.h5"), out=str(out), live=str(tmp_path / "live"), checkpoint=str(tmp_path / "check.h5"),
        holdout=str(tmp_path / "support.h5"), holdout_every=2, metrics=str(metrics), lr=0.05, history=False,
    )  # fmt: skip
    written = decode(out.read_bytes())
    assert isinstance(written, Run)
    watched = train_stream(new_run(), stream(3), sgd(), holdout=Holdout(block=block(6, weighted=False), every=2))
    assert encode(written) == encode(watched)
    assert list((tmp_path / "live").iterdir()) == []
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["version"] for line in lines] == [1, 2, 3]
    assert ["accuracy" in line for line in lines] == [False, True, False]
    train_sparse(str(tmp_path / "run.h5"), str(tmp_path / "support.h5"), out=str(out), iterations=2, lr=0.01)
    adapted = decode(out.read_bytes())
    assert isinstance(adapted, Run)
    assert adapted.model.head is not None
    assert (adapted.model.head.kind, adapted.model.version) == ("prototypes", 2)
    assert adapted.history[-1].inputs.keys() == {"run.h5", "support.h5"}


# ------------------------------------------------------------------------------------- how samples had been prepared

PAPER = Preparation(of="pictures", size=(16, 16), fit="crop", invert=True)


def test_the_run_keeps_how_the_samples_were_prepared_that_it_learnt_from() -> None:
    adapted = train_support(new_run(), replace(block(6), prepared=PAPER), fixed(), rng=rng())
    assert adapted.model.input.prepared == PAPER
    (again,) = [decode(encode(adapted))]
    assert isinstance(again, Run)
    assert again.model.input.prepared == PAPER
    assert train_support(adapted, block(6), fixed(), rng=rng()).model.input.prepared is None
    trained = train_stream(new_run(), [block(6), replace(block(6), prepared=PAPER)], sgd())
    assert trained.model.input.prepared == PAPER


def test_a_stream_whose_samples_are_prepared_in_another_way_stops_it() -> None:
    other = replace(block(6), prepared=replace(PAPER, invert=False))
    with pytest.raises(
        TrainingStopped, match=r"after 1 updates: stream: pictures as they are, expected inverted"
    ) as stop:
        train_stream(new_run(), [replace(block(6), prepared=PAPER), other], sgd())
    assert stop.value.run.model.input.prepared == PAPER


def test_samples_without_a_label_teach_nothing() -> None:
    unlabelled = replace(block(6), y=np.array([0, 1, 2, 0, 1, -1]))
    with pytest.raises(DataError, match="support: 1 of 6 samples have no label"):
        train_support(new_run(), unlabelled, fixed(), rng=rng())
    with pytest.raises(DataError, match="1 of 6 samples have no label"):
        train_stream(new_run(), [unlabelled], sgd())
