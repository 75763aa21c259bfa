"""Operators that only move values: where each element of their output comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.operators import Op

OUTSIDE = -1
"""Stands for a value that is no input's: a border's own number."""

MOVES = ("flatten", "reshape", "permute", "expand", "roll", "slice", "take", "pad")
"""Kinds that `moved` knows."""


def moved(op: Op, values: NDArray[Any]) -> NDArray[Any]:
    """What an operator of `MOVES` makes of values (*op.in_shape), whole numbers where it pads: (*op.shape)."""
    if op.kind == "permute":
        return values.transpose(op["order"])
    if op.kind == "expand":
        return np.broadcast_to(values, op.shape)
    if op.kind == "roll":
        return np.roll(values, op["shifts"], op["axes"])
    if op.kind == "slice":
        return np.asarray(values[(slice(None),) * op["axis"] + (slice(op["start"], op["stop"], op["step"]),)])
    if op.kind == "take":
        return np.asarray(np.take(values, op["index"], op["axis"]))
    if op.kind == "pad":
        return _bordered(op, values)
    return values.reshape(op.shape)


def _bordered(op: Op, values: NDArray[Any]) -> NDArray[Any]:
    cut = tuple(
        slice(max(0, -b), size - max(0, -a)) for b, a, size in zip(op["before"], op["after"], values.shape, strict=True)
    )
    amounts = [(max(0, b), max(0, a)) for b, a in zip(op["before"], op["after"], strict=True)]
    if op["mode"] == "constant":
        return np.pad(values[cut], amounts, constant_values=OUTSIDE)
    if op["mode"] == "reflect":
        return np.pad(values[cut], amounts, mode="reflect")
    return np.pad(values[cut], amounts, mode="edge" if op["mode"] == "replicate" else "wrap")
