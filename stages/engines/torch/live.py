"""Live slices: the part of a layer's weight and bias that trains, as a parameter of its own.

Only these are parameters, so no optimiser, weight decay or momentum can move a frozen value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stages.artifacts.records import LayerUpdate
from stages.graphs.checking import check_updates
from stages.graphs.graph import Graph
from stages.operators import Op


class Live:
    """What trains in one layer. Parameters, each None where it does not train:

    * `weight`, along the output axis (and of depthwise layers): (live, in / groups, *kernel), of a scale (live,);
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

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the parameters to the values of a layer's whole weight and bias."""
        with torch.no_grad():
            if self.weight is not None:
                self.weight.copy_(self.weight_of(tensors))
            if self.bias is not None:
                self.bias.copy_(self.bias_of(tensors))

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
        rows = self.op.is_depthwise or self.op.operator.by_output
        if rows or self.by_input == self.op.operator.input_first:
            return weight, (self.channels,)  # the weight's first axis counts these channels
        first, second, *kernel = self.op.weight_shape
        by_group = weight.view(self.op.groups, first // self.op.groups, second, *kernel)
        return by_group, (self.channels // second, slice(None), self.channels % second)


def channels_of(op: Op, x: Tensor, channels: Tensor) -> Tensor:
    """Some channels of a layer's input or output x (N, ...), copied in x's own memory layout.

    A channels-last map is read as rows of channels: three times as fast as torch's selection along axis 1.
    """
    axis = op.channel_axis % (x.ndim - 1) + 1
    if x.ndim != 4 or axis != 1 or x.is_contiguous():
        return x.index_select(axis, channels)
    batch, count, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, count).index_select(1, channels)
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def live_layers(graph: Graph, updates: Sequence[LayerUpdate], tensors: Mapping[str, Tensor]) -> dict[str, Live]:
    """The live part of each updated layer, by layer, in execution order.

    Raises:
        DataError: the updates are not a plan for this graph.
    """
    if updates:
        check_updates(updates, graph)
    return {update.layer: Live(graph[update.layer], update, tensors) for update in updates if update.trains}
