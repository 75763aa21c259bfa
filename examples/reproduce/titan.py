"""Titan's comparison: what each way of choosing samples costs and brings, on images, sound and activity data.

    python examples/reproduce/titan.py --modality images --rounds 300 --seeds 3 --out build/titan

Every method trains the same network from the same start on the same stream, at the learning rate of `--rates` that
gives it the best final accuracy. Reported per method: final accuracy, rounds and seconds to the final accuracy of
random choice, gradient variance relative to random choice, and the time of filter, selection and update. Real data is
taken from the folder that EDGETRAIN_DATA names or `shared` beside the repository; without it images are scikit-learn's
digits, sound is left out, and activity data is always synthetic.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from stages.artifacts.live import Version, version_for
from stages.artifacts.records import Block, End, Model, Run
from stages.data.conversion import noisy_labels, share_of, with_noise
from stages.filtering import Filtering, filter_stream, shallow_features
from stages.models import heads, registry
from stages.models.deploy import deploy, state
from stages.models.inputs import adapt
from stages.randomness import generator
from stages.selection import Selection, Weights, select_stream
from stages.sparse.optimizers import Optimizing
from stages.sparse_training import StreamTraining, train_stream

WINDOW, BATCH, KEEP = 100, 10, 30
"""Titan section 4.1: samples per round, batch, candidates."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    filter: str
    keep: int
    select: str
    weighted: bool = True


METHODS = {
    "random": Method("random", BATCH, "all"),
    "random-30": Method("random", KEEP, "all"),
    "stratified": Method("quota", KEEP, "stratified"),
    "importance": Method("random", WINDOW, "is"),
    "c-is of all": Method("random", WINDOW, "c-is"),
    "titan of all": Method("random", WINDOW, "titan"),
    "random + c-is": Method("random", KEEP, "c-is"),
    "quota + c-is": Method("quota", KEEP, "c-is"),
    "quota + titan": Method("quota", KEEP, "titan"),
    "quota + c-is, unweighted": Method("quota", KEEP, "c-is", weighted=False),
    "priority + c-is": Method("priority", KEEP, "c-is"),
    "rep + c-is": Method("rep", KEEP, "c-is"),
    "published": Method("rep-div", KEEP, "c-is"),
    "high loss": Method("random", WINDOW, "high-loss"),
    "low loss": Method("random", WINDOW, "low-loss"),
    "entropy": Method("random", WINDOW, "entropy"),
    "ocs": Method("random", WINDOW, "ocs"),
    "camel": Method("camel", BATCH, "all"),
}
REFERENCE = "random"


# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Task:
    """Samples to stream, samples to test on, and the network."""

    stream: Block
    test: Block
    arch: str
    arch_args: dict[str, int]
    source: str


def real(name: str) -> Path | None:
    """A file of real data, if it is there."""
    folder = Path(os.environ.get("EDGETRAIN_DATA") or Path(__file__).resolve().parents[2].parent / "shared")
    path = folder / "data" / name
    return path if path.is_file() else None


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """x and y of an HDF5 file."""
    with h5py.File(path) as file:
        return file["x"][:], file["y"][:]


def split(x: np.ndarray, y: np.ndarray, layout: str, arch: str, arch_args: dict[str, int], source: str) -> Task:
    """A fifth for testing, the rest for the stream, in random order."""
    order = generator(0, "split").permutation(len(y))
    test, rest = np.split(order, [len(y) // 5])
    return Task(Block(x[rest], y[rest], layout), Block(x[test], y[test], layout), arch, arch_args, source)


def images() -> Task:
    """Quick, Draw! drawings (10 classes), or scikit-learn's digits."""
    path = real("quickdraw10.h5")
    if path is not None:
        return split(*load(path), "NHW", "cnn4", {"width": 32}, "Quick, Draw!, 10 classes")
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target.astype(np.int64)
    return split(x, y, "NHW", "cnn4", {"width": 32}, "scikit-learn digits")


def sound() -> Task | None:
    """Free Spoken Digit Dataset, log-mel, DS-CNN."""
    path = real("fsdd.h5")
    if path is None:
        return None
    args = {"width": 32, "depth": 2, "frames": 49, "mel": 40, "sample_rate": 8000}
    return split(*load(path), "NT", "ds-cnn", args, "spoken digits")


def activity() -> Task:
    """Synthetic: six overlapping Gaussian classes of very different frequency, shaped as HARBOX (900 features)."""
    rng = generator(0, "activity")
    y = rng.choice(6, 12_000, p=[0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).astype(np.int64)
    centres = rng.normal(size=(6, 900)) * 0.35
    x = (centres[y] + rng.normal(size=(len(y), 900)) * rng.uniform(0.5, 2.0, (len(y), 1))).astype(np.float32)
    return split(x, y, "ND", "mlp", {"dim": 900, "width": 100}, "synthetic activity, imbalanced")


MODALITIES: dict[str, Callable[[], Task | None]] = {"images": images, "sound": sound, "activity": activity}


def with_order(task: Task, order: str, seed: int) -> Task:
    """The stream `iid`, `incremental` (class after class), or with noise in 40 % of samples (`-x`) or labels (`-y`)."""
    rng = generator(seed, "order")
    block = task.stream.take(rng.permutation(len(task.stream)))
    if order == "incremental":
        block = block.take(np.argsort(block.y, kind="stable"))
    elif order == "noisy-x":
        block = replace(block, x=with_noise(np.asarray(block.x), share_of(len(block), 0.4, rng), 0.3, rng))
    elif order == "noisy-y":
        block = replace(block, y=noisy_labels(block.y, 0.4, rng))
    return replace(task, stream=block)


def endless(block: Block, rounds: int) -> Iterator[Block]:
    """The stream again and again, for as many rounds."""
    left = rounds * WINDOW
    while left > 0:
        yield block.take(slice(0, left))
        left -= min(left, len(block))


# -------------------------------------------------------------------------------------------------------------- trials


class Stopwatch:
    """Seconds spent in each stage; a stage's time does not include that of the stage it reads from."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = time.perf_counter()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] = self.seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time spent here belongs to `name` alone."""
        self._switch()
        self._running.append(name)
        yield
        self._switch()
        self._running.pop()

    def through(self, name: str, records: Iterable[Block | End]) -> Iterator[Block]:
        """The blocks of `records`, the time to get each added to `name`."""
        iterator = iter(records)
        while True:
            with self.section(name):
                record = next(iterator, None)
            if not isinstance(record, Block):
                return
            yield record


def trial(task: Task, method: Method, rate: float, rounds: int, seed: int, *, every: int, lag: int = 1) -> dict:
    """One training run: the accuracy curve, the seconds of each stage, and the variance relative to random choice."""
    run = Run(
        Model(task.arch, task.arch_args, registry.input_spec(task.arch, task.arch_args), "batchnorm",
              state(registry.build(task.arch, task.arch_args, seed=seed)))
    )  # fmt: skip
    backbone = deploy(run.model)
    start = Weights(backbone, None)
    versions: dict[int, Version] = {}
    watch, ratios, curve = Stopwatch(), [], []

    def publish(number, tensors, head):
        versions[number] = Version(number, {name: value.copy() for name, value in tensors.items()}, head)
        versions.pop(number - lag - 1, None)
        if number % every == 0:
            with watch.section("test"):
                curve.append((number, accuracy(start.at(versions[number]), task.test)))

    def weights(number):
        version = version_for(number, lag)
        return start if version == 0 else start.at(versions[version])

    def noted(blocks):
        for block in blocks:
            if "variance_random" in block.facts:
                ratios.append(block.facts["variance"] / max(block.facts["variance_random"], 1e-30))
            yield block

    filtering = Filtering(window=WINDOW, keep=method.keep, strategy=method.filter)
    selection = Selection(batch=BATCH, strategy=method.select, weighted=method.weighted)
    features = shallow_features(backbone, 1) if filtering.needs_model else None
    pool = filter_stream(endless(task.stream, rounds), filtering, features=features, seed=seed)
    batch = select_stream(watch.through("filter", pool), selection, weights=weights, seed=seed)
    training = StreamTraining(plan="full", optimizing=Optimizing(learning_rate=rate, schedule="step"))
    blocks = noted(watch.through("select", batch))
    with watch.section("update"):
        train_stream(run, blocks, training, publish=publish)
    parts = {f"{part}_s": watch.seconds.get(part, 0.0) for part in ("filter", "select", "update")}
    return {"curve": curve, "variance_ratio": float(np.mean(ratios)) if ratios else None, **parts}


def accuracy(weights: Weights, block: Block) -> float:
    """Share of right answers."""
    hits = 0
    for part in block.slices(256):
        inputs = adapt(np.asarray(part.x), part.layout, weights.backbone.input)
        scores = heads.logits(weights.head, weights.backbone.features(inputs))
        hits += int((weights.head.labels[scores.argmax(1).numpy()] == part.y).sum())
    return hits / len(block)


def final(result: dict) -> float:
    """Accuracy at the end: the mean of the last three measurements."""
    return float(np.mean([value for _, value in result["curve"][-3:]]))


def tuned(task: Task, method: Method, options: argparse.Namespace) -> tuple[float, list[dict]]:
    """The learning rate with the best mean final accuracy, and its trials: the same effort for every method."""
    best: tuple[float, float, list[dict]] | None = None
    for rate in options.rates:
        results = []
        for seed in range(options.seeds):
            streamed = with_order(task, options.order, seed)
            results.append(trial(streamed, method, rate, options.rounds, seed, every=options.every))
        score = float(np.mean([final(result) for result in results]))
        if best is None or score > best[0]:
            best = (score, rate, results)
    return best[1], best[2]


def rounds_to(result: dict, accuracy: float) -> float:
    """First measured round at which the accuracy is reached; infinity if never."""
    return next((round for round, value in result["curve"] if value >= accuracy), float("inf"))


def summary(results: dict[str, tuple[float, list[dict]]], rounds: int) -> list[dict]:
    """One row per method, relative to random choice."""
    target = float(np.mean([final(result) for result in results[REFERENCE][1]]))
    whole_s = float(np.mean([sum_s(result) for result in results[REFERENCE][1]]))
    rows = []
    for name, (rate, trials) in results.items():
        needed = np.array([rounds_to(result, target) for result in trials])
        share = needed / rounds
        seconds = share * np.array([sum_s(result) for result in trials]) / whole_s
        overlapped = share * np.array([overlap_s(result) for result in trials]) / whole_s
        accuracies = np.array([final(result) for result in trials])
        ratios = [result["variance_ratio"] for result in trials if result["variance_ratio"] is not None]
        rows.append(
            {
                "method": name,
                "rate": rate,
                "accuracy": float(accuracies.mean()),
                "accuracy_sd": float(accuracies.std(ddof=1)) if len(accuracies) > 1 else None,
                "rounds_to_random": float(np.median(share)),
                "time_to_random": float(np.median(seconds)),
                "pipelined_time_to_random": float(np.median(overlapped)),
                "variance_ratio": float(np.mean(ratios)) if ratios else None,
                **{f"{part}_ms": 1e3 * float(np.mean([result[f"{part}_s"] for result in trials])) / rounds
                   for part in ("filter", "select", "update")},
            }
        )  # fmt: skip
    return rows


def sum_s(result: dict) -> float:
    """Seconds on one processor."""
    return result["filter_s"] + result["select_s"] + result["update_s"]


def overlap_s(result: dict) -> float:
    """Seconds when filter and selection run beside the update, ideally."""
    return max(result["filter_s"] + result["select_s"], result["update_s"])


def markdown(rows: list[dict], title: str) -> str:
    """The rows as a table."""
    names = [name for name in rows[0] if name != "method"]
    lines = [f"### {title}", "", "| method | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for row in rows:
        cells = ["–" if row[name] is None else f"{row[name]:.3g}" for name in names]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", choices=MODALITIES, default="images")
    parser.add_argument("--order", choices=["iid", "incremental", "noisy-x", "noisy-y"], default="iid")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=10, help="rounds from one measurement to the next")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.05, 0.02, 0.01])
    parser.add_argument("--out", type=Path, default=Path("build/titan"))
    options = parser.parse_args()
    task = MODALITIES[options.modality]()
    if task is None:
        print(f"{options.modality}: no data (set EDGETRAIN_DATA to the folder that holds data/); skipped")
        return
    trial(task, METHODS["quota + titan"], options.rates[0], 5, 0, every=5)  # first calls are slow: not counted
    methods = [REFERENCE, *(name for name in options.methods if name != REFERENCE)]
    results = {name: tuned(task, METHODS[name], options) for name in methods}
    rows = summary(results, options.rounds)
    title = f"{task.source}, {options.order}, {options.rounds} rounds, {options.seeds} seeds"
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{options.modality}-{options.order}"
    stem.with_suffix(".json").write_text(json.dumps({"title": title, "rows": rows, "trials": results}, indent=1))
    stem.with_suffix(".md").write_text(markdown(rows, title))
    print(markdown(rows, title))


if __name__ == "__main__":
    main()
