"""One bit per output element, where stock autograd keeps a whole float32 tensor (pytorch/pytorch#133566)."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.operators import Shape


def pack(passes: Tensor, channels_last: bool) -> Tensor:
    """Booleans (N, ...) as bits: uint8 (ceil(elements / 8),).

    Bits lie in the order of the layout, so neither packing nor unpacking copies anything.
    """
    flat = _in_order(passes, channels_last).reshape(-1)
    if passes.device.type != "cpu":
        return _pack_anywhere(flat)
    return torch.from_numpy(np.packbits(flat.numpy()))  # numpy packs three to six times as fast as torch does


def unpack(bits: Tensor, batch: int, shape: Shape, channels_last: bool) -> Tensor:
    """What `pack` packed: uint8 (batch, *shape) of ones and zeros."""
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
