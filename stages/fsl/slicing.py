"""SliceOut (arXiv:2007.10909): every training step leaves out channels of all hidden widths, so that tensors shrink.

Kept are w of N channels, a run of neighbours: the layer's rows, everything between, the next layer's columns. There is
one draw for each width and step. The next layer's columns are scaled, so that its sums keep their mean: by N / w where
all channels are kept equally often (`wrap`: a run may go on at the beginning; `random`), by 1 / P_j for the paper's
runs without wrapping: P_j = (min(j, N - w) - max(0, j - w + 1) + 1) / (N - w + 1). A step of the optimiser touches
what was kept and its state, and nothing else. The paper's own normalisation could not be read; this is what
unbiasedness demands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.graphs.graph import Graph
from stages.graphs.widths import Width, hidden_widths
from stages.operators import Op
from stages.randomness import generator

Integers = NDArray[np.int64]
DRAWS = ("wrap", "contiguous", "random")
PANEL = 16
"""Channels that kernels compute together: a width of whole panels costs what its share says."""


def kept_channels(channels: int, keep: float) -> int:
    """How many channels are kept: whole panels where there are enough of them.

    >>> kept_channels(64, 0.75), kept_channels(64, 0.5), kept_channels(10, 0.5), kept_channels(3, 0.1)
    (48, 32, 5, 1)
    """
    unit = PANEL if channels >= 2 * PANEL else 1
    return min(channels, max(unit, round(keep * channels / unit) * unit))


def inclusion(channels: int, kept: int) -> NDArray[np.float64]:
    """How often each channel is in a run of neighbours whose start is drawn evenly, without wrapping: (N,)."""
    j, starts = np.arange(channels), channels - kept + 1
    return np.asarray((np.minimum(j, channels - kept) - np.maximum(0, j - kept + 1) + 1) / starts)


def drawn_channels(channels: int, kept: int, draw: str, rng: np.random.Generator) -> Integers:
    """The channels that a step keeps: int64 (w,), ascending but where a run wraps."""
    if draw == "random":
        return np.sort(rng.choice(channels, kept, replace=False))
    start = int(rng.integers(channels if draw == "wrap" else channels - kept + 1))
    return (start + np.arange(kept)) % channels


@dataclass(frozen=True)
class Part:
    """What a step keeps of one tensor: rows, and columns where the next layer reads kept channels."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    scale: Tensor | None = None
    """Of the columns (w,)."""

    def of(self, whole: Tensor) -> Tensor:
        """The part, differentiable, scaled."""
        part = whole if self.rows is None else whole.index_select(0, self.rows)
        if self.columns is None:
            return part
        part = part.index_select(1, self.columns)
        assert self.scale is not None
        return part * self.scale.view(1, -1, *(1,) * (part.dim() - 2))

    def index(self) -> tuple[Tensor | slice, ...]:
        """Of the part in the whole."""
        if self.columns is None:
            return (self.rows if self.rows is not None else slice(None),)
        if self.rows is None:
            return slice(None), self.columns
        return self.rows[:, None], self.columns


@dataclass(frozen=True)
class Cut:
    """One step's draw: the graph of what is kept, and the parts of its tensors by name."""

    graph: Graph
    parts: Mapping[str, Part]

    def tensors(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The kept parts; tensors that are kept whole are the same."""
        return {name: self.parts[name].of(value) if name in self.parts else value for name, value in whole.items()}

    def write_back(self, whole: Mapping[str, Tensor], parts: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Put collected statistics back in their places."""
        with torch.no_grad():
            for name in names:
                if name in self.parts:
                    whole[name][self.parts[name].index()] = parts[name]


class Slicing:
    """Draws what each step keeps.

    Args:
        graph: whose hidden widths are sliced.
        keep: the share of channels that is kept.
        draw: one of `DRAWS`.
        seed: of the draws, one for each width and step.
        device: where the module lies.
    """

    def __init__(self, graph: Graph, keep: float, draw: str, seed: int, device: torch.device) -> None:
        self._graph, self._keep, self._draw, self._seed, self._device = graph, keep, draw, seed, device
        self.widths = hidden_widths(graph)

    def cut(self, step: int) -> Cut:
        """What a step keeps."""
        parts: dict[str, Part] = {}
        kept: dict[str, int] = {}
        for number, width in enumerate(self.widths):
            rng = generator(self._seed, f"slice-{number}", step)
            count = kept_channels(width.channels, self._keep)
            channels = drawn_channels(width.channels, count, self._draw, rng)
            self._add(parts, width, channels, self._scale(width.channels, channels))
            kept |= dict.fromkeys((width.maker, *width.through), count)
        return Cut(_shrunk(self._graph, kept), parts)

    def _scale(self, channels: int, kept: Integers) -> Tensor:
        if self._draw == "contiguous":
            scale = 1 / inclusion(channels, len(kept))[kept]
        else:
            scale = np.full(len(kept), channels / len(kept))
        return torch.from_numpy(scale.astype(np.float32)).to(self._device)

    def _add(self, parts: dict[str, Part], width: Width, channels: Integers, scale: Tensor) -> None:
        rows = torch.from_numpy(channels).to(self._device)
        for name in (width.maker, *width.through):
            for what in self._graph[name].operator.tensors(self._graph[name]):
                key = f"{name}.{what}"
                parts[key] = replace(parts.get(key, Part()), rows=rows)
        key = f"{width.reader}.weight"
        parts[key] = replace(parts.get(key, Part()), columns=rows, scale=scale)


def _shrunk(graph: Graph, kept: Mapping[str, int]) -> Graph:
    """The graph with so many channels of these values."""
    ops: list[Op] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for op in graph.ops:
        shape = op.shape
        if op.name in kept:
            axis = op.channel_axis % len(shape) if len(shape) == len(op.in_shape) else 0
            shape = (*shape[:axis], kept[op.name], *shape[axis + 1 :])
        shapes[op.name] = shape
        groups = kept[op.name] if op.name in kept and op.is_depthwise and op.groups > 1 else op.groups
        ops.append(replace(op, shape=shape, in_shapes=tuple(shapes[name] for name in op.inputs), groups=groups))
    return replace(graph, ops=tuple(ops))


class SlicedSGD(torch.optim.SGD):
    """SGD whose step touches, of a cut's tensors, what was kept: values and momentum."""

    def __init__(self, parameters: Sequence[Tensor], *, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay)
        self.kept: dict[int, Part] = {}
        """By a parameter's identity."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, of the kept parts where there are any."""
        if not self.kept:
            super().step()
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                part = self.kept.get(id(parameter))
                index = (...,) if part is None else part.index()
                gradient = parameter.grad[index].add(parameter[index], alpha=group["weight_decay"])
                if group["momentum"]:
                    state = self.state[parameter]
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    gradient = state["momentum_buffer"][index] * group["momentum"] + gradient
                    state["momentum_buffer"][index] = gradient
                parameter[index] = parameter[index] - group["lr"] * gradient
