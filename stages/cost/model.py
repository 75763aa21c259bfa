"""The cost table of a model: what each layer costs, and how much memory one forward pass needs.

Everything is an integer per sample. Two inference peaks are told apart by name: `paper_peak_bytes` is TinyTrain's
figure, `inference_peak_bytes` what executing the graph operator by operator holds at its worst moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from stages.cost.ops import ELEMENT_BYTES, input_gradient_macs, kept_bytes, macs, weight_gradient_macs
from stages.errors import require
from stages.models.graph import Graph, Op

IN_PLACE = frozenset({"relu", "relu6", "add"})
"""Kinds that overwrite an input which nothing reads later."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Cost of one layer per sample; gradients as if the whole layer trained."""

    layer: str
    kind: str
    parameters: int
    """Weights and biases of the deploy form."""
    weights: int
    """Weights alone: what TinyTrain calls the layer's parameters."""
    macs: int
    input_gradient_macs: int
    weight_gradient_macs: int
    input_bytes: int
    output_bytes: int
    mask_bytes: int
    """One bit per output of the activations that follow, kept when gradients flow through them."""
    buffer_bytes: int
    """Input and output buffers while the layer runs, by TinyTL's rule (`paper_buffer_bytes`)."""

    @property
    def backward_macs(self) -> int:
        """Input gradient and weight gradient."""
        return self.input_gradient_macs + self.weight_gradient_macs

    @property
    def saved_bytes(self) -> int:
        """What the whole layer and the activations behind it keep for the backward pass when it trains."""
        return self.input_bytes + self.mask_bytes


def cost_table(graph: Graph) -> tuple[LayerCost, ...]:
    """Cost of every layer in execution order.

    Raises:
        UsageError: an operator of the graph has no cost rule.
    """
    forward_macs(graph)  # every operator must have a rule, the free ones included
    return tuple(_layer_cost(graph, op) for op in graph.layers)


def _layer_cost(graph: Graph, op: Op) -> LayerCost:
    readers = (graph[name] for name in graph.consumers[op.name])
    return LayerCost(
        layer=op.name,
        kind=op.kind,
        parameters=op.weights + (op.out_channels if op.bias else 0),
        weights=op.weights,
        macs=macs(op),
        input_gradient_macs=input_gradient_macs(op),
        weight_gradient_macs=weight_gradient_macs(op),
        input_bytes=ELEMENT_BYTES * op.in_elements,
        output_bytes=ELEMENT_BYTES * op.elements,
        mask_bytes=sum(kept_bytes(reader, 1) for reader in readers if reader.kind in ("relu", "relu6")),
        buffer_bytes=paper_buffer_bytes(op),
    )


def forward_macs(graph: Graph) -> int:
    """MACs of one forward pass of one sample. Raises UsageError for an operator without a cost rule."""
    return sum(macs(op) for op in graph.ops)


def full_backward_macs(graph: Graph) -> int:
    """MACs of one backward pass when everything trains: twice the forward pass, the stem's input gradient included
    (TinyTrain Table 2, FullTrain). Shares such as `15%` are shares of this."""
    return sum(input_gradient_macs(op) + weight_gradient_macs(op) for op in graph.ops)


def weight_count(graph: Graph) -> int:
    """Weights of all layers, biases not counted (TinyTrain Table 4)."""
    return sum(op.weights for op in graph.layers)


def paper_buffer_bytes(op: Op) -> int:
    """Input plus output of one layer, the output of a grouped layer counted once per group size.

    TinyTL's profiler computes a grouped convolution one group at a time, so only one group's output is extra.
    """
    return ELEMENT_BYTES * (op.in_elements + op.elements // op.groups)


def paper_peak_bytes(graph: Graph) -> int:
    """TinyTrain's inference peak per sample: the largest layer's buffers (Table 11: 640 / 896 / 512 KB)."""
    return max(paper_buffer_bytes(op) for op in graph.layers)


def inference_peak_bytes(graph: Graph) -> int:
    """Peak of the tensors alive at once while the graph runs one sample operator by operator.

    As the engine runs it: a tensor lives until its last reader has run, activations and additions overwrite an input
    that nothing reads later (never the model's own input), and flattening copies nothing.
    """
    buffer: dict[str, str] = {}
    for op in graph.ops:
        buffer[op.name] = next((buffer[source] for source in op.inputs if _takes_over(graph, op, source)), op.name)
    last_use = {buffer[name]: i for i, op in enumerate(graph.ops) for name in (op.name, *op.inputs)}
    alive: dict[str, int] = {}
    peak = 0
    for i, op in enumerate(graph.ops):
        alive.setdefault(buffer[op.name], ELEMENT_BYTES * op.elements)
        peak = max(peak, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last_use[name] > i}
    return peak


def _takes_over(graph: Graph, op: Op, source: str) -> bool:
    """Whether the operator's output lies in the buffer of this input."""
    dies_here = graph.consumers[source][-1] == op.name and graph[source].kind != "input"
    return op.kind == "flatten" or (op.kind in IN_PLACE and dies_here)


def block_entries(graph: Graph, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the named layers that are the first of their block to mix channels: no depthwise ones.

    In an inverted bottleneck this is the expanding convolution, where SparseUpdate found training to help most (Lin et
    al., arXiv:2206.15472, section 3.2). A graph without blocks keeps all its names.
    """
    first: dict[int, str] = {}
    for op in graph.layers:
        if op.block >= 0 and not op.is_depthwise:
            first.setdefault(op.block, op.name)
    return tuple(name for name in names if name in first.values() or not graph.blocks)


def filters(graph: Graph, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the named layers that sum over channels or positions: not the depthwise 1x1 ones.

    Such a layer is a BatchNorm that could not be folded: it scales channels. Its weights and MACs are so few that a
    score which divides by both (TinyTrain Eq. 3) puts it before all convolutions, which the equation is about.
    """
    return tuple(name for name in names if not (graph[name].is_depthwise and prod(graph[name].kernel) == 1))


def last_blocks(graph: Graph, blocks: int) -> tuple[str, ...]:
    """Names of the layers of the last `blocks` blocks and of those after them: the window that TinyTrain inspects.

    A final 1x1 `mix` layer lies behind the blocks and belongs to it. A graph with no more blocks is inspected whole.
    TinyTrain finds the last six enough (appendix F.1).

    Raises:
        UsageError: fewer than one block.
    """
    require(blocks > 0, "--blocks", str(blocks), "at least 1")
    first = len(graph.blocks) - blocks
    if first <= 0:
        return tuple(op.name for op in graph.layers)
    start = next(i for i, op in enumerate(graph.ops) if op.block == first)
    return tuple(op.name for op in graph.ops[start:] if op.is_layer)
