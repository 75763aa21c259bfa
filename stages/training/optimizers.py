"""Optimisers over live slices: which rule, at which rate, and the step that never leaves a broken model behind.

Only live slices (and the linear head) are parameters, so optimiser state exists for nothing else and frozen values
cannot move under weight decay, momentum or Adam's moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.engines.parameter import Floats, Parameter
from stages.errors import DataError, require
from stages.losses import quiet


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

    @property
    def state_values(self) -> int:
        """Values that the rule keeps for each that it moves."""
        return (1 if self.momentum else 0) if self.optimizer == "sgd" else 2

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

State = dict[str, Floats]
Rule = Callable[[Floats, Floats, State, float, Optimizing], Floats]
"""(values, gradient, state, rate, how) -> how far the values move down, in the gradient's place; state in place."""

CHUNK = 1 << 14
"""Values that a rule works on at once. The six arrays that Adam reads and writes of so many (64 KiB each) lie in the
second-level cache of small processors, and an operation on one still outweighs its call."""

COLUMNS = 64
"""Sums that `square_sum` takes side by side."""


def _sgd(weight: Floats, gradient: Floats, state: State, rate: float, how: Optimizing) -> Floats:
    if how.weight_decay:
        gradient += how.weight_decay * weight
    if how.momentum:
        buffer = state["momentum_buffer"]
        buffer *= how.momentum
        buffer += gradient
        return np.multiply(buffer, rate, out=gradient)
    gradient *= rate
    return gradient


def _adam(weight: Floats, gradient: Floats, state: State, rate: float, how: Optimizing) -> Floats:
    if how.weight_decay:
        gradient += how.weight_decay * weight
    return _adam_move(gradient, state, rate)


def _adamw(weight: Floats, gradient: Floats, state: State, rate: float, how: Optimizing) -> Floats:
    move = _adam_move(gradient, state, rate)
    if how.weight_decay:
        single = weight.dtype.type
        move += single(rate) * single(how.weight_decay) * weight
    return move


def _adam_move(gradient: Floats, state: State, rate: float) -> Floats:
    """Adam (arXiv:1412.6980, algorithm 1) with beta 0.9 and 0.999, epsilon 1e-8.

    Its divisor sqrt(v / c) + epsilon, c = 1 - 0.999^t, is taken as (sqrt(v) + epsilon sqrt(c)) / sqrt(c). Each
    operation is one in single precision, in the order of the C library's `et_adam`: both give the same bits.
    """
    done, mean, square = state["step"], state["exp_avg"], state["exp_avg_sq"]
    single = gradient.dtype.type  # double in the tests that compare with autograd
    scratch = gradient - mean
    scratch *= 1 - 0.9
    mean += scratch
    np.multiply(gradient, gradient, out=scratch)
    scratch *= 1 - 0.999
    square *= 0.999
    square += scratch
    correction = np.sqrt(_unbiased(0.999, done, single))
    np.sqrt(square, out=scratch)
    scratch += single(1e-8) * correction
    np.divide(mean, scratch, out=gradient)
    gradient *= single(rate) * correction / _unbiased(0.9, done, single)
    return gradient


def _unbiased(base: float, steps: Floats, single: type[np.floating[Any]]) -> Any:
    """1 - base^steps: of one number of steps, or of each value's own, whose values began to move at different times."""
    if not steps.ndim:
        return single(1 - _power(base, int(steps)))
    ages, places = np.unique(steps, return_inverse=True)
    return np.array([1 - _power(base, int(age)) for age in ages], single)[places].reshape(steps.shape)


def _power(base: float, exponent: int) -> float:
    """By squaring, as the C library has it: the last bit of a pow() is the machine's."""
    result = 1.0
    while exponent:
        result *= base if exponent & 1 else 1.0
        base, exponent = base * base, exponent >> 1
    return result


OPTIMIZERS: dict[str, Rule] = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}
"""Name -> what one step does to one parameter and its state."""


class Optimizer:
    """A rule over parameters, with the state that it keeps for each; state exists once a step was made.

    A step goes through values, gradients and state in chunks that stay in the cache, and makes no array of a
    parameter's size: until the last chunk is known to be finite the old values lie where the gradients were.
    """

    def __init__(self, parameters: Sequence[Parameter], how: Optimizing) -> None:
        self.parameters = list(parameters)
        self.state: list[State] = [{} for _ in self.parameters]
        self._how = how
        self._still: frozenset[int] = frozenset()

    def hold(self, parameters: Iterable[Parameter]) -> None:
        """Let these parameters, and no others, rest: steps leave them and their state as they are."""
        self._still = frozenset(map(id, parameters))

    @quiet
    def step(self, rate: float, factor: float = 1.0) -> bool:
        """Move every parameter by its gradient times `factor`, and set the gradients to 0.

        False, and the parameters as they were, where a value would become NaN or infinite.
        """
        finite, moving = True, [p for p in self.parameters if id(p) not in self._still]
        for parameter, state in zip(self.parameters, self.state, strict=True):
            if id(parameter) in self._still:
                continue
            self._prepare(parameter, state)
            for part in _parts(parameter, state):
                finite &= self._move(*part, rate, factor)
        if not finite:
            for parameter in moving:
                parameter.value[...] = parameter.gradient
        self.clear()
        return finite

    def clear(self) -> None:
        """Set all gradients to 0."""
        for parameter in self.parameters:
            parameter.gradient[...] = 0

    def _prepare(self, parameter: Parameter, state: State) -> None:
        """Begin the state at zero where it is missing, and count the step."""
        names = ["momentum_buffer"] if self._how.momentum else []
        if self._how.optimizer != "sgd":
            names = ["exp_avg", "exp_avg_sq"]
            step = state.setdefault("step", np.zeros((), np.float32))
            step += 1
        for name in names:
            if name not in state:
                state[name] = np.zeros_like(parameter.value)

    def _move(self, weight: Floats, gradient: Floats, state: State, rate: float, factor: float) -> bool:
        """Move a chunk, and leave its old values in its gradient; whether the new ones are finite."""
        move = OPTIMIZERS[self._how.optimizer](weight, gradient * factor, state, rate, self._how)
        gradient[...] = weight
        weight -= move
        return bool(np.isfinite(weight).all())


def _parts(parameter: Parameter, state: State) -> Iterator[tuple[Floats, Floats, State]]:
    """Chunks of a parameter's values, its gradient and its state, as views."""
    flat = {name: array.reshape(-1) if array.ndim else array for name, array in state.items()}
    value, gradient = parameter.value.reshape(-1), parameter.gradient.reshape(-1)
    for start in range(0, len(value), CHUNK):
        part = slice(start, start + CHUNK)
        yield value[part], gradient[part], {name: a[part] if a.ndim else a for name, a in flat.items()}


def learning_rate(update: int, how: Optimizing) -> float:
    """The rate of update number `update` (from 0).

    >>> how = Optimizing(learning_rate=1.0, warmup_updates=4, schedule="step")
    >>> [learning_rate(u, how) for u in (0, 1, 3, 4, 104)]
    [0.25, 0.5, 1.0, 1.0, 0.95]
    """
    if update < how.warmup_updates:
        return how.learning_rate * (update + 1) / how.warmup_updates
    return how.learning_rate * SCHEDULES[how.schedule](update - how.warmup_updates, how)


def make_optimizer(parameters: Sequence[Parameter], how: Optimizing) -> Optimizer:
    """A fresh optimiser over these parameters and no others."""
    if not parameters:
        raise DataError("plan", "no live channel and no live head", "something that trains")
    return Optimizer(parameters, how)


def checked_step(optimizer: Optimizer, loss: float, *, rate: float, clip_norm: float, where: str) -> None:
    """One step at `rate` with the gradients that the parameters hold, all or nothing; the gradients are 0 afterwards.

    With `clip_norm` > 0, gradients of norm n are multiplied by clip_norm / (n + 1e-6) where that is below 1 (as
    torch's `clip_grad_norm_` does). Raises `NotFinite` when the loss, a gradient or a weight would be NaN or infinite;
    the parameters are then what they were before the step.
    """
    fix = "lower --lr or limit the gradient with --clip"
    squares = gradient_square(optimizer.parameters)
    factor = clip_factor(squares, clip_norm) if clip_norm else 1.0
    if not (isfinite(loss) and isfinite(squares) and factor > 0):
        optimizer.clear()
        found = "a gradient is NaN or infinite" if isfinite(loss) else f"the loss is {loss}"
        raise NotFinite(where, found, "finite numbers", fix)
    if not optimizer.step(rate, factor):
        raise NotFinite(where, "a weight would become NaN or infinite", "finite numbers", fix)


@quiet
def gradient_square(parameters: Sequence[Parameter]) -> float:
    """The sum of squares of all gradients together, in float64: finite where they all are."""
    total = 0.0  # one after the other: `sum` compensates from Python 3.12 on
    for parameter in parameters:
        total += square_sum(parameter.gradient.reshape(-1))
    return total


@quiet
def clip_factor(squares: float, norm: float) -> float:
    """What brings gradients with this sum of squares down to this norm, 1 at most; 0 where theirs is above 1.8e19.

    In single precision, as the C library's `et_clip_factor` has it.
    """
    found = np.sqrt(np.float32(squares))
    return float(min(np.float32(1), np.float32(norm) / (found + np.float32(1e-6))))


def square_sum(values: Floats) -> float:
    """The sum of squares (N,) in float64: `COLUMNS` sums of every so manyth value, then theirs.

    Each of them is taken in its order, as the C library's `et_square_sum` has it: the same bits on every machine.
    """
    sums = np.zeros(COLUMNS)
    for start in range(0, len(values), CHUNK):
        part = np.square(values[start : start + CHUNK], dtype=np.float64)
        whole = len(part) // COLUMNS * COLUMNS
        for rows in (part[:whole].reshape(-1, COLUMNS), part[None, whole:]):
            if rows.size:
                rows[0] += sums[: rows.shape[1]]
                sums[: rows.shape[1]] = np.add.reduce(rows, axis=0)
    return float(np.add.accumulate(sums)[-1])


def state_arrays(optimizer: Optimizer) -> dict[str, NDArray[Any]]:
    """The optimiser's state as arrays keyed `<parameter number>.<name>`, for a checkpoint."""
    return {
        f"{number}.{name}": array.copy()
        for number, state in enumerate(optimizer.state)
        for name, array in state.items()
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
        shape = optimizer.parameters[int(number)].value.shape
        one = name == "step" and array.size == 1  # of all values; else each has its own
        if not one and array.shape != shape:
            raise DataError("checkpoint", f"optimiser state {key!r} of shape {array.shape}", f"{shape}")
        value = np.array(array, np.float32, order="C").reshape(() if one else shape)
        optimizer.state[int(number)][name] = value


def replace_parameter(optimizer: Optimizer, old: Parameter, new: Parameter, rows: NDArray[np.int64]) -> None:
    """Let `new` stand for `old` where a head has grown: row i of `old` is row `rows[i]` of `new`.

    The state of the old rows moves with them; new rows start from zero state.
    """
    number = next(i for i, parameter in enumerate(optimizer.parameters) if parameter is old)
    optimizer.parameters[number] = new
    state = optimizer.state[number]
    for name, value in state.items():
        if value.shape == old.value.shape:
            grown = np.zeros_like(new.value)
            grown[rows] = value
            state[name] = grown
