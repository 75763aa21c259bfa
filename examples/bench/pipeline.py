"""What selection beside training costs: throughput, transport and memory of the live pipeline.

    python examples/bench/pipeline.py            # writes docs/results/pipeline.md, about fifteen minutes on two cores
    python examples/bench/pipeline.py --quick    # a look at everything, printed only; its figures mean little

Compared, all on the same stream: training alone on randomly chosen samples; filter, select and training one after the
other on one core (lag 0); the same three sharing one core (lag 1); and pipelined, filter and select on the other core.
A pipeline can be no faster than its slower side: its bound is update / max(update, filter + select). Besides: where
the time goes in one process, memory over a stream of a million samples, and a sensor that must not wait.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from edgetrain_cli.libraries import keep_freed_memory
from edgetrain_cli.streams import widen
from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.live import LiveDirectory
from stages.artifacts.records import Block, End, Head, Model, Run
from stages.artifacts.stream import open_records, records
from stages.filtering import Filtering, filter_stream
from stages.models import registry
from stages.models.deploy import deploy, store
from stages.models.modules import state
from stages.planning.baselines import named_plan
from stages.planning.plans import make_plan
from stages.selection import Selection, Weights, select_stream
from stages.sparse_training import StreamTraining, Update, train_stream

ROOT = Path(__file__).parents[2]
CLASSES, WINDOW, KEEP, BATCH = 10, 100, 30, 10
SKIPPED = 3
"""Rounds at the start that are not counted: layouts are prepared, caches fill."""


@dataclass(frozen=True)
class Setting:
    """A network, the pictures it gets, and its sparse plan."""

    arch: str
    arch_args: dict[str, int]
    shape: tuple[int, ...]
    plan: str
    rounds: int


SETTINGS = {
    "digits": Setting("cnn4", {"width": 32}, (28, 28), "last-2", 120),
    "mcunet-5fps": Setting("mcunet-5fps", {}, (128, 128, 3), "mcunet-99kb", 40),
    "mobilenetv2-w0.35": Setting("mobilenetv2-w0.35", {}, (128, 128, 3), "mbv2-99kb", 40),
}

TINY = Setting("mlp", {"dim": 64, "width": 32, "depth": 3}, (64,), "last-layer", 1)
"""For the long stream: samples of 8 x 8 bytes."""
LONG, LONG_BLOCK = (100_000, 500_000, 1_000_000), 10_000
"""Samples after which memory is looked at, and samples per block of the source."""
RATES, SENSOR_S = (100, 400, 1600, 6400, 25600), 5
"""Samples per second that the sensor sends, and for how long."""


@dataclass(frozen=True)
class Measured:
    """One run of a pipeline."""

    seconds: float
    """Per round, in the steady state."""
    private_mb: dict[str, float]
    """Stage -> largest private memory (USS), 2^20 bytes."""
    shared_mb: dict[str, float]
    """Stage -> largest proportional memory (PSS)."""
    scored: float
    """Mean number of candidates scored per round; NaN where nothing was."""


# ------------------------------------------------------------------------------------------------------------- inputs


def make_inputs(setting: Setting, folder: Path, rounds: int) -> None:
    """stream.h5 (run record and windows) and batches.h5 (run record and random batches)."""
    spec = registry.input_spec(setting.arch, setting.arch_args)
    tensors = state(registry.build(setting.arch, setting.arch_args))
    model = Model(setting.arch, setting.arch_args, spec, "batchnorm", tensors)
    backbone = deploy(model)
    updates = named_plan(setting.plan, backbone.graph, tensors_l2=backbone.tensors)
    plan = make_plan(setting.plan, updates, backbone.graph, memory_model="paper", optimizer="sgd", facts={})
    run = encode(Run(store(model, backbone), plan=plan))
    for name, size in (("stream", WINDOW), ("batches", BATCH)):
        with (folder / f"{name}.h5").open("wb") as file:
            file.write(run)
            for number in range(rounds):
                file.write(encode(pictures(setting.shape, size, number)))


def pictures(shape: tuple[int, ...], size: int, seed: int) -> Block:
    """Random pictures of ten classes."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
    layout = {1: "ND", 2: "NHW", 3: "NHWC"}[len(shape)]
    return Block(x, rng.integers(0, CLASSES, size), layout, labels=np.arange(CLASSES))


# ---------------------------------------------------------------------------------------------------------- pipelines


def measure(folder: Path, pipeline: str, *, source: str = "stream", watched: bool = False) -> Measured:
    """Run a pipeline as `edgetrain run` on a file and read what it told about itself.

    Only where it is `watched` is its memory looked at, which stops it for milliseconds every time.
    """
    for file in folder.glob("*.jsonl"):
        file.unlink()
    command = [sys.executable, "-m", "edgetrain_cli", "run", pipeline]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / f"{source}.h5").open("rb") as stream, (folder / "out.h5").open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=stream, stdout=out)
        watch = Memory(process.pid, [words.split()[0] for words in pipeline.split("|")])
        if watched:
            watch.start()
        code = process.wait()
        if watched:
            watch.join()
    if code:
        raise SystemExit(f"`edgetrain run '{pipeline}'` ended with {code}")
    rows = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("*.jsonl")}
    last = rows["train"] if "train" in rows else rows["select"]
    scored = [row["scored"] for row in rows.get("select", []) if "scored" in row]
    return Measured(per_round_s(last), watch.private_mb, watch.shared_mb, float(np.mean(scored or [np.nan])))


def per_round_s(rows: list[dict]) -> float:
    """Seconds per round after the first ones."""
    first = min(SKIPPED, len(rows) - 2)
    return (rows[-1]["seconds"] - rows[first]["seconds"]) / (len(rows) - 1 - first)


def reference(way: str) -> str:
    """What a way of running is compared with: the same training on random samples, nothing else going on."""
    return f"{way.split(':')[0]}: random alone" if ":" in way else "full: random alone"


class Memory(threading.Thread):
    """Watches the private memory of a process's children, which are the stages in order."""

    def __init__(self, parent: int, names: list[str]) -> None:
        super().__init__(daemon=True)
        self.parent, self.names = parent, names
        self.private_mb, self.shared_mb = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)

    def run(self) -> None:
        while Path(f"/proc/{self.parent}").exists():
            try:
                children = stages_of(self.parent)
                if len(children) == len(self.names):
                    for name, child in zip(self.names, children, strict=True):
                        self._look(name, child)
            except (OSError, ValueError):
                pass
            if Path(f"/proc/{self.parent}/stat").read_text().split(")")[-1].split()[0] == "Z":
                return
            time.sleep(0.05)

    def _look(self, name: str, child: int) -> None:
        private, proportional = memory_mb(child)
        self.private_mb[name] = max(self.private_mb[name], private)
        self.shared_mb[name] = max(self.shared_mb[name], proportional)


def memory_mb(process: int) -> tuple[float, float]:
    """Private memory (USS) and proportional memory (PSS), 2^20 bytes."""
    kb = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        kb[line.split(":")[0]] = int(line.split()[1])
    return (kb["Private_Clean"] + kb["Private_Dirty"]) / 1024, kb["Pss"] / 1024


def stages_of(process: int) -> list[int]:
    """The stages that `edgetrain run` has forked, in order."""
    return sorted(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def compare(setting: Setting, cores: tuple[int, int], rounds: int, repeats: int) -> tuple[dict, Measured]:
    """Milliseconds per round of every way to run it, medians over repeats taken in turn; and the memory of one."""
    one, other = cores
    choose = f"filter --cpus {one} -q | select --cpus {one} --metrics select.jsonl -q"
    same = f"filter --cpus {other} -q | select --cpus {other} --metrics select.jsonl -q"
    ways = {}
    for plan, option in (("full", "--full"), ("sparse", "")):
        train = f"train-sparse {option} --cpus {other} --metrics train.jsonl -q"
        ways[f"{plan}: random alone"] = (train, "batches")
        ways[f"{plan}: sequential, one core"] = (f"{same} --lag 0 | {train}", "stream")
        ways[f"{plan}: sharing one core"] = (f"{same} | {train}", "stream")
        ways[f"{plan}: pipelined"] = (f"{choose} | {train}", "stream")
    ways["sparse: pipelined, anytime"] = (f"{choose} --until-ready | {train}", "stream")
    ways["sparse: pipelined, features sent"] = (f"{choose} --send features | {train}", "stream")
    ways["choosing alone"] = (choose, "stream")
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(setting, folder, rounds)
        for _ in range(repeats):
            for way, (pipeline, source) in ways.items():
                found[way].append(measure(folder, pipeline, source=source))
                print(f"  {way}: {1e3 * found[way][-1].seconds:.1f} ms per round", file=sys.stderr, flush=True)
        watched = measure(folder, ways["full: pipelined"][0], watched=True)
    figures = {}
    for way, several in found.items():
        beside = zip(found[reference(way)], several, strict=True)
        figures[way] = {
            "ms": 1e3 * median(one.seconds for one in several),
            "ratio": median(alone.seconds / one.seconds for alone, one in beside),
            "scored": float(np.mean([one.scored for one in several])),
        }
    return figures, watched


# ------------------------------------------------------------------------------------------------ where the time goes


class Laps:
    """Processor time of this process, by what it was spent on."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._last_s = time.process_time()

    def lap(self, what: str) -> None:
        """What was done since the last lap."""
        now_s = time.process_time()
        self.ms[what] = self.ms.get(what, 0.0) + 1e3 * (now_s - self._last_s)
        self._last_s = now_s


def processor_ms(folder: Path, plan: str | None, rounds: int) -> dict[str, float]:
    """Processor time per round, by stage and step, of the pipeline at lag 1 as one process with one thread."""
    laps = Laps()
    run, *blocks = open_records(folder / "stream.h5")
    images = [encode(block) for block in blocks[:rounds]]
    start = Weights(deploy(run.model), run.model.head)
    live = LiveDirectory(folder / "live", "")
    live.prepare()

    def windows() -> Iterator[Block]:
        for image in images:
            laps.lap("filter: choosing")
            block = decode(image)
            laps.lap("filter: reading")
            yield block

    def through(records: Iterable[Block | End], made: str, writer: str, reader: str) -> Iterator[Block]:
        for record in records:
            laps.lap(made)
            image = encode(record)
            laps.lap(f"{writer}: writing")
            if isinstance(record, Block):
                block = decode(image)
                laps.lap(f"{reader}: reading")
                yield block

    def weights(number: int) -> Weights:
        laps.lap("select: scoring and choosing")
        version = None if number < 2 else live.read(number - 1)
        laps.lap("select: reading weights")
        return start if version is None else start.at(version)

    def publish(number: int, tensors: Mapping[str, np.ndarray], head: Head, _: object) -> None:
        live.publish(number, tensors, head, keep=3)
        laps.lap("train-sparse: publishing")

    def updated(update: Update) -> None:
        laps.lap("train-sparse: updating")
        if update.round + 1 == SKIPPED:
            laps.ms.clear()

    candidates = through(filter_stream(windows(), Filtering()), "filter: choosing", "filter", "select")
    updates = None if run.plan is None else run.plan.updates
    chosen = select_stream(candidates, Selection(), weights=weights, updates=updates, backbone=start.backbone)
    batches = through(chosen, "select: scoring and choosing", "select", "train-sparse")
    train_stream(run, batches, StreamTraining(plan=plan), publish=publish, on_step=updated)
    live.clear()
    return {what: ms / (len(images) - SKIPPED) for what, ms in laps.ms.items()}


# -------------------------------------------------------------------------------------------------------- long streams


def long_stream(folder: Path, pipeline: str, marks: Sequence[int]) -> dict[str, list[float]]:
    """Stage -> its private memory, 2^20 bytes, after so many samples of a stream that is never on disk."""
    run, block = ((folder / "run.h5").read_bytes(), encode(pictures(TINY.shape, LONG_BLOCK, 0)))
    command = [sys.executable, "-m", "edgetrain_cli", "run", pipeline]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found: dict[str, list[float]] = {words.split()[0]: [] for words in pipeline.split("|")}
    with (folder / "out.h5").open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=out)
    assert process.stdin is not None
    process.stdin.write(run)
    for sent in range(LONG_BLOCK, marks[-1] + 1, LONG_BLOCK):
        process.stdin.write(block)
        if sent in marks:
            process.stdin.flush()
            for name, child in zip(found, stages_of(process.pid), strict=True):
                found[name].append(memory_mb(child)[0])
    process.stdin.close()
    if process.wait():
        raise SystemExit(f"`edgetrain run '{pipeline}'` ended with {process.returncode}")
    return found


def long_streams(folder: Path, marks: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """Pipeline -> what `long_stream` finds, for `filter` alone and for all three."""
    make_inputs(TINY, folder, 1)
    (folder / "run.h5").write_bytes(encode(next(open_records(folder / "stream.h5"))))
    pipelines = {"filter": "filter -q", "all three": "filter -q | select -q | train-sparse -q"}
    return {name: long_stream(folder, pipeline, marks) for name, pipeline in pipelines.items()}


# -------------------------------------------------------------------------------------------------------------- sensor


def sensor(folder: Path, rate: int, seconds: int) -> dict[str, float]:
    """What a sensor at a fixed rate meets in front of `filter --pace demand | select | train-sparse`."""
    for file in folder.glob("*.jsonl"):
        file.unlink()
    most = str(max(1, rate // 100))
    emitting = [sys.executable, str(ROOT / "examples" / "sensor.py"), "stream.h5", "--rate", str(rate), "--seconds",
                str(seconds), "--run", "run.h5", "--per-record", most]  # fmt: skip
    taking = "filter --pace demand --metrics filter.jsonl -q | select --until-ready -q | train-sparse -q"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    (folder / "run.h5").write_bytes(encode(next(open_records(folder / "stream.h5"))))
    with (folder / "out.h5").open("wb") as out:
        source = subprocess.Popen(emitting, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        command = [sys.executable, "-m", "edgetrain_cli", "run", taking]
        taker = subprocess.Popen(command, cwd=folder, env=environment, stdin=source.stdout, stdout=out)
        source.stdout.close()
        code, told = taker.wait(), source.stderr.read().decode()
        source.wait()
    sent, stalls = map(int, re.findall(r"(\d+) (?:samples|stalls)", told))
    if code or source.returncode:
        raise SystemExit(f"the sensor at {rate}/s: {told} {code}")
    rows = [json.loads(line) for line in (folder / "filter.jsonl").read_text().splitlines()]
    counts = {name: sum(row[name] for row in rows) for name in ("dropped", "missed")}
    return {"rate": rate, "sent": sent, "stalls": stalls, "rounds": len(rows), **counts}


# ---------------------------------------------------------------------------------------------------------- transport


def transport(size: int, shape: tuple[int, ...], blocks: int) -> tuple[float, float]:
    """Seconds per block from process to process, encoding and decoding included, and MB (10^6) per block."""
    block = pictures(shape, size, 0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "wb", buffering=0) as out:
            for _ in range(blocks):
                data = memoryview(encode(block))
                while data:
                    data = data[out.write(data) :]
        os._exit(0)
    os.close(writing)
    widen(reading)  # as the stages do
    with os.fdopen(reading, "rb") as file:
        stream = records(file, "pipe")
        next(stream)
        began = time.perf_counter()
        for record in stream:
            np.asarray(record.x)  # type: ignore[union-attr]
        seconds = (time.perf_counter() - began) / (blocks - 1)
    os.waitpid(child, 0)
    return seconds, block.x.nbytes / 1e6


# -------------------------------------------------------------------------------------------------------------- report


def rows_of(results: dict[str, dict], times: dict[str, dict[str, float]]) -> list[str]:
    """The table of throughputs."""
    lines = [
        "| model | way | ms per round | throughput beside random alone | bound | of the bound | candidates scored |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for model, ways in results.items():
        for way, figures in ways.items():
            ratio, limits = f"{figures['ratio']:.2f}", "|"
            if way == "choosing alone":
                ratio = ""
            elif "pipelined" in way:
                alone = ways[reference(way)]["ms"]
                slower = slower_side_ms(
                    way, alone, ways["choosing alone"]["ms"], times[f"{model}, {way.split(':')[0]}"]
                )
                limits = f"{alone / slower:.2f} | {figures['ratio'] / (alone / slower):.2f}"
            lines.append(
                f"| {model} | {way} | {figures['ms']:.2f} | {ratio} | {limits} | {_number(figures['scored'])} |"
            )
    return lines


def slower_side_ms(way: str, update_ms: float, choosing_ms: float, times: dict[str, float]) -> float:
    """What a round takes at least, on the side that takes longer."""
    if "anytime" not in way:
        return max(update_ms, choosing_ms)
    spared = (1 - CLASSES / KEEP) * times["select: scoring and choosing"]
    return max(update_ms + times["train-sparse: publishing"], choosing_ms + times["select: reading weights"] - spared)


def memory_rows(watched: dict[str, Measured]) -> list[str]:
    """The table of memory."""
    lines = ["| model | stage | private (USS), MB | proportional (PSS), MB |", "|---|---|---:|---:|"]
    for model, found in watched.items():
        for stage, private in found.private_mb.items():
            lines.append(f"| {model} | {stage} | {private:.0f} | {found.shared_mb[stage]:.0f} |")
        both = sum(found.private_mb[stage] for stage in ("filter", "select"))
        lines.append(f"| {model} | **filter + select** | **{both:.0f}** | |")
    return lines


def time_rows(times: dict[str, dict[str, float]]) -> list[str]:
    """The table of processor time; one column per model and plan."""
    steps = list(next(iter(times.values())))
    lines = [f"| ms per round | {' | '.join(times)} |", "|---|" + "---:|" * len(times)]
    for step in steps:
        lines.append(f"| {step} | " + " | ".join(f"{column.get(step, 0.0):.2f}" for column in times.values()) + " |")
    for stage in dict.fromkeys(step.split(":")[0] for step in steps):
        sums = (sum(ms for step, ms in column.items() if step.startswith(stage)) for column in times.values())
        lines.append(f"| **{stage}** | " + " | ".join(f"**{ms:.2f}**" for ms in sums) + " |")
    return lines


def long_rows(found: dict[str, dict[str, list[float]]], marks: Sequence[int]) -> list[str]:
    """The table of memory over a long stream."""
    lines = [
        f"| pipeline | stage | {' | '.join(f'{mark:,} samples' for mark in marks)} |",
        "|---|---|" + "---:|" * len(marks),
    ]
    for pipeline, stages in found.items():
        for stage, values in stages.items():
            lines.append(f"| {pipeline} | {stage} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    return lines


def sensor_rows(found: list[dict[str, float]]) -> list[str]:
    """The table of the sensor."""
    lines = [
        "| samples per second | sent | stalls | rounds | dropped by choice | missed |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        missed, sent = row["missed"], row["sent"]
        shares = f"{100 * (row['dropped'] - missed) / sent:.0f} % | {100 * missed / sent:.0f} %"
        lines.append(f"| {row['rate']} | {sent} | {row['stalls']} | {row['rounds']} | {shares} |")
    return lines


@dataclass(frozen=True)
class Findings:
    """All that was measured."""

    throughput: dict[str, dict]
    memory: dict[str, Measured]
    times: dict[str, dict[str, float]]
    large: tuple[float, float]
    small: tuple[float, float]
    long: dict[str, dict[str, list[float]]]
    marks: Sequence[int]
    sensor: list[dict[str, float]]


def report(found: Findings, rounds: str) -> str:
    """The page."""
    results, large, small = found.throughput, found.large, found.small
    return "\n".join(
        [
            "# The live pipeline: what selection beside training costs",
            "",
            f"`make bench-pipeline` on {machine()}. Rounds of {WINDOW} samples, {KEEP} candidates, batches of {BATCH}; "
            f"{rounds}. Filter `quota`, select `titan`, lag 1 where nothing else is said; one thread per core.",
            "",
            "## Throughput",
            "",
            "The bound is update / max(update, filter + select): a pipeline is as fast as its slower side. `choosing "
            "alone` is filter and select on one core without a trainer. Anytime selection scores one candidate "
            f"of every class or more, {CLASSES} here, so its bound is update / max(update + publishing the version, "
            "filter + select with that many), by the times below.",
            "",
            *rows_of(results, found.times),
            "",
            "Where there is no idle core, `sharing one core` is what the whole pipeline costs.",
            "",
            "## Where the time goes",
            "",
            "Processor time per round, the three stages in turn in one process with one thread.",
            "",
            *time_rows(found.times),
            "",
            "## Transport",
            "",
            "Encoding, a pipe and decoding, two processes.",
            "",
            "| block | per block | |",
            "|---|---:|---:|",
            f"| {large[1]:.0f} MB | {1e3 * large[0]:.1f} ms | {large[1] / large[0]:.0f} MB/s |",
            f"| {1e3 * small[1]:.0f} kB | {1e3 * small[0]:.2f} ms | |",
            "",
            "## Memory under `edgetrain run`",
            "",
            "The largest seen while `full: pipelined` ran; MB = 2^20 bytes.",
            "",
            *memory_rows(found.memory),
            "",
            "## Memory over a long stream",
            "",
            "Private memory (USS), MB, of the stages of `edgetrain run` fed through a pipe with samples of 64 bytes, "
            f"{LONG_BLOCK:,} per block.",
            "",
            *long_rows(found.long, found.marks),
            "",
            "## A sensor that must not wait",
            "",
            f"`examples/sensor.py` for {SENSOR_S} s in front of `filter --pace demand | select --until-ready | "
            "train-sparse` with the digits model, all on the same cores; up to 100 records per second. A stall is a "
            "record that was not taken before the next was due. What is dropped by choice are samples of the window "
            "that are no candidates; missed are those that came faster than they could be looked at.",
            "",
            *sensor_rows(found.sensor),
            "",
        ]
    )


def machine() -> str:
    """This machine and the versions that matter."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    usable = len(os.sched_getaffinity(0))
    return f"{cpu}, {usable} cores, Python {platform.python_version()}, {platform.system()}"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, printed and not written")
    parser.add_argument("--models", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "pipeline.md")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    keep_freed_memory()  # as the commands do
    cores = sorted(os.sched_getaffinity(0))
    pair = (cores[0], cores[-1])
    small = transport(BATCH, (28, 28), 50 if options.quick else 1000)
    large = transport(100, (400, 400, 3), 5 if options.quick else 20)
    results, memory, times = {}, {}, {}
    for name in options.models:
        print(name, file=sys.stderr, flush=True)
        rounds = 6 if options.quick else SETTINGS[name].rounds
        repeats = 1 if options.quick else options.repeats
        results[name], memory[name] = compare(SETTINGS[name], pair, rounds, repeats)
        with tempfile.TemporaryDirectory() as folder:
            make_inputs(SETTINGS[name], Path(folder), min(rounds, 20))
            os.sched_setaffinity(0, {pair[1]})  # one thread
            for label, plan in (("full", "full"), ("sparse", None)):
                times[f"{name}, {label}"] = processor_ms(Path(folder), plan, rounds)
            os.sched_setaffinity(0, cores)
    print("long stream, sensor", file=sys.stderr, flush=True)
    marks = tuple(mark // 10 for mark in LONG) if options.quick else LONG
    rates, seconds = (RATES[:2], 2) if options.quick else (RATES, SENSOR_S)
    with tempfile.TemporaryDirectory() as folder:
        long = long_streams(Path(folder), marks)
        make_inputs(SETTINGS["digits"], Path(folder), 5)
        sensed = [sensor(Path(folder), rate, seconds) for rate in rates]
    counts = "a quick look" if options.quick else f"medians of {options.repeats} runs"
    page = report(Findings(results, memory, times, large, small, long, marks, sensed), counts)
    print(page)
    if not options.quick:
        options.out.write_text(page)


if __name__ == "__main__":
    main()
