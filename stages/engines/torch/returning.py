"""What of all that the backward pass needs is kept, paged to a file, or made again, as torch's engine has it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stages.engines.paging import PageFile
from stages.graphs.graph import Graph
from stages.graphs.keeping import Needs

KEEP, PAGE, RECOMPUTE = "keep", "page", "recompute"


class Returning:
    """A schedule, value or `slice <operator>` -> keep, page or recompute, with the file of what is paged."""

    def __init__(self, graph: Graph, needs: Mapping[str, Needs], how: Mapping[str, str], page_dir: str) -> None:
        self._how = how
        self._file = PageFile(page_dir, 1) if PAGE in how.values() else None
        self._pages: dict[str, tuple[int, Tensor]] = {}
        """By name where a value lies, and a tensor of its shape and strides that holds nothing."""
        self._end = 0
        first: dict[str, str] = {}
        for op in reversed(graph.ops):
            if op.name in needs:
                need = needs[op.name]
                again = need.channels and self.way(f"slice {op.name}") == RECOMPUTE
                values = set(need.values) | ({graph.root(op.inputs[0])} if again else set())
                first |= dict.fromkeys(values, op.name)
        self.last_needed: dict[str, list[str]] = {}
        """Operator -> the values made again that no backward pass after its own needs."""
        stored = self.stored(frozenset(value for need in needs.values() for value in need.values))
        for value, operator in first.items():
            if value not in stored:
                self.last_needed.setdefault(operator, []).append(value)

    def way(self, name: str) -> str:
        """What becomes of a value or slice."""
        return self._how.get(name, KEEP)

    def stored(self, values: frozenset[str]) -> frozenset[str]:
        """Which values are stored when the backward pass needs these."""
        named = {name for name in self._how if not name.startswith("slice ")}
        return frozenset(name for name in values | named if self.way(name) != RECOMPUTE)

    def begin(self) -> None:
        """A forward pass begins: what was paged before is needed no more."""
        self._pages, self._end = {}, 0

    def page_out(self, name: str, value: Tensor) -> bool:
        """Put a value into the file where the schedule says so; whether it does."""
        if self._file is None or self.way(name) != PAGE:
            return False
        dense = value.contiguous(memory_format=_format(value)).cpu()
        flat = dense.as_strided((dense.numel(),), (1,))
        self._file.grow(self._end + flat.numel())
        self._file.move(0, self._end, flat.numpy(), back=False)
        self._pages[name] = self._end, torch.empty_like(dense, device="meta")
        self._end += flat.numel()
        return True

    def page_in(self, name: str) -> Tensor | None:
        """A paged value, in memory again; None for one that is not."""
        if self._file is None or name not in self._pages:
            return None
        at, like = self._pages[name]
        flat = torch.empty(like.numel())
        self._file.move(0, at, flat.numpy(), back=True)
        return flat.as_strided(like.shape, like.stride())


def _format(value: Tensor) -> torch.memory_format:
    channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
