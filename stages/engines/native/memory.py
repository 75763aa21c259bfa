"""What the engine holds in memory for a graph and a plan, to the byte, known before a tensor is read.

What grows with the plan is told apart from what does not: *working memory* (arenas, live values, gradients, state,
samples) is what a plan's budget is about; the image (steps and frozen weights, which may lie in flash) is a figure of
its own. Not counted: a worker's context of some hundred bytes, and what a loss or an optimiser step takes for a moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from stages.artifacts.records import LayerUpdate
from stages.engines.native.lowering import lower
from stages.graphs.graph import Graph
from stages.operators.op import ELEMENT_BYTES

REMEMBERED = 1024
"""Plans whose figures are kept: a search asks for the same ones again."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the parts that `net.NativeNet` allocates."""

    arena: int
    """Of one worker."""
    live: int
    """Values that train, in the kernels' layout."""
    kept: int
    """What stays between the forward and the backward pass of one sample, inside the arena."""
    boundary: int
    """What enters the trained part, of one sample."""
    features: int
    """Of one sample."""
    image: int
    pages: int = 0
    """What a sample has in a file between its passes."""

    def sample(self, batch: int = 1) -> int:
        """Of each sample of a batch: boundary, features and their gradient; and what it keeps, where there are more.

        A batch of one goes through forward and backward at once, so what it keeps never leaves the arena.
        """
        return self.boundary + 2 * self.features + (self.kept if batch > 1 else 0)

    def working(self, *, batch: int = 1, workers: int = 1, state: int = 0, head: int = 0) -> int:
        """All that training holds beside the image and the samples themselves.

        Args:
            batch: samples in memory at once, of those whose loss is taken together.
            workers: threads, each with an arena and gradients of its own.
            state: the optimiser's values per live value (0 for SGD, 1 with momentum, 2 for Adam).
            head: values of a classifier on the features, which trains too.
        """
        trained = self.live + ELEMENT_BYTES * head
        return workers * (self.arena + self.live) + (2 + state) * trained + batch * self.sample(batch)


def memory_of(
    graph: Graph, updates: Sequence[LayerUpdate], keep_bits: int = 32, how: Mapping[str, str] | None = None
) -> Memory:
    """What the program for these updates takes; none run the graph without training.

    Raises:
        NotCovered: an operator has no kernel; it is named.
        DataError: the updates are not a plan for this graph.
    """
    return _memory_of(graph, tuple(updates), keep_bits, tuple(sorted((how or {}).items())))


@lru_cache(REMEMBERED)
def _memory_of(
    graph: Graph, updates: tuple[LayerUpdate, ...], keep_bits: int, how: tuple[tuple[str, str], ...]
) -> Memory:
    program = lower(graph, updates, keep_bits=keep_bits, how=dict(how))
    return Memory(
        arena=program.arena_bytes,
        live=ELEMENT_BYTES * program.live_floats,
        kept=program.kept_bytes,
        boundary=ELEMENT_BYTES * sum(buffer.floats for buffer in program.boundary),
        features=ELEMENT_BYTES * program.features,
        image=program.image_bytes,
        pages=ELEMENT_BYTES * program.page_floats,
    )
