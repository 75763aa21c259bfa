"""What a sample and an engine take, in bytes: what `room.fit` shares the free memory by.

The native engine's figures are what it allocates, to the byte. Torch's are the accounting's, with what was measured of
its allocator beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from stages.artifacts.records import LayerUpdate
from stages.cost.model import inference_peak_bytes
from stages.cost.training import native_memory, saved_activation_bytes
from stages.engines.choice import fisher_bytes, threads_of
from stages.graphs.keeping import value_bytes
from stages.models.deploy import Backbone

FIRST_PASS_BYTES = 100 << 20
"""What torch takes besides the samples when it first runs a net forward and backward: compiled kernels, their
workspace, pools of its allocator. Measured for MobileNetV2 at 224 x 224."""
PEAKS = 2.5
"""Peaks of inference that a sample takes on its way through torch: operands, workspace, and the copy that is freed
late. Measured as above: 2.5 with a backward pass, 1.5 without."""


@dataclass(frozen=True)
class Need:
    """Bytes beside the model's tensors and the samples as they came."""

    sample: int
    """Of each sample that is in memory at once."""
    fixed: int
    """However few they are."""


def to_infer(backbone: Backbone) -> Need:
    """For features of samples."""
    graph = backbone.graph
    if backbone.engine.name == "torch":
        return _in_torch(backbone, 0)
    memory = native_memory(graph, ())
    return Need(_input(backbone) + memory.features, memory.image + threads_of(backbone.engine) * memory.arena)


def to_train(backbone: Backbone, updates: Sequence[LayerUpdate], state: int) -> Need:
    """For micro-batches that go forward and backward through a plan, with so many values of the optimiser's state for
    each live value.

    Raises:
        DataError: the updates are not a plan for this backbone.
    """
    bits = backbone.engine.keep_bits
    if backbone.engine.name == "torch":
        return _in_torch(backbone, saved_activation_bytes(backbone.graph, updates, keep_bits=bits))
    memory = native_memory(backbone.graph, updates, bits)
    fixed = memory.image + memory.working(batch=0, workers=threads_of(backbone.engine), state=state)
    return Need(_input(backbone) + memory.sample(batch=2), fixed)


def to_inspect(backbone: Backbone, window: Collection[str]) -> Need:
    """For a Fisher pass over these layers and what is computed from them."""
    if backbone.engine.name == "torch":
        return _in_torch(backbone, fisher_bytes(backbone.engine, backbone.graph, window, 1))
    workers = threads_of(backbone.engine)
    held = [fisher_bytes(backbone.engine, backbone.graph, window, workers + more) for more in (0, 1)]
    each = held[1] - held[0]
    image = native_memory(backbone.graph, ()).image
    return Need(_input(backbone) + each, image + max(0, held[0] - workers * each))


def _in_torch(backbone: Backbone, kept: int) -> Need:
    return Need(kept + int(PEAKS * inference_peak_bytes(backbone.graph)), FIRST_PASS_BYTES)


def _input(backbone: Backbone) -> int:
    """A sample as the model takes it."""
    return value_bytes(backbone.graph, backbone.graph.ops[0].name, 1)
