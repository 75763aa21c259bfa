"""Inspect: stable keys for every record, tables from the same values, rounds of a stream."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgetrain_cli.commands.inspect_artifact import inspect_artifact
from stages.artifacts.hdf5 import encode
from stages.artifacts.records import (
    Block,
    End,
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
from stages.errors import DataError
from stages.inspecting import describe, plain, rounds, sample_range


def tiny_run() -> Run:
    """Every part of a run record, with values that can be recognised."""
    names = ("ant", "bee")
    head = Head(
        "linear", np.arange(2), np.zeros((2, 3), np.float32), np.zeros(2, np.float32), np.array([True, False]), names
    )
    tensors = {"stem.weight": np.zeros((3, 3), np.float32), "stem.bias": np.zeros(3, np.float32)}
    spec = InputSpec("image", (1, 8, 8), (1 / 255,), (-0.5,))
    return Run(
        model=Model("mlp", {"width": 3}, spec, "deploy", tensors, head, version=4),
        profile=Profile(("stem",), {"macs": np.array([2_500_000])}, {"total_macs": 2_500_000, "peak_bytes": 3 * 2**19}),
        scores=Scores(
            "fisher", ("stem",), np.array([0.25]), np.array([0.5]), (np.ones(3, np.float32),), (np.ones(3, np.float32),)
        ),
        plan=Plan(
            "greedy", (LayerUpdate("stem", "output", (0, 2), 3, (1,)),), 1536, "paper", 900, {"budget_bytes": 2048}
        ),
        metrics={"train-sparse": {"loss": np.array([2.0, 1.0, np.nan])}},
        history=(Step("profile", "0.1.0", {"measure": False}, 0, {"run.h5": "ab" * 32}),),
        extra=Group({"note": "mine"}, {}, {"lab": Group(arrays={"t": np.zeros(2)})}),
    )


def round_block(number: int, variance: float, allocation: list[int]) -> Block:
    counts = {"allocation": np.array(allocation), "seen": np.array([60, 40])}
    facts = {"strategy": "titan", "variance": variance, "variance_is": 0.5, "variance_random": 2.0}
    x = np.zeros((2, 3), np.float32)
    weights = {"weight": np.full(2, 0.5, np.float32)}
    return Block(x, np.array([0, 1]), "ND", weights, np.arange(2), ("ant", "bee"), counts, number, facts)


def save(path: Path, *records: Run | Block | End) -> Path:
    path.write_bytes(b"".join(map(encode, records)))
    return path


# --------------------------------------------------------------------------------------------------------------- values


def test_a_run_in_full() -> None:
    found = describe(tiny_run())
    assert list(found) == ["kind", "model", "profile", "scores", "plan", "metrics", "history", "extra"]
    assert found["model"]["values"] == 12
    assert found["model"]["bytes"] == 48
    assert found["model"]["head"] == {
        "kind": "linear", "classes": 2, "known": 1, "features": 3, "scale": 10.0, "labels": [0, 1],
        "names": ["ant", "bee"],
    }  # fmt: skip
    assert found["profile"]["columns"] == {"macs": [2_500_000]}
    assert found["plan"]["updates"] == [
        {"layer": "stem", "axis": "output", "live_channels": 2, "channels": 3, "live_biases": 1, "detached": False}
    ]
    loss = found["metrics"]["train-sparse"]["loss"]
    assert (loss["length"], loss["first"], loss["last"], loss["mean"]) == (3, 2.0, 1.0, 1.5)
    assert found["history"][0]["adds"] == "model in deploy form, profile"
    assert found["extra"] == ["/lab/t", "@note"]


def test_a_block_in_full() -> None:
    x = np.array([[1.0, 2.0], [np.nan, 4.0], [5.0, 0.0]], np.float32)
    columns = {"user": np.array([b"ann", b"bob", b"ann"]), "index": np.arange(3)}
    found = describe(Block(x, np.array([7, 2, 7]), "ND", columns, facts={"rate": np.int64(8)}))
    assert found["x"] == {"min": 0.0, "mean": 2.4, "max": 5.0, "bad_samples": 1}
    assert found["classes"] == [{"label": 2, "name": "2", "samples": 1}, {"label": 7, "name": "7", "samples": 2}]
    assert found["columns"]["user"]["distinct"] == 2
    assert found["columns"]["index"]["mean"] == 1.0
    assert (found["bytes"], found["facts"]) == (24, {"rate": 8})


def test_everything_can_be_written_as_json() -> None:
    records = [tiny_run(), round_block(0, np.inf, [1, 1]), End(1, {"dropped": np.int64(3)})]
    text = json.dumps([describe(record) for record in records], allow_nan=False)
    assert json.loads(text)[2] == {"kind": "end", "rounds": 1, "facts": {"dropped": 3}}
    assert plain((np.float32(0.5), np.array([1]), b"a", float("nan"))) == [0.5, [1], "a", None]


def test_sample_range_of_nothing_and_over_slices() -> None:
    assert sample_range(np.zeros((0, 3))) == {"min": None, "mean": None, "max": None, "bad_samples": 0}
    x = np.arange(1000, dtype=np.uint8)[:, None]
    assert sample_range(x) == {"min": 0, "mean": float(x.mean()), "max": 255, "bad_samples": 0}


def test_rounds_say_what_selection_gains() -> None:
    rows = rounds(map(describe, [tiny_run(), round_block(0, 0.25, [3, 1]), round_block(1, 1.0, [2, 2]), End(2)]))
    assert [row["to_random"] for row in rows] == [0.125, 0.5]
    assert [row["to_is"] for row in rows] == [0.5, 2.0]
    assert rows[0]["allocation"] == {"ant": 3, "bee": 1}


# -------------------------------------------------------------------------------------------------------------- command


def test_tables_carry_units_and_names(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    inspect_artifact(str(save(tmp_path / "run.h5", tiny_run())))
    text = capfdbinary.readouterr().out.decode()
    for word in ("mlp", "2.500", "2 of 3 output channels (67%), 1 biases", "ant, bee", "/lab/t"):
        assert word in text


def test_one_block_in_full_and_many_as_rows(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    blocks = [round_block(i, 0.5, [1, 1]) for i in range(30)]
    inspect_artifact(str(save(tmp_path / "one.h5", blocks[0])))
    one = capfdbinary.readouterr().out.decode()
    assert "weight" in one
    assert "no end mark after round 0" in one
    inspect_artifact(str(save(tmp_path / "many.h5", *blocks, End(30))))
    many = capfdbinary.readouterr().out.decode()
    assert "30 blocks, 60 samples" in many
    assert "... 10 more" in many
    assert "end of stream: 30 rounds" in many


def test_json_and_rounds_from_the_command(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    path = str(save(tmp_path / "s.h5", tiny_run(), round_block(0, 0.25, [3, 1]), End(1)))
    inspect_artifact(path, as_json=True)
    assert [one["kind"] for one in json.loads(capfdbinary.readouterr().out)["records"]] == ["run", "block", "end"]
    inspect_artifact(path, rounds=True, as_json=True)
    assert json.loads(capfdbinary.readouterr().out)["rounds"][0]["to_random"] == 0.125
    inspect_artifact(path, rounds=True)
    assert "ant:3 bee:1" in capfdbinary.readouterr().out.decode()


def test_a_broken_stream_shows_what_came_before_the_error(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = save(tmp_path / "s.h5", round_block(0, 0.25, [3, 1]), round_block(1, 0.25, [3, 1]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"s\.h5\[1\]"):
        inspect_artifact(str(path))
    assert "titan" in capfdbinary.readouterr().out.decode()
