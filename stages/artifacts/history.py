"""What ran on a run record, and which run a record belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from stages.artifacts.codec import model_tree
from stages.artifacts.hdf5 import encode, encode_tree
from stages.artifacts.records import Json, Run, Step


def with_step(run: Run, command: str, version: str, arguments: Mapping[str, Json], inputs: Mapping[str, str]) -> Run:
    """The run with one more entry in its history; the seed is told apart from the other arguments."""
    others = {name: value for name, value in arguments.items() if name != "seed"}
    step = Step(command=command, version=version, arguments=others, seed=arguments.get("seed"), inputs=dict(inputs))
    return replace(run, history=(*run.history, step))


def run_hash(run: Run) -> str:
    """SHA-256 of the run record's image, hexadecimal."""
    return sha256(encode(run)).hexdigest()


def model_hash(run: Run) -> str:
    """SHA-256 of the model part alone: stays the same while stages add profile, scores and history.

    It names the starting point of a streaming run, so that versions of another run are told apart.
    """
    return sha256(encode_tree(model_tree(run.model))).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
