"""The cost table of a model: what each layer costs, and how much memory one forward pass needs.

Everything is an integer per sample. Two inference peaks are told apart by name: `paper_peak_bytes` is TinyTrain's
figure, `inference_peak_bytes` what executing the graph operator by operator holds at its worst moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from stages.cost.ops import input_gradient_macs, macs, weight_gradient_macs
from stages.errors import require
from stages.graphs.graph import Graph
from stages.operators import Op
from stages.operators.op import ELEMENT_BYTES


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
    """What the activations that follow keep of their own when gradients flow through them."""
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
    uses = graph.uses(op.name)
    readers = [graph[name] for use in uses for name in graph.consumers[use.name]]
    return LayerCost(
        layer=op.name,
        kind=op.kind,
        parameters=op.weights + (op.out_channels if op.bias else 0),
        weights=op.weights,
        macs=sum(map(macs, uses)),
        input_gradient_macs=sum(map(input_gradient_macs, uses)),
        weight_gradient_macs=sum(map(weight_gradient_macs, uses)),
        input_bytes=ELEMENT_BYTES * sum(use.in_elements for use in uses),
        output_bytes=ELEMENT_BYTES * sum(use.elements for use in uses),
        mask_bytes=sum(reader.operator.keeps(reader, {0}).own_bytes(reader, 1) for reader in _activations(readers)),
        buffer_bytes=max(map(paper_buffer_bytes, uses)),
    )


def _activations(ops: Iterable[Op]) -> Iterator[Op]:
    """Those that work on each element alone."""
    return (op for op in ops if len(op.inputs) == 1 and op.shape == op.in_shape and not op.operator.trains)


def forward_macs(graph: Graph) -> int:
    """MACs of one forward pass of one sample. Raises UsageError for an operator without a cost rule."""
    return sum(macs(op) for op in graph.ops)


def full_backward_macs(graph: Graph) -> int:
    """MACs of one backward pass when everything trains: twice the forward pass, the stem's input gradient included
    (TinyTrain Table 2, FullTrain). Shares such as `15%` are shares of this."""
    inputs = {op.name: sum(source not in graph.constants for source in op.inputs) for op in graph.ops}
    return sum(inputs[op.name] * input_gradient_macs(op) + weight_gradient_macs(op) for op in graph.ops)


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
    that nothing reads later (never the model's own input), and views copy nothing, unless they reshape what another
    view has reordered.
    """
    buffer: dict[str, str] = {}
    for op in graph.ops:
        buffer[op.name] = next((buffer[source] for source in op.inputs if _takes_over(graph, op, source)), op.name)
    last_use = {buffer[name]: i for i, op in enumerate(graph.ops) for name in (op.name, *op.inputs)}
    alive: dict[str, int] = {}
    peak = 0
    for i, op in enumerate(graph.ops):
        if op.name in graph.constants:
            continue
        alive.setdefault(buffer[op.name], ELEMENT_BYTES * op.elements)
        peak = max(peak, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last_use[name] > i}
    return peak


def _takes_over(graph: Graph, op: Op, source: str) -> bool:
    """Whether the operator's output lies in the buffer of this input."""
    if op.operator.alias:
        return not _copies(graph, op)
    dies_here = graph.consumers[source][-1] == op.name and graph[source].inputs != ()
    fits = op.operator.overwrite is not None and graph[source].shape == op.shape
    return fits and dies_here and not graph[source].operator.alias


def _copies(graph: Graph, op: Op) -> bool:
    """Whether an operator that could be a view of its input must copy: a reshape of reordered elements."""
    before = graph[op.inputs[0]].operator
    return op.operator.in_order and before.alias and not before.in_order


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
    """Those of the named layers that sum over channels or positions: not those that only scale channels.

    Such a layer is a BatchNorm that could not be folded, another norm's scale, or a layer scale. Its weights and MACs
    are so few that a score which divides by both (TinyTrain Eq. 3) puts it before all convolutions, which the equation
    is about.
    """
    return tuple(name for name in names if graph[name].operator.candidate)


def last_blocks(graph: Graph, blocks: int) -> tuple[str, ...]:
    """Names of the layers of the last `blocks` blocks and of those after them: the window that TinyTrain inspects.

    A final 1x1 `mix` layer lies behind the blocks and belongs to it. A graph with no more blocks is inspected whole.
    TinyTrain finds the last six enough (appendix F.1).

    Raises:
        UsageError: fewer than one block.
    """
    require(blocks > 0, "--blocks", str(blocks), "at least 1")
    first = len(graph.blocks) - blocks
    start = next((i for i, op in enumerate(graph.ops) if op.block == first), 0) if first > 0 else 0
    return tuple(op.name for op in graph.ops[start:] if op.is_layer and not op.shares)
