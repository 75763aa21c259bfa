"""A net of torch's behind the protocol that all engines share: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stages.artifacts.records import Array
from stages.engines.parameter import Boundary, Floats, Parameter, Place
from stages.engines.torch.net import SparseNet


class AutogradNet(Protocol):
    """A frozen part that never changes and a part behind it with parameters, on tensors."""

    def prefix(self, x: Tensor) -> tuple[Tensor, ...]:
        """Model input (N, *input) -> what enters the trained part, without autograd."""

    def suffix(self, boundary: tuple[Tensor, ...]) -> Tensor:
        """What `prefix` gave -> features (N, D), differentiable in the parameters; each sample's depend on it alone."""

    def parameters(self) -> list[nn.Parameter]:
        """All that trains; empty where nothing does."""


class ArrayNet:
    """`training.updates.Net` over a net of tensors. On the CPU both share the parameters' memory."""

    def __init__(self, net: AutogradNet, device: str = "cpu") -> None:
        self._torch, self._device = net, torch.device(device)
        self._theirs = net.parameters()
        # a copy of its own on every device: optimisers change arrays, and autograd may not notice
        self._mine = [Parameter(np.require(to_array(p), requirements=("C", "W"))) for p in self._theirs]
        if self._device.type == "cpu":
            for parameter, mine in zip(self._theirs, self._mine, strict=True):
                parameter.data = torch.from_numpy(mine.value)

    def prefix(self, x: Floats) -> Boundary:
        return tuple(to_array(value) for value in self._torch.prefix(self._tensor(x)))

    def suffix(self, boundary: Boundary) -> Floats:
        self._write()
        with torch.no_grad():
            return to_array(self._torch.suffix(self._tensors(boundary)))

    def features(self, x: Floats) -> Floats:
        """Model input (N, *input) -> features (N, D)."""
        self._write()
        with torch.no_grad():
            return to_array(self._torch.suffix(self._torch.prefix(self._tensor(x))))

    def forward(self, boundary: Boundary) -> tuple[Floats, Tensor]:
        self._write()
        with torch.enable_grad():
            features = self._torch.suffix(self._tensors(boundary))
        return to_array(features), features

    def backward(self, kept: Tensor, gradient: Floats) -> None:
        if not self._mine:
            return
        upstream = self._tensor(gradient).to(kept.dtype)
        found = torch.autograd.grad(kept, self._theirs, upstream, allow_unused=True)
        for mine, tensor in zip(self._mine, found, strict=True):
            if tensor is not None:
                mine.gradient += to_array(tensor)

    def parameters(self) -> list[Parameter]:
        return self._mine

    def draw(self, seed: int) -> None:
        """Nothing is rounded."""

    def _write(self) -> None:
        """The parameters' values onto the device, where that has a memory of its own."""
        if self._device.type != "cpu":
            with torch.no_grad():
                for theirs, mine in zip(self._theirs, self._mine, strict=True):
                    theirs.copy_(torch.from_numpy(mine.value))

    def _read(self) -> None:
        if self._device.type != "cpu":
            for theirs, mine in zip(self._theirs, self._mine, strict=True):
                mine.value[...] = to_array(theirs)

    def _tensor(self, x: Array) -> Tensor:
        return torch.from_numpy(np.require(x, requirements="W")).to(self._device)

    def _tensors(self, boundary: Boundary) -> tuple[Tensor, ...]:
        return tuple(self._tensor(value) for value in boundary)


class TorchNet(ArrayNet):
    """`engines.choice.TrainedNet` over the sparse engine in torch."""

    def __init__(self, net: SparseNet) -> None:
        super().__init__(net, net.device)
        self._net = net

    layout = "torch"

    def draw(self, seed: int) -> None:
        """What the following forward passes round by, where they round stochastically."""
        if self._net.rounding is not None:
            self._net.rounding.draw(seed)

    def turn(self, number: int) -> list[Parameter]:
        """Train what of the plan has this turn, from 0 on, and nothing else; these parameters."""
        self._write()
        moving = {id(parameter) for parameter in self._net.turn(number)}
        return [mine for theirs, mine in zip(self._theirs, self._mine, strict=True) if id(theirs) in moving]

    def places(self) -> list[Place]:
        """Where every live tensor's values lie in the parameters."""
        mine = {id(theirs): parameter for theirs, parameter in zip(self._theirs, self._mine, strict=True)}
        return [
            Place(mine[id(theirs)], name, np.arange(ids.size), ids.reshape(-1))
            for theirs, name, ids in self._net.places()
        ]

    @property
    def boundary(self) -> tuple[str, ...]:
        return self._net.boundary

    def live_tensors(self) -> dict[str, Floats]:
        self._write()
        return _arrays(self._net.live_tensors())

    def load_live(self, tensors: Mapping[str, Array]) -> None:
        self._net.load_live({name: self._tensor(value) for name, value in tensors.items()})
        self._read()

    def load_whole(self, tensors: Mapping[str, Array]) -> None:
        self._net.load_whole({name: self._tensor(tensors[name]) for name in self._net.live_names})
        self._read()

    def changed_tensors(self) -> dict[str, Floats]:
        self._write()
        return _arrays(self._net.changed_tensors())

    def tensors(self) -> dict[str, Floats]:
        self._write()
        return _arrays(self._net.tensors())


def to_array(tensor: Tensor) -> Floats:
    """A tensor's values; on the CPU its own memory."""
    return tensor.detach().cpu().numpy()


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Floats]:
    return {name: to_array(tensor) for name, tensor in tensors.items()}
