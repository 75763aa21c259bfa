"""Layers whose outputs have settled train no more: NEq's equilibrium (arXiv:2207.09455) in meta-training.

As there, velocities are taken once an epoch from samples that are looked at without augmentation. A single channel that
has settled saves nothing, because the gradient must pass through it; so layers leave front to back, as far as all of
their channels have settled, and with them all that lies before: the backward pass then ends behind them. When no layer
is left, training ends.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stages.artifacts.records import Array, Group
from stages.engines.torch.reference import apply
from stages.errors import UsageError, require
from stages.graphs.graph import Graph
from stages.losses import Floats
from stages.models.modules import Net
from stages.planning.policies import Velocity, parse_policy, similarity, velocity_of

MEANT = ("threshold", "mu", "share")
"""Settings of the policy that mean something where the look is once an epoch."""


def settling_of(text: str) -> Velocity | None:
    """How `--policy` freezes what has settled; None for `static`.

    Raises `UsageError` for other policies, which revise plans, and for settings of `train-sparse` alone.
    """
    policy = parse_policy(text)
    if policy.name == "static":
        return None
    require(policy.name == "velocity", "--policy", policy.name, "static or velocity; the others revise plans")
    how, standard = policy.settings, Velocity()
    for name in ("every", "learn", "by", "probe"):
        if getattr(how, name) != getattr(standard, name):
            raise UsageError("--policy velocity", f"{name}=", "one of " + ", ".join(f"{each}=" for each in MEANT))
    assert isinstance(how, Velocity)
    return how


class Settling:
    """Looks at a net's layers from epoch to epoch and freezes the first ones when they have settled.

    Args:
        how: threshold, mu and share.
        net: what trains.
        probe: model inputs (n, *input) that are looked at.
    """

    def __init__(self, how: Velocity, net: Net, probe: Floats) -> None:
        self._how, self._net, self._probe = how, net, torch.from_numpy(probe)
        self._layers = [op.name for op in net.graph.layers]
        self._watched = {_watched(net.graph, name): name for name in self._layers}
        self._memory: dict[str, dict[str, Array]] = {}
        self.left = 0
        """How many of the layers train no more, from the first one on."""

    @property
    def ended(self) -> bool:
        """Whether nothing trains."""
        return self.left == len(self._layers)

    def wake(self) -> None:
        """Begin anew: everything trains."""
        self._memory, self.left = {}, 0
        self._freeze()

    def look(self) -> None:
        """Take the velocities after an epoch, and freeze what has settled."""
        velocities: dict[str, Array] = {}
        for name, outputs in self._outputs().items():
            seen = self._memory.get(name, {})
            now = {"outputs": outputs}
            if "outputs" in seen:
                now["similarity"] = similarity(seen["outputs"], outputs)
            if "similarity" in seen:
                change = now["similarity"] - seen["similarity"]
                now["velocity"] = velocities[name] = velocity_of(change, seen.get("velocity"), self._how.mu)
            self._memory[name] = now
        while not self.ended and self._settled(velocities.get(self._layers[self.left])):
            self.left += 1
        self._freeze()

    def _settled(self, velocity: Array | None) -> bool:
        if velocity is None:
            return False
        return bool((np.abs(velocity) <= self._how.threshold).mean() >= self._how.share)

    def _freeze(self) -> None:
        """Gradients for everything from the first layer that trains on."""
        graph, values = self._net.graph, self._net.values()
        first = len(graph.ops) if self.ended else graph.position[self._layers[self.left]]
        trained = {id(parameter) for parameter in self._net.parameters()}
        for name, value in values.items():
            if id(value) in trained:
                value.requires_grad_(graph.position[name.rpartition(".")[0]] >= first)

    def _outputs(self) -> dict[str, Array]:
        """Layer -> (C, n): its channels' values on the probe, behind its BatchNorm where it has one."""
        self._net.eval()
        tensors = self._net.values()
        device = next(iter(tensors.values())).device
        values: dict[str, Tensor] = {self._net.graph.ops[0].name: self._probe.to(device)}
        found: dict[str, Array] = {}
        with torch.no_grad():
            for op in self._net.graph.ops[1:]:
                y = values[op.name] = apply(op, [values[name] for name in op.inputs], tensors)
                if op.name in self._watched:
                    channels = y.movedim(1 + op.channel_axis % len(op.shape), 0)
                    found[self._watched[op.name]] = channels.reshape(len(channels), -1).cpu().numpy()
        return found

    # -- over a restart

    def state(self) -> Group:
        """What the coming epochs depend on."""
        groups = {name: Group(arrays=dict(arrays)) for name, arrays in self._memory.items()}
        return Group({"left": self.left}, groups=groups)

    def load(self, state: Group) -> None:
        """Go on from `state`."""
        self._memory = {name: dict(group.arrays) for name, group in state.groups.items()}
        self.left = int(state.attrs["left"])
        self._freeze()


def _watched(graph: Graph, layer: str) -> str:
    """The value that tells of a layer: its own, or that of the BatchNorm which alone reads it."""
    readers = graph.consumers[layer]
    behind = len(readers) == 1 and graph[readers[0]].kind == "batchnorm"
    return readers[0] if behind else layer
