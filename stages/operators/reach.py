"""Convolution kernels cut to the taps that ever meet the map.

On a map of 2 x 2 a 7 x 7 kernel with padding 3 multiplies zeros with all but its inner 3 x 3 taps. Without the others
the result is the same and oneDNN's depthwise kernels are far faster (measured: docs/decisions.md). Costs still count
the whole kernel, as the field does.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from stages.operators.op import Op

if TYPE_CHECKING:
    from torch import Tensor

Taps = tuple[slice, ...]
"""Per spatial axis, the kernel's taps that are needed."""


def within_reach(op: Op, weight: Tensor) -> tuple[Op, Tensor]:
    """The same convolution with its kernel (out, in / groups, *kernel) cut, the weight as a view.

    Both are returned as they are where every tap meets the map; other operators have nothing to cut.
    """
    cut, taps = _cut(op)
    return (op, weight) if cut is op else (cut, weight[(slice(None), slice(None), *taps)])


@lru_cache(maxsize=1024)
def _cut(op: Op) -> tuple[Op, Taps]:
    axes = [
        _axis(size, out, kernel, step, pad, apart)
        for size, out, kernel, step, pad, apart in zip(
            op.in_shape[1:], op.shape[1:], op.kernel, op.stride, op.padding, op.dilation, strict=bool(op.kernel)
        )
    ]
    kernel = tuple(taps.stop - taps.start for taps, _ in axes)
    if kernel == op.kernel:
        return op, ()
    return replace(op, kernel=kernel, padding=tuple(pad for _, pad in axes)), tuple(taps for taps, _ in axes)


def _axis(size: int, out: int, kernel: int, step: int, pad: int, apart: int) -> tuple[slice, int]:
    """The needed taps along one axis and the padding left.

    Tap t of output o reads position o * step - pad + t * apart: never one of 0..size-1 where that is negative even for
    the last output, or beyond the end even for the first.
    """
    first = min(max(0, -(((out - 1) * step - pad) // apart)), pad // apart)
    last = min(kernel - 1, (pad + size - 1) // apart)
    left = pad - first * apart
    fits = (size + 2 * left - apart * (last - first) - 1) // step + 1 == out
    return (slice(first, last + 1), left) if first <= last and fits else (slice(0, kernel), pad)
