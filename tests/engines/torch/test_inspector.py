"""What torch's Fisher pass keeps between its ways, and that it takes arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from stages.engines.torch.inspector import Inspector, backward, fisher_bytes, forward, kept_names
from stages.errors import DataError
from tests.importance.nets import INPUT, deployed, mixed
from tests.rounding import as_tensors

SAMPLES = 6
BACKBONE = deployed(mixed())
TENSORS = as_tensors(BACKBONE.tensors)
ALL = tuple(op.name for op in BACKBONE.graph.layers)


def inputs(samples=SAMPLES):
    return torch.randn(samples, *INPUT.shape, generator=torch.Generator().manual_seed(0))


class Storages(TorchDispatchMode):
    """Remembers, without keeping it alive, every storage that any operator returns, weights excepted."""

    def __init__(self, weights):
        super().__init__()
        self.seen, self.weights = {}, {tensor.data_ptr() for tensor in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in self.weights:
                    self.seen[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive_bytes(self):
        return sum(size for reference, size in self.seen.values() if not reference.expired())


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("first", range(len(ALL)))
def test_between_the_passes_exactly_the_predicted_bytes_live(first, micro_batch):
    graph, window = BACKBONE.graph, frozenset(ALL[first:])
    with Storages(TENSORS.values()) as storages:
        x = inputs(micro_batch).clone()  # made here, so that it is counted if it is kept
        features, kept = forward(graph, TENSORS, x, frozenset(kept_names(graph, window)))
        expected = fisher_bytes(graph, window, micro_batch)
        del x
        assert kept.keys() >= set(ALL[first:])
        assert storages.alive_bytes() == expected + features.nbytes


def test_the_way_back_saves_nothing_large_with_autograd():
    """What stock autograd saves while layers are walked through is one operator's, never the network's."""
    x = inputs()
    graph, window = BACKBONE.graph, frozenset(ALL)
    features, kept = forward(graph, TENSORS, x, frozenset(kept_names(graph, window)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        layers = [seen.op.name for seen in backward(graph, TENSORS, kept, window, torch.ones_like(features))]
    assert layers == list(reversed(ALL))
    assert max(saved, default=0) <= max(4 * SAMPLES * op.elements for op in graph.ops)


def test_gradients_come_once_and_in_the_features_shape():
    inspector = Inspector(BACKBONE.graph, BACKBONE.tensors, ALL[-2:])
    x = inputs().numpy()
    x.flags.writeable = False
    features = inspector.features(x)
    with pytest.raises(DataError, match="gradient at the features"):
        inspector.sums(features[1:])
    sums = inspector.sums(np.ones_like(features))
    assert sums.keys() == set(ALL[-2:])
    assert all(array.shape[0] == SAMPLES and array.dtype == np.float32 for pair in sums.values() for array in pair)
    with pytest.raises(DataError, match="features"):
        inspector.sums(np.ones_like(features))
    with pytest.raises(DataError, match="model input"):
        inspector.features(x[:, 1:])
