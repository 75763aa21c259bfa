"""Counting rules, one row per operator kind: integers computed from shapes, per sample, without torch.

One multiply-accumulate is one MAC. Convolutions and linear layers are counted, padding included (as fvcore and
TinyTrain count); activations, pooling, additions and the optimiser are not. Tensors are float32: 4 bytes per element.
The backward pass of a layer is its input gradient (where something before it trains) plus its weight gradient (where
it trains itself); each costs as many MACs as the forward pass, so training everything costs twice the forward pass
(TinyTrain, arXiv:2307.09988, appendix A.4, after Xu et al. 2022).

An operator without a rule is an error that names it, never a silent zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from stages.errors import UsageError
from stages.models.graph import Op

ELEMENT_BYTES = 4
"""Weights, activations, gradients and optimiser state are float32."""


def layer_macs(op: Op) -> int:
    """MACs of a convolution or linear layer: every weight is used once per output position."""
    return op.weights * prod(op.shape[1:])


@dataclass(frozen=True, slots=True)
class Rule:
    """What one operator kind costs: MACs forward, for the gradient of its input, for the gradient of its weight."""

    macs: Callable[[Op], int]
    input_gradient_macs: Callable[[Op], int]
    weight_gradient_macs: Callable[[Op], int]


RULES: Mapping[str, Rule] = {
    "conv": Rule(layer_macs, layer_macs, layer_macs),
    "linear": Rule(layer_macs, layer_macs, layer_macs),
}

FREE: Mapping[str, str] = {
    "input": "computes nothing",
    "batchnorm": "folded into the layer before it in deploy form",
    "relu": "a comparison per element, no multiplication",
    "relu6": "two comparisons per element, no multiplication",
    "add": "an addition per element, no multiplication",
    "concat": "a copy",
    "flatten": "a view",
    "max_pool": "comparisons, no multiplication",
    "avg_pool": "additions and one multiplication per output; not a multiply-accumulate by a weight",
    "global_pool": "additions and one multiplication per channel; not a multiply-accumulate by a weight",
}
"""Operator kinds that count as zero MACs, each with the reason."""


def bit_mask_bytes(op: Op, batch: int) -> int:
    """One bit per output element of the whole batch, packed into bytes."""
    return -(-batch * op.elements // 8)


def window_index_bytes(op: Op, batch: int) -> int:
    """One byte per output element: the position of the maximum inside its window."""
    return batch * op.elements


KEPT: Mapping[str, Callable[[Op, int], int]] = {
    "relu": bit_mask_bytes,
    "relu6": bit_mask_bytes,
    "max_pool": window_index_bytes,
}
"""What an operator through which gradients flow keeps for the backward pass, in bytes; kinds not listed keep nothing
(a live layer's input is the layer's own matter: see `training.kept_input`)."""


def macs(op: Op) -> int:
    """Forward MACs of one operator, per sample.

    Raises:
        UsageError: the operator's kind has no rule.
    """
    return _count(op, lambda rule: rule.macs)


def input_gradient_macs(op: Op) -> int:
    """MACs of the gradient with respect to the operator's input, per sample. Raises as `macs` does."""
    return _count(op, lambda rule: rule.input_gradient_macs)


def weight_gradient_macs(op: Op) -> int:
    """MACs of the gradient with respect to the whole weight, per sample. Raises as `macs` does."""
    return _count(op, lambda rule: rule.weight_gradient_macs)


def kept_bytes(op: Op, batch: int) -> int:
    """Bytes that the operator keeps for a batch's backward pass when gradients flow through it."""
    rule = KEPT.get(op.kind)
    return rule(op, batch) if rule else 0


def _count(op: Op, part: Callable[[Rule], Callable[[Op], int]]) -> int:
    if op.kind in FREE:
        return 0
    if op.kind not in RULES:
        raise UsageError(
            f"operator {op.name}",
            f"no cost rule for kind {op.kind!r}",
            "one of " + ", ".join(RULES),
            "add a rule to stages/cost/ops.py, or list the kind in FREE with a reason",
        )
    return part(RULES[op.kind])(op)
