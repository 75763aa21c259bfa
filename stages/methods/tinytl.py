"""TinyTL (Cai et al., arXiv:2007.11622) and AdapterDrop (Rueckle et al., arXiv:2010.11918) as adaptation methods.

TinyTL trains lite residual modules beside the blocks of the frozen backbone; AdapterDrop-p is TinyTL without the
modules of the first p % of the blocks, as TinyTrain compares them (arXiv:2307.09988, appendix A.5). What is our reading
of it is said in `lite_residual`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.artifacts.records import LayerUpdate
from stages.cost.ops import input_gradient_macs, macs
from stages.cost.training import memory_model
from stages.engines.choice import need_torch
from stages.errors import UsageError, require
from stages.fsl.protonet import cosine_logits
from stages.graphs.graph import Graph
from stages.graphs.keeping import flow_holds
from stages.methods.lite_residual import Place, find_places, with_modules
from stages.methods.task import Answer, Cost, Task
from stages.models.deploy import Backbone
from stages.operators import Op
from stages.operators.op import ELEMENT_BYTES, Keep
from stages.planning.channels import channel_count
from stages.training.adaptation import Adapting, adapt_net
from stages.training.updates import features_of


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyTL:
    """Which modules there are, and whether biases train too."""

    drop: float = 0.0
    """Share of the blocks, from the first on, that have no module: AdapterDrop. At least one block keeps its own."""
    bias: bool = False
    """Train the biases of the backbone too, from the first block with a module on (TinyTL's "L+B")."""
    kernel: int = 5
    """Of the modules' grouped convolutions, at most."""

    def __post_init__(self) -> None:
        require(0 <= self.drop < 1, "tinytl", f"drop {self.drop}", "at least 0 and below 1")
        require(self.kernel > 0 and self.kernel % 2 == 1, "tinytl", f"kernel {self.kernel}", "a positive odd number")

    def __call__(self, backbone: Backbone, task: Task, how: Adapting, rng: np.random.Generator) -> Answer:
        """Train the modules on the support, then answer, in torch whatever engine runs the backbone.

        Raises `UsageError` where `places` does, `PartMissing` without torch.
        """
        need_torch("tinytl, adapter-drop")
        import torch

        from stages.engines.torch.face import ArrayNet
        from stages.methods.lite_residual_net import LiteResidualNet

        places = self.places(backbone.graph)
        biases = self.biases(backbone.graph, places)
        # spawned, so that the support's views are drawn as for every other method
        seed = int(rng.spawn(1)[0].integers(2**63))

        def fresh() -> ArrayNet:
            draw = torch.Generator().manual_seed(seed)
            return ArrayNet(LiteResidualNet(backbone, places, draw, biased=[update.layer for update in biases]))

        result = adapt_net(fresh, backbone.input, task.support_x, task.support_y, how, rng)
        features = features_of(result.net, task.query_x, micro_batch=how.micro_batch)
        predicted = cosine_logits(features, result.prototypes, how.scale).argmax(1)
        return Answer(predicted, biases, result.learning_rate, cost(backbone.graph, places, biases))

    def places(self, graph: Graph) -> tuple[Place, ...]:
        """The blocks with a module: the last ones. Raises `UsageError` for a net in which no block could have one."""
        places = find_places(graph, self.kernel)
        if not places:
            raise UsageError(
                "tinytl, adapter-drop",
                "a net without blocks that turn one map (C, H, W) into another",
                "blocks to put lite residual modules beside",
                "leave these methods out for other nets",
            )
        return places[-channel_count(1 - self.drop, len(places)) :]

    def biases(self, graph: Graph, places: Sequence[Place]) -> tuple[LayerUpdate, ...]:
        """Updates of the biases that train: those of the first block with a module and of all behind it."""
        if not self.bias:
            return ()
        first = graph.blocks.index(places[0].block)
        layers = [op for op in graph.layers if op.bias and (op.block >= first or op.block == -1)]
        return tuple(
            LayerUpdate(op.name, "output", (), op.out_channels, tuple(range(op.out_channels))) for op in layers
        )


def cost(graph: Graph, places: Sequence[Place], biases: Sequence[LayerUpdate] = ()) -> Cost:
    """What training the modules and these biases costs per sample.

    Backward MACs: twice each module's forward pass, less the input gradient of convolutions that read what never
    changes (the first module's), plus the input gradient of every frozen layer behind the earliest that trains.

    Memory: the named models' rules for values and buffers, every value of a module counted. Kept for backward, by the
    rule of TinyTL's own profiler: a bit per ReLU output wherever gradients flow, and for modules the inputs of their
    convolutions and norms. (Stock autograd, which runs this baseline, keeps the inputs of frozen layers too.)
    """
    whole = with_modules(graph, places)
    reached = whole.downstream({*(place.name for place in places), *(update.layer for update in biases)})
    passed_on = sum(input_gradient_macs(op) for op in whole.layers if op.inputs[0] in reached)
    modules = sum(2 * macs(op) for place in places for op in place.convolutions)
    unread = sum(macs(place.spatial) for place in places if whole[place.name].inputs[1] not in reached)
    _, own = flow_holds(whole, reached, frozenset())
    saved = sum(keep.own_bytes(whole[name], 1) for name, keep in own.items()) + sum(map(_kept_by, places))
    values = sum(place.values for place in places)
    bias_values = sum(len(update.bias) for update in biases)

    def memory(name: str) -> int:
        model = memory_model(name)
        return model.total_bytes(graph, values + model.biases * bias_values, saved, batch=1, optimizer="adam")

    return Cost(
        layers=2 * len(places) + len(biases),
        live_values=values + bias_values,
        backward_macs=passed_on + modules - unread,
        memory_bytes=memory("paper"),
        saved_bytes=memory("saved"),
    )


def _kept_by(place: Place) -> int:
    def each(op: Op) -> int:
        return ELEMENT_BYTES * (op.in_elements + op.elements)

    return sum(map(each, place.convolutions)) + Keep(bits=True).own_bytes(place.spatial, 1)
