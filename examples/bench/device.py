"""What the commands of a device hold and take: start, memory, forty photos in 200 MB, a busy core.

    python examples/bench/device.py             # about ten minutes; writes docs/results/device.md
    python examples/bench/device.py --quick     # fewer runs, printed only

Every command is a process of its own, started from one that holds nothing. Processor seconds are the least of several
runs: what other processes do only adds to them. The photos are drawn here, and MobileNetV2 has random weights: neither
memory nor time depends on what they show. Nothing of this imports PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EDGETRAIN = str(Path(sys.executable).parent / "edgetrain")
CPU_LIMIT_S, PEAK_LIMIT_MB, GROUP_MB, BUSY_LIMIT, CHOOSING_LIMIT_MB = 0.5, 80, 200, 2.0, 100
TRIVIAL = {
    "profile": "profile base.h5 --no-measure -q -o out.h5",
    "score-layers": "score-layers run.h5 --support tiny.h5 --memory 128KiB -q -o out.h5",
    "train-sparse": "train-sparse plan.h5 tiny.h5 --lr 0.01 --iterations 2 -q -o out.h5",
    "evaluate": "evaluate trained.h5 tiny.h5 -q",
    "predict": "predict trained.h5 tiny.h5 -q",
    "filter": "filter window.h5 -q -o out.h5",
    "select": "select candidates.h5 -q -o out.h5",
    "run": "run 'filter -q | select -q | train-sparse -q -o out.h5'",
}
"""Command -> how it is called on next to nothing."""
LIMITED = ("select", "train-sparse", "predict", "evaluate")
PHOTOS = {
    "score-layers": "score-layers run.h5 --support photos.h5 --memory 8MB --macs 15% -q -o plan.h5",
    "train-sparse": "train-sparse plan.h5 photos.h5 --lr 0.003 --iterations 10 -q -o trained.h5",
    "evaluate": "evaluate trained.h5 photos.h5 -q",
    "predict": "predict trained.h5 photos.h5 -q -o predicted.csv",
}


@dataclass(frozen=True)
class Cost:
    """One process, with those that it started."""

    code: int
    cpu_s: float
    wall_s: float
    peak_mb: float


def edgetrain(folder: Path, words: str, *, stdin: Path | None = None, before: str = "") -> Cost:
    """Run one command in a folder; `before` is a line of shell that its process runs first."""
    command = [EDGETRAIN, *shlex.split(words)]
    if before:
        command = ["sh", "-c", f'{before}; exec "$@"', "sh", *command]
    with contextlib.ExitStack() as stack:
        source = subprocess.DEVNULL if stdin is None else stack.enter_context(stdin.open("rb"))
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
        )
        assert process.stderr is not None
        said = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode and not before:
        raise SystemExit(f"edgetrain {words}: {said}")
    return Cost(process.returncode, usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss / 1024)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def python(folder: Path, code: str) -> None:
    """Run a piece of Python there: this process itself imports nothing large."""
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, env=environment())


# --------------------------------------------------------------------------------------------------------------- starts


def small_inputs(folder: Path) -> None:
    """Records of a small CNN, and blocks of little pictures, by name as `TRIVIAL` has them."""
    python(folder, BLOCKS)
    edgetrain(folder, "import --arch cnn4-w16 --size 32 -q -o base.h5")
    edgetrain(folder, "profile base.h5 --no-measure -q -o run.h5")
    edgetrain(folder, "score-layers run.h5 --support tiny.h5 --memory 128KiB -q -o plan.h5")
    edgetrain(folder, "train-sparse plan.h5 tiny.h5 --lr 0.01 --iterations 2 -q -o trained.h5")
    (folder / "window.h5").write_bytes((folder / "plan.h5").read_bytes() + (folder / "stream.h5").read_bytes())
    edgetrain(folder, "filter window.h5 -q -o candidates.h5")


BLOCKS = """
import numpy as np
from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block
rng = np.random.default_rng(0)
for name, count in (("tiny", 12), ("stream", 100)):
    x = rng.integers(0, 256, (count, 32, 32), dtype=np.uint8)
    open(f"{name}.h5", "wb").write(encode(Block(x, np.arange(count) % 3, "NHW")))
"""


def starts(folder: Path, repeats: int) -> Iterator[str]:
    small_inputs(folder)
    yield from ["| command | processor s | peak MB | at most | |", "|---|--:|--:|---|---|"]
    for name, words in TRIVIAL.items():
        stdin = folder / "window.h5" if name == "run" else None
        runs = [edgetrain(folder, words, stdin=stdin) for _ in range(repeats)]
        cpu, peak = min(run.cpu_s for run in runs), max(run.peak_mb for run in runs)
        limit = f"{CPU_LIMIT_S} s, {PEAK_LIMIT_MB} MB" if name in LIMITED else ""
        kept = ("yes" if cpu <= CPU_LIMIT_S and peak <= PEAK_LIMIT_MB else "NO") if limit else ""
        yield f"| {name} | {cpu:.2f} | {peak:.0f} | {limit} | {kept} |"


# --------------------------------------------------------------------------------------------------- filter and select


def choosing(folder: Path, rounds: int) -> Iterator[str]:
    """Private memory of `filter` and `select` as processes of their own, at its largest together."""
    window = (folder / "stream.h5").read_bytes()
    with (folder / "long.h5").open("wb") as file:
        file.write((folder / "plan.h5").read_bytes())
        for _ in range(rounds):
            file.write(window)
    with (folder / "long.h5").open("rb") as source:
        first = subprocess.Popen(
            [EDGETRAIN, "filter", "-q"], stdin=source, stdout=subprocess.PIPE, cwd=folder, env=environment()
        )
        second = subprocess.Popen(
            [EDGETRAIN, "select", "-q"], stdin=first.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=folder, env=environment(),
        )  # fmt: skip
        assert first.stdout is not None
        first.stdout.close()
        most = 0.0
        while second.poll() is None:
            most = max(most, private_mb(first.pid) + private_mb(second.pid))
            time.sleep(0.01)
        first.wait()
    kept = "yes" if most <= CHOOSING_LIMIT_MB else "NO"
    yield f"`filter | select` over {rounds} windows of 100 samples, both processes together: {most:.0f} MB private at"
    yield f"the most (at most {CHOOSING_LIMIT_MB}: {kept})."


def private_mb(process: int) -> float:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
    return 0.0


# --------------------------------------------------------------------------------------------------------------- photos


def photos(folder: Path, samples: int) -> Iterator[str]:
    """MobileNetV2 at 224 x 224 on photos, in a control group where one can be made."""
    python(folder, PICTURES.format(samples=samples))
    edgetrain(folder, "import --arch mobilenetv2 --size 224 -q -o base.h5")
    edgetrain(folder, "profile base.h5 --no-measure -q -o run.h5")
    with control_group() as join:
        yield f"{samples} photos, MobileNetV2 at 224 x 224" + (
            f", in a control group of {GROUP_MB} MB:" if join else "; no control group could be made here:"
        )
        yield from ["", "| command | ends with | s | peak MB |", "|---|--:|--:|--:|"]
        for name, words in PHOTOS.items():
            cost = edgetrain(folder, words, before=join or "true")
            yield f"| {name} | {cost.code} | {cost.wall_s:.1f} | {cost.peak_mb:.0f} |"


PICTURES = """
import numpy as np
from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block
rng = np.random.default_rng(0)
x = rng.integers(0, 256, ({samples}, 28, 28, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
open("photos.h5", "wb").write(encode(Block(x, np.arange({samples}) % 4, "NHWC")))
"""


@contextlib.contextmanager
def control_group() -> Iterator[str]:
    """A line of shell that lets a process join a group of `GROUP_MB`; empty where none can be made."""
    name = f"edgetrain-{os.getpid()}"
    for folder, limits in (
        (Path("/sys/fs/cgroup/memory") / name, ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")),
        (Path("/sys/fs/cgroup") / name, ("memory.max", "memory.swap.max")),
    ):
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limits[0]).write_text(str(GROUP_MB << 20))
            with contextlib.suppress(OSError):  # swap is not always counted
                (folder / limits[1]).write_text(str(GROUP_MB << 20 if "limit" in limits[1] else 0))
            yield f"echo $$ > {folder / 'cgroup.procs'}"
        finally:
            folder.rmdir()
        return
    yield ""


# ---------------------------------------------------------------------------------------------------------- a busy core


def busy(folder: Path, rounds: int) -> Iterator[str]:
    """The literal pipeline of three processes, quiet and with a core kept busy, in turn."""
    window = (folder / "stream.h5").read_bytes()
    with (folder / "long.h5").open("wb") as file:
        file.write((folder / "plan.h5").read_bytes())
        for _ in range(rounds):
            file.write(window)
    line = f"{EDGETRAIN} filter -q < long.h5 | {EDGETRAIN} select -q | {EDGETRAIN} train-sparse --full -q -o out.h5"

    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run(["sh", "-c", line], cwd=folder, check=True, stderr=subprocess.DEVNULL, env=environment())
        return time.perf_counter() - began

    ratios = []
    for _ in range(3):
        quiet = seconds()
        other = multiprocessing.Process(target=spin, args=(max(os.sched_getaffinity(0)),), daemon=True)
        other.start()
        try:
            ratios.append(seconds() / quiet)
        finally:
            other.terminate()
            other.join()
    ratio = sorted(ratios)[1]
    kept = "yes" if ratio <= BUSY_LIMIT else "NO"
    yield f"`filter | select | train-sparse --full` over {rounds} windows, with one core kept busy by another process:"
    yield f"{ratio:.2f} times its quiet time (median of 3 pairs; at most {BUSY_LIMIT:g}: {kept})."


def spin(processor: int) -> None:
    os.sched_setaffinity(0, {processor})
    while True:
        pass


# --------------------------------------------------------------------------------------------------------------- report


def report(quick: bool) -> Iterator[str]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    yield from ["# What commands hold on a device", ""]
    yield f"Written by `make bench-device`: {cpu}, {len(os.sched_getaffinity(0))} processors, Python"
    yield f"{platform.python_version()}. The native engine; PyTorch is not imported."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from ["", "## On next to nothing", ""]
        yield from starts(folder, 2 if quick else 10)
        yield ""
        yield from choosing(folder, 20 if quick else 100)
        yield from ["", "## A busy core", ""]
        yield from busy(folder, 20 if quick else 200)
    with tempfile.TemporaryDirectory() as name:
        yield from ["", "## Photos", ""]
        yield from photos(Path(name), 40)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs, printed only")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "device.md")
    options = parser.parse_args(arguments)
    lines = []
    for line in report(options.quick):
        print(line, flush=True)
        lines.append(line)
    if not options.quick:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
