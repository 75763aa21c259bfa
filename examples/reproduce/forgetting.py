"""Leaving out what is never forgotten, against everything and random parts: docs/results/forgetting.md.

    python examples/reproduce/forgetting.py            # some minutes on 2 cores
    python examples/reproduce/forgetting.py --quick    # one seed, few samples: does it still run?

The example level of Tri-Level E-ViT (arXiv:2211.10801): a fifth of the samples is left out, and exchanged now and then.
All rows of a seed start from the same network and go through the same samples in the same order. Drawings come from the
folder that EDGETRAIN_DATA names, or `shared` beside the repository; else there are glyphs.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # numpy reads them when imported

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from related import DRAWINGS, ROOT, accuracy, drawings, interval

from edgetrain_cli.libraries import keep_freed_memory
from stages.artifacts.files import atomic_write
from stages.artifacts.live import Version
from stages.artifacts.records import Array, Block, End, Head, LayerUpdate, Run
from stages.importing import Importing, import_model
from stages.models.deploy import deploy
from stages.planning.baselines import named_plan
from stages.selection import Selection, Weights, select_stream
from stages.sparse_training import StreamTraining, train_stream
from stages.training.optimizers import Optimizing
from stages.valuation.forgetting import Forgetting

KEPT = 0.8
BATCH = 50


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    seeds: int
    images: int
    tested: int
    passes: int


FULL, QUICK = Size(5, 1000, 2000, 20), Size(1, 100, 100, 5)


@dataclass(frozen=True)
class Way:
    """One row: how a pass is thinned."""

    selection: Selection | None = None
    fixed: bool = False
    """A random part, drawn once."""
    share_of_passes: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """One run of one row; processor seconds."""

    accuracy: float
    training_s: float
    choosing_s: float
    presented: int


def forgetting(**changes: object) -> Selection:
    return Selection(strategy="forgetting", remove=1 - KEPT, period=4, **changes)  # type: ignore[arg-type]


WAYS = {
    "everything": Way(),
    "everything, 0.8 of the passes": Way(share_of_passes=KEPT),
    "forgetting": Way(forgetting()),
    "forgetting, unweighted (as published)": Way(forgetting(weighted=False)),
    "a fixed random 80 %": Way(fixed=True),
    "a random 80 % of each block": Way(Selection(strategy="random", batch=round(KEPT * BATCH))),
    "stratified, 80 % of each block": Way(Selection(strategy="stratified", batch=round(KEPT * BATCH))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few samples and passes")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs" / "results" / "forgetting.md")
    options = parser.parse_args()
    keep_freed_memory()  # as commands do
    size = QUICK if options.quick else FULL
    found: dict[str, list[Outcome]] = {name: [] for name in WAYS}
    for seed in range(size.seeds):
        start, train, test = task(size, seed)
        for name, way in WAYS.items():
            found[name].append(one_run(start, train, test, way, size.passes, seed))
    text = page(size, found, bookkeeping_s(size))
    if options.quick:
        print(text)
    else:
        atomic_write(options.out, text.encode())


def task(size: Size, seed: int) -> tuple[Run, Block, Block]:
    """A network from scratch, samples to learn from, numbered, and samples to test on."""
    data = drawings()
    rows = np.random.default_rng(seed).permutation(len(data))[: size.images + size.tested]
    train, test = data.take(rows[: size.images]), data.take(rows[size.images :])
    start = import_model(Importing(arch="cnn4", arch_args={"width": 16, "size": 28}, seed=seed))
    return start, replace(train, columns={"index": np.arange(size.images)}), test


def one_run(start: Run, train: Block, test: Block, way: Way, count: int, seed: int) -> Outcome:
    """Train as the row says; the trainer's seconds do not contain those of choosing, nor of handing weights over."""
    count = round(way.share_of_passes * count)
    kept = None
    if way.fixed:
        kept = np.random.default_rng([seed, 1]).permutation(len(train))[: round(KEPT * len(train))]
    blocks = list(passes(train, count, kept, seed))
    backbone = deploy(start.model)
    first, newest = Weights(backbone, start.model.head), {}

    def publish(number: int, tensors: Mapping[str, Array], head: Head, plan: Sequence[LayerUpdate] | None) -> None:
        with watch:
            newest[0] = Version(number, {name: tensor.copy() for name, tensor in tensors.items()}, head)

    def weights(number: int) -> Weights:
        return first.at(newest[0]) if newest else first

    watch = Watch()
    chosen: Iterable[Block | End] = blocks
    if way.selection is not None:
        plan = named_plan("full", backbone.graph)
        chosen = select_stream(blocks, way.selection, weights=weights, updates=plan, backbone=backbone, seed=seed)
    how = Optimizing(learning_rate=0.05, momentum=0.9, schedule="cosine", total_updates=len(blocks), clip_norm=2.0)
    seen = Counter()
    began = time.process_time()
    config = StreamTraining(plan="full", optimizing=how)
    result = train_stream(start, seen.of(watch.pulled(chosen)), config, publish=publish if way.selection else None)
    training_s = time.process_time() - began - watch.seconds
    return Outcome(accuracy(result, test), training_s, watch.seconds, seen.samples)


class Watch:
    """Processor seconds spent within: a context, and a stream whose elements are waited for."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.process_time()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.process_time() - self._began

    def pulled(self, records: Iterable[Block | End]) -> Iterator[Block]:
        waiting = iter(records)
        while True:
            with self:
                record = next(waiting, None)
            if not isinstance(record, Block):
                return
            yield record


class Counter:
    """Counts the samples that pass."""

    def __init__(self) -> None:
        self.samples = 0

    def of(self, blocks: Iterable[Block]) -> Iterator[Block]:
        for block in blocks:
            self.samples += len(block)
            yield block


def passes(data: Block, count: int, kept: Array | None, seed: int) -> Iterator[Block]:
    """Blocks of `BATCH` samples in another order each pass, of which only those that are kept stay."""
    rng = np.random.default_rng([seed, 2])
    for _ in range(count):
        order = rng.permutation(len(data))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            rows = rows if kept is None else rows[np.isin(rows, kept)]
            if len(rows):
                yield data.take(rows)


def bookkeeping_s(size: Size) -> float:
    """Processor seconds of `Forgetting` for one block, random answers, the median of many passes' means."""
    memory, rng = Forgetting(forgetting()), np.random.default_rng(0)
    data = Block(np.zeros((size.images, 1), np.uint8), np.zeros(size.images, np.int64), "ND",
                 columns={"index": np.arange(size.images)})  # fmt: skip
    means = []
    for _ in range(30):
        blocks = list(passes(data, 1, None, 0))
        began = time.process_time()
        for block in blocks:
            offered, _ = memory.offer(block, np.full(len(block), 1 / len(block)), rng)
            memory.note(offered, rng.random(len(offered)) < 0.7)
        means.append((time.process_time() - began) / len(blocks))
    return float(np.median(means))


# ---------------------------------------------------------------------------------------------------------- the page


def page(size: Size, found: Mapping[str, Sequence[Outcome]], kept_s: float) -> str:
    data = "Quick, Draw!" if DRAWINGS.is_file() else "glyphs"
    whole = found["everything"]
    updates = size.passes * -(-size.images // BATCH)
    step_s = float(np.median([each.training_s for each in whole])) / updates
    lines = [
        "# Leaving out what is never forgotten",
        "",
        "Written by `make reproduce-forgetting`. The example level of Tri-Level E-ViT: 20 % of the samples left out, a",
        "quarter of these exchanged every 4 passes. Conv-4 of width 16 from scratch, "
        f"{size.images:,} samples of {data} of ten",
        f"classes, {size.passes} passes in blocks of {BATCH}, cosine; accuracy on {size.tested:,} others. "
        f"Differences are paired over {size.seeds} seeds,",
        "in points, with 95 % intervals. Seconds are processor seconds of one thread relative to `everything` of the",
        "same seed, in this run: those of training, and with those of choosing where both take turns.",
        "",
        "| row | accuracy, % | minus everything | samples presented | seconds of training | with choosing |",
        "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name, outcomes in found.items():
        lines.append(f"| {name} | {100 * np.mean([each.accuracy for each in outcomes]):.1f} | "
                     f"{difference(outcomes, whole)} | {relative(outcomes, whole, lambda o: o.presented)} | "
                     f"{relative(outcomes, whole, lambda o: o.training_s)} | "
                     f"{relative(outcomes, whole, lambda o: o.training_s + o.choosing_s)} |")  # fmt: skip
    lines += ["", "| forgetting against | minus, points |", "|---|--:|"]
    ours = found["forgetting"]
    lines += [f"| {name} | {difference(ours, found[name])} |" for name in WAYS if name != "forgetting"]
    lines += [
        "",
        f"Bookkeeping takes {1e6 * kept_s:.0f} microseconds per block, {100 * kept_s / step_s:.2f} % of a step of "
        f"everything ({1e3 * step_s:.1f} ms).",
        "",
        "*At equal epochs* the rival is `everything`; *at equal seconds of training* `everything, 0.8 of the passes`,",
        "whose learning rate falls as much in fewer passes. `select` looks at the samples itself, which is what",
        "choosing costs; on a processor of its own (`edgetrain run`) an epoch takes the seconds of training alone.",
        "",
        verdict(ours, found),
        "",
    ]
    return "\n".join(lines)


def difference(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> str:
    if ours is theirs:
        return ""
    return interval([100 * (a.accuracy - b.accuracy) for a, b in zip(ours, theirs, strict=True)])


def relative(ours: Sequence[Outcome], whole: Sequence[Outcome], of: Callable[[Outcome], float]) -> str:
    """The median ratio over seeds."""
    return f"{np.median([of(a) / of(b) for a, b in zip(ours, whole, strict=True)]):.2f}"


def verdict(ours: Sequence[Outcome], found: Mapping[str, Sequence[Outcome]]) -> str:
    """What the differences say, in a sentence."""
    said = []
    for name in ("a fixed random 80 %", "stratified, 80 % of each block", "everything, 0.8 of the passes"):
        points = [100 * (a.accuracy - b.accuracy) for a, b in zip(ours, found[name], strict=True)]
        half = 1.96 * np.std(points, ddof=1) / np.sqrt(len(points)) if len(points) > 1 else np.inf
        mean = float(np.mean(points))
        kind = "no different from" if abs(mean) <= half else "better than" if mean > 0 else "worse than"
        said.append(f"{kind} {name} ({mean:+.2f})")
    return "Forgetting is " + ";\n".join(said) + "."


if __name__ == "__main__":
    main()
