"""Training simulated in few bits: FracTrain's quantiser, its schedule (PFQ) and its gate (DFQ), in float32.

Convolutions and linear layers get rounded inputs and rounded weights, and the gradient at their output is rounded by
chance before those of their weight and input are made from it (arXiv:2012.13113; the repository's `modules/quantize.py`
`QConv2d`, after Banner et al.). All else is float32: biases, BatchNorm, other operators, the update, and the weights
themselves, which are what validation computes with and a run keeps. Values are rounded and computed with in float32:
that takes longer than float32, and the saving is a count of bits (`bit_widths.cost`).

Changed: the choices of DFQ meet at each layer's output, not at the block's, so that BatchNorm sees, and collects
once, what was really computed. All convolutions and linear layers take part and count, the stem and those of shortcuts
too; other operators (BatchNorm, attention) stay in float32 and count nothing, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.artifacts.records import Array
from stages.errors import require
from stages.fsl.bit_widths import DEPTHWISE, FLOAT, WHERE, Bits, Dynamic, Progressive, at_least, cost
from stages.graphs.graph import Graph
from stages.operators import Op
from stages.operators.op import Forward, Tensors
from stages.planning.precision import advance, begin
from stages.randomness import generator, torch_generator

LAYERS = ("conv", "linear")
"""Kinds of operators that compute in few bits."""
LEAST_STEP = 1e-8
"""Of the quantiser, where a range is smaller (`modules/quantize.py`: min_scale)."""
BETA = 1e-3
"""Weight of the cost in DFQ's loss (`train_dfq.py`: --beta)."""
EMBEDDED, HIDDEN = 32, 16
"""Sizes of DFQ's gate (`models.py`: gate_dim; embed_dim and hidden_dim)."""


# ------------------------------------------------------------------------------------------------------- the quantiser


def quantised(x: Tensor, bits: int, *, rows: bool = False, noise: Tensor | None = None) -> Tensor:
    """Q_b(x) = q s + z: floats of x's shape and dtype, 2^b - 1 steps of s between the least and the greatest value.

    z = min x, s = max((max x - min x) / (2^b - 1), 1e-8), q = round(clamp((x - z) / s + noise, 0, 2^b - 1))
    (`modules/quantize.py`: UniformQuantize). Nobody reserves a step for zero. Without noise |Q_b(x) - x| <= s / 2; with
    noise of U(-1/2, 1/2) the mean of Q_b(x) is x.

    Args:
        bits: 2 to 16; more than float32's 24 would have nothing to round.
        rows: a range for each index of the first axis, as weights have it; else one for all.
        noise: of x's shape.
    """
    axes = tuple(range(1 if rows else 0, x.dim()))
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    last = 2.0**bits - 1
    step = ((high - low) / last).clamp_min(LEAST_STEP)
    q = (x - low) / step
    return (q if noise is None else q + noise).clamp(0, last).round() * step + low


class _Rounded(torch.autograd.Function):
    """Q_b forward, straight through backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, rows: bool) -> Tensor:
        """Q_b(x), to the nearest."""
        return quantised(x, bits, rows=rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient as it comes."""
        return gradients[0], None, None


class _RoundedGradient(torch.autograd.Function):
    """Nothing forward, Q_b by chance backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, chance: torch.Generator) -> Tensor:
        """x itself."""
        ctx.bits, ctx.chance = bits, chance
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Q_b of the gradient."""
        gradient = gradients[0]
        noise = torch.rand(gradient.shape, generator=ctx.chance, dtype=gradient.dtype) - 0.5
        return quantised(gradient, ctx.bits, noise=noise.to(gradient.device)), None, None


def rounded(x: Tensor, bits: int, *, rows: bool = False) -> Tensor:
    """`quantised` to the nearest, whose gradient is that of x; 32 bits: x."""
    if bits == FLOAT:
        return x
    found: Tensor = _Rounded.apply(x, bits, rows)  # type: ignore[no-untyped-call]
    return found


def rounded_gradient(x: Tensor, bits: int, chance: torch.Generator) -> Tensor:
    """x, whose gradient is rounded to `bits` by chance, one range for all of it; 32 bits: x.

    Args:
        chance: a generator of the CPU, so that all devices round alike.
    """
    if bits == FLOAT:
        return x
    found: Tensor = _RoundedGradient.apply(x, bits, chance)  # type: ignore[no-untyped-call]
    return found


def compute(op: Op, inputs: Sequence[Tensor], tensors: Tensors, bits: Bits, chance: torch.Generator) -> Tensor:
    """A layer's output (N, *op.shape) in these widths (`modules/quantize.py`: QConv2d); the bias is not rounded."""
    own = {f"{op.owner}.{what}": tensors[f"{op.owner}.{what}"] for what in op.operator.tensors(op)}
    weight = f"{op.owner}.weight"
    own[weight] = rounded(own[weight], bits.weights, rows=True)
    y = op.operator.forward(op, [rounded(inputs[0], bits.forward)], own)
    return rounded_gradient(y, bits.backward, chance)


# ----------------------------------------------------------------------------------------------------------- the count


@dataclass(frozen=True)
class Layers:
    """The layers of a graph that compute in few bits, in their order."""

    ops: tuple[Op, ...]
    shares: Mapping[str, float]
    """Of the layers' MACs, by the layer's name."""

    def count(self, bits: Bits) -> float:
        """Bit-weighted MACs of a training step in these widths, as a share of float32's."""
        return sum(self.shares[op.name] * cost(of_layer(op, bits)) for op in self.ops)


def layers_of(graph: Graph) -> Layers:
    """The convolutions and linear layers that train."""
    ops = tuple(op for op in graph.ops if op.is_layer and op.kind in LAYERS)
    require(bool(ops), WHERE, "a net without convolutions and linear layers", "some")
    total = sum(op.operator.macs_of(op) for op in ops)
    return Layers(ops, {op.name: op.operator.macs_of(op) / total for op in ops})


def of_layer(op: Op, bits: Bits) -> Bits:
    """The widths that a layer gets where the net is to have these: depthwise ones have at least `DEPTHWISE`."""
    return at_least(bits, DEPTHWISE) if op.is_depthwise else bits


# --------------------------------------------------------------------------------------------------- a pass, and passes


class Pass(Protocol):
    """How the layers compute in the forward and backward pass of one unit of work."""

    @property
    def rules(self) -> Mapping[str, Forward]:
        """What computes in a layer's place, by its name."""

    @property
    def bit_mac_share(self) -> float:
        """After the forward pass: bit-weighted MACs as a share of float32's."""

    @property
    def penalty(self) -> Tensor | float:
        """After the forward pass: what the loss has besides."""


class Simulation(Protocol):
    """Says how each unit computes, and learns from the losses of epochs."""

    gate: nn.Module | None
    """What trains beside the net, and is gone with the training."""

    def unit(self, number: int) -> Pass:
        """How the unit of this number computes; it rounds by chance from a generator of its own."""

    def see(self, loss: float) -> None:
        """The mean loss of another epoch."""

    def forget(self) -> None:
        """Losses will be others: a phase begins."""

    def state(self) -> Mapping[str, Array]:
        """What a checkpoint must have besides the gate."""

    def load(self, state: Mapping[str, Array]) -> None:
        """Go on from such a state; arrays without dimensions may have got one."""


def _chance(seed: int, op: Op, number: int, candidate: int = 0) -> torch.Generator:
    """One for each layer, so that nothing depends on the order in which layers are differentiated."""
    return torch_generator(seed, f"simulate-{candidate}-{op.name}", number)


@dataclass(frozen=True)
class _EqualPass:
    """All layers compute in the same widths."""

    layers: Layers
    bits: Bits
    seed: int
    number: int
    penalty: float = 0.0

    @property
    def rules(self) -> Mapping[str, Forward]:
        return {op.name: self._layer for op in self.layers.ops}

    @property
    def bit_mac_share(self) -> float:
        return self.layers.count(self.bits)

    def _layer(self, op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
        return compute(op, inputs, tensors, of_layer(op, self.bits), _chance(self.seed, op, self.number))


class ProgressiveSimulation:
    """The same widths for all layers, and the next ones when the loss stalls (PFQ; `train_pfq.py`)."""

    gate: nn.Module | None = None

    def __init__(self, graph: Graph, schedule: Progressive, seed: int) -> None:
        self._layers, self._schedule, self._seed = layers_of(graph), schedule, seed
        self._memory: Mapping[str, Array] = begin(schedule)

    @property
    def bits(self) -> Bits:
        """The widths of now."""
        return self._schedule.bits[int(self._memory["stage"])]

    def unit(self, number: int) -> Pass:
        """All layers in the widths of now."""
        return _EqualPass(self._layers, self.bits, self._seed, number)

    def see(self, loss: float) -> None:
        """Move on if this loss is the last of five that hardly differ."""
        self._memory = advance(self._schedule, self._memory, loss)

    def forget(self) -> None:
        """Keep the stage and eps, not the losses."""
        self._memory = {**self._memory, "recent": np.zeros(0), "first": np.zeros(0)}

    def state(self) -> Mapping[str, Array]:
        """What the indicator remembers."""
        return self._memory

    def load(self, state: Mapping[str, Array]) -> None:
        """Go on from it."""
        numbers = {name: state[name].reshape(()) for name in ("stage", "eps")}
        self._memory = {**state, **numbers}


# ------------------------------------------------------------------------------------------------------------ the gate


class Gate(nn.Module):
    """DFQ's gate (`models.py`: RNNGate and the gate layers): which of K widths, for every block and sample.

    Mean over the positions -> 32 -> ReLU -> 16 for each block, an LSTM cell for all whose state goes on from block to
    block, and K scores.
    """

    def __init__(self, channels: Sequence[int], candidates: int, seed: int) -> None:
        """For blocks whose inputs have so many channels; weights are torch's usual ones, of the seed."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator(seed, "simulate-gate").integers(2**63)))
            self.embed = nn.ModuleList(
                nn.Sequential(nn.Linear(count, EMBEDDED), nn.ReLU(), nn.Linear(EMBEDDED, HIDDEN)) for count in channels
            )
            self.cell = nn.LSTMCell(HIDDEN, HIDDEN)
            self.scores = nn.Linear(HIDDEN, candidates)

    def forward(
        self, block: int, means: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Means (N, C) of a block's input -> its choice (N, K) and the state for the next block."""
        state = self.cell(self.embed[block](means), state)
        return one_hot(self.scores(state[0])), state


def one_hot(scores: Tensor) -> Tensor:
    """1 for each row's highest score, else 0 (N, K), with the gradient of the rows' softmax p.

    onehot(argmax p) - stop(p) + p (`models.py`: RNNGate.forward), summed so that the value is exactly 0 or 1.
    """
    p = scores.softmax(dim=1)
    return functional.one_hot(p.argmax(dim=1), p.shape[1]).to(p.dtype) + (p - p.detach())


class _GatedPass:
    """Every layer computes in all candidate widths; each sample goes on with the one that its block's choice names."""

    def __init__(self, layers: Layers, how: Dynamic, gate: Gate, blocks: Sequence[int], seed: int, number: int) -> None:
        self._layers, self._how, self._gate, self._blocks = layers, how, gate, blocks
        self._seed, self._number = seed, number
        self._choices: dict[int, Tensor] = {}
        self._state: tuple[Tensor, Tensor] | None = None
        self.rules: Mapping[str, Forward] = {op.name: self._layer for op in layers.ops}

    def _layer(self, op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
        if op.block not in self._choices:
            axis = op.channel_axis % len(op.in_shape) + 1
            means = inputs[0].movedim(axis, 1).flatten(2).mean(2) if len(op.in_shape) > 1 else inputs[0]
            place = self._blocks.index(op.block)
            self._choices[op.block], self._state = self._gate(place, means, self._state)
        choice = self._choices[op.block]
        found = [
            compute(op, inputs, tensors, of_layer(op, bits), _chance(self._seed, op, self._number, j))
            for j, bits in enumerate(self._how.bits)
        ]
        return torch.stack([choice[:, j].view(-1, *(1,) * len(op.shape)) * y for j, y in enumerate(found)]).sum(0)

    @property
    def _count(self) -> Tensor:
        """Bit-weighted MACs as a share of float32's, differentiable in the choices: ()."""
        counts = []
        for op in self._layers.ops:
            costs = [self._layers.shares[op.name] * cost(of_layer(op, bits)) for bits in self._how.bits]
            often = self._choices[op.block].mean(0)
            counts.append(often @ often.new_tensor(costs))
        return torch.stack(counts).sum()

    @property
    def bit_mac_share(self) -> float:
        return float(self._count.detach())

    @property
    def penalty(self) -> Tensor:
        """beta reg cost: the cost is summed over samples, blocks and the three products of a layer; reg is 1 at or
        above the target and -1 below it (`train_dfq.py`: computation_loss, with blocks weighted by MACs)."""
        samples = len(next(iter(self._choices.values())))
        count = self._count
        sign = 1 if float(count.detach()) >= self._how.target else -1
        return sign * BETA * 3 * samples * len(self._blocks) * count


class DynamicSimulation:
    """Widths that a gate chooses (DFQ; `train_dfq.py`).

    Raises `UsageError` for a target that no choice reaches.
    """

    def __init__(self, graph: Graph, how: Dynamic, seed: int) -> None:
        self._layers, self._how, self._seed = layers_of(graph), how, seed
        counts = [self._layers.count(bits) for bits in how.bits]
        least, most = min(counts), max(counts)
        expected = f"{least:.4f} to {most:.4f}, what these widths cost in this net"
        require(least < how.target < most, WHERE, f"target={how.target}", expected)
        first: dict[int, Op] = {}
        for op in self._layers.ops:
            first.setdefault(op.block, op)
        self._blocks = tuple(first)
        self._gate = Gate([op.in_channels for op in first.values()], len(how.bits), seed)
        self.gate: nn.Module | None = self._gate

    def unit(self, number: int) -> Pass:
        """The gate asked once for each block, in their order."""
        return _GatedPass(self._layers, self._how, self._gate, self._blocks, self._seed, number)

    def see(self, loss: float) -> None:
        """Nothing: the target stays."""

    def forget(self) -> None:
        """Nothing was kept."""

    def state(self) -> Mapping[str, Array]:
        """Nothing: the gate is one of the learner's modules."""
        return {}

    def load(self, state: Mapping[str, Array]) -> None:
        """Nothing."""


def simulation_of(how: Progressive | Dynamic, graph: Graph, seed: int) -> Simulation:
    """The simulation that a setting asks for. Raises `UsageError` for a target that the net cannot have."""
    if isinstance(how, Dynamic):
        return DynamicSimulation(graph, how, seed)
    return ProgressiveSimulation(graph, how, seed)
