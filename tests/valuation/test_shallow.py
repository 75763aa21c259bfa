import numpy as np
import pytest

from stages.artifacts.records import Block, InputSpec
from stages.errors import UsageError
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.operators import Op
from stages.valuation.shallow import shallow_features


def two_blocks():
    """Features (3,) -> relu, block 0 -> relu6, block 1."""
    ops = (
        Op("input", "input", (), (3,)),
        Op("blocks.0.relu", "relu", ("input",), (3,), ((3,),), block=0),
        Op("blocks.1.relu6", "relu6", ("blocks.0.relu",), (3,), ((3,),), block=1),
    )
    return Backbone(Graph(ops, ("blocks.0", "blocks.1")), {}, InputSpec("features", (3,)))


def test_shallow_features_are_the_output_of_the_first_blocks():
    block = Block(np.array([[-1.0, 2, 9]], np.float32), np.zeros(1, np.int64), "ND")
    assert shallow_features(two_blocks(), 1)(block).tolist() == [[0, 2, 9]]
    assert shallow_features(two_blocks(), 2)(block).tolist() == [[0, 2, 6]]
    with pytest.raises(UsageError, match="--blocks: 3, expected 1 to 2"):
        shallow_features(two_blocks(), 3)
