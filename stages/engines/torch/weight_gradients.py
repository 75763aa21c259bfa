"""Weight gradients of live channels only, each by the fastest exact form (measured: docs/decisions.md).

* 1x1 convolutions and linear layers: one matrix product over the live rows or columns.
* Depthwise layers with kernels above 3 on small feature maps: sums of outer products of positions. oneDNN's weight
  gradient takes up to twenty times as long there, most of all where the kernel covers the whole map (5x5 on 4x4).
* Everything else: torch's convolution weight gradient over the live channels, with only the groups that hold any.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight

from stages.engines.torch.live import Live, channels_of
from stages.operators import Op

OUTER_PAIRS = 4096
"""Largest number of (input, output) position pairs of a depthwise layer for which outer products win."""


def weight_gradient(live: Live, op: Op, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of `live.weight`, in its shape, from one use `op` of the layer.

    `x` is the layer's input: whole (N, ...) where output channels are live, else the live channels of it.
    `gradient` is that of the layer's output (N, ...).
    """
    if not op.kernel and op.is_depthwise:
        return _scale_gradient(live, op, x, gradient)
    if op.is_depthwise:
        return _depthwise(live, op, x, channels_of(op, gradient, live.channels))
    if op.operator.matrix(op):
        return _matrix_gradient(live, op, _rows(op, x), _rows(op, gradient))
    if op.operator.input_first:  # a transposed convolution is a convolution from its output to its input
        mirror = replace(op, kind="conv", shape=op.in_shape, in_shapes=(op.shape,))
        swapped = (channels_of(op, gradient, live.channels), x) if not live.by_input else (gradient, x)
        rule = _output_grouped if live.by_input else _input_grouped
        return rule(live, mirror, *swapped)
    return _input_grouped(live, op, x, gradient) if live.by_input else _output_grouped(live, op, x, gradient)


def bias_gradient(live: Live, op: Op, gradient: Tensor) -> Tensor:
    """Gradient of `live.bias` (live biases,) from the layer's output gradient (N, ...)."""
    axis = _axis(op, gradient)
    over = [other for other in range(gradient.ndim) if other != axis]
    return gradient.sum(over).index_select(0, live.bias_channels)


def _axis(op: Op, x: Tensor) -> int:
    """The axis of x (N, ...) that counts channels."""
    return op.channel_axis % (x.ndim - 1) + 1


def _scale_gradient(live: Live, op: Op, x: Tensor, gradient: Tensor) -> Tensor:
    axis = _axis(op, gradient)
    x = x if x.shape[axis] == len(live.channels) else channels_of(op, x, live.channels)
    product = x * channels_of(op, gradient, live.channels)
    return product.sum([other for other in range(product.ndim) if other != axis])


def _depthwise(live: Live, op: Op, x: Tensor, gradient: Tensor) -> Tensor:
    if not op.operator.input_first:
        return depthwise_gradient(op, x, gradient)
    x = x if x.shape[1] == len(live.channels) else channels_of(op, x, live.channels)
    mirror = replace(op, kind="conv", shape=op.in_shape, in_shapes=(op.shape,))
    return depthwise_gradient(mirror, gradient, x)


def _rows(op: Op, x: Tensor) -> Tensor:
    """(N, C, ...) or (N, ..., C) -> (N * positions, C); of a strided layer's input, the positions that it reads."""
    if op.channel_axis:
        return x.reshape(-1, x.shape[-1])
    if x.shape[2:] != op.shape[1:]:
        every = [slice(None, None, step) for step in op.stride]
        x = x[(slice(None), slice(None), *every)]
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _matrix_gradient(live: Live, op: Op, x: Tensor, gradient: Tensor) -> Tensor:
    """Of a weight without kernel: the product over positions of live columns, in the parameter's shape."""
    if live.by_input:
        return (x.t() @ gradient).view(-1, op.out_channels, *op.kernel)
    everything = live.update.ratio == 1
    rows = gradient if everything else gradient.index_select(1, live.channels)
    return (rows.t() @ x).view(-1, op.in_channels, *op.kernel)


# ----------------------------------------------------------------------------------------------- grouped convolutions


class Packing(NamedTuple):
    """Live channels of a grouped convolution, packed into a grouped convolution of the groups that hold any."""

    groups: Tensor
    """(G,): the groups that hold a live channel, ascending."""
    padded: Tensor
    """(G * m,): m live channels per group, the first repeated where a group has fewer."""
    place: Tensor
    """(live,): where in `padded` each live channel is."""


@lru_cache(maxsize=64)
def _packing(channels: tuple[int, ...], per_group: int) -> Packing:
    groups = sorted({channel // per_group for channel in channels})
    members = [[channel for channel in channels if channel // per_group == group] for group in groups]
    widest = max(map(len, members))
    padded = [channel for own in members for channel in own + own[:1] * (widest - len(own))]
    place = [group * widest + i for group, own in enumerate(members) for i in range(len(own))]
    return Packing(torch.tensor(groups), torch.tensor(padded), torch.tensor(place))


def _of_groups(x: Tensor, groups: Tensor, of: int) -> Tensor:
    """The channels of some of `of` equal groups: (N, C, ...) -> (N, C / of * len(groups), ...)."""
    if len(groups) == of:
        return x
    return x.reshape(len(x), of, -1, *x.shape[2:]).index_select(1, groups).flatten(1, 2)


def _output_grouped(live: Live, op: Op, x: Tensor, gradient: Tensor) -> Tensor:
    packing = _on(_packing(live.update.channels, op.out_channels // op.groups), x.device)
    count, inside = len(packing.groups), op.in_channels // op.groups
    shape = (len(packing.padded), inside, *op.kernel)
    whole_of = gradient.shape[1] == op.out_channels  # else the live channels alone
    rows = channels_of(op, gradient, packing.padded if whole_of else torch.searchsorted(live.channels, packing.padded))
    whole = _convolution_gradient(op, _of_groups(x, packing.groups, op.groups), shape, rows, count)
    return whole.index_select(0, packing.place)


def _input_grouped(live: Live, op: Op, x: Tensor, gradient: Tensor) -> Tensor:
    """`x` holds the live channels only; the result is (live, out / groups, *kernel)."""
    packing = _on(_packing(live.update.channels, op.in_channels // op.groups), x.device)
    count, outside = len(packing.groups), op.out_channels // op.groups
    widest = len(packing.padded) // count
    columns = channels_of(op, x, torch.searchsorted(live.channels, packing.padded))
    shape = (count * outside, widest, *op.kernel)
    whole = _convolution_gradient(op, columns, shape, _of_groups(gradient, packing.groups, op.groups), count)
    by_channel = whole.view(count, outside, widest, *op.kernel).transpose(1, 2).flatten(0, 1)
    return by_channel.index_select(0, packing.place)


def _on(packing: Packing, device: torch.device) -> Packing:
    return packing if device.type == "cpu" else Packing(*(part.to(device) for part in packing))


def _convolution_gradient(op: Op, x: Tensor, shape: tuple[int, ...], gradient: Tensor, groups: int) -> Tensor:
    rule = conv1d_weight if len(op.kernel) == 1 else conv2d_weight
    stride = op.stride
    if max(op.kernel) == 1 < max(stride) and not any(op.padding):
        # The positions that a 1x1 kernel reads, without the others. oneDNN's AVX2 kernel (3.x, jit_1x1) writes past its
        # buffer where the stride is above 1, the layout channels-last and x has fewer than 8 channels.
        x = x[(slice(None), slice(None), *(slice(None, None, step) for step in stride))]
        stride = (1,) * len(stride)
    result: Tensor = rule(  # type: ignore[no-untyped-call]
        x, shape, gradient, stride, op.padding, op.dilation, groups
    )
    return result


# ---------------------------------------------------------------------------------------------------------- depthwise


def depthwise_gradient(op: Op, x: Tensor, gradient: Tensor) -> Tensor:
    """(live, 1, *kernel) from the live channels' input (N, live, ...) and output gradient (N, live, ...)."""
    pairs = prod(op.in_shape[1:]) * prod(op.shape[1:])
    if max(op.kernel) > 3 and pairs <= OUTER_PAIRS and x.device.type == "cpu":
        return _outer_gradient(op, x, gradient)
    live = x.shape[1]
    return _convolution_gradient(op, x, (live, 1, *op.kernel), gradient, live)


def _outer_gradient(op: Op, x: Tensor, gradient: Tensor) -> Tensor:
    """Sum over samples of input position times output position, then over the pairs that meet at each kernel tap."""
    inputs, outputs = x.flatten(2).transpose(1, 2)[:, :, None], gradient.flatten(2).transpose(1, 2)[:, None]
    pairs = inputs[0] * outputs[0]
    for i in range(1, x.shape[0]):
        pairs.addcmul_(inputs[i], outputs[i])
    taps = pairs.new_zeros(prod(op.kernel) + 1, x.shape[1])
    places = _taps(op.in_shape[1:], op.shape[1:], op.kernel, op.stride, op.padding, op.dilation)
    taps.index_add_(0, places, pairs.flatten(0, 1))
    return taps[:-1].t().reshape(-1, 1, *op.kernel)


@lru_cache(maxsize=64)
def _taps(
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Which kernel tap connects each (input, output) position pair: int64 (pairs,); prod(kernel) where none does."""
    tap, meets = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    for size, out, taps, step, pad, apart in zip(in_shape, out_shape, kernel, stride, padding, dilation, strict=True):
        offset = torch.arange(size)[:, None] + pad - torch.arange(out) * step
        inside = (offset >= 0) & (offset < taps * apart) & (offset % apart == 0)
        rows, columns = tap.shape
        tap = (tap[:, None, :, None] * taps + (offset // apart)[None, :, None, :]).reshape(rows * size, columns * out)
        meets = (meets[:, None, :, None] & inside[None, :, None, :]).reshape(rows * size, columns * out)
    return torch.where(meets, tap, prod(kernel)).flatten()
