"""Live slices: the part of a layer's weight and bias that trains, as a parameter of its own.

Only these are parameters, so no optimiser, weight decay or momentum can move a frozen value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stages.artifacts.records import LayerUpdate, detached_layers
from stages.errors import DataError
from stages.models.graph import Graph, Op


class Live:
    """What trains in one layer. Parameters, each None where it does not train:

    * `weight`, along the output axis (and of depthwise layers): (live, in / groups, *kernel);
      along the input axis: (live, out / groups, *kernel), entry j being what reads the j-th live input channel;
    * `bias`: (live biases,).
    """

    def __init__(self, op: Op, update: LayerUpdate, tensors: Mapping[str, Tensor]) -> None:
        self.op, self.update = op, update
        self.by_input = update.axis == "input" and not op.is_depthwise
        device = tensors[f"{op.name}.weight"].device
        self.channels = torch.tensor(update.channels, dtype=torch.int64, device=device)
        self.bias_channels = torch.tensor(update.bias, dtype=torch.int64, device=device)
        self.weight = nn.Parameter(self.weight_of(tensors)) if update.channels else None
        self.bias = nn.Parameter(self.bias_of(tensors)) if update.bias else None
        self.keeps = _keeps(op, update)
        """What of its input the weight gradient needs: `nothing`, `whole`, or the live channels' `slice`."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name: `<layer>.weight`, `<layer>.bias`."""
        named = {f"{self.op.name}.weight": self.weight, f"{self.op.name}.bias": self.bias}
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    def weight_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The live slice of the layer's whole weight, copied."""
        view, index = self._window(tensors)
        return view[index]

    def bias_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The live entries of the layer's whole bias, copied."""
        return tensors[f"{self.op.name}.bias"][self.bias_channels]

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the parameters' values into the layer's whole weight and bias, in place."""
        with torch.no_grad():
            if self.weight is not None:
                view, index = self._window(tensors)
                view[index] = self.weight
            if self.bias is not None:
                tensors[f"{self.op.name}.bias"][self.bias_channels] = self.bias

    def _window(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor | slice, ...]]:
        """A view of the whole weight and the index of the live slice in it."""
        weight = tensors[f"{self.op.name}.weight"]
        if not self.by_input:
            return weight, (self.channels,)
        out, inside, *kernel = self.op.weight_shape
        by_group = weight.view(self.op.groups, out // self.op.groups, inside, *kernel)
        return by_group, (self.channels // inside, slice(None), self.channels % inside)


def _keeps(op: Op, update: LayerUpdate) -> str:
    if not update.channels:
        return "nothing"
    sliced = update.axis == "input" or op.is_depthwise
    return "slice" if sliced and update.ratio < 1 else "whole"


def channels_of(x: Tensor, channels: Tensor) -> Tensor:
    """Some channels of x (N, C, ...), copied in x's own memory layout.

    A channels-last tensor is read as rows of channels: three times as fast as torch's selection along axis 1.
    """
    if x.ndim != 4 or x.is_contiguous():
        return x.index_select(1, channels)
    batch, count, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, count).index_select(1, channels)
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def live_layers(graph: Graph, updates: Sequence[LayerUpdate], tensors: Mapping[str, Tensor]) -> dict[str, Live]:
    """The live part of each updated layer, by layer, in execution order.

    Raises:
        DataError: the updates are not a plan for this graph.
    """
    seen: set[str] = set()
    for update in updates:
        _check(graph, update, seen)
        seen.add(update.layer)
    live = [update for update in updates if update.trains]
    names = {update.layer for update in live}
    cut_off = (graph.gradient_flow(names) & names) - graph.gradient_flow(names, detached_layers(updates))
    if cut_off:
        where = f"plan, layer {min(cut_off, key=graph.position.__getitem__)}"
        raise DataError(where, "every way to the features is detached", "one that is not, for its gradient")
    ordered = sorted(live, key=lambda update: graph.position[update.layer])
    return {update.layer: Live(graph[update.layer], update, tensors) for update in ordered}


def _check(graph: Graph, update: LayerUpdate, seen: set[str]) -> None:
    where = f"plan, layer {update.layer}"
    fix = "make the plan for this model with `edgetrain score-layers`"
    if update.layer not in graph.by_name or not graph[update.layer].is_layer:
        raise DataError(where, "no such layer in the model", "a convolution or linear layer", fix)
    if update.layer in seen:
        raise DataError(where, "updated twice", "one update per layer", fix)
    op = graph[update.layer]
    channels = {"output": op.out_channels, "input": op.in_channels}
    if channels.get(update.axis) != update.axis_channels:
        raise DataError(where, f"{update.axis_channels} {update.axis} channels", f"{channels}", fix)
    if not update.trains and not update.detached:
        raise DataError(where, "nothing that trains", "channels or biases", fix)
    if update.bias and not op.bias:
        raise DataError(where, "biases", "none: the layer has no bias", fix)
    for what, live, size in (
        ("channels", update.channels, update.axis_channels),
        ("bias", update.bias, op.out_channels),
    ):
        if live and (min(live) < 0 or max(live) >= size or list(live) != sorted(set(live))):
            raise DataError(where, f"{what} {_few(live)}", f"ascending numbers in 0..{size - 1}", fix)


def _few(numbers: Sequence[int]) -> str:
    return str(list(numbers[:5])) + ("..." if len(numbers) > 5 else "")
