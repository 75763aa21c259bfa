"""Kept values in 8 or 16 bits: whole numbers of steps between each sample's least and largest value.

Stochastic rounding, floor(t + u) with u uniform on [0, 1), leaves the mean of a value what it is (FracTrain's
quantiser, arXiv:2012.13113, after Banner et al.): so weight gradients, which are linear in what was kept, stay
unbiased. u comes from a table of equally spaced numbers in an order drawn once, entered at a place drawn anew for every
tensor: cheaper than as many draws, and as uniform for each value.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

TABLE = 1 << 16
"""Numbers of the table."""
_TYPES = {8: torch.uint8, 16: torch.uint16}


class Rounding:
    """Packs values into so many bits, by chance or to the nearest."""

    def __init__(self, bits: int, *, nearest: bool) -> None:
        self._top, self._type, self._nearest = float(2**bits - 1), _TYPES[bits], nearest
        self._generator = torch.Generator()

    def draw(self, seed: int) -> None:
        """What the following values are rounded by."""
        self._generator.manual_seed(seed & (2**63 - 1))

    def pack(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """(N, ...) -> the numbers, in its shape and layout, and each sample's least value and step (N, 2)."""
        flat = value.flatten(1)
        least, largest = torch.aminmax(flat, dim=1)
        spread = largest - least
        up = torch.where(spread > 0, self._top / spread, torch.zeros_like(spread))
        ones = (len(value), *(1,) * (value.dim() - 1))
        steps = (value - least.view(ones)).mul_(up.view(ones))
        if self._nearest:
            steps.add_(0.5)
        else:
            along = steps.as_strided((steps.numel(),), (1,))  # in the order of its memory
            along.add_(self._noise(steps.numel(), value.device))
        return steps.clamp_(0, self._top).to(self._type), torch.stack([least, spread / self._top], 1)

    def _noise(self, count: int, device: torch.device) -> Tensor:
        start = int(torch.randint(TABLE, (), generator=self._generator))
        table = _table().to(device)
        repeats = -(-(start + count) // TABLE)
        return (table if repeats == 1 else table.repeat(repeats))[start : start + count]


@cache
def _table() -> Tensor:
    order = torch.randperm(TABLE, generator=torch.Generator().manual_seed(0))
    return (order.float() + 0.5) / TABLE


def unpack_values(numbers: Tensor, scale: Tensor) -> Tensor:
    """What `Rounding.pack` packed, rounded as it was."""
    ones = (len(numbers), *(1,) * (numbers.dim() - 1))
    least, step = (column.view(ones) for column in scale.unbind(1))
    return numbers.float().mul_(step).add_(least)
