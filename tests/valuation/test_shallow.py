from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.artifacts.records import Block, InputSpec
from stages.engines.choice import Engine
from stages.engines.torch.reference import apply
from stages.errors import UsageError
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone, deploy
from stages.models.inputs import adapt
from stages.operators import Op
from stages.valuation.shallow import shallow_features
from tests.engines.protocol import on_every_engine
from tests.methods.test_methods import random_run


def two_blocks():
    """Features (3,) -> relu, block 0 -> relu6, block 1."""
    ops = (
        Op("input", "input", (), (3,)),
        Op("blocks.0.relu", "relu", ("input",), (3,), ((3,),), block=0),
        Op("blocks.1.relu6", "relu6", ("blocks.0.relu",), (3,), ((3,),), block=1),
    )
    return Backbone(Graph(ops, ("blocks.0", "blocks.1")), {}, InputSpec("features", (3,)))


@on_every_engine
def test_maps_are_flat_in_the_graphs_order(engine):
    backbone = replace(deploy(random_run().model), engine=Engine(engine))
    ops = backbone.graph.ops
    last = max(i for i, op in enumerate(ops) if op.block == 0)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (3, *backbone.graph.input_shape[1:]), dtype=np.uint8)
    found = shallow_features(backbone, 1)(Block(x, np.zeros(3, np.int64), "NHW"))
    tensors = {name: torch.from_numpy(value) for name, value in backbone.tensors.items()}
    values = {ops[0].name: torch.from_numpy(adapt(x, "NHW", backbone.input))}
    for op in ops[1 : last + 1]:
        values[op.name] = apply(op, [values[name] for name in op.inputs], tensors)
    expected = values[ops[last].name].flatten(1).numpy()
    assert expected.ndim == 2 < len(ops[last].shape)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))


def test_shallow_features_are_the_output_of_the_first_blocks():
    block = Block(np.array([[-1.0, 2, 9]], np.float32), np.zeros(1, np.int64), "ND")
    assert shallow_features(two_blocks(), 1)(block).tolist() == [[0, 2, 9]]
    assert shallow_features(two_blocks(), 2)(block).tolist() == [[0, 2, 6]]
    with pytest.raises(UsageError, match="--blocks: 3, expected 1 to 2"):
        shallow_features(two_blocks(), 3)
