"""The table of operators: one record per kind, one module per family (docs/operators.md)."""

from stages.operators import (
    activations,
    arithmetic,
    convolution,
    linear,
    normalisation,
    opaque,
    pooling,
    recurrent,
    shapes,
    tokens,
)
from stages.operators.op import TABLE, Op, Operator, Shape

__all__ = ["FAMILIES", "TABLE", "Op", "Operator", "Shape"]

FAMILIES = (convolution, linear, recurrent, normalisation, activations, arithmetic, pooling, shapes, tokens, opaque)
"""The modules that fill the table."""
