"""A small streaming run made without commands: an MLP with a plan, a stream, and the pipeline's settings."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block, LayerUpdate, Model, Run
from stages.artifacts.stream import open_records
from stages.filtering import Filtering
from stages.models import registry
from stages.models.deploy import deploy, store
from stages.models.modules import state
from stages.pipeline import Pipeline
from stages.planning.plans import make_plan
from stages.selection import Selection
from stages.sparse_training import STREAM_OPTIMIZING, StreamTraining

DIM, WIDTH, CLASSES = 12, 16, 4
RATE = 0.05


def new_run(live: int = 1) -> Run:
    """An MLP of three layers of which the last `live` train, the very last one in part."""
    args = {"dim": DIM, "width": WIDTH, "depth": 3}
    tensors = state(registry.build("mlp", args, seed=1))
    model = Model("mlp", args, registry.input_spec("mlp", args), "batchnorm", tensors)
    backbone = deploy(model)
    names = [op.name for op in backbone.graph.layers]
    updates = [LayerUpdate(name, "output", tuple(range(WIDTH)), WIDTH, tuple(range(WIDTH))) for name in names[-live:]]
    updates[-1] = replace(updates[-1], channels=(1, 4, 7, 8), bias=(2,))
    plan = make_plan("hand", updates, backbone.graph, memory_model="paper", optimizer="sgd", facts={})
    return Run(store(model, backbone), plan=plan)


def samples(count: int, seed: int = 0) -> Block:
    """Points around one centre per class, the classes of unequal size."""
    rng = np.random.default_rng(seed)
    y = rng.choice(CLASSES, count, p=[0.4, 0.3, 0.2, 0.1])
    centres = np.random.default_rng(99).normal(size=(CLASSES, DIM))
    return Block((centres[y] + rng.normal(size=(count, DIM))).astype(np.float32), y.astype(np.int64), "ND")


def pipeline(lag: int, **changes: object) -> Pipeline:
    """The settings that the command lines of the tests give."""
    training = StreamTraining(optimizing=replace(STREAM_OPTIMIZING, learning_rate=RATE))
    settings = {"filtering": Filtering(window=20, keep=8), "selection": Selection(batch=4), "training": training}
    return Pipeline(**{**settings, **changes}, lag=lag)  # type: ignore[arg-type]


def write(directory: Path, run: Run, blocks: list[Block]) -> None:
    """`stream.h5`: the run record and the blocks; `run.h5`: the run record alone."""
    (directory / "run.h5").write_bytes(encode(run))
    (directory / "stream.h5").write_bytes(b"".join(map(encode, [run, *blocks])))


def read_run(path: Path) -> Run:
    """The run record in a file."""
    record = next(open_records(path))
    assert isinstance(record, Run)
    return record


def assert_same(found: Run, expected: Run) -> None:
    """Tensors, head, version and metrics are equal bit for bit."""
    assert found.model.version == expected.model.version
    assert found.model.tensors.keys() == expected.model.tensors.keys()
    for name, tensor in expected.model.tensors.items():
        np.testing.assert_array_equal(found.model.tensors[name], tensor, err_msg=name)
    for name in ("weight", "bias", "labels", "known"):
        np.testing.assert_array_equal(getattr(found.model.head, name), getattr(expected.model.head, name))
    ours, theirs = found.metrics["train-sparse"], expected.metrics["train-sparse"]
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
