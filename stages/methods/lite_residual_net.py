"""The net of TinyTL's lite residual modules (`lite_residual`), under stock autograd."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.engines.torch.reference import apply
from stages.graphs.graph import last_readers
from stages.methods.lite_residual import Place, norm_groups, with_modules
from stages.models.deploy import Backbone
from stages.operators import Op


class LiteResidualNet:
    """A frozen backbone with modules that train, and the biases of the layers named in `biased`.

    The same generator state gives the same modules. The backbone's tensors are not changed.
    """

    def __init__(
        self, backbone: Backbone, places: Sequence[Place], rng: torch.Generator, *, biased: Collection[str] = ()
    ) -> None:
        self.graph = with_modules(backbone.graph, places)
        self._places = {place.name: place for place in places}
        biases = [f"{name}.bias" for name in biased]
        frozen = {name: torch.from_numpy(value) for name, value in backbone.tensors.items()}
        self._trained = {name: nn.Parameter(frozen[name].clone()) for name in biases}
        for place in places:
            self._trained |= {name: nn.Parameter(value) for name, value in _initial(place, rng).items()}
        self._tensors: dict[str, Tensor] = {**frozen, **self._trained}
        moving = self.graph.made_with(self.graph.downstream({*self._places, *biased}))
        self._suffix = [op for op in self.graph.ops if op.name in moving]
        self.boundary = self.graph.boundary(moving) if moving else (self.graph.output,)
        before = self.graph.upstream(self.boundary)
        self._prefix = [op for op in self.graph.ops[1:] if op.name in before]

    def prefix(self, x: Tensor) -> tuple[Tensor, ...]:
        """Model input (N, *input) -> what enters the trained part, without autograd. Never changes while training."""
        with torch.no_grad():
            values = self._run(self._prefix, {self.graph.ops[0].name: x}, self.boundary)
        return tuple(values[name] for name in self.boundary)

    def suffix(self, boundary: tuple[Tensor, ...]) -> Tensor:
        """What `prefix` gave -> features (N, D), differentiable in the parameters."""
        output = self.graph.ops[-1].name
        return self._run(self._suffix, dict(zip(self.boundary, boundary, strict=True)), (output,))[output]

    def parameters(self) -> list[nn.Parameter]:
        """Biases, then what each module has, in execution order."""
        return list(self._trained.values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The same by name: `<layer>.bias`, `<block>.lite-residual.spatial.weight`, `....spatial.norm.weight`, ..."""
        return dict(self._trained)

    def _run(self, ops: Sequence[Op], values: dict[str, Tensor], keep: Collection[str]) -> dict[str, Tensor]:
        """The operators' values; those not in `keep` are dropped after their last reader."""
        for op, dropped in zip(ops, last_readers(ops, keep), strict=True):
            inputs = [values[name] for name in op.inputs]
            place = self._places.get(op.name)
            values[op.name] = (
                inputs[0] + residual(place, inputs[1], self._tensors) if place else apply(op, inputs, self._tensors)
            )
            for name in dropped:
                del values[name]
        return values


def residual(place: Place, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The module's output (N, *place.shape) for its block's input (N, C, H, W)."""
    h = F.avg_pool2d(x, place.pool)
    h = F.relu(_normalised(place.spatial, h, tensors))
    h = _normalised(place.pointwise, h, tensors)
    return F.interpolate(h, place.shape[1:], mode="bilinear", align_corners=False)


def _normalised(op: Op, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    scale, shift = tensors[f"{op.name}.norm.weight"], tensors[f"{op.name}.norm.bias"]
    return F.group_norm(apply(op, [x], tensors), norm_groups(op.out_channels), scale, shift)


def _initial(place: Place, rng: torch.Generator) -> dict[str, Tensor]:
    """He's normal initialisation (arXiv:1502.01852); norms the identity, the last one's scale 0."""
    tensors: dict[str, Tensor] = {}
    scales: tuple[Callable[[int], Tensor], ...] = (torch.ones, torch.zeros)
    for op, scale in zip(place.convolutions, scales, strict=True):
        weight = torch.randn(op.weight_shape, generator=rng)
        tensors[f"{op.name}.weight"] = weight * sqrt(2 / weight[0].numel())
        tensors[f"{op.name}.norm.weight"] = scale(op.out_channels)
        tensors[f"{op.name}.norm.bias"] = torch.zeros(op.out_channels)
    return tensors
