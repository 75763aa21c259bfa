"""The plain interpreter of a `Graph`: the table's torch rules, one after the other.

It is differentiable where the tensors require gradients, so it also serves as the dense oracle of the sparse engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from stages.graphs.graph import Graph, last_readers
from stages.operators import Op
from stages.operators.op import Forward

NO_RULES: Mapping[str, Forward] = {}
"""No operator has a rule of its own: all have their kind's."""


def run(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    x: Tensor,
    *,
    training: bool = False,
    rules: Mapping[str, Forward] = NO_RULES,
) -> Tensor:
    """Output of the last operator for x (N, *graph.input_shape).

    Outputs are dropped after their last use. `training` takes the rules of meta-training (BatchNorm by the batch's own
    statistics, which it collects in place), `rules` those of single operators by name in place of their kind's. Raises
    `DataError` for an input of another shape.
    """
    graph.check_input(x.shape)
    values = {graph.ops[0].name: x}
    for op, dropped in zip(graph.ops[1:], last_readers(graph.ops[1:], {graph.output}), strict=True):
        inputs, own = [values[name] for name in op.inputs], rules.get(op.name)
        values[op.name] = own(op, inputs, tensors) if own else apply(op, inputs, tensors, training=training)
        for name in dropped:
            del values[name]
    return values[graph.output]


def apply(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor], *, training: bool = False) -> Tensor:
    """One operator on its inputs (N, *shape); its tensors are `tensors[f"{op.owner}.weight"]` and so on."""
    operator = op.operator
    rule = operator.forward_training if training and operator.forward_training is not None else operator.forward
    return rule(op, inputs, tensors)
