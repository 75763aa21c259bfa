"""Processes that train together: each takes its share of a step's episodes, and sums go over all of them.

Built on torch.distributed: `torchrun` starts the processes, gloo (CPU) or NCCL (CUDA) moves the sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Team:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, numbers: range) -> range:
        """Every `size`-th of the numbers, from `rank` on."""
        return numbers[self.rank :: self.size]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, the same bits in all of them."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, summed in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))


ALONE = Team()


@contextmanager
def joined(rank: int, size: int, *, cuda: bool = False, init_method: str = "env://") -> Iterator[Team]:
    """Meet the other processes, and part from them at the end."""
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo", init_method=init_method, rank=rank, world_size=size
    )
    try:
        yield Team(rank, size)
    finally:
        torch.distributed.destroy_process_group()
