"""Compile an exported program and compare it with training in Python, bit for bit."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from stages.bare_metal.live_file import read_live
from stages.bare_metal.program import Source
from stages.bare_metal.samples import Batched, model_input
from stages.errors import DataError, PartMissing
from stages.models import heads
from stages.training.learner import StreamLearner
from stages.training.optimizers import Optimizing

TRIAL_SAMPLES = 8


@dataclass(frozen=True)
class Trial:
    """What the comparison found."""

    updates: int
    samples: int
    largest_difference: float
    """Of a live value or the head's; 0: bit for bit."""
    right: int
    """Samples that the program answers as Python does, after training."""


def compiler(first: str | None = None) -> str:
    """A C compiler, `first` where it is there. Raises `PartMissing` where there is none."""
    for name in (first, "cc", "gcc", "clang"):
        if name and shutil.which(name.split()[0]):
            return name
    raise PartMissing("--check", "no C compiler", "cc, gcc, clang or $CC", "leave --check out: exporting needs none")


def try_program(
    files: Mapping[str, bytes], source: Source, how: Optimizing, lots: Sequence[Batched], cc: str | None = None
) -> Trial:
    """Build the program for this machine with the same bits as Python, train both on the same batches, and compare.

    Args:
        source: made with `same_bits`.
        cc: the compiler, if it is there.

    Raises:
        PartMissing: no C compiler, or make.
        DataError: it does not compile, or ends with an error.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        if shutil.which("make") is None:
            raise PartMissing("--check", "no make", "GNU make beside the C compiler", "leave --check out")
        _run(["make", "-s", "-C", name, f"CC={compiler(cc)}", "-j", "BITS=same", "CFLAGS=-O0"], b"")
        samples = b"".join(lot.encode() for lot in lots)
        program, live = str(folder / "network"), str(folder / "live.bin")
        _run([program, "train", live], samples)
        slot = read_live((folder / "live.bin").read_bytes(), source, live)
        answers = _run([program, "predict", live], samples).decode().splitlines()
    learner = StreamLearner(source.backbone, source.updates, source.head, how)
    for lot in lots:
        learner.update(lot.batch(source))
    head = learner.head()
    mine = np.concatenate([*(p.value.ravel() for p in learner.net.parameters()), head.weight.ravel(), head.bias])
    theirs = np.concatenate([slot.live, slot.head])
    x = np.concatenate([model_input(lot.values, source.backbone.input) for lot in lots])
    best = heads.logits(head, learner.net.features(x)).argmax(1)
    names = head.names or [str(label) for label in head.labels.tolist()]
    right = sum(names[row] == answer.split("\t")[0] for row, answer in zip(best, answers, strict=True))
    same = mine.shape == theirs.shape and np.array_equal(mine.view(np.int32), theirs.view(np.int32))
    largest = 0.0 if same else float(np.abs(mine - theirs).max())
    return Trial(len(lots), len(x), largest, right)


def _run(command: Sequence[str], data: bytes) -> bytes:
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise DataError(f"--check: {Path(command[0]).name}", f"exit code {done.returncode}: {last}", "0")
    return done.stdout
