"""What every registered stage promises, checked as processes over all of them."""

from dataclasses import replace

import numpy as np
import pytest

from edgetrain_cli.app import COMMANDS, STAGES
from stages.artifacts.hdf5 import encode
from stages.artifacts.history import file_hash
from stages.artifacts.records import Block, End, Group, Run
from stages.artifacts.stream import open_records

LINES = {
    "pretrain-fsl": "edgetrain pretrain-fsl --init marked.h5 test.h5 --epochs 1 --steps 2 --ways 2 --shots 1 "
    "--queries 2 --validation-tasks 0 -q",
    "profile": "edgetrain profile marked.h5 --no-measure -q",
    "score-layers": "edgetrain score-layers marked.h5 --support support.h5 --memory 64KB --macs 60% -q",
    "filter": "cat marked.h5 stream.h5 | edgetrain filter -q",
    "select": "cat marked.h5 stream.h5 | edgetrain select -q",
    "train-sparse": "edgetrain train-sparse marked.h5 support.h5 --iterations 2 --lr 0.001 -q",
}
PLACES_AND_MANNERS = {
    "source", "support", "run_file", "out", "live", "resume", "checkpoint", "metrics", "plot",
    "quiet", "as_json", "only_json", "cpus", "history", "max_record",
}  # fmt: skip
"""Arguments that say where from, where to and how loud: inputs are in the history by their hashes."""
FIRST_OF_RUN = {"pretrain-fsl": "base.h5"}
"""Where a stage cannot go on from the planned run: what it starts from instead."""


def test_all_six_stages_are_registered():
    assert set(LINES) == set(STAGES)
    assert len(STAGES) == 6
    assert set(STAGES) <= set(COMMANDS)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_keeps_its_promises(shell, stage):
    start = next(open_records(shell.directory / FIRST_OF_RUN.get(stage, "run.h5")))
    notes = Group({"author": "me"}, {"page": np.array([b"a note"])})
    marked = replace(start, extra=Group({"lab": "B12"}, {}, {"notes": notes}))
    before = encode(marked)
    (shell.directory / "marked.h5").write_bytes(before)

    result = shell(f"{LINES[stage]} > once.h5 && {LINES[stage]} > twice.h5 && {LINES[stage]} --no-history > bare.h5")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stderr == b"", "quiet is quiet"
    assert (shell.directory / "marked.h5").read_bytes() == before, "the input is left alone"
    once, twice = ((shell.directory / name).read_bytes() for name in ("once.h5", "twice.h5"))
    assert once == twice, "the same inputs and seed give the same bytes"

    run, *blocks = open_records(shell.directory / "once.h5")
    assert isinstance(run, Run)
    assert run.extra.attrs["lab"] == "B12", "unknown attributes are carried through"
    assert run.extra.groups["notes"].arrays["page"][0] == b"a note", "unknown groups too"
    assert len(run.history) == len(start.history) + 1
    assert run.history[-1].command == stage
    assert all(len(digest) == 64 for digest in run.history[-1].inputs.values())
    assert PLACES_AND_MANNERS.isdisjoint(run.history[-1].arguments), "only what affects the result"
    bare = next(open_records(shell.directory / "bare.h5"))
    assert bare.history == start.history
    check_rounds(blocks, rounds=stage in ("filter", "select"))


def test_inputs_of_one_name_are_both_in_the_history(shell):
    """a/same.h5 and b/same.h5 are two files; one file read twice is one."""
    result = shell(
        """set -e
        mkdir a b && cp profiled.h5 a/same.h5 && cp support.h5 b/same.h5
        edgetrain score-layers a/same.h5 --support b/same.h5 --memory 64KB --macs 60% -q -o out.h5
        """
    )
    assert result.returncode == 0, result.stderr.decode()
    inputs = next(open_records(shell.directory / "out.h5")).history[-1].inputs
    hashes = {file: file_hash(shell.directory / file) for file in ("a/same.h5", "b/same.h5")}
    assert inputs == {"same.h5": hashes["a/same.h5"], "same.h5 (2)": hashes["b/same.h5"]}


def check_rounds(blocks, *, rounds: bool) -> None:
    """A stream of rounds is numbered, weighted, counted per class, and closed; other stages emit the run alone."""
    if not rounds:
        assert blocks == []
        return
    *batches, end = blocks
    assert isinstance(end, End)
    assert end.rounds == len(batches) == 3
    for number, batch in enumerate(batches):
        assert isinstance(batch, Block)
        assert batch.round == number
        assert batch.columns["weight"].dtype == np.float32
        assert len(batch.columns["index"]) == len(batch)
