"""The native engine beside the one in PyTorch: a training step and a forward pass, and the arena's bytes.

    python examples/bench/native.py             # three nets, one and two threads, a few minutes
    python examples/bench/native.py --quick     # one net, few repeats; nothing is written

Both train TinyTrain's plan of the same backbone at 128 x 128. They take turns within each repeat, and ratios are
medians of the ratios within a repeat, so that a busy machine is busy for both. On one thread a time is processor
seconds of a process that is pinned to one core; on two it is wall time, because waiting for the other thread is a cost
of its own. A step is the frozen part, forward and backward pass of the trained part and the live slices' gradients, for
the mean square of the features. The table goes to docs/results/native.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from engine import NETS, ROOT, inputs_of, load, mean_square, task, tinytrain

from stages.cost.model import paper_peak_bytes
from stages.cost.training import saved_activation_bytes
from stages.engines.native.library import library
from stages.engines.native.net import NativeNet
from stages.engines.parameter import Floats
from stages.engines.torch.face import TorchNet
from stages.engines.torch.net import SparseNet
from stages.training.updates import gradient_update

BATCHES = (1, 32)
LIMITS = {("step", 1): 0.2, ("step", 32): 0.7, ("forward", 1): 0.2, ("forward", 32): 0.75}
"""To reach on one thread with the widest vectors: (what, batch) -> most that native / torch may be."""
WIDTHS = {16: "AVX-512", 8: "AVX2", 4: "SSE2 or NEON", 1: "scalar"}


def bodies(theirs: TorchNet, ours: NativeNet, x: Floats) -> dict[str, Callable[[], object]]:
    """What is measured, by `engine what`."""
    loss = mean_square().ours

    def step(net: TorchNet | NativeNet) -> Callable[[], None]:
        def body() -> None:
            gradient_update(net, x, loss)
            for parameter in net.parameters():
                parameter.gradient[...] = 0

        return body

    return {
        "torch step": step(theirs),
        "native step": step(ours),
        "torch forward": lambda: theirs.features(x),
        "native forward": lambda: ours.features(x),
    }


def turns(work: dict[str, Callable[[], object]], clock: Callable[[], float], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each body in each repeat, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, body in work.items():
            began = clock()
            for _ in range(4 if name.endswith("1") else 1):
                body()
            if repeat:
                seconds[name].append(clock() - began)
    return {name: np.array(each) for name, each in seconds.items()}


def job(net_name: str, threads: int, repeats: int) -> None:
    """One net at one number of threads, in this process: figures as JSON."""
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    backbone = load(net_name)
    updates = tinytrain(backbone, task(backbone, 25))
    theirs = TorchNet(SparseNet(backbone, updates))
    widths = [0] if threads > 1 else [w for w in (16, 8, 4) if w <= library().et_width()]
    figures = {}
    for width in widths:
        net = NativeNet(backbone.graph, backbone.tensors, updates, threads=threads, width=width)
        for batch in BATCHES:
            x = inputs_of(backbone, batch)
            named = {f"{name} {batch}": body for name, body in bodies(theirs, net, x).items()}
            seconds = turns(named, clock, repeats)
            for what in ("step", "forward"):
                mine, torchs = seconds[f"native {what} {batch}"], seconds[f"torch {what} {batch}"]
                figures[f"{width or library().et_width()} {what} {batch}"] = [
                    1e3 * float(np.median(torchs)), 1e3 * float(np.median(mine)), float(np.median(mine / torchs)),
                ]  # fmt: skip
    program = net.lowering
    figures["bytes"] = [
        program.arena_bytes, 4 * program.bound_floats, program.kept_bytes, 4 * program.live_floats, net.image.nbytes,
        paper_peak_bytes(backbone.graph), saved_activation_bytes(backbone.graph, updates),
    ]  # fmt: skip
    print(json.dumps(figures))


def measured(net: str, threads: int, repeats: int) -> dict[str, list[float]]:
    """The same from a fresh process."""
    command = [sys.executable, __file__, "--job", net, "--threads", str(threads), "--repeats", str(repeats)]
    found: dict[str, list[float]] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def report(nets: list[str], repeats: int) -> Iterator[str]:
    yield "# The native engine beside the one in PyTorch"
    yield ""
    yield f"`python examples/bench/native.py`, {repeats} repeats; ratios below 1: native is faster. When it began,"
    yield f"the load average was {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores: where others run too, PyTorch's"
    yield "two threads lose most of their time waiting for each other."
    worst: dict[tuple[str, int], float] = {}
    memory = []
    for threads in (1, 2):
        unit = "processor ms" if threads == 1 else "wall ms"
        yield from ["", f"## {threads} thread{'s' * (threads > 1)}, {unit}", ""]
        yield from ["| net | vectors | what | batch | torch | native | ratio |", "|---|---|---|--:|--:|--:|--:|"]
        for net in nets:
            figures = measured(net, threads, repeats)
            sizes = figures.pop("bytes")
            widest = max(int(key.split()[0]) for key in figures)
            if threads == 1:
                memory.append([net, *map(int, sizes)])
            for key, (theirs, mine, ratio) in figures.items():
                width, what, batch = key.split()
                times = 4 if batch == "1" else 1
                yield (
                    f"| {net} | {WIDTHS[int(width)]} | {what} | {batch} | {theirs / times:.2f} | {mine / times:.2f} | "
                    f"{ratio:.2f} |"
                )
                if threads == 1 and int(width) == widest:
                    worst[what, int(batch)] = max(worst.get((what, int(batch)), 0), ratio)
    yield from ["", "## To reach, one thread, the worst net", "", "| what | batch | limit | found | reached |"]
    yield "|---|--:|--:|--:|---|"
    for (what, batch), limit in LIMITS.items():
        found = worst[what, batch]
        yield f"| {what} | {batch} | {limit} | {found:.2f} | {'yes' if found <= limit else 'no'} |"
    yield from ["", "## Bytes of one worker", ""]
    yield "*paper*: TinyTrain's inference peak; *saved*: what the engine in PyTorch keeps for a sample's backward pass."
    yield ""
    yield "| net | arena | lower bound | of it kept | live values | image | paper | saved |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for net, *sizes in memory:
        yield f"| {net} | " + " | ".join(f"{size:,}" for size in sizes) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one net, few repeats; nothing is written")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "native.md")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return job(options.job, options.threads, options.repeats)
    lines = []
    for line in report(options.nets[:1] if options.quick else options.nets, 2 if options.quick else options.repeats):
        print(line, flush=True)
        lines.append(line)
    if not options.quick:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
