"""Where a graph's tensors come from in the user's own state dict, so that what trained finds its way back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor's place in a state dict: the entry, or rows of it."""

    name: str
    start: int = 0
    """First row of the entry along its first axis."""
    rows: int = -1
    """How many rows; -1 is the whole entry."""
    transposed: bool = False
    """The graph's tensor is the transpose of the entry (a matrix that the user multiplied from the right)."""
    trains: bool = True
    """A parameter; False for buffers."""
