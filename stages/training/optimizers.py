"""Optimisers over live slices: which rule, at which rate, and the step that never leaves a broken model behind.

Only live slices (and the linear head) are parameters, so optimiser state exists for nothing else and frozen values
cannot move under weight decay, momentum or Adam's moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.errors import DataError, require


class NotFinite(DataError):
    """Training diverged: a loss, gradient or weight that is NaN or infinite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizing:
    """How weights move: the rule, its constants, and the learning rate over time."""

    optimizer: str = "sgd"
    """`sgd`, `adam` (weight decay as an L2 term) or `adamw` (decoupled weight decay)."""
    learning_rate: float = 0.02
    """The schedule's peak."""
    momentum: float = 0.0
    """Of `sgd` only. Titan's theory of importance weights covers plain SGD (momentum 0)."""
    weight_decay: float = 0.0
    schedule: str = "constant"
    """`constant`, `cosine` (to 0 over `total_updates`) or `step` (times 0.95 every 100 updates: Titan's)."""
    warmup_updates: int = 0
    """The rate climbs linearly to its peak over so many updates; the schedule starts after them."""
    total_updates: int = 0
    """Length of the `cosine` schedule, warm-up included."""
    clip_norm: float = 0.0
    """Gradients of larger Euclidean norm (over all parameters) are scaled down to it; 0 leaves them alone."""

    def __post_init__(self) -> None:
        where = "optimiser"
        require(self.optimizer in OPTIMIZERS, where, f"{self.optimizer!r}", "one of " + ", ".join(OPTIMIZERS))
        require(self.schedule in SCHEDULES, where, f"schedule {self.schedule!r}", "one of " + ", ".join(SCHEDULES))
        for name in ("learning_rate", "momentum", "weight_decay", "clip_norm", "warmup_updates", "total_updates"):
            value = getattr(self, name)
            require(isfinite(value) and value >= 0, where, f"{name} {value}", "a finite number, at least 0")
        require(self.momentum < 1, where, f"momentum {self.momentum}", "below 1")
        require(self.momentum == 0 or self.optimizer == "sgd", where, f"momentum with {self.optimizer}", "sgd")
        require(
            self.schedule != "cosine" or self.total_updates > self.warmup_updates,
            where,
            f"schedule cosine over {self.total_updates} updates, {self.warmup_updates} of them warm-up",
            "a total above the warm-up",
            "state how many updates there will be",
        )


def _cosine(update: int, how: Optimizing) -> float:
    done = min(update / (how.total_updates - how.warmup_updates), 1.0)
    return 0.5 * (1 + cos(pi * done))


SCHEDULES: dict[str, Callable[[int, Optimizing], float]] = {
    "constant": lambda update, how: 1.0,
    "cosine": _cosine,
    "step": lambda update, how: 0.95 ** (update // 100),
}
"""Share of the peak rate at an update, counted from 0 after the warm-up."""

State = dict[str, Tensor]
Rule = Callable[[Tensor, Tensor, State, float, Optimizing], None]


def _sgd(weight: Tensor, gradient: Tensor, state: State, rate: float, how: Optimizing) -> None:
    if how.weight_decay:
        gradient = gradient.add(weight, alpha=how.weight_decay)
    if how.momentum and "momentum_buffer" in state:
        gradient = state["momentum_buffer"].mul_(how.momentum).add_(gradient)
    elif how.momentum:
        gradient = state["momentum_buffer"] = gradient.clone()
    weight.add_(gradient, alpha=-rate)


def _adam(weight: Tensor, gradient: Tensor, state: State, rate: float, how: Optimizing) -> None:
    if how.weight_decay:
        gradient = gradient.add(weight, alpha=how.weight_decay)
    _adam_step(weight, gradient, state, rate)


def _adamw(weight: Tensor, gradient: Tensor, state: State, rate: float, how: Optimizing) -> None:
    weight.mul_(1 - rate * how.weight_decay)
    _adam_step(weight, gradient, state, rate)


def _adam_step(weight: Tensor, gradient: Tensor, state: State, rate: float) -> None:
    """Adam (arXiv:1412.6980, algorithm 1) with beta 0.9 and 0.999, epsilon 1e-8."""
    if not state:
        state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    state["step"] += 1
    done = float(state["step"])
    mean = state["exp_avg"].lerp_(gradient, 1 - 0.9)
    square = state["exp_avg_sq"].mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
    spread = (square.sqrt() / sqrt(1 - 0.999**done)).add_(1e-8)
    weight.addcdiv_(mean, spread, value=-rate / (1 - 0.9**done))


OPTIMIZERS: dict[str, Rule] = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}
"""Name -> what one step does to one parameter and its state, in place."""


class Optimizer:
    """A rule over parameters, with the state that it keeps for each; state exists once a step was made.

    torch.optim computes the same, but making any of its optimisers imports torch's compiler: 71 MB and two seconds on
    a desktop processor, more than all that sparse training saves.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], how: Optimizing) -> None:
        self.parameters = list(parameters)
        self.state: list[State] = [{} for _ in self.parameters]
        self._how = how

    def step(self, rate: float) -> None:
        """Move every parameter that has a gradient, and clear the gradients."""
        rule = OPTIMIZERS[self._how.optimizer]
        with torch.no_grad():
            for parameter, state in zip(self.parameters, self.state, strict=True):
                if parameter.grad is not None:
                    rule(parameter, parameter.grad, state, rate, self._how)
                    parameter.grad = None


def learning_rate(update: int, how: Optimizing) -> float:
    """The rate of update number `update` (from 0).

    >>> how = Optimizing(learning_rate=1.0, warmup_updates=4, schedule="step")
    >>> [learning_rate(u, how) for u in (0, 1, 3, 4, 104)]
    [0.25, 0.5, 1.0, 1.0, 0.95]
    """
    if update < how.warmup_updates:
        return how.learning_rate * (update + 1) / how.warmup_updates
    return how.learning_rate * SCHEDULES[how.schedule](update - how.warmup_updates, how)


def make_optimizer(parameters: Sequence[nn.Parameter], how: Optimizing) -> Optimizer:
    """A fresh optimiser over these parameters and no others."""
    if not parameters:
        raise DataError("plan", "no live channel and no live head", "something that trains")
    return Optimizer(parameters, how)


def checked_step(optimizer: Optimizer, loss: float, *, rate: float, clip_norm: float, where: str) -> None:
    """One step at `rate` with the gradients that the parameters hold, all or nothing; the gradients are cleared.

    Raises `NotFinite` when the loss, a gradient or a weight would be NaN or infinite; the parameters are then what
    they were before the step.
    """
    parameters = optimizer.parameters
    gradients = [p.grad for p in parameters if p.grad is not None]
    fix = "lower --lr or limit the gradient with --clip"
    if not isfinite(loss):
        raise NotFinite(where, f"the loss is {loss}", "a finite number", fix)
    if not _finite(gradients):
        raise NotFinite(where, "a gradient is NaN or infinite", "finite numbers", fix)
    before = [p.detach().clone() for p in parameters]
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step(rate)
    if not _finite(parameters):
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        raise NotFinite(where, "a weight would become NaN or infinite", "finite numbers", fix)


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def state_arrays(optimizer: Optimizer) -> dict[str, NDArray[Any]]:
    """The optimiser's state as arrays keyed `<parameter number>.<name>`, for a checkpoint."""
    return {
        f"{number}.{name}": value.numpy().copy()
        for number, state in enumerate(optimizer.state)
        for name, value in state.items()
    }


def load_state(optimizer: Optimizer, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Put back what `state_arrays` took out of an optimiser of the same kind over parameters of the same shapes.

    Raises `DataError` for state that does not fit.
    """
    optimizer.state = [{} for _ in optimizer.parameters]
    for key, array in arrays.items():
        number, _, name = key.partition(".")
        if not number.isdigit() or int(number) >= len(optimizer.parameters):
            raise DataError("checkpoint", f"optimiser state {key!r}", f"parameters 0..{len(optimizer.parameters) - 1}")
        shape = tuple(optimizer.parameters[int(number)].shape)
        if name != "step" and array.shape != shape:
            raise DataError("checkpoint", f"optimiser state {key!r} of shape {array.shape}", f"{shape}")
        value = np.asarray(array, np.float32).reshape(() if name == "step" else shape)
        optimizer.state[int(number)][name] = torch.from_numpy(value.copy())


def replace_parameter(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, rows: NDArray[np.int64]) -> None:
    """Let `new` stand for `old` where a head has grown: row i of `old` is row `rows[i]` of `new`.

    The state of the old rows moves with them; new rows start from zero state.
    """
    number = next(i for i, parameter in enumerate(optimizer.parameters) if parameter is old)
    optimizer.parameters[number] = new
    state = optimizer.state[number]
    for name, value in state.items():
        if value.shape == old.shape:
            grown = torch.zeros_like(new)
            grown[torch.from_numpy(rows)] = value
            state[name] = grown
