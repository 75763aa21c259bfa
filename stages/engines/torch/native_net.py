"""The native engine behind the torch engine's protocol: the C library computes, optimisers and losses are torch's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stages.artifacts.records import LayerUpdate
from stages.engines.native.net import NativeNet
from stages.engines.torch.net import Boundary
from stages.graphs.checking import check_updates
from stages.models.deploy import Backbone


class NativeBehindTorch:
    """A backbone of which only what `updates` name trains, computed by the C library; `SparseNet`'s protocol.

    One worker per thread of torch; results do not depend on their number.

    Raises:
        DataError: the updates do not fit the backbone.
        NotCovered: an operator has no native kernel.
        PartMissing: the library was not built on this machine.
    """

    def __init__(self, backbone: Backbone, updates: Sequence[LayerUpdate]) -> None:
        if updates:
            check_updates(updates, backbone.graph)
        arrays = {name: tensor.numpy() for name, tensor in backbone.tensors.items()}
        self.net = NativeNet(backbone.graph, arrays, updates, threads=torch.get_num_threads())
        live = self.net.live_tensors()
        order = [f"{update.layer}.{what}" for update in updates for what in ("weight", "bias")]
        self._parameters = {name: nn.Parameter(_tensor(live[name].copy())) for name in order if name in live}
        self.calls = 0
        """Forward passes that kept something: only the last one's is still there."""

    @property
    def boundary(self) -> tuple[str, ...]:
        """What `prefix` gives, in its order: in the library's own layout, which no other engine reads."""
        return tuple(f"{name} (native)" for name in self.net.boundary)

    def prefix(self, x: Tensor) -> Boundary:
        """Model input (N, *input) -> what enters the trained part, without autograd. Never changes while training."""
        return tuple(_tensor(value) for value in self.net.prefix(x.numpy()))

    def suffix(self, boundary: Boundary) -> Tensor:
        """What `prefix` gave -> features (N, D), differentiable in the parameters; only the last call's can go back."""
        self._write()
        if not self._parameters or not torch.is_grad_enabled():
            return _tensor(self.net.suffix(_arrays(boundary)))
        features: Tensor = _Attached.apply(self, boundary, *self.parameters())  # type: ignore[no-untyped-call]
        return features

    def features(self, x: Tensor) -> Tensor:
        """Model input (N, *input) -> features (N, D), without gradients."""
        with torch.no_grad():
            return self.suffix(self.prefix(x))

    def parameters(self) -> list[nn.Parameter]:
        """The live slices, in execution order."""
        return list(self._parameters.values())

    def live_tensors(self) -> dict[str, Tensor]:
        """Copies of the live slices by name: `<layer>.weight` (live, ...), `<layer>.bias` (live,)."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def load_live(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the live slices to what `live_tensors` of a net with the same plan gave. Raises `DataError` otherwise."""
        self.net.load_live({name: tensor.detach().numpy() for name, tensor in tensors.items()})
        self._read()

    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the live slices to those of whole tensors by name, as `changed_tensors` gives them."""
        self.net.load_whole({name: tensor.detach().numpy() for name, tensor in tensors.items()})
        self._read()

    def changed_tensors(self) -> dict[str, Tensor]:
        """The whole tensors that hold live values, by name; frozen values bit-equal to the backbone's."""
        self._write()
        return {name: _tensor(array) for name, array in self.net.changed_tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """The whole backbone's tensors with the live values merged in, copied where they may still change."""
        self._write()
        return {name: _tensor(np.array(array)) for name, array in self.net.tensors().items()}

    def _write(self) -> None:
        """The parameters' values into the library."""
        if self._parameters:
            self.net.load_live({name: parameter.detach().numpy() for name, parameter in self._parameters.items()})

    def _read(self) -> None:
        """The library's live values into the parameters."""
        with torch.no_grad():
            for name, value in self.net.live_tensors().items():
                self._parameters[name].copy_(_tensor(value))


class _Attached(torch.autograd.Function):
    """The trained part as one node of torch's graph; its inputs are the live slices."""

    @staticmethod
    def forward(ctx: Any, net: NativeBehindTorch, boundary: Boundary, *parameters: Tensor) -> Tensor:
        features, ctx.kept = net.net.forward(_arrays(boundary))
        net.calls += 1
        ctx.net, ctx.call = net, net.calls
        return _tensor(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        net: NativeBehindTorch = ctx.net
        if ctx.call != net.calls:
            raise RuntimeError("the native engine keeps what its last forward pass needs, and another one came since")
        net.net.clear_gradients()
        net.net.backward(ctx.kept, gradient.contiguous().numpy())
        found = net.net.gradients()
        return (None, None, *(_tensor(np.ascontiguousarray(found[name])) for name in net._parameters))


def _arrays(boundary: Boundary) -> tuple[NDArray[np.float32], ...]:
    return tuple(value.numpy() for value in boundary)


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
