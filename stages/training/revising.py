"""Training whose plan is revised while it runs: who decides, and how an optimiser goes on with another net.

Values that train before and after a revision keep their optimiser state; those that join begin with none, with an age
of their own for Adam's corrections; the state of those that leave is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stages.artifacts.records import LayerUpdate
from stages.engines.choice import TrainedNet
from stages.engines.parameter import Parameter
from stages.training.optimizers import Optimizer, State


class Follower(Protocol):
    """Follows one net's training and revises its plan."""

    @property
    def updates(self) -> tuple[LayerUpdate, ...]:
        """What trains now; nothing where training has come to rest."""

    def begin(self) -> TrainedNet:
        """The net that trains at first."""

    def hold(self, optimizer: Optimizer) -> None:
        """Let what has no turn rest; asked once, of a new optimiser."""

    def about_to_step(self) -> None:
        """The gradients of an update are complete."""

    def after(self, optimizer: Optimizer, loss: float) -> TrainedNet:
        """An update was made, or its loss alone was taken where training rests: the net that trains next. The optimiser
        has it in the place of the net before."""


def carry(optimizer: Optimizer, before: TrainedNet, after: TrainedNet) -> None:
    """Let an optimiser over one net's parameters, and others, go on over another net's.

    A value has its state by the tensor and the element that it is; its number of steps too.
    """
    mine = {id(parameter) for parameter in before.parameters()}
    pairs = list(zip(optimizer.parameters, optimizer.state, strict=True))
    known = _by_element(before, {id(parameter): state for parameter, state in pairs})
    parameters = list(after.parameters())
    states = _taken(after, parameters, known)
    others = [(parameter, state) for parameter, state in pairs if id(parameter) not in mine]
    optimizer.parameters = [*parameters, *(parameter for parameter, _ in others)]
    optimizer.state = [*states, *(state for _, state in others)]
    optimizer.hold(())


ByElement = dict[tuple[str, str], NDArray[np.float32]]
"""(tensor, what is kept) -> the state of each element of the whole tensor, 0 of those that do not train."""


def _by_element(net: TrainedNet, states: Mapping[int, State]) -> ByElement:
    sizes = {name: tensor.size for name, tensor in net.changed_tensors().items()}
    found: ByElement = {}
    for place in net.places():
        for what, value in states[id(place.parameter)].items():
            whole = found.setdefault((place.name, what), np.zeros(sizes[place.name], np.float32))
            whole[place.ids] = np.broadcast_to(value, place.parameter.value.shape).reshape(-1)[place.at]
    return found


def _taken(net: TrainedNet, parameters: Sequence[Parameter], known: ByElement) -> list[State]:
    """The state of a net's parameters, of the elements that they hold; one number of steps where all have the same."""
    kinds = sorted({what for _, what in known})
    states: dict[int, State] = {id(p): {what: np.zeros(p.value.size, np.float32) for what in kinds} for p in parameters}
    ages: dict[int, list[NDArray[np.float32]]] = {id(parameter): [] for parameter in parameters}
    for place in net.places():
        for what in kinds:
            if (place.name, what) in known:
                states[id(place.parameter)][what][place.at] = known[place.name, what][place.ids]
        if "step" in kinds:
            ages[id(place.parameter)].append(states[id(place.parameter)]["step"][place.at])
    for parameter in parameters:
        state = states[id(parameter)]
        for what, value in state.items():
            state[what] = value.reshape(parameter.value.shape)
        if ages[id(parameter)] and len(age := np.unique(np.concatenate(ages[id(parameter)]))) == 1:
            state["step"] = np.array(age[0])  # what lies between the values has no age
    return [states[id(parameter)] for parameter in parameters]


def resting(net: TrainedNet, moving: Sequence[Parameter]) -> list[Parameter]:
    """The net's parameters that have no turn."""
    turn = {id(parameter) for parameter in moving}
    return [parameter for parameter in net.parameters() if id(parameter) not in turn]
