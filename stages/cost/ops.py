"""Counting rules: integers computed from shapes, per sample, without torch.

One multiply-accumulate is one MAC. Convolutions, linear layers, products of values, attention and per-channel scales
are counted, padding included (as fvcore and TinyTrain count); activations, pooling, sums and the optimiser are not.
Tensors are float32: 4 bytes per element. The backward pass of an operator is its inputs' gradients (where something
before it trains) plus its weight's gradient (where it trains itself); each costs as many MACs as the forward pass, so
training everything costs twice the forward pass (TinyTrain, arXiv:2307.09988, appendix A.4, after Xu et al. 2022).

Each kind's rule stands in its record (`stages.operators`): a kind without one cannot be registered.
"""

from __future__ import annotations

from stages.operators import Op


def macs(op: Op) -> int:
    """Forward MACs of one operator, per sample. Raises `UsageError` for a kind that the table does not have."""
    return op.operator.macs_of(op)


def input_gradient_macs(op: Op) -> int:
    """MACs of the gradient with respect to one of the operator's inputs, per sample. Raises as `macs` does."""
    return macs(op)


def weight_gradient_macs(op: Op) -> int:
    """MACs of the gradient with respect to the whole weight, per sample. Raises as `macs` does."""
    return macs(op) if op.is_layer else 0
