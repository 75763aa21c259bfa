"""Small records of both kinds."""

import numpy as np
import pytest

from stages.artifacts.records import (
    Block,
    Group,
    Head,
    InputSpec,
    LayerUpdate,
    Model,
    Plan,
    Profile,
    Run,
    Scores,
    Step,
)


@pytest.fixture
def block() -> Block:
    return Block(
        x=np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4),
        y=np.array([0, 1, 2, 0, 1, 2]),
        layout="NHW",
        columns={"weight": np.full(6, 1 / 6, np.float32), "drawer": np.arange(6)},
        labels=np.arange(3),
        names=("a", "b", "é"),
        per_class={"seen": np.array([5, 6, 7]), "allocation": np.array([1, 2, 3])},
        round=4,
        facts={"variance": 0.5, "strategy": "titan"},
        extra=Group(arrays={"speakers": np.array([b"x", b"yy"])}),
    )


@pytest.fixture
def run() -> Run:
    tensors = {"stem.weight": np.ones((2, 1, 3, 3), np.float32), "temperature": np.array(3.0, np.float32)}
    head = Head(
        "linear",
        np.arange(2),
        np.ones((2, 4), np.float32),
        np.zeros(2, np.float32),
        np.array([True, False]),
        ("yes", "no"),
    )
    return Run(
        model=Model("cnn4", {"width": 3}, InputSpec("image", (1, 8, 8)), "deploy", tensors, head, 7),
        profile=Profile(("stem",), {"macs": np.array([12])}, {"threads": 2, "energy": "unavailable"}),
        scores=Scores(
            "score",
            ("stem", "mix"),
            np.ones(2),
            np.ones(2),
            (np.ones(2, np.float32), np.ones(3, np.float32)),
            (np.ones(1, np.float32), np.ones(2, np.float32)),
        ),
        plan=Plan(
            "greedy",
            (LayerUpdate("stem", "output", (1,), 2, (0, 1), detached=True),),
            100,
            "paper",
            50,
            {"optimum": 1.5},
        ),
        metrics={"train-sparse": {"loss": np.array([2.0, 1.0])}},
        history=(Step("profile", "0.1.0", {"measure": False}, 0, {"base.h5": "ab"}),),
        extra=Group({"lab": "B12"}, {}, {"notes": Group(arrays={"page": np.array([b"text"])})}),
    )
