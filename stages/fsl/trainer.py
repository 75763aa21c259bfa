"""Meta-training as a state that advances by epochs: phases, validation, the best weights, and checkpoints of it all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from stages.artifacts.records import Array, Group
from stages.errors import DataError
from stages.fsl.episodes import Episode
from stages.fsl.meta_training import DataSet, Epoch, Learner, Means, Measured, Units, train_epoch, validate
from stages.fsl.optimizing import Optimizer, load_optimizer, make_optimizer, optimizer_state
from stages.fsl.schedule import WarmCosine
from stages.fsl.settling import Settling
from stages.fsl.slicing import Slicing
from stages.fsl.team import Team

Weights = Mapping[str, Array]
"""The module's floating-point state by name."""

SETTLED = "settled_layers"
COLUMNS = ("epoch", "learning_rate", "loss", "scale", "validation_accuracy", "validation_half_width")
BIT_MAC_SHARE = "bit_mac_share"
"""One more where few bits are simulated: bit-weighted MACs as a share of float32's."""


@dataclass(frozen=True)
class Phase:
    """Epochs of one kind of work."""

    units: Units
    epochs: int
    schedule: WarmCosine
    batchnorm_trains: bool
    competes: bool = True
    """Whether patience counts its epochs."""
    slicing: Slicing | None = None
    """What leaves out channels in each step, in all epochs but the last `whole_epochs`."""
    whole_epochs: int = 0


@dataclass(frozen=True)
class Rhythm:
    """What all epochs have in common."""

    steps: int
    per_step: int
    momentum: float
    weight_decay: float
    optimizer: str
    """`sgd` or `adamw`."""
    layer_decay: float
    patience: int
    """Competing epochs without a better validation after which training ends; 0 never ends it."""


@dataclass(frozen=True)
class Progress:
    """Where training stands, for whoever watches."""

    steps: int = 0
    loss: float = float("nan")
    """Mean over the last epoch."""
    accuracy: float = float("nan")
    """On the validation tasks, after the last epoch."""


@dataclass(frozen=True)
class Kept:
    """The weights that training will return."""

    weights: Weights
    """Of the learner: backbone, scale and rows."""
    epoch: int
    """-1 before the first."""
    accuracy: float
    """NaN without validation tasks: then the last weights are kept."""


class Trainer:
    """Trains epoch after epoch; `kept` is the result so far, `state` and `load` carry everything over a restart."""

    def __init__(
        self,
        learner: Learner,
        phases: Sequence[Phase],
        rhythm: Rhythm,
        tasks: Sequence[tuple[DataSet, Episode]],
        team: Team,
        settling: Settling | None = None,
    ) -> None:
        self.learner, self.rhythm, self.tasks, self.team, self.settling = learner, rhythm, tasks, team, settling
        self.phases = [phase for phase in phases if phase.epochs]
        self.done = 0
        self.progress = Progress()
        self.kept = Kept(weights(learner), -1, float("nan"))
        self.columns = (
            *COLUMNS,
            *([] if learner.simulation is None else [BIT_MAC_SHARE]),
            *([] if settling is None else [SETTLED]),
        )
        self.table: dict[str, list[float]] = {name: [] for name in self.columns}
        self.optimizer = self._optimizer()

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, nothing trains any more, or patience is at an end."""
        idle = sum(phase.epochs for phase in self.phases if not phase.competes)
        waited = self.done - max(self.kept.epoch + 1, idle)
        out_of_patience = 0 < self.rhythm.patience <= waited and bool(self.tasks)
        settled = self.settling is not None and self.settling.ended and self._is_last_phase()
        return self.done >= sum(phase.epochs for phase in self.phases) or out_of_patience or settled

    def _is_last_phase(self) -> bool:
        return self.done >= sum(phase.epochs for phase in self.phases[:-1])

    def epoch(self, on_step: Callable[[Progress], None]) -> None:
        """Train one epoch, then validate."""
        phase, number = self._position()
        if number == 0:
            self.optimizer = self._optimizer()
            if self.learner.simulation is not None:
                self.learner.simulation.forget()
            if self.settling is not None:
                self.settling.wake()
        steps = self.rhythm.steps
        slicing = phase.slicing if number < phase.epochs - phase.whole_epochs else None
        epoch = Epoch(number, steps, self.rhythm.per_step, phase.schedule, phase.batchnorm_trains, slicing)
        before = (self.done - number) * steps

        def count(done: int) -> None:
            on_step(replace(self.progress, steps=before + done))

        means = train_epoch(self.learner, phase.units, self.optimizer, epoch, self.team, count)
        if self.learner.simulation is not None:
            self.learner.simulation.see(means.loss)
        if self.settling is not None:
            self.settling.look()
        measured = validate(self.learner, self.tasks, self.team) if self.tasks else Measured(*[float("nan")] * 2)
        self._record(phase.schedule.at(number + (steps - 1) / steps), means, measured)
        on_step(self.progress)

    def _position(self) -> tuple[Phase, int]:
        """The phase of the coming epoch, and the epoch's number in it."""
        number = self.done
        for phase in self.phases:
            if number < phase.epochs:
                return phase, number
            number -= phase.epochs
        raise IndexError("no epoch left")

    def _optimizer(self) -> Optimizer:
        how = self.rhythm
        return make_optimizer(
            how.optimizer, self.learner,
            momentum=how.momentum, weight_decay=how.weight_decay, layer_decay=how.layer_decay,
        )  # fmt: skip

    def _record(self, rate: float, means: Means, measured: Measured) -> None:
        scale = self.learner.scale.item()
        row = {
            **dict(zip(COLUMNS, (self.done, rate, means.loss, scale, measured.mean, measured.half_width), strict=True)),
            BIT_MAC_SHARE: means.bit_mac_share,
            SETTLED: 0 if self.settling is None else self.settling.left,
        }
        for name in self.columns:
            self.table[name].append(float(row[name]))
        # NaN compares as false: without validation, and for the first epoch, the new weights are kept
        if not measured.mean <= self.kept.accuracy:
            self.kept = Kept(weights(self.learner), self.done, measured.mean)
        self.done += 1
        self.progress = Progress(self.done * self.rhythm.steps, means.loss, measured.mean)

    # -- over a restart

    def state(self) -> Group:
        """Everything that the coming epochs depend on."""
        kept = {"epoch": self.kept.epoch, "accuracy": self.kept.accuracy}
        groups = {
            "weights": _group(weights(self.learner)),
            "kept": replace(_group(self.kept.weights), attrs=kept),
            "optimizer": optimizer_state(self.optimizer, self.learner),
            "table": Group(arrays={name: np.array(values) for name, values in self.table.items()}),
        }
        if self.learner.simulation is not None:
            groups["simulation"] = _group(self.learner.simulation.state())
        if self.settling is not None:
            groups["settling"] = self.settling.state()
        return Group({"done": self.done}, groups=groups)

    def load(self, state: Group) -> None:
        """Go on from what `state` returned. Raises `DataError` for a state that does not fit."""
        try:
            self._load(state)
        except (KeyError, ValueError, RuntimeError) as error:
            found = " ".join(f"a checkpoint that does not fit: {error}".split())
            raise DataError("--resume", found, "one of this very training") from error

    def _load(self, state: Group) -> None:
        shapes = {name: array.shape for name, array in weights(self.learner).items()}
        current, kept = state.groups["weights"], state.groups["kept"]
        tensors = {name: torch.from_numpy(array) for name, array in _arrays(current, shapes).items()}
        self.learner.load_state_dict(tensors, strict=False)  # all but BatchNorm's counters, which nothing reads
        load_optimizer(self.optimizer, self.learner, state.groups["optimizer"], _array)
        self.kept = Kept(_arrays(kept, shapes), int(kept.attrs["epoch"]), float(kept.attrs["accuracy"]))
        self.table = {name: [float(value) for value in state.groups["table"].arrays[name]] for name in self.columns}
        if self.learner.simulation is not None:
            self.learner.simulation.load(state.groups["simulation"].arrays)
        if self.settling is not None:
            self.settling.load(state.groups["settling"])
        self.done = int(state.attrs["done"])
        self.progress = Progress(self.done * self.rhythm.steps, self.table["loss"][-1], self.kept.accuracy)


def weights(module: nn.Module) -> dict[str, Array]:
    """The module's parameters and running statistics, copied; BatchNorm's batch counters are left out."""
    return {
        name: value.detach().cpu().numpy().copy()
        for name, value in module.state_dict().items()
        if value.is_floating_point()
    }


def _group(arrays: Weights) -> Group:
    """Arrays as datasets, which have at least one dimension."""
    return Group(arrays={name: np.atleast_1d(array) for name, array in arrays.items()})


def _arrays(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    return {name: _array(group, name, shape) for name, shape in shapes.items()}


def _array(group: Group, name: str, shape: tuple[int, ...]) -> Array:
    return np.array(group.arrays[name]).reshape(shape)
