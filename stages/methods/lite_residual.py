"""TinyTL's lite residual modules (Cai et al., arXiv:2007.11622, section 3.3) beside the blocks of a frozen backbone.

A module reads its block's input at half the resolution, and what it makes is added to the block's output:

    average pool /2 -> k x k convolution in 2 groups -> norm -> ReLU -> 1x1 convolution -> norm -> bilinear, to the
    output's size

The kernel is 5, smaller where the pooled map is; the strided block's stride is the k x k convolution's. Norms are
group norms of 8 channels, so that no sample's output depends on the batch. The last norm's scale starts at 0: an
untrained net computes what the backbone computes.

Which of TinyTL's parts TinyTrain kept for its comparison is not stated. Our reading: a module at every block (TinyTL's
code leaves the first one out: `tinytl:drop=0.06` does), group norm without weight standardisation, modules not
pre-trained, frozen weights in float32, biases of the backbone frozen unless asked for.

This is a baseline: it runs under stock autograd (`lite_residual_net`), not in the sparse engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from stages.graphs.graph import Graph
from stages.operators import Op, Shape

KIND = "lite-residual"
"""Last part of a module's name."""

GROUPS = 2
NORM_CHANNELS = 8
"""Channels per group of the norms; where the channels are no multiple of it, all are one group."""


# ---------------------------------------------------------------------------------------------------------- the places


@dataclass(frozen=True, slots=True)
class Place:
    """A block and the shape of the module beside it."""

    block: str
    entry: str
    """The operator whose output the block reads."""
    exit: str
    """The operator whose output is the block's."""
    pool: Shape
    spatial: Op
    """The k x k convolution, in groups."""
    pointwise: Op
    """The 1x1 convolution; its shape is the module's before it is enlarged."""
    shape: Shape
    """The block's output (C, H, W)."""

    @property
    def name(self) -> str:
        return f"{self.block}.{KIND}"

    @property
    def convolutions(self) -> tuple[Op, Op]:
        return self.spatial, self.pointwise

    @property
    def values(self) -> int:
        """Values that train: both convolutions, and scale and shift of both norms."""
        return sum(op.weights + 2 * op.out_channels for op in self.convolutions)


def find_places(graph: Graph, kernel: int = 5) -> tuple[Place, ...]:
    """Where modules can stand, in the blocks' order, with kernels of at most `kernel`.

    A block needs one input and one output, both maps (C, H, W); blocks of feature vectors, lines, or with several
    inputs have no place.
    """
    found = (_place(graph, block, kernel) for block in graph.blocks)
    return tuple(place for place in found if place is not None)


def _place(graph: Graph, block: str, kernel: int) -> Place | None:
    ops = [op for op in graph.ops if op.name == block or op.name.startswith(f"{block}.")]
    inside = {op.name for op in ops}
    entries = {source for op in ops for source in op.inputs} - inside
    left = {op.name for op in ops if not inside.issuperset(graph.consumers[op.name])}
    if len(entries) != 1 or left != {ops[-1].name}:
        return None
    entry, exit = graph[entries.pop()], ops[-1]
    if len(entry.shape) != 3 or len(exit.shape) != 3:
        return None
    pool = tuple(min(2, size) for size in entry.shape[1:])
    pooled = (entry.out_channels, *(size // by for size, by in zip(entry.shape[1:], pool, strict=True)))
    stride = tuple(max(1, round(a / b)) for a, b in zip(entry.shape[1:], exit.shape[1:], strict=True))
    name = f"{block}.{KIND}"
    spatial = _spatial(f"{name}.spatial", pooled, kernel, stride)
    point = Op(
        f"{name}.pointwise", "conv", (), (exit.out_channels, *spatial.shape[1:]), (spatial.shape,),
        kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1),
    )  # fmt: skip
    return Place(block, entry.name, exit.name, pool, spatial, point, exit.shape)


def _spatial(name: str, pooled: Shape, kernel: int, stride: Shape) -> Op:
    """The grouped convolution on the pooled map; its kernel is odd and no larger than the map."""
    sizes = pooled[1:]
    kernels = tuple(min(kernel, size - 1 + size % 2) for size in sizes)
    padding = tuple(k // 2 for k in kernels)
    out = tuple((size - 1) // step + 1 for size, step in zip(sizes, stride, strict=True))
    groups = gcd(GROUPS, pooled[0])
    return Op(
        name, "conv", (), (pooled[0], *out), (pooled,),
        kernel=kernels, stride=stride, padding=padding, dilation=(1, 1), groups=groups,
    )  # fmt: skip


def with_modules(graph: Graph, places: Sequence[Place]) -> Graph:
    """The graph with an addition behind each block that has a module, read by all that read the block.

    Its inputs are the block's output and the block's input, which the module makes into what is added.

    The layers are the backbone's own.
    """
    at = {place.exit: place for place in places}
    moved: dict[str, str] = {}
    ops: list[Op] = []
    for op in graph.ops:
        ops.append(replace(op, inputs=tuple(moved.get(name, name) for name in op.inputs)))
        if op.name in at:
            place = at[op.name]
            entry = moved.get(place.entry, place.entry)
            ops.append(Op(place.name, "add", (op.name, entry), op.shape, (op.shape,) * 2, block=op.block))
            moved[op.name] = place.name
    return Graph(tuple(ops), graph.blocks)


def norm_groups(channels: int) -> int:
    """Groups of a norm.

    >>> [norm_groups(channels) for channels in (8, 24, 12, 4)]
    [1, 3, 1, 1]
    """
    return channels // NORM_CHANNELS if channels % NORM_CHANNELS == 0 else 1
