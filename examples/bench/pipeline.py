"""What selection beside training costs: throughput, transport and memory of the live pipeline.

    python examples/bench/pipeline.py            # writes docs/results/pipeline.md, about ten minutes on two cores
    python examples/bench/pipeline.py --quick    # a look at everything, printed only; its figures mean little

Compared, all on the same stream: training alone on randomly chosen samples; filter, select and training one after the
other on one core (lag 0); the same three sharing one core (lag 1); and pipelined, filter and select on the other core.
A pipeline can be no faster than its slower side: its bound is update / max(update, filter + select).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block, Model, Run
from stages.artifacts.stream import records
from stages.models import registry
from stages.models.deploy import deploy, state, store
from stages.planning.baselines import named_plan
from stages.planning.plans import make_plan

ROOT = Path(__file__).parents[2]
CLASSES, WINDOW, BATCH = 10, 100, 10
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
    "digits": Setting("cnn4", {"width": 32}, (28, 28), "last-2", 200),
    "mcunet-5fps": Setting("mcunet-5fps", {}, (128, 128, 3), "mcunet-99kb", 40),
    "mobilenetv2-w0.35": Setting("mobilenetv2-w0.35", {}, (128, 128, 3), "mbv2-99kb", 40),
}


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
    weights = {name: tensor.numpy() for name, tensor in backbone.tensors.items()}
    updates = named_plan(setting.plan, backbone.graph, tensors_l2=weights)
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
    return Block(x, rng.integers(0, CLASSES, size), "NHW" if len(shape) == 2 else "NHWC", labels=np.arange(CLASSES))


# ---------------------------------------------------------------------------------------------------------- pipelines


def measure(folder: Path, pipeline: str, *, source: str = "stream") -> Measured:
    """Run a pipeline as `edgetrain run` on a file and read what it told about itself."""
    for file in folder.glob("*.jsonl"):
        file.unlink()
    command = [sys.executable, "-m", "edgetrain_cli", "run", pipeline]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / f"{source}.h5").open("rb") as stream, (folder / "out.h5").open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=stream, stdout=out)
        watch = Memory(process.pid, [words.split()[0] for words in pipeline.split("|")])
        watch.start()
        code = process.wait()
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


class Memory(threading.Thread):
    """Watches the private memory of a process's children, which are the stages in order."""

    def __init__(self, parent: int, names: list[str]) -> None:
        super().__init__(daemon=True)
        self.parent, self.names = parent, names
        self.private_mb, self.shared_mb = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)

    def run(self) -> None:
        while Path(f"/proc/{self.parent}").exists():
            try:
                children = Path(f"/proc/{self.parent}/task/{self.parent}/children").read_text().split()
                if len(children) == len(self.names):
                    for name, child in zip(self.names, sorted(map(int, children)), strict=True):
                        self._look(name, child)
            except (OSError, ValueError):
                pass
            if Path(f"/proc/{self.parent}/stat").read_text().split(")")[-1].split()[0] == "Z":
                return
            time.sleep(0.05)

    def _look(self, name: str, child: int) -> None:
        kb = {}
        for line in Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()[1:]:
            kb[line.split(":")[0]] = int(line.split()[1])
        private = (kb["Private_Clean"] + kb["Private_Dirty"]) / 1024
        self.private_mb[name] = max(self.private_mb[name], private)
        self.shared_mb[name] = max(self.shared_mb[name], kb["Pss"] / 1024)


def compare(setting: Setting, cores: tuple[int, int], rounds: int, repeats: int) -> dict:
    """Seconds per round of every way to run it, medians over repeats taken in turn."""
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
    return {
        way: {
            "ms": 1e3 * median(one.seconds for one in several),
            "private_mb": {name: max(one.private_mb[name] for one in several) for name in several[0].private_mb},
            "shared_mb": {name: max(one.shared_mb[name] for one in several) for name in several[0].shared_mb},
            "scored": float(np.mean([one.scored for one in several])),
        }
        for way, several in found.items()
    }


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


def rows_of(results: dict[str, dict]) -> list[str]:
    """The table of throughputs."""
    lines = [
        "| model | way | ms per round | throughput beside random alone | bound | of the bound | candidates scored |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for model, ways in results.items():
        choosing = ways["choosing alone"]["ms"]
        for way, figures in ways.items():
            plan = way.split(":")[0]
            if way == "choosing alone":
                lines.append(f"| {model} | {way} | {figures['ms']:.2f} | | | | {_number(figures['scored'])} |")
                continue
            alone = ways[f"{plan}: random alone"]["ms"]
            ratio, bound = alone / figures["ms"], alone / max(alone, choosing)
            limits = f"{bound:.2f} | {ratio / bound:.2f}" if "pipelined" in way else "|"
            lines.append(
                f"| {model} | {way} | {figures['ms']:.2f} | {ratio:.2f} | {limits} | {_number(figures['scored'])} |"
            )
    return lines


def memory_rows(results: dict[str, dict]) -> list[str]:
    """The table of memory."""
    lines = ["| model | stage | private (USS), MB | proportional (PSS), MB |", "|---|---|---:|---:|"]
    for model, ways in results.items():
        figures = ways["full: pipelined"]
        for stage, private in figures["private_mb"].items():
            lines.append(f"| {model} | {stage} | {private:.0f} | {figures['shared_mb'][stage]:.0f} |")
        both = sum(figures["private_mb"][stage] for stage in ("filter", "select"))
        lines.append(f"| {model} | **filter + select** | **{both:.0f}** | |")
    return lines


def report(results: dict[str, dict], large: tuple[float, float], small: tuple[float, float], rounds: str) -> str:
    """The page."""
    return "\n".join(
        [
            "# The live pipeline: what selection beside training costs",
            "",
            f"`make bench-pipeline` on {machine()}. Rounds of {WINDOW} samples, 30 candidates, batches of {BATCH}; "
            f"{rounds}. Filter `quota`, select `titan`, lag 1 where nothing else is said; one thread per core.",
            "",
            "## Throughput",
            "",
            "The bound is update / max(update, filter + select): a pipeline is as fast as its slower side. `choosing "
            "alone` is filter and select on one core without a trainer.",
            "",
            *rows_of(results),
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
            *memory_rows(results),
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
    return f"{cpu}, {usable} cores, Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}"


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
    cores = sorted(os.sched_getaffinity(0))
    pair = (cores[0], cores[-1])
    small = transport(BATCH, (28, 28), 50 if options.quick else 1000)
    large = transport(100, (400, 400, 3), 5 if options.quick else 20)
    results = {}
    for name in options.models:
        print(name, file=sys.stderr, flush=True)
        rounds = 6 if options.quick else SETTINGS[name].rounds
        results[name] = compare(SETTINGS[name], pair, rounds, 1 if options.quick else options.repeats)
    counts = "a quick look" if options.quick else f"medians of {options.repeats} runs"
    page = report(results, large, small, counts)
    print(page)
    if not options.quick:
        options.out.write_text(page)


if __name__ == "__main__":
    main()
