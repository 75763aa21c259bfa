"""One random generator per (seed, stage, round), so that a result never depends on who drew before."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

if TYPE_CHECKING:
    import torch


def generator(seed: int, stage: str, round: int = 0) -> np.random.Generator:
    """Independent generator for one round of one stage.

    The stage's name enters by CRC-32, not by `hash`, which differs between processes.

    >>> bool(generator(0, "select", 3).integers(1000) == generator(0, "select", 3).integers(1000))
    True
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, crc32(stage.encode()), round))))


def torch_generator(seed: int, stage: str, round: int = 0) -> torch.Generator:
    """For what torch itself draws, the weights of modules that meta-training builds: seeded from `generator(...)`."""
    import torch

    return torch.Generator().manual_seed(int(generator(seed, stage, round).integers(2**63)))
