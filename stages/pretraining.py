"""The stage `pretrain-fsl`: meta-train a backbone with ProtoNet, from imported weights or from scratch.

The procedure is TinyTrain's offline stage (arXiv:2307.09988, section 2.1 and appendix A), which is P>M>F's: cosine
prototypes with a learnable scale, SGD with momentum, warm-up and cosine, BatchNorm with frozen statistics. From scratch
there are no statistics worth freezing: `batchnorm="train"` normalises by each episode's own and collects running ones.

A supervised phase (cosine classifier over all classes) may come first. After each epoch, validation tasks over classes
that do not train decide which weights are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from math import ceil
from typing import Any

import numpy as np
import torch

from stages.artifacts.history import model_hash
from stages.artifacts.records import Array, Block, Group, Head, Run
from stages.errors import DataError, PartMissing, UsageError, require
from stages.fsl.augment import HANDWRITING, PSEUDO_QUERY, Augmentation, augment
from stages.fsl.bit_widths import parse_simulation
from stages.fsl.episode_list import data_hash
from stages.fsl.episodes import Episode, Pool, check_pool, draw_episodes, pool_of
from stages.fsl.meta_training import BatchUnits, DataSet, EpisodeUnits, Inputs, Learner
from stages.fsl.schedule import WarmCosine
from stages.fsl.settling import Settling, settling_of
from stages.fsl.simulated_bits import Simulation, simulation_of
from stages.fsl.slicing import Slicing
from stages.fsl.team import ALONE, Team
from stages.fsl.trainer import Phase, Progress, Rhythm, Trainer
from stages.losses import Floats
from stages.models.deploy import Backbone, deploy, with_graph
from stages.models.inputs import adapt_block
from stages.models.modules import Net, trainable
from stages.randomness import generator, torch_generator
from stages.settings.pretraining import Pretraining as Pretraining

STAGE = "pretrain-fsl"
"""Name of the metrics' table in the run record."""
CHECKPOINT = "pretraining"
"""Name of the group that a checkpoint adds to the run record."""

AUGMENTATIONS: Mapping[str, Augmentation] = {
    "none": Augmentation(probability=0.0),
    "colour": PSEUDO_QUERY,
    "photo": replace(PSEUDO_QUERY, probability=1.0, coin="sample", flip=True, zoom=0.5),
    "handwriting": HANDWRITING,
}
"""For training: nothing, P>M>F's pseudo-query, the same with mirror images and zoom, geometric distortions."""


WHOLE_AT_THE_END = 0.1
"""Share of the epochs, the last ones, in which nothing is left out: BatchNorm's statistics become those of all
channels."""


def pretrain(
    run: Run,
    data: Sequence[Block],
    config: Pretraining,
    *,
    seed: int,
    validation: Block | None = None,
    resume: Run | None = None,
    save: Callable[[Run], None] = lambda record: None,
    on_step: Callable[[Progress], None] = lambda progress: None,
    device: str = "cpu",
    team: Team = ALONE,
    allow: str | None = None,
) -> Run:
    """The run with meta-trained weights (the best on validation), their cosine scale in an empty head, and metrics.

    Args:
        data: one block per data set; classes are told apart by label inside each.
        validation: samples of other classes; without them, `config.validation_share` of the classes is held out.
        resume: a checkpoint that `save` got from the same run, data, configuration and seed.
        save: gets a checkpoint after every epoch, in the leading process.
        team: the processes that train together; `per_step` must be a multiple of their number.

    Raises:
        DataError: data that the model cannot read, or with too few classes or samples; a loss that is not finite.
        UsageError: options that do not fit together, or a checkpoint of another training.
        PartMissing: no such device.
    """
    fits = config.per_step % team.size == 0
    require(fits, "--per-step", f"{config.per_step} for {team.size} processes", "a multiple of their number")
    run = _learning_from(replace(run, model=with_graph(run.model, allow=allow)), data)
    identity = _identity(run, [*data, *([] if validation is None else [validation])], config, seed)
    backbone, module = deploy(run.model), trainable(run.model)
    trainer = _trainer(run, data, validation, config, seed, backbone, module, _device(device), team)
    if resume is not None:
        trainer.load(_resumed(resume, identity))
    while not trainer.finished:
        trainer.epoch(on_step)
        if team.leads:
            save(_checkpoint(_with_weights(run, module, trainer, backbone), trainer.state(), identity))
    return _with_weights(run, module, trainer, backbone)


def _learning_from(run: Run, data: Sequence[Block]) -> Run:
    """The run with how the samples were prepared that it learns from, where all data sets were prepared alike."""
    ways = {block.prepared for block in data}
    spec = replace(run.model.input, prepared=ways.pop() if len(ways) == 1 else None)
    return replace(run, model=replace(run.model, input=spec))


def _trainer(
    run: Run,
    data: Sequence[Block],
    validation: Block | None,
    config: Pretraining,
    seed: int,
    backbone: Backbone,
    module: Net,
    device: torch.device,
    team: Team,
) -> Trainer:
    sets, others = _data_sets(backbone, data, validation, config, seed)
    classes = sum(len(each.pool.classes) for each in sets) if config.supervised_epochs else 0
    rows = torch.randn(classes, backbone.graph.feature_dim, generator=torch_generator(seed, "pretrain-rows"))
    head = run.model.head
    scale = head.scale if head is not None else config.scale
    learner = Learner(module, scale, rows, _simulation(config, module, seed)).to(device)

    def distort(x: Floats, rng: np.random.Generator) -> Floats:
        return augment(x, backbone.input, rng, AUGMENTATIONS[config.augment])

    flat = WarmCosine(
        epochs=max(1, config.supervised_epochs), rate=config.supervised_rate, warmup_epochs=0, least_rate=0.0
    )
    batches = BatchUnits(learner, sets, config.supervised_batch, distort, seed)
    episodes = EpisodeUnits(learner, sets, config.shape, distort, seed)
    sliced = _slicing(config, module, seed, device)
    whole = ceil(WHOLE_AT_THE_END * config.epochs)
    phases = [
        Phase(batches, config.supervised_epochs, flat, batchnorm_trains=True, competes=False, slicing=sliced),
        Phase(episodes, config.epochs, config.schedule, config.batchnorm_trains, slicing=sliced, whole_epochs=whole),
    ]
    rhythm = Rhythm(
        config.steps, config.per_step, config.momentum, config.weight_decay, config.optimizer, config.layer_decay,
        config.patience,
    )  # fmt: skip
    settling = _settling(config, module, sets, seed)
    return Trainer(learner, phases, rhythm, _validation_tasks(others, config, seed), team, settling)


def _slicing(config: Pretraining, module: Net, seed: int, device: torch.device) -> Slicing | None:
    """What leaves out channels while training, if anything does. Raises `UsageError` where there is nothing."""
    if config.slice == 1:
        return None
    slicing = Slicing(module.graph, config.slice, config.slice_draw, seed, device)
    found = "a net in which no layer's channels are read by one other layer alone"
    require(bool(slicing.widths), "--slice", found, "hidden widths, as of cnn4, mlp, ds-cnn, MobileNets, ViTs")
    return slicing


PROBE = 16
"""Samples that tell whether a layer has settled."""


def _settling(config: Pretraining, module: Net, sets: Sequence[DataSet], seed: int) -> Settling | None:
    """What freezes layers that have settled, if anything does; it looks at some samples of the first data set."""
    how = settling_of(config.policy)
    if how is None:
        return None
    rows = np.concatenate(sets[0].pool.members)
    chosen = generator(seed, "pretrain-probe").choice(rows, min(PROBE, len(rows)), replace=False)
    return Settling(how, module, sets[0].inputs(np.sort(chosen)))


def _simulation(config: Pretraining, module: Net, seed: int) -> Simulation | None:
    """What computes in few bits while training, if anything does. Raises `UsageError` for a target out of reach."""
    if config.simulate_bits is None:
        return None
    return simulation_of(parse_simulation(config.simulate_bits), module.graph, seed)


# ----------------------------------------------------------------------------------------------------------- the data


def _data_sets(
    backbone: Backbone, data: Sequence[Block], validation: Block | None, config: Pretraining, seed: int
) -> tuple[list[DataSet], list[DataSet]]:
    """What trains, and what validation tasks are drawn from."""
    if not data:
        raise DataError("data", "no data set", "at least one")
    hold_out = config.validation_tasks > 0 and validation is None
    sets, others = [], []
    for number, block in enumerate(data):
        inputs, pool = _reader(backbone, block), pool_of(block)
        if hold_out:
            pool, held_out = _split(pool, config, generator(seed, "pretrain-validation", number))
            others.append(DataSet(inputs, held_out))
        sets.append(DataSet(inputs, check_pool(pool, config.shape, skip=config.on_bad == "skip")[0]))
    if validation is not None and config.validation_tasks:
        pool, _ = check_pool(pool_of(validation), config.validation_shape, skip=config.on_bad == "skip")
        others.append(DataSet(_reader(backbone, validation), pool))
    return sets, others


def _reader(backbone: Backbone, block: Block) -> Inputs:
    whole = replace(block, x=np.asarray(block.x[:]), columns={})

    def inputs(rows: Array) -> Floats:
        return adapt_block(whole.take(rows), backbone.input)

    inputs(np.arange(min(1, len(block))))  # what the model cannot read is found before training starts
    return inputs


def _split(pool: Pool, how: Pretraining, rng: np.random.Generator) -> tuple[Pool, Pool]:
    """Classes for training and classes for validation, the latter among those with enough samples for its tasks."""
    large = np.flatnonzero(pool.sizes() >= how.validation_shape.least_samples)
    count = max(how.validation_ways, round(how.validation_share * len(pool.classes)))
    if len(large) < count or len(pool.classes) - count < 2:
        raise DataError(
            "validation",
            f"{len(large)} of {len(pool.classes)} classes with {how.validation_shape.least_samples} samples",
            f"{count} to hold out and others to train on",
            "name validation data, change the validation tasks, or ask for none",
        )
    held_out = np.zeros(len(pool.classes), bool)
    held_out[rng.choice(large, count, replace=False)] = True
    return pool.only(~held_out), pool.only(held_out)


def _validation_tasks(sets: Sequence[DataSet], how: Pretraining, seed: int) -> list[tuple[DataSet, Episode]]:
    """The tasks, taken from the data sets in turn."""
    tasks: list[tuple[DataSet, Episode]] = []
    for number, data in enumerate(sets):
        numbers = range(how.validation_tasks)[number :: len(sets)]
        drawn = draw_episodes(data.pool, how.validation_shape, seed, numbers, stage="validation-task")
        tasks += [(data, task) for task in drawn]
    return tasks


# ---------------------------------------------------------------------------------------------------------- the model


def _with_weights(run: Run, module: Net, trainer: Trainer, backbone: Backbone) -> Run:
    """The run with the weights that training keeps, the scale in a head without classes, and the table of epochs."""
    own = "backbone."
    kept = {name.removeprefix(own): array for name, array in trainer.kept.weights.items() if name.startswith(own)}
    tensors = module.arrays(kept)
    dim = backbone.graph.feature_dim
    head = Head(
        "prototypes",
        labels=np.zeros(0, np.int64),
        weight=np.zeros((0, dim), np.float32),
        bias=np.zeros(0, np.float32),
        known=np.zeros(0, bool),
        names=(),
        scale=float(trainer.kept.weights["scale"]),
    )
    return replace(run, model=replace(run.model, tensors=tensors, head=head)).with_metrics(STAGE, trainer.table)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise PartMissing("--device", f"{name}: {reason}", "a device of this machine", "use --device cpu") from error
    return device


# ----------------------------------------------------------------------------------------------------------- restarts


def _identity(run: Run, blocks: Sequence[Block], config: Pretraining, seed: int) -> str:
    """What a checkpoint must have in common with the training that goes on from it."""
    parts: list[Any] = [model_hash(run), [data_hash(block) for block in blocks], asdict(config), seed]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _checkpoint(run: Run, state: Group, identity: str) -> Run:
    group = replace(state, attrs={**state.attrs, "identity": identity})
    return replace(run, extra=replace(run.extra, groups={**run.extra.groups, CHECKPOINT: group}))


def _resumed(record: Run, identity: str) -> Group:
    group = record.extra.groups.get(CHECKPOINT)
    if group is None:
        fix = "`edgetrain pretrain-fsl --checkpoint` writes one"
        raise DataError("--resume", "a run record", "a checkpoint of pretraining", fix)
    if group.attrs.get("identity") != identity:
        raise UsageError("--resume", "a checkpoint of another training", "the same model, data, options and seed")
    return group
