"""The sparse engine: a backbone and a plan as an executable whose training costs what the plan says.

A frozen prefix (everything that no live layer feeds) runs without autograd; the suffix behind it is one node of torch's
graph that keeps one bit per activation output and the inputs of live layers (`suffix`). Only live slices are
parameters: frozen values stay bit-equal under any optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stages.artifacts.records import Array, LayerUpdate
from stages.engines.torch.live import live_layers
from stages.engines.torch.program import Program, channels_last_is_faster, in_chunks
from stages.engines.torch.suffix import Attached, Suffix
from stages.errors import DataError
from stages.models.deploy import Backbone

Boundary = tuple[Tensor, ...]
"""What crosses from the prefix into the suffix: the values (N, C, ...) that both touch, often a single one."""


class SparseNet:
    """A backbone of which only the channels named in `updates` train.

    The backbone's tensors are not changed. Parameters must be changed in place (as torch's optimisers do).
    `channels_last` None decides by what was measured: channels-last wherever oneDNN's fused kernels run.

    Raises:
        DataError: the updates do not fit the backbone.
        UsageError: the graph is not in deploy form; the operator is named.
    """

    def __init__(
        self, backbone: Backbone, updates: Sequence[LayerUpdate], *, channels_last: bool | None = None
    ) -> None:
        self._graph = graph = backbone.graph
        self.device = backbone.engine.device
        self._tensors = {name: _tensor(value, self.device) for name, value in backbone.tensors.items()}
        for update in updates:
            if not update.trains:
                continue
            for name in _tensor_names(update.layer, self._tensors):
                self._tensors[name] = self._tensors[name].clone()
        self._live = live_layers(graph, updates, self._tensors)
        if channels_last is None:
            channels_last = all(map(channels_last_is_faster, self._tensors.values()))
        self._suffix = Suffix(graph, self._tensors, self._live, updates, channels_last=channels_last)
        before = graph.upstream(self._suffix.boundary)
        self._prefix = Program(graph, self._tensors, before, self._suffix.boundary, channels_last=channels_last)

    @property
    def boundary(self) -> tuple[str, ...]:
        """The operators whose outputs `prefix` gives, in its order."""
        return self._suffix.boundary

    # -------------------------------------------------------------------------------------------------- execution

    def prefix(self, x: Tensor) -> Boundary:
        """Model input (N, *input) -> what enters the trained part, without autograd. Never changes while training."""
        self._graph.check_input(x.shape)
        return in_chunks(self._prefix, self._graph.ops[0].name, x)

    def suffix(self, boundary: Boundary) -> Tensor:
        """What `prefix` gave -> features (N, D), differentiable in the parameters."""
        if not self._live:
            return boundary[0]
        for live in self._live.values():
            live.write(self._tensors)
        if not torch.is_grad_enabled():
            return self._suffix.forward(boundary)
        features: Tensor = Attached.apply(  # type: ignore[no-untyped-call]
            self._suffix, boundary, *self.parameters()
        )
        return features

    def features(self, x: Tensor) -> Tensor:
        """Model input (N, *input) -> features (N, D), without gradients."""
        with torch.no_grad():
            return self.suffix(self.prefix(x))

    # ----------------------------------------------------------------------------------------------------- values

    def parameters(self) -> list[nn.Parameter]:
        """The live slices, in execution order."""
        return list(self._parameters().values())

    @property
    def live_names(self) -> tuple[str, ...]:
        """The tensors of which something trains."""
        return tuple(self._parameters())

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for live in self._live.values() for name, parameter in live.parameters().items()}

    def live_tensors(self) -> dict[str, Tensor]:
        """Copies of the live slices by name: `<layer>.weight` (live, ...), `<layer>.bias` (live,)."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters().items()}

    def load_live(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the live slices to what `live_tensors` of a net with the same plan gave.

        Raises `DataError` when names or shapes differ.
        """
        mine = self._parameters()
        if tensors.keys() != mine.keys():
            raise DataError("live slices", f"of {sorted(tensors)}", f"{sorted(mine)}", "use those of the same plan")
        for name, parameter in mine.items():
            if tensors[name].shape != parameter.shape:
                raise DataError(f"live slice {name}", f"{tuple(tensors[name].shape)}", f"{tuple(parameter.shape)}")
            with torch.no_grad():
                parameter.copy_(tensors[name])

    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the live slices to those of whole tensors by name, as `changed_tensors` gives them."""
        with torch.no_grad():
            for live in self._live.values():
                if live.weight is not None:
                    live.weight.copy_(live.weight_of(tensors))
                if live.bias is not None:
                    live.bias.copy_(live.bias_of(tensors))

    def changed_tensors(self) -> dict[str, Tensor]:
        """The whole tensors that hold live values, by name; frozen values bit-equal to the backbone's.

        They are the engine's own, which goes on to change them.
        """
        for live in self._live.values():
            live.write(self._tensors)
        return {name: self._tensors[name] for name in self._parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """The whole backbone's tensors with the live values merged in, copied where they may still change."""
        return {**self._tensors, **{name: tensor.clone() for name, tensor in self.changed_tensors().items()}}


def _tensor(value: Array, device: str) -> Tensor:
    return torch.from_numpy(np.require(value, requirements=("C", "W"))).to(device)


def _tensor_names(layer: str, tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in (f"{layer}.weight", f"{layer}.bias") if name in tensors]
