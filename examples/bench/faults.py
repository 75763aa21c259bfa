"""Faults at random moments of a live pipeline, hundreds of them: the rest must end, say why, and lose nothing.

    python examples/bench/faults.py            # writes docs/results/faults.md
    python examples/bench/faults.py --quick    # a dozen, printed only

Each trial runs source | filter | select | train-sparse on the digits model as forks of this process, lets one thing go
wrong at a random moment (`FAULTS`), and checks: all have ended within --limit seconds with the exit codes that
docs/live-pipeline.md names; the trainer says that it ended well only with the very bytes of an undisturbed run, and
else there is a message; every version in the live directory is whole; a trainer that was not killed has written the
model after its last good update; and the run goes on from its checkpoint to the undisturbed run's bytes, even where
the resumed run is disturbed again.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # read when torch is imported; a fork cannot use threads that its parent has started
)

import argparse
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median

import numpy as np

from edgetrain_cli.app import raise_on_signals
from edgetrain_cli.commands.run import run_words
from edgetrain_cli.launch import preload, start
from stages.artifacts.hdf5 import encode
from stages.artifacts.history import model_hash
from stages.artifacts.live import LiveDirectory
from stages.artifacts.records import Block, Model, Run
from stages.artifacts.stream import open_records
from stages.errors import DataError
from stages.models import registry
from stages.models.deploy import deploy, store
from stages.models.modules import state
from stages.planning.baselines import named_plan
from stages.planning.plans import make_plan

ROOT = Path(__file__).parents[2]
STAGES = ("filter", "select", "train-sparse")
WINDOW = 20
ARCH, ARGS, SHAPE, CLASSES, PLAN = "cnn4", {"width": 8}, (28, 28), 4, "last-2"
KILLED, BROKEN, NO_READER, DISK = -signal.SIGKILL, 65, -signal.SIGPIPE, 74
ENDED_BY = {signal.SIGTERM: 143, signal.SIGINT: 130}
SMALL_BYTES = 6000
"""Less than any version of the model, more than what a trainer tells in its metrics and on stderr."""
AGAIN = 0.25
"""Share of the resumed runs that are disturbed once more."""


# --------------------------------------------------------------------------------------------------------- one pipeline


@dataclass
class Pipeline:
    """A pipeline that is under way, in a folder of its own."""

    folder: Path
    source: int
    """Process that feeds the stream."""
    stages: dict[str, int]
    """Stage -> process."""
    codes: dict[str, int] = field(default_factory=dict)
    """Stage -> exit code, minus the signal for one that was killed; as they end."""
    planted: int = 0
    """The version in whose place somebody put a bad file."""

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a stage; nothing if it has ended."""
        os.kill(self.source if name == "source" else self.stages[name], number)  # a zombie until `wait` takes note

    def rounds(self, name: str) -> int:
        """How many rounds a stage has told about."""
        file = self.folder / f"{name}.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def wait(self) -> float:
        """Until all have ended; seconds that took."""
        began_s = time.perf_counter()
        names = {pid: name for name, pid in self.stages.items()}
        while len(self.codes) < len(names):
            pid, status = os.wait()
            if pid in names:
                self.codes[names[pid]] = os.waitstatus_to_exitcode(status)
            else:
                self.source = 0
        seconds = time.perf_counter() - began_s
        if self.source:
            os.kill(self.source, signal.SIGKILL)
            os.waitpid(self.source, 0)
        return seconds

    @property
    def messages(self) -> str:
        """What the stages wrote on stderr."""
        return (self.folder / "log").read_text()


def launch(stream: Path, folder: Path, *, resume: bool = False, falls_silent_at: int | None = None) -> Pipeline:
    """Start the source and the three stages. The source falls silent after so many bytes."""
    for name in STAGES:
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
    reading, writing = os.pipe()
    source = os.fork()
    if source == 0:
        feed(stream, writing, falls_silent_at)
    os.close(writing)
    own = os.dup(0), os.dup(2)
    log = os.open(folder / "log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
    os.dup2(reading, 0)
    os.dup2(log, 2)
    try:
        lines = commands(folder, resume=resume)
        stages = {lines[position][0]: pid for pid, position in start(lines, run_words).items()}
    finally:
        for descriptor, kept in zip((0, 2), own, strict=True):
            os.dup2(kept, descriptor)
        for descriptor in (*own, log, reading):
            os.close(descriptor)
    return Pipeline(folder, source, stages)


def feed(stream: Path, descriptor: int, falls_silent_at: int | None) -> None:
    """In the source: write the stream, or a part of it and nothing more."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    data = memoryview(stream.read_bytes())[:falls_silent_at]
    while data:
        data = data[os.write(descriptor, data[: 1 << 16]) :]
    if falls_silent_at is not None:
        signal.pause()
    os._exit(0)


def commands(folder: Path, *, resume: bool) -> list[list[str]]:
    """The stages' command lines."""
    live, check = ["--live", str(folder / "live")], str(folder / "check.h5")
    again = ["--resume", check] if resume else []
    told = {name: ["--metrics", str(folder / f"{name}.jsonl"), "-q"] for name in STAGES}
    return [
        ["filter", "--window", str(WINDOW), "--keep", "8", *told["filter"]],
        ["select", "--batch", "4", *live, *again, *told["select"]],
        ["train-sparse", *live, "--checkpoint", check, "--checkpoint-every", "3", *again, *told["train-sparse"],
         "-o", str(folder / "out.h5")],
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- faults


Act = Callable[[Pipeline, random.Random], None]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, and how the stages may then end."""

    name: str
    act: Act
    codes: Mapping[str, Sequence[int]]
    """Stage -> exit codes beside 0, for a stage that had finished. Whatever comes first decides for its neighbours."""
    says: str
    """What one of the stages must write on stderr, unless the trainer had all it needed; empty where nobody is left to
    say it."""
    at_round: bool = False
    """Strikes right after a stage has passed a block on, not at any moment."""
    silent: bool = False
    """The source falls silent somewhere; the fault is how that is ended."""


def kill(victim: str) -> Act:
    return lambda pipeline, chance: pipeline.signal(victim, signal.SIGKILL)


def fill_disk(pipeline: Pipeline, chance: random.Random) -> None:
    """From now on the trainer's files must be small: versions, checkpoints and the model do not fit, messages do."""
    while not pipeline.rounds("train-sparse") and not (pipeline.folder / "out.h5").exists():
        time.sleep(0.001)
    resource.prlimit(pipeline.stages["train-sparse"], resource.RLIMIT_FSIZE, (SMALL_BYTES, SMALL_BYTES))


def plant(kind: str) -> Act:
    """Put a bad file where a version is about to be read."""

    def act(pipeline: Pipeline, chance: random.Random) -> None:
        live = LiveDirectory(pipeline.folder / "live", "")
        while not (numbers := live.numbers()) and not (pipeline.folder / "out.h5").exists():
            time.sleep(0.001)
        if not numbers:
            return
        try:
            good = (live.path / f"{numbers[-1]}.h5").read_bytes()
        except FileNotFoundError:  # the run has just ended well
            return
        pipeline.planted = numbers[-1] + 2
        bad = good[: len(good) // 2] if kind == "half" else chance.randbytes(len(good))
        (live.path / f"{pipeline.planted}.h5").write_bytes(bad)

    return act


def end_all(number: int) -> Act:
    """What `edgetrain run` does with Ctrl-C."""

    def act(pipeline: Pipeline, chance: random.Random) -> None:
        for name in STAGES:
            pipeline.signal(name, number)

    return act


_UPSTREAM = {"filter": (NO_READER, BROKEN), "select": (NO_READER, BROKEN)}
FAULTS = [
    Fault("the source is killed", kill("source"), dict.fromkeys(STAGES, (BROKEN,)), "stopped early"),
    *(
        Fault(
            f"{victim} is killed{when}",
            kill(victim),
            {**_UPSTREAM, victim: (KILLED,)} | ({} if victim == "train-sparse" else {"train-sparse": (BROKEN,)}),
            "" if victim == "train-sparse" else "broke|stream",
            at_round=bool(when),
        )
        for victim in STAGES
        for when in ("", " between two blocks")
    ),
    Fault("the disk is full", fill_disk, {**_UPSTREAM, "train-sparse": (DISK,)}, "writing failed|too large"),
    *(
        Fault(f"a {kind} version", plant(kind), {**_UPSTREAM, "train-sparse": (BROKEN,)}, ".h5")
        for kind in ("half", "corrupt")
    ),
    *(
        Fault(
            f"the source falls silent, {signal.Signals(number).name}",
            end_all(number),
            dict.fromkeys(STAGES, (code, BROKEN, NO_READER)),
            "interrupted|ended",
            silent=True,
        )
        for number, code in ENDED_BY.items()
    ),
]


def disturbed(
    stream: Path, folder: Path, fault: Fault, chance: random.Random, length_s: float, *, resume: bool = False
) -> tuple[Pipeline, float]:
    """Run the pipeline, let the fault happen, and wait: the pipeline, and seconds from the fault to its end."""
    size = stream.stat().st_size
    pipeline = launch(stream, folder, resume=resume, falls_silent_at=chance.randrange(size) if fault.silent else None)
    if fault.at_round:
        victim = next(name for name in STAGES if fault.name.startswith(name))
        wanted, began_s = chance.randrange(1, 12), time.perf_counter()
        while pipeline.rounds(victim) < wanted and time.perf_counter() < began_s + 3 * length_s:
            time.sleep(0.0005)
    else:
        time.sleep(chance.uniform(0, 1.5 * length_s if fault.silent else length_s))
    fault.act(pipeline, chance)
    return pipeline, pipeline.wait()


# --------------------------------------------------------------------------------------------------------------- checks


def problems(
    pipeline: Pipeline, fault: Fault, seconds: float, model: str, expected: bytes, limit_s: float
) -> list[str]:
    """What is not as it should be after a fault."""
    found = []
    codes, messages, folder = pipeline.codes, pipeline.messages, pipeline.folder
    if seconds > limit_s and any(codes.values()):
        found.append(f"the rest took {seconds:.2f} s to end")
    if "Traceback" in messages or "internal error" in messages:
        found.append("an internal error")
    found += [
        f"{name} ended with {code}" for name, code in codes.items() if code not in (0, *fault.codes.get(name, ()))
    ]
    if codes["train-sparse"] == 0:  # a stage that is killed once it has passed everything on does no harm
        if (folder / "out.h5").read_bytes() != expected:
            found.append(f"the trainer ended well with another model than an undisturbed run's: {codes}")
    elif not re.search(fault.says, messages):
        found.append(f"no message: {codes}")
    live = LiveDirectory(folder / "live", model)
    for number in set(live.numbers()) - {pipeline.planted}:
        try:
            live.read(number)
        except DataError as error:
            found.append(f"a half-written version: {error}")
    done = pipeline.rounds("train-sparse")
    if codes["train-sparse"] not in (KILLED, DISK) and done:
        version = read_version(folder / "out.h5")
        if version != done:
            found.append(f"{done} updates were made, the model has {version}")
    return found


def read_version(file: Path) -> int | None:
    """Updates of the model in a file; None where there is no run record."""
    record = next(open_records(file)) if file.exists() else None
    return record.model.version if isinstance(record, Run) else None


def completed(
    stream: Path, folder: Path, chance: random.Random | None = None, length_s: float = 0.0
) -> tuple[bytes, int]:
    """Go on from the checkpoint, or from the start where there is none yet: the result's bytes, and how many runs of
    it were disturbed in their turn, which happens where there is `chance`."""
    disturbances = 0
    while chance is not None and chance.random() < AGAIN:
        disturbed(stream, folder, chance.choice(FAULTS), chance, length_s, resume=resumable(folder))
        disturbances += 1
    pipeline = launch(stream, folder, resume=resumable(folder))
    pipeline.wait()
    if any(pipeline.codes.values()):
        return f"{pipeline.codes} {pipeline.messages}".encode(), disturbances
    return (folder / "out.h5").read_bytes(), disturbances


def resumable(folder: Path) -> bool:
    """Whether there is a checkpoint; where not, the live directory is emptied for a new start."""
    if (folder / "check.h5").exists():
        return True
    for file in (folder / "live").glob("*"):
        file.unlink()
    return False


def made_stream(folder: Path, rounds: int) -> tuple[Path, str]:
    """The digits model and a stream of random pictures for it; the file, and the model's hash."""
    spec = registry.input_spec(ARCH, ARGS)
    model = Model(ARCH, ARGS, spec, "batchnorm", state(registry.build(ARCH, ARGS)))
    backbone = deploy(model)
    updates = named_plan(PLAN, backbone.graph, tensors_l2=backbone.tensors)
    plan = make_plan(PLAN, updates, backbone.graph, memory_model="paper", optimizer="sgd", facts={})
    run, rng = Run(store(model, backbone), plan=plan), np.random.default_rng(0)
    file = folder / "stream.h5"
    with file.open("wb") as out:
        out.write(encode(run))
        for _ in range(rounds):
            x = rng.integers(0, 256, (WINDOW, *SHAPE), dtype=np.uint8)
            out.write(encode(Block(x, rng.integers(0, CLASSES, WINDOW), "NHW", labels=np.arange(CLASSES))))
    return file, model_hash(run)


# --------------------------------------------------------------------------------------------------------------- report


@dataclass
class Tally:
    """What the trials of one fault came to."""

    hits: int = 0
    too_late: int = 0
    """The pipeline had finished before the fault made a difference."""
    again: int = 0
    """Resumed runs that were disturbed in their turn."""
    seconds: list[float] = field(default_factory=list)
    """From the fault to the end of the last stage."""
    failures: list[str] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Tally)))

    def row(self) -> str:
        """The table's cells."""
        times = (f"{median(self.seconds):.2f}", f"{max(self.seconds):.2f}") if self.seconds else ("", "")
        counts = (self.hits + self.too_late, self.too_late, self.again)
        return " | ".join([*map(str, counts), *times, str(len(self.failures))])


def page(tallies: dict[str, Tally], rounds: int, limit_s: float) -> str:
    """The report."""
    lines = [
        "# Faults in a live pipeline",
        "",
        "`make bench-faults`: source | `filter` | `select` | `train-sparse` on the digits model, forks of one process; "
        f"{rounds} rounds, a checkpoint every 3 updates, one fault at a random moment. Each trial checks that all end "
        f"within {limit_s:g} s with the documented exit codes and a message, that a trainer which ends well has "
        "written the very bytes of an undisturbed run, that every version is whole, that the model after the last good "
        "update was written (unless the trainer was killed or the disk was full), and that the run goes on from its "
        "checkpoint to the undisturbed run's bytes. Too late: the pipeline had "
        "finished. Some of the resumed runs are disturbed in their turn.",
        "",
        "| fault | trials | too late | resumed runs disturbed | seconds to the end, median | longest | failures |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [f"| {name} | {tally.row()} |" for name, tally in tallies.items()]
    lines.append(f"| **all** | {sum(tallies.values(), Tally()).row()} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="one trial of each fault, printed as JSON and not written")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds in which the rest must end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "faults.md")
    options = parser.parse_args()
    raise_on_signals()
    preload()
    chance, tallies = random.Random(options.seed), {fault.name: Tally() for fault in FAULTS}
    with tempfile.TemporaryDirectory() as name:
        stream, model = made_stream(Path(name), options.rounds)
        for attempt in ("first", "second"):  # the first run finds nothing in the caches and takes longer
            whole = Path(name) / attempt
            whole.mkdir()
            began = time.perf_counter()
            expected, _ = completed(stream, whole)
            length_s = time.perf_counter() - began
        trials = len(FAULTS) if options.quick else options.trials
        for number in range(trials):
            print(f"trial {number + 1} of {trials}", end="\r", file=sys.stderr, flush=True)
            fault, folder = FAULTS[number % len(FAULTS)], Path(name) / str(number)
            folder.mkdir()
            trial(fault, tallies[fault.name], stream, folder, model, expected, chance, length_s, options.limit)
            shutil.rmtree(folder)
    if not options.quick:
        options.out.write_text(page(tallies, options.rounds, options.limit))
    counts = {name: tally.hits + tally.too_late for name, tally in tallies.items()}
    failures = [text for tally in tallies.values() for text in tally.failures]
    print(json.dumps({"trials": counts, "failures": failures}, indent=1))
    sys.exit(bool(failures))


def trial(
    fault: Fault,
    tally: Tally,
    stream: Path,
    folder: Path,
    model: str,
    expected: bytes,
    chance: random.Random,
    length_s: float,
    limit_s: float,
) -> None:
    """One fault, and the run that goes on after it."""
    pipeline, seconds = disturbed(stream, folder, fault, chance, length_s)
    wrong = problems(pipeline, fault, seconds, model, expected, limit_s)
    if any(pipeline.codes.values()):
        tally.hits += 1
        tally.seconds.append(seconds)
        messages = pipeline.messages
        result, again = completed(stream, folder, chance, length_s)
        tally.again += again
        if result != expected:
            told = result.decode() if result.startswith(b"{") else "it differs from the undisturbed run"
            wrong.append(f"resumed: {told}")
    else:
        tally.too_late += 1
        messages = pipeline.messages
    tally.failures += [f"{fault.name}: {text}: {messages.strip()}" for text in wrong]


if __name__ == "__main__":
    main()
