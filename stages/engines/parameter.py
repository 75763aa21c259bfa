"""What trains, as every engine offers it to an optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Boundary = tuple[Floats, ...]
"""What crosses from the frozen into the trained part: an array (N, ...) for each value, as the engine lays it out."""


@dataclass(eq=False)
class Parameter:
    """What trains, and the sum of its gradients since the last step: float32 arrays of one shape, C-contiguous."""

    value: Floats
    """Changed in place by steps."""
    gradient: Floats = field(default=None)  # type: ignore[arg-type]
    """Summed into by backward passes, set to 0 by a step."""

    def __post_init__(self) -> None:
        if self.gradient is None:
            self.gradient = np.zeros_like(self.value)
        whole = self.value.flags.c_contiguous and self.gradient.flags.c_contiguous
        if not whole or self.value.shape != self.gradient.shape:
            raise ValueError("a parameter's value and gradient are C-contiguous and of one shape")


class Place(NamedTuple):
    """Where values of a whole tensor lie in a parameter: element `ids[i]` of the flat tensor at `at[i]` of the flat
    parameter. A live tensor may have several, a parameter too."""

    parameter: Parameter
    name: str
    """Of the tensor: `<layer>.weight` or `<layer>.bias`."""
    at: NDArray[np.int64]
    ids: NDArray[np.int64]
