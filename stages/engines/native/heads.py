"""A linear head's loss and gradients by the C library: the bits that every machine and an exported program gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stages.engines.native.library import library
from stages.engines.parameter import Floats, Parameter

Loss = Callable[[Floats], tuple[float, Floats]]


def linear_loss(weight: Parameter, bias: Parameter, rows: NDArray[np.int64], weights: NDArray[np.float32]) -> Loss:
    """sum_i w_i * cross-entropy of the rows (N,) under features W^T + b, in single precision, sample by sample.

    weight (C, D) and bias (C,) get their gradients on the way.
    """
    lib, count = library(same_bits=True), len(rows)
    labels, shares = np.ascontiguousarray(rows, np.int32), np.ascontiguousarray(weights, np.float32)
    classes, width = weight.value.shape

    def loss(features: Floats) -> tuple[float, Floats]:
        scores, pull = np.empty((count, classes), np.float32), np.empty((count, width), np.float32)
        features = np.ascontiguousarray(features, np.float32)
        lib.et_linear(
            features.ctypes.data, weight.value.ctypes.data, bias.value.ctypes.data, scores.ctypes.data, count, width,
            classes,
        )  # fmt: skip
        value = lib.et_softmax_loss(
            scores.ctypes.data, labels.ctypes.data, shares.ctypes.data, scores.ctypes.data, count, classes
        )
        lib.et_linear_gradients(
            features.ctypes.data, weight.value.ctypes.data, scores.ctypes.data, weight.gradient.ctypes.data,
            bias.gradient.ctypes.data, pull.ctypes.data, count, width, classes,
        )  # fmt: skip
        return float(value), pull

    return loss
