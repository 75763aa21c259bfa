"""Features of a backbone's first blocks, for filters that look at more than labels (Titan footnote 3)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stages.artifacts.records import Array, Block
from stages.errors import require
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.models.inputs import adapt_block
from stages.operators import Op
from stages.valuation.buffer import Features

CHUNK = 16
"""Samples that pass together: more would only raise the peak of memory."""


def shallow_features(backbone: Backbone, depth: int) -> Features:
    """Samples -> output of the backbone's first `depth` blocks, flat: float32 (n, F) (Titan footnote 3).

    Raises `UsageError` when the model has fewer blocks.
    """
    graph = backbone.graph
    there = len(graph.blocks)
    require(1 <= depth <= there, "--blocks", f"{depth}", f"1 to {there}, the model's blocks")
    last = max(graph.position[op.name] for op in graph.ops if op.block == depth - 1)
    ops = graph.ops[: last + 1]
    if len(ops[-1].shape) > 1:
        ops = (*ops, Op("/flat", "flatten", (ops[-1].name,), (ops[-1].elements,), (ops[-1].shape,)))
    shallow = replace(backbone, graph=Graph(ops, graph.blocks[:depth]))

    def features(block: Block) -> Array:
        pieces = (adapt_block(piece, backbone.input) for piece in block.slices(CHUNK))
        return np.concatenate([shallow.features(piece) for piece in pieces])

    return features
