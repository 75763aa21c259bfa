"""Exact gradients of any loss over a batch's features, in micro-batches; and cached outputs of the frozen prefix.

A loss such as ProtoNet's couples all samples (prototypes are means over the support), so plain gradient accumulation
would change it. Two passes do not: (1) features of the whole batch, nothing kept; the loss and its gradient at the
features; (2) per micro-batch, forward with saving and backward from those rows. Memory then depends on the micro-batch
only, at the cost of one more forward pass, and the gradient through prototypes fits any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from stages.artifacts.records import Array
from stages.engines.choice import TrainedNet
from stages.engines.parameter import Boundary, Floats, Parameter
from stages.errors import DataError
from stages.losses import quiet

Loss = Callable[[Floats], tuple[float, Floats]]
"""Features (N, D) -> the loss, and its gradient at the features (N, D); parameters of its own get theirs on the way."""


class Net(Protocol):
    """What trains: a frozen part that never changes, and a part behind it with parameters. Every engine offers it."""

    def prefix(self, x: Floats) -> Boundary:
        """Model input (N, *input) -> what enters the trained part."""

    def suffix(self, boundary: Boundary) -> Floats:
        """What `prefix` gave -> features (N, D), each sample's depending on it alone; nothing is kept."""

    def forward(self, boundary: Boundary) -> tuple[Floats, Any]:
        """What `prefix` gave -> features (N, D), and what `backward` needs: good until the next call."""

    def backward(self, kept: Any, gradient: Floats) -> None:
        """Add to the parameters' gradients, from the gradient at the features (N, D)."""

    def parameters(self) -> list[Parameter]:
        """All that trains; empty where nothing does."""

    def draw(self, seed: int) -> None:
        """What the following forward passes round by, where they round stochastically."""


@dataclass(frozen=True)
class PrefixCache:
    """The frozen prefix's outputs for fixed samples: they never change while the suffix trains.

    Features and gradients from a cache are bit-equal to those from the pixels: a convolution's result for one sample
    does not depend on the batch around it. (A matrix product's may in torch, in the last bit: for a prefix with linear
    layers this holds when the cache is filled in the micro-batches that it is used in.)
    """

    boundary: Boundary
    """Values (N, ...) at the boundary."""

    def __len__(self) -> int:
        return len(self.boundary[0])

    def __getitem__(self, rows: slice | Array) -> PrefixCache:
        """Some of the samples: a slice, or an array of indices."""
        # copied even where a view would do, because matrix products of torch round by the alignment of their input
        return PrefixCache(tuple(np.array(value[rows]) for value in self.boundary))

    def arrays(self) -> dict[str, Array]:
        """The cache as arrays, to be stored (`artifacts.hdf5.encode_tree`)."""
        return {f"boundary{i}": value for i, value in enumerate(self.boundary)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> PrefixCache:
        """What `arrays` gave, read back into memory."""
        names = [f"boundary{i}" for i in range(len(arrays))]
        if not names or sorted(names) != sorted(arrays):
            raise DataError("prefix cache", f"arrays {sorted(arrays)}", "boundary0, boundary1, ...", "write it again")
        return cls(tuple(np.asarray(arrays[name]) for name in names))


def boundary_of(net: TrainedNet) -> str:
    """What `net.prefix` gives, in words that another process can compare."""
    return f"{' '.join(net.boundary)} ({net.layout})"


Source: TypeAlias = Floats | PrefixCache
"""Samples: model inputs (N, *input), or cached prefix outputs."""


def cache_prefix(net: Net, x: Floats, *, micro_batch: int = 0) -> PrefixCache:
    """Run the frozen prefix over model inputs (N, *input) once and keep its outputs."""
    return PrefixCache(_joined([_enter(net, chunk) for chunk in _chunks([x], micro_batch)]))


def features_of(net: Net, sources: Source | Sequence[Source], *, micro_batch: int = 0) -> Floats:
    """Features (N, D) of all samples, one source after the other, nothing kept."""
    return np.concatenate([net.suffix(_enter(net, chunk)) for chunk in _chunks(_listed(sources), micro_batch)])


@quiet
def gradient_update(
    net: Net, sources: Source | Sequence[Source], loss_of_features: Loss, *, micro_batch: int = 0
) -> float:
    """Add the gradient of a loss over the features of all samples to the parameters' gradients; the loss's value.

    Args:
        net: whose parameters get gradients.
        sources: samples, or several lots of them; `loss_of_features` gets their features in that order, (N, D).
        loss_of_features: called once.
        micro_batch: most samples in memory at once; 0 is all of them, which takes one pass instead of two. The gradient
            is the same up to rounding.
    """
    listed = _listed(sources)
    total = sum(len(source) for source in listed)
    if not micro_batch or total <= micro_batch:
        features, kept = net.forward(_joined([_enter(net, source) for source in listed]))
        loss, gradient = loss_of_features(features)
        net.backward(kept, gradient)
        return loss
    loss, gradient = loss_of_features(features_of(net, listed, micro_batch=micro_batch))
    if net.parameters():
        start = 0
        for chunk in _chunks(listed, micro_batch):
            _, kept = net.forward(_enter(net, chunk))
            net.backward(kept, gradient[start : start + len(chunk)])
            start += len(chunk)
    return loss


def _listed(sources: Source | Sequence[Source]) -> list[Source]:
    return [sources] if isinstance(sources, np.ndarray | PrefixCache) else list(sources)


def _chunks(sources: Sequence[Source], micro_batch: int) -> Iterator[Source]:
    """Pieces of at most `micro_batch` samples; none reaches over the end of its source."""
    for source in sources:
        size = micro_batch or len(source)
        for start in range(0, len(source), size or 1):
            yield source[start : start + size]


def _enter(net: Net, source: Source) -> Boundary:
    return source.boundary if isinstance(source, PrefixCache) else net.prefix(source)


def _joined(parts: Sequence[Boundary]) -> Boundary:
    if len(parts) == 1:
        return parts[0]
    return tuple(np.concatenate(values) for values in zip(*parts, strict=True))
