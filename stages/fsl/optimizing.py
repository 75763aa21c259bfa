"""What steps while a backbone is meta-trained: SGD, or AdamW with rates that fall towards the input, as transformers
are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stages.artifacts.records import Array, Group
from stages.fsl.slicing import Part, SlicedSGD
from stages.graphs.graph import Graph
from stages.models.modules import Net

if TYPE_CHECKING:
    from stages.fsl.meta_training import Learner

SHARE = "share"
"""Key of a parameter group: which share of the scheduled rate it takes."""


def depth(graph: Graph, operator: str) -> int:
    """How deep an operator lies: 0 of a stem, b + 1 of block b, L + 1 of what follows the last of L blocks."""
    op, count = graph[operator], len(graph.blocks)
    if op.block < 0:
        behind = any(each.block >= 0 for each in graph.ops[: graph.position[operator]])
        return count + 1 if behind or not count else 0
    stem = op.block == 0 and not f"{operator}.".startswith(f"{graph.blocks[0]}.")
    return 0 if stem else op.block + 1


def shares(graph: Graph, decay: float) -> dict[str, float]:
    """Tensor name -> share of the rate: decay^(L + 1 - depth) (BEiT, arXiv:2106.08254, appendix; BSR's DeiT script)."""
    last = len(graph.blocks) + 1
    return {
        f"{op.name}.{what}": decay ** (last - depth(graph, op.name))
        for op in graph.ops
        for what in op.operator.tensors(op)
    }


class AdamW(torch.optim.AdamW):
    """torch's, in groups by share and by whether weights decay: vectors (biases, norms) and the scale do not."""

    kept: Mapping[int, Part]
    """Nothing: AdamW leaves no channels out."""

    def __init__(self, learner: Learner, *, weight_decay: float, layer_decay: float) -> None:
        backbone = learner.backbone
        assert isinstance(backbone, Net)
        by_name = shares(backbone.graph, layer_decay)
        share = {id(value): by_name[name] for name, value in backbone.values().items()}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for parameter in learner.parameters():
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((share.get(id(parameter), 1.0), decay), []).append(parameter)
        rows = [{"params": group, SHARE: key[0], "weight_decay": key[1]} for key, group in groups.items()]
        super().__init__(rows, lr=0.0)
        self.kept = {}


Optimizer = SlicedSGD | AdamW


def make_optimizer(
    name: str, learner: Learner, *, momentum: float, weight_decay: float, layer_decay: float
) -> Optimizer:
    """`sgd` or `adamw` over the learner's parameters; `set_rate` sets its rate."""
    if name == "adamw":
        return AdamW(learner, weight_decay=weight_decay, layer_decay=layer_decay)
    return SlicedSGD(list(learner.parameters()), momentum=momentum, weight_decay=weight_decay)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the rate, of each group its share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(SHARE, 1.0)


# ------------------------------------------------------------------------------------------------------- over a restart


def optimizer_state(optimizer: Optimizer, learner: Learner) -> Group:
    """What the optimiser remembers: a group per quantity, an array per parameter."""
    found: dict[str, dict[str, Array]] = {}
    for name, parameter in learner.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if value is not None:
                found.setdefault(key, {})[name] = np.atleast_1d(value.cpu().numpy())
    return Group(groups={key: Group(arrays=arrays) for key, arrays in found.items()})


def load_optimizer(
    optimizer: Optimizer, learner: Learner, state: Group, read: Callable[[Group, str, tuple[int, ...]], Array]
) -> None:
    """Go on from `optimizer_state`; `read` takes an array of a shape from a group, or raises."""
    for name, parameter in learner.named_parameters():
        for key, group in state.groups.items():
            if name in group.arrays:
                shape = () if key == "step" else tuple(parameter.shape)
                value = torch.from_numpy(read(group, name, shape))
                optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
