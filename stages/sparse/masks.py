"""What activations and max-pooling keep for the backward pass: one bit, or one byte, per output element.

Stock autograd keeps a whole float32 tensor for each ReLU (pytorch/pytorch#133566) and eight bytes per max-pool output.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.errors import UsageError
from stages.models.graph import Op, Shape

MAX_WINDOW = 256
"""Positions that a byte can tell apart."""


def pack(output: Tensor, activation: str, channels_last: bool) -> Tensor:
    """Where gradients pass an activation, from its output: uint8 (ceil(elements / 8),), one bit per element.

    `relu` passes where the output is above 0, `relu6` where it is between 0 and 6, ends excluded, as torch has it.
    Bits lie in the order of the layout, so neither packing nor unpacking copies anything.
    """
    flat = _in_order(output, channels_last).reshape(-1)
    if output.device.type != "cpu":
        return _pack_anywhere((flat > 0) & (flat < 6) if activation == "relu6" else flat > 0)
    values = flat.detach().numpy()
    passes = values > 0  # numpy compares and packs three to six times as fast as torch does
    if activation == "relu6":
        np.logical_and(passes, values < 6, out=passes)
    return torch.from_numpy(np.packbits(passes))


def unpack(bits: Tensor, batch: int, shape: Shape, channels_last: bool) -> Tensor:
    """What `pack` packed: uint8 (batch, *shape) of ones where gradients pass and zeros elsewhere."""
    elements = batch * prod(shape)
    if bits.device.type == "cpu":
        flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=elements))
    else:
        flat = _unpack_anywhere(bits)[:elements]
    if channels_last and len(shape) == 3:
        channels, height, width = shape
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(batch, *shape)


def _in_order(x: Tensor, channels_last: bool) -> Tensor:
    return x.permute(0, 2, 3, 1) if channels_last and x.ndim == 4 else x


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=device)


def _pack_anywhere(passes: Tensor) -> Tensor:
    padded = F.pad(passes.to(torch.uint8), (0, -len(passes) % 8)).view(-1, 8)
    return (padded * _powers(passes.device)).sum(1, dtype=torch.uint8)


def _unpack_anywhere(bits: Tensor) -> Tensor:
    return bits[:, None].bitwise_and(_powers(bits.device)).ne(0).to(torch.uint8).view(-1)


# ---------------------------------------------------------------------------------------------------------- max-pooling


def window_index(op: Op, x: Tensor) -> Tensor:
    """Which position of its window each maximum came from: x (N, C, ...) -> uint8 (N, *op.shape).

    Raises:
        UsageError: a window of more positions than a byte can number.
    """
    if prod(op.kernel) > MAX_WINDOW:
        raise UsageError(f"operator {op.name}", f"a window of {op.kernel}", f"at most {MAX_WINDOW} positions")
    pool = F.max_pool1d if len(op.kernel) == 1 else F.max_pool2d
    _, position = pool(x, op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode, return_indices=True)
    index = torch.zeros_like(position)
    for axis, start in enumerate(_window_starts(op, x.device)):
        inner = prod(op.in_shape[axis + 2 :])
        coordinate = position.div(inner, rounding_mode="floor") % op.in_shape[axis + 1]
        index.mul_(op.kernel[axis]).add_((coordinate - start).div_(op.dilation[axis], rounding_mode="floor"))
    return index.to(torch.uint8)


def max_pool_gradient(op: Op, index: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of a max-pool's input (N, *op.in_shape), from that of its output and `window_index`."""
    rest = index.to(torch.int64)
    position = torch.zeros_like(rest)
    inner = 1
    for axis, start in reversed(list(enumerate(_window_starts(op, index.device)))):
        position += (start + rest % op.kernel[axis] * op.dilation[axis]) * inner
        rest = rest.div(op.kernel[axis], rounding_mode="floor")
        inner *= op.in_shape[axis + 1]
    batch = len(gradient)
    flat = gradient.new_zeros(batch, op.in_channels, inner)
    flat.scatter_add_(2, position.flatten(2), gradient.flatten(2))
    return flat.view(batch, *op.in_shape)


def _window_starts(op: Op, device: torch.device) -> list[Tensor]:
    """Per spatial axis, where each output's window begins in the input (in the padding: below 0), to be broadcast."""
    axes = len(op.kernel)
    starts = []
    for axis in range(axes):
        start = torch.arange(op.shape[axis + 1], device=device) * op.stride[axis] - op.padding[axis]
        starts.append(start.view([-1 if i == axis else 1 for i in range(axes)]))
    return starts
