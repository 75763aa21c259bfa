"""What a specimen of the zoo is, and how one is built so that no part of it is trivially zero or one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.LayerNorm,
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Specimen:
    """A small faithful copy of an architecture.

    `factory` takes no arguments and returns the module; `input_shape` is the shape of one sample, without the batch;
    `traits` are the operators and habits that the specimen is kept for; `refused` names the operator for which an
    import is expected to be refused ("" if it is expected to pass); `spread` is the standard deviation of a sample's
    values; `vocabulary` > 0: the input is integers below it.
    """

    name: str
    factory: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    traits: tuple[str, ...]
    refused: str = ""
    spread: float = 1.0
    vocabulary: int = 0

    def build(self, seed: int = 0) -> nn.Module:
        """The module in evaluation mode: the same weights for the same seed; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.factory()
            randomise(module)
        return module.eval()

    def example(self, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random samples [batch, *input_shape]: normal values, or whole numbers where there is a vocabulary."""
        rng = torch.Generator().manual_seed(seed)
        shape = (batch, *self.input_shape)
        if self.vocabulary:
            return torch.randint(self.vocabulary, shape, generator=rng).to(dtype)
        return (self.spread * torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype)


def tensors(output: Any) -> list[Tensor]:
    """All tensors that a module returned, in order: alone, in tuples and lists, or as fields of a dataclass."""
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output):
        output = [getattr(output, field.name) for field in fields(output)]
    return [tensor for part in output or () for tensor in tensors(part)]


def result(output: Any) -> Tensor:
    """The answer among what a module returned: the first tensor."""
    return tensors(output)[0]


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Give normalisations random statistics and affine parameters, biases random values, and fill what is constant.

    Constants are class tokens, position tables, layer scales, PReLU slopes and gains that start at zero or one. Kernels
    are drawn so that signals keep their size: torch's own default lets deep ReLU nets answer the same to every input.
    """
    for part in module.modules():
        if isinstance(part, NORMS):
            _randomise_norm(part)
        elif isinstance(part, CONVOLUTIONS) and "weight" in part._parameters:
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    for name, parameter in module.named_parameters():
        if name.rsplit(".", 1)[-1].endswith("bias"):
            parameter.normal_(0, 0.1)
        elif not parameter.any():
            parameter.normal_(0, 0.5)
        elif parameter.min() == parameter.max():
            parameter.uniform_(0.3, 0.9)


def _randomise_norm(norm: nn.Module) -> None:
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
    if norm.weight is not None:
        norm.weight.uniform_(0.5, 1.5)
