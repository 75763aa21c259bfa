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
from stages.engines.torch.live import Live, live_layers
from stages.engines.torch.program import Program, channels_last_is_faster, in_chunks
from stages.engines.torch.rounding import Rounding
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
        self,
        backbone: Backbone,
        updates: Sequence[LayerUpdate],
        turns: Sequence[Sequence[LayerUpdate]] = (),
        *,
        channels_last: bool | None = None,
    ) -> None:
        self._graph = graph = backbone.graph
        self.device = backbone.engine.device
        self._tensors = {name: _tensor(value, self.device) for name, value in backbone.tensors.items()}
        for update in updates:
            if not update.trains:
                continue
            for name in _tensor_names(update.layer, self._tensors):
                self._tensors[name] = self._tensors[name].clone()
        self._whole = live_layers(graph, updates, self._tensors)
        if channels_last is None:
            channels_last = all(map(channels_last_is_faster, self._tensors.values()))
        engine = backbone.engine
        self.rounding = None
        if engine.keep_bits < 32:
            self.rounding = Rounding(engine.keep_bits, nearest=engine.keep_rounding == "nearest")
        self._turns: list[tuple[dict[str, Live], Suffix]] = []
        for turn in turns or (updates,):
            live = live_layers(graph, turn, self._tensors) if turns else self._whole
            suffix = Suffix(
                graph,
                self._tensors,
                live,
                turn,
                channels_last=channels_last,
                changing=self._whole.keys(),
                rounding=self.rounding,
                how=dict(engine.how),
                page_dir=engine.page_dir,
            )
            self._turns.append((live, suffix))
        self.turn(0)
        before = graph.upstream(self._suffix.boundary)
        self._prefix = Program(graph, self._tensors, before, self._suffix.boundary, channels_last=channels_last)

    def turn(self, number: int) -> list[nn.Parameter]:
        """Train what of the plan has this turn, from 0 on, and nothing else; these parameters."""
        self._write()
        self._live, self._suffix = self._turns[number]
        return self._moving()

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
        if not self._whole:
            return boundary[0]
        for live in self._live.values():
            live.write(self._tensors)
        if not torch.is_grad_enabled():
            return self._suffix.forward(boundary)
        features: Tensor = Attached.apply(  # type: ignore[no-untyped-call]
            self._suffix, boundary, *self._moving()
        )
        return features

    def features(self, x: Tensor) -> Tensor:
        """Model input (N, *input) -> features (N, D), without gradients."""
        with torch.no_grad():
            return self.suffix(self.prefix(x))

    # ----------------------------------------------------------------------------------------------------- values

    def parameters(self) -> list[nn.Parameter]:
        """The live slices, in execution order, turn after turn."""
        return [parameter for lives, _ in self._turns for parameter in _named(lives).values()]

    def _moving(self) -> list[nn.Parameter]:
        return list(_named(self._live).values())

    @property
    def live_names(self) -> tuple[str, ...]:
        """The tensors of which something trains."""
        return tuple(_named(self._whole))

    def places(self) -> list[tuple[nn.Parameter, str, Array]]:
        """Of every parameter its tensor's name, and which elements of the flat tensor it is, in its shape."""
        every = [live for lives, _ in self._turns for live in lives.values()]
        numbers = {
            name: torch.arange(self._tensors[name].numel()).view(self._tensors[name].shape) for name in self.live_names
        }
        found = []
        for live in every:
            for name, parameter in live.parameters().items():
                taken = live.bias_of(numbers) if name.endswith(".bias") else live.weight_of(numbers)
                found.append((parameter, name, taken.numpy()))
        return found

    def live_tensors(self) -> dict[str, Tensor]:
        """Copies of the live slices by name: `<layer>.weight` (live, ...), `<layer>.bias` (live,)."""
        self._write()
        for live in self._whole.values():
            live.read(self._tensors)
        return {name: parameter.detach().clone() for name, parameter in _named(self._whole).items()}

    def load_live(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the live slices to what `live_tensors` of a net with the same plan gave.

        Raises `DataError` when names or shapes differ.
        """
        mine = _named(self._whole)
        if tensors.keys() != mine.keys():
            raise DataError("live slices", f"of {sorted(tensors)}", f"{sorted(mine)}", "use those of the same plan")
        for name, parameter in mine.items():
            if tensors[name].shape != parameter.shape:
                raise DataError(f"live slice {name}", f"{tuple(tensors[name].shape)}", f"{tuple(parameter.shape)}")
            with torch.no_grad():
                parameter.copy_(tensors[name])
        for live in self._whole.values():
            live.write(self._tensors)
        self.load_whole(self._tensors)

    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the live slices to those of whole tensors by name, as `changed_tensors` gives them."""
        for lives, _ in self._turns:
            for live in lives.values():
                live.read(tensors)
        self._write()

    def changed_tensors(self) -> dict[str, Tensor]:
        """The whole tensors that hold live values, by name; frozen values bit-equal to the backbone's.

        They are the engine's own, which goes on to change them.
        """
        self._write()
        return {name: self._tensors[name] for name in self.live_names}

    def _write(self) -> None:
        """The live slices of all turns into the whole tensors."""
        for lives, _ in self._turns:
            for live in lives.values():
                live.write(self._tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The whole backbone's tensors with the live values merged in, copied where they may still change."""
        return {**self._tensors, **{name: tensor.clone() for name, tensor in self.changed_tensors().items()}}


def _named(lives: Mapping[str, Live]) -> dict[str, nn.Parameter]:
    return {name: parameter for live in lives.values() for name, parameter in live.parameters().items()}


def _tensor(value: Array, device: str) -> Tensor:
    return torch.from_numpy(np.require(value, requirements=("C", "W"))).to(device)


def _tensor_names(layer: str, tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in (f"{layer}.weight", f"{layer}.bias") if name in tensors]
