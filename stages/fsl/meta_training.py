"""The loop of meta-training: units of work (episodes or batches), steps over several of them, validation.

A unit is a number: everything random about it comes from the generator of (seed, stage, number). A step sums the
gradients of `per_step` units; processes share them out. Each unit sees the running statistics of BatchNorm as they were
before the step, and their mean over the units is kept: so N processes do what one process does, up to the order of
summation.

The modules are torch's, and so is the way back through them; ProtoNet's loss and its gradient at the features are the
closed form that adaptation on a device uses (`fsl.protonet`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.artifacts.records import Array
from stages.errors import DataError
from stages.fsl.episodes import Episode, Pool, Shape
from stages.fsl.intervals import half_width
from stages.fsl.optimizing import Optimizer, set_rate
from stages.fsl.protonet import accuracy, cosine_logits, episode_loss, prototypes
from stages.fsl.schedule import WarmCosine
from stages.fsl.simulated_bits import Pass, Simulation
from stages.fsl.slicing import Cut, Part, Slicing
from stages.fsl.team import Team
from stages.losses import Floats
from stages.randomness import generator

Inputs = Callable[[Array], Floats]
"""Positions in a data set -> model inputs (n, *input)."""
Distort = Callable[[Floats, np.random.Generator], Floats]
"""Model inputs -> augmented model inputs."""


@dataclass(frozen=True)
class DataSet:
    """Samples as model inputs, and what tasks are drawn from."""

    inputs: Inputs
    pool: Pool


class Units(Protocol):
    """A source of losses by number."""

    def loss(self, number: int) -> Tensor:
        """The loss of one unit, with its graph."""


class Learner(nn.Module):
    """What trains: the backbone, the cosine scale and, for a supervised phase, one row per class (C, D).

    Without a supervised phase `rows` has no rows. A simulation's gate trains beside them.
    """

    def __init__(self, backbone: nn.Module, scale: float, rows: Tensor, simulation: Simulation | None = None) -> None:
        super().__init__()
        self.simulation = simulation
        self.gate = None if simulation is None else simulation.gate
        self.backbone = backbone
        self.scale = nn.Parameter(torch.tensor(scale))
        self.rows = nn.Parameter(rows)

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def forward(self, x: Floats) -> Tensor:
        """Model inputs (N, *input) -> features (N, D), on the learner's device."""
        features: Tensor = self.backbone(torch.from_numpy(x).to(self.device, non_blocking=True))
        return features

    def keep(self, cut: Cut | None) -> dict[int, Part]:
        """Train, until told otherwise, what a cut keeps; the kept parts by the parameter's identity."""
        self.backbone.cut = cut  # type: ignore[assignment]
        if cut is None:
            return {}
        values: dict[str, Tensor] = self.backbone.values()  # type: ignore[operator]
        return {id(values[name]): part for name, part in cut.parts.items()}

    def simulate(self, number: int) -> Pass | None:
        """Compute, until told otherwise, as the simulation has it for this unit, if there is one."""
        if self.simulation is None:
            return None
        unit = self.simulation.unit(number)
        self.backbone.rules = unit.rules  # type: ignore[assignment]
        return unit

    def compute_plainly(self) -> None:
        """Compute in float32 again."""
        if self.simulation is not None:
            self.backbone.rules = {}  # type: ignore[assignment]


class _ProtoNetLoss(torch.autograd.Function):
    """`episode_loss` of features [support; query] (N_s + N_q, D) and the scale, as a step of autograd's."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, scale: Tensor, task: Episode) -> Tensor:
        """The loss; what backward needs is computed with it."""
        rows, count = features.cpu().numpy(), len(task.support)
        loss = episode_loss(rows[:count], task.support_labels, rows[count:], task.query_labels, task.ways, scale.item())
        gradient = torch.from_numpy(np.concatenate([loss.support_gradient, loss.query_gradient]))
        ctx.save_for_backward(gradient.to(features.device), scale.new_tensor(loss.scale_gradient))
        return features.new_tensor(loss.value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients at the features and at the scale."""
        at_features, at_scale = ctx.saved_tensors
        return gradients[0] * at_features, gradients[0] * at_scale, None


def protonet_loss(features: Tensor, scale: Tensor, task: Episode) -> Tensor:
    """ProtoNet's loss of a task, differentiable in the features of [support; query] (N_s + N_q, D) and in the scale."""
    loss: Tensor = _ProtoNetLoss.apply(features, scale, task)  # type: ignore[no-untyped-call]
    return loss


@dataclass(frozen=True)
class EpisodeUnits:
    """Tasks drawn from the data sets, each set with the same probability (as Meta-Dataset mixes its sources)."""

    learner: Learner
    sets: Sequence[DataSet]
    shape: Shape
    distort: Distort
    seed: int

    def loss(self, number: int) -> Tensor:
        """ProtoNet's loss of one augmented task (Snell et al., with P>M>F's cosine)."""
        rng = generator(self.seed, "pretrain-episode", number)
        data = self.sets[int(rng.integers(len(self.sets)))]
        task = self.shape.draw(data.pool, rng)
        x = data.inputs(np.concatenate([task.support, task.query]))
        x = self.distort(x, generator(self.seed, "pretrain-distortion", number))
        return protonet_loss(self.learner(x), self.learner.scale, task)


@dataclass(frozen=True)
class BatchUnits:
    """Batches over all classes of all data sets, against the learner's row of each class."""

    learner: Learner
    sets: Sequence[DataSet]
    batch: int
    distort: Distort
    seed: int

    def loss(self, number: int) -> Tensor:
        """Cross-entropy of the cosine classifier over one augmented batch."""
        rng = generator(self.seed, "pretrain-batch", number)
        counts = [len(data.pool.classes) for data in self.sets]
        drawn = rng.integers(sum(counts), size=self.batch)
        pieces, first = [], 0
        for data, count in zip(self.sets, counts, strict=True):
            mine = drawn[(drawn >= first) & (drawn < first + count)] - first
            rows = np.array([rng.choice(data.pool.members[c]) for c in mine], np.int64)
            pieces += [(data.inputs(rows), mine + first)] if len(mine) else []
            first += count
        x = np.concatenate([x for x, _ in pieces])
        x = self.distort(x, generator(self.seed, "pretrain-distortion", number))
        labels = torch.from_numpy(np.concatenate([y for _, y in pieces])).to(self.learner.device)
        features, cosines_of = (functional.normalize(each, dim=1) for each in (self.learner(x), self.learner.rows))
        return functional.cross_entropy(self.learner.scale * (features @ cosines_of.T), labels)


@dataclass(frozen=True)
class Epoch:
    """What one epoch is."""

    number: int
    steps: int
    per_step: int
    schedule: WarmCosine
    batchnorm_trains: bool
    slicing: Slicing | None = None
    """What leaves out channels in each step; None where all train."""


class Means(NamedTuple):
    """Over units of work."""

    loss: float
    """Without what a simulation adds to it."""
    bit_mac_share: float
    """Bit-weighted multiply-accumulates as a share of float32's; 1 without a simulation."""


def train_epoch(
    learner: Learner,
    units: Units,
    optimizer: Optimizer,
    epoch: Epoch,
    team: Team,
    on_step: Callable[[int], None],
) -> Means:
    """One epoch of steps, and its means. `on_step` gets the number of steps done, from the first epoch's start.

    Raises `DataError` for a loss that is not finite.
    """
    learner.train(epoch.batchnorm_trains)
    losses, counts = 0.0, 0.0
    for step in range(epoch.number * epoch.steps, (epoch.number + 1) * epoch.steps):
        set_rate(optimizer, epoch.schedule.at(step / epoch.steps))
        optimizer.kept = learner.keep(None if epoch.slicing is None else epoch.slicing.cut(step))
        numbers = range(step * epoch.per_step, (step + 1) * epoch.per_step)
        loss, bit_mac_share = _gradients(learner, units, numbers, team)
        if not isfinite(loss):
            raise DataError(f"step {step}", f"a loss of {loss}", "a finite loss", "lower the learning rate")
        optimizer.step()
        losses, counts = losses + loss, counts + bit_mac_share
        on_step(step + 1)
    optimizer.kept = learner.keep(None)
    return Means(losses / epoch.steps, counts / epoch.steps)


def _gradients(learner: Learner, units: Units, numbers: range, team: Team) -> Means:
    """Means over the step's units; gradients and running statistics are left where they belong."""
    statistics = [buffer for buffer in learner.buffers() if buffer.is_floating_point()]
    before = [buffer.clone() for buffer in statistics]
    after = [torch.zeros_like(buffer) for buffer in statistics]
    parameters = list(learner.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    loss_sum, bit_mac_share = torch.zeros((), device=learner.device), torch.zeros((), device=learner.device)
    for number in team.share(numbers):
        _copy(before, statistics)
        simulated = learner.simulate(number)
        loss = units.loss(number) / len(numbers)
        whole = loss if simulated is None else loss + simulated.penalty / len(numbers)
        whole.backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.detach()
        bit_mac_share += (1.0 if simulated is None else simulated.bit_mac_share) / len(numbers)
        for mean, buffer in zip(after, statistics, strict=True):
            mean += buffer / len(numbers)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    learner.compute_plainly()
    team.sum([*gradients, *after, loss_sum, bit_mac_share])
    _copy(after, statistics)
    return Means(float(loss_sum), float(bit_mac_share))


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


# ----------------------------------------------------------------------------------------------------------- validation


@dataclass(frozen=True)
class Measured:
    """Accuracy over tasks."""

    mean: float
    half_width: float
    """Of the 95 % interval of the mean (Student's t over tasks); NaN for a single task."""


def validate(learner: Learner, tasks: Sequence[tuple[DataSet, Episode]], team: Team) -> Measured:
    """Accuracy of the prototypes on tasks, samples as they are, BatchNorm in evaluation mode."""
    learner.eval()
    found = torch.zeros(len(tasks), dtype=torch.float64, device=learner.device)
    with torch.no_grad():
        for number in team.share(range(len(tasks))):
            found[number] = _task_accuracy(learner, *tasks[number])
    team.sum([found])
    values = found.cpu().numpy()
    return Measured(float(values.mean()), half_width(values))


def _task_accuracy(learner: Learner, data: DataSet, task: Episode) -> float:
    features = learner(data.inputs(np.concatenate([task.support, task.query]))).cpu().numpy()
    count = len(task.support)
    means = prototypes(features[:count], task.support_labels, task.ways)
    return accuracy(cosine_logits(features[count:], means, 1.0), task.query_labels)
