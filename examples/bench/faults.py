"""Kill -9 of a random stage at a random moment, hundreds of times: the rest must end, say why, and lose nothing.

    python examples/bench/faults.py --kills 300

Each trial runs filter | select | train-sparse on one stream as forks of this process, kills one of them, and checks:
the others end within --limit seconds of it with a message; every version in the live directory is whole; a trainer that
survives has written the model after its last good update; and the run goes on from its checkpoint to the very bytes of
an undisturbed one. The result is one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetrain_cli.app import register
from edgetrain_cli.commands.run import run_words
from edgetrain_cli.launch import preload, start
from stages.artifacts.hdf5 import encode
from stages.artifacts.history import model_hash
from stages.artifacts.live import LiveDirectory
from stages.artifacts.records import Block, Model, Run
from stages.artifacts.stream import open_records
from stages.models import registry
from stages.models.deploy import deploy, state, store
from stages.planning.baselines import named_plan
from stages.planning.plans import make_plan

STAGES = ("filter", "select", "train-sparse")
WINDOW = 20
ARGS = {"dim": 12, "width": 16, "depth": 3}


@dataclass(frozen=True)
class Trial:
    """How one pipeline ended."""

    codes: dict[str, int]
    """Stage -> exit code, minus the signal for one that was killed."""
    seconds: float
    """From the kill to the end of the last stage."""
    messages: str


def commands(stream: Path, folder: Path, *, resume: bool) -> list[list[str]]:
    """The stages' command lines, in a folder of their own."""
    live, check = ["--live", str(folder / "live")], str(folder / "check.h5")
    again = ["--resume", check] if resume else []
    return [
        ["filter", str(stream), "--window", str(WINDOW), "--keep", "8", "-q"],
        ["select", "--batch", "4", *live, *again, "-q"],
        ["train-sparse", *live, "--checkpoint", check, "--checkpoint-every", "3", *again, "-q", "-o",
         str(folder / "out.h5")],
    ]  # fmt: skip


def pipeline(lines: list[list[str]], log: Path, kill: tuple[str, float] | None = None) -> Trial:
    """Run the stages as forks; kill one of them after so many seconds."""
    own = os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        names = {pid: lines[position][0] for pid, position in start(lines, run_words).items()}
    finally:
        os.dup2(own, 2)
        os.close(own)
    if kill is not None:
        victim = next(pid for pid, name in names.items() if name == kill[0])
        time.sleep(kill[1])
        os.kill(victim, signal.SIGKILL)
    killed_s = time.perf_counter()
    codes = {}
    for _ in names:
        pid, status = os.wait()
        codes[names[pid]] = os.waitstatus_to_exitcode(status)
    return Trial(codes, time.perf_counter() - killed_s, log.read_text())


def problems(trial: Trial, victim: str, folder: Path, model: str, limit_s: float) -> list[str]:
    """What is not as it should be after a kill."""
    found = []
    if trial.seconds > limit_s:
        found.append(f"the rest took {trial.seconds:.1f} s to end")
    if "Traceback" in trial.messages or 70 in trial.codes.values():
        found.append("an internal error")
    if trial.codes["train-sparse"] not in (0, 65, -signal.SIGKILL):
        found.append(f"train-sparse ended with {trial.codes['train-sparse']}")
    if trial.codes[victim] == -signal.SIGKILL and victim != "train-sparse":
        if trial.codes["train-sparse"] == 65 and not trial.messages:
            found.append("no message")
        if re.search(r"after \d+ updates", trial.messages) and not (folder / "out.h5").exists():
            found.append("the model is lost")
    if (folder / "out.h5").exists() and not isinstance(next(open_records(folder / "out.h5")), Run):
        found.append("the output is no run record")
    live = LiveDirectory(folder / "live", model)
    for number in live.numbers() if live.path.exists() else []:
        if live.read(number) is None:
            found.append(f"version {number} vanished")
    return found


def completed(stream: Path, folder: Path) -> bytes:
    """Go on from the checkpoint, or from the start where there is none yet; the bytes of the result."""
    resume = (folder / "check.h5").exists()
    if not resume:
        for file in (folder / "live").glob("*"):
            file.unlink()
    trial = pipeline(commands(stream, folder, resume=resume), folder / "again.log")
    if any(trial.codes.values()):
        raise SystemExit(f"resuming failed: {trial.codes} {trial.messages}")
    return (folder / "out.h5").read_bytes()


def made_stream(folder: Path, rounds: int) -> tuple[Path, str]:
    """A small model and a stream for it; the file, and the model's hash."""
    spec = registry.input_spec("mlp", ARGS)
    model = Model("mlp", ARGS, spec, "batchnorm", state(registry.build("mlp", ARGS)))
    backbone = deploy(model)
    updates = named_plan("last-layer", backbone.graph)
    plan = make_plan("last-layer", updates, backbone.graph, memory_model="paper", optimizer="sgd", facts={})
    run = Run(store(model, backbone), plan=plan)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, WINDOW * rounds)
    x = rng.normal(size=(len(y), ARGS["dim"])) + rng.normal(size=(4, ARGS["dim"]))[y]
    file = folder / "stream.h5"
    file.write_bytes(encode(run) + encode(Block(x.astype(np.float32), y, "ND")))
    return file, model_hash(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds in which the rest must end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    register()
    preload()
    importlib.import_module("torch._dynamo")  # torch's optimisers import it when first used, which takes a second
    chance, counts, failures, slowest = random.Random(options.seed), Counter(), [], 0.0
    with tempfile.TemporaryDirectory() as name:
        stream, model = made_stream(Path(name), options.rounds)
        whole = Path(name) / "whole"
        whole.mkdir()
        began = time.perf_counter()
        expected = completed(stream, whole)
        length_s = time.perf_counter() - began
        for number in range(options.kills):
            folder = Path(name) / str(number)
            folder.mkdir()
            victim = chance.choice(STAGES)
            trial = pipeline(
                commands(stream, folder, resume=False), folder / "log", (victim, chance.uniform(0, length_s))
            )
            wrong = problems(trial, victim, folder, model, options.limit)
            hit = trial.codes[victim] == -signal.SIGKILL
            if hit and completed(stream, folder) != expected:
                wrong.append("the resumed run differs from the undisturbed one")
            counts[victim if hit else "too late"] += 1
            slowest = max(slowest, trial.seconds if hit else 0.0)
            failures += [f"kill {number} of {victim}: {text}: {trial.messages.strip()}" for text in wrong]
    print(json.dumps({"kills": dict(counts), "slowest_end_s": round(slowest, 3), "failures": failures}))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
