"""Titan's comparison: what each way of choosing samples costs and brings, on images, sound and activity data.

    python examples/reproduce/titan.py         # everything, into docs/results/titan.md; about an hour on two cores
    python examples/reproduce/titan.py --modality images --order iid --rounds 100 --seeds 2 --page build/titan.md

Every method trains the same network from the same start on the same stream. Each gets the learning rate of `--rates`
that gives it the best accuracy over the second half of the rounds on seeds of their own, then runs on the reported
seeds; the other orders of the stream take the rates of the first. A trial is a process with one thread on one
processor, and seconds are processor seconds. Trials that are in `--out` already are not run again.

Real data is taken from the folder that EDGETRAIN_DATA names or `shared` beside the repository, or from files of samples
that `edgetrain pack` made (`--images cifar10.h5`, `--activity harbox.h5`); without any, images are scikit-learn's
digits, sound is left out, and activity data is synthetic.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # numpy reads them when imported

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import titan_page

from edgetrain_cli.libraries import keep_freed_memory
from stages.artifacts.live import Version, version_for
from stages.artifacts.records import Block, End, Model, Run
from stages.data.conversion import noisy_labels, share_of, with_noise
from stages.filtering import Filtering, filter_stream
from stages.measurement.process import process_memory
from stages.models import heads, registry
from stages.models.calibration import calibrated
from stages.models.deploy import deploy
from stages.models.inputs import adapt
from stages.models.modules import state
from stages.planning.baselines import named_plan
from stages.randomness import generator
from stages.selection import Selection, Weights, select_stream
from stages.sparse_training import StreamTraining, TrainingStopped, train_stream
from stages.training.optimizers import Optimizing
from stages.valuation import fine
from stages.valuation.costs import UpdateClock
from stages.valuation.designs import divide
from stages.valuation.scoring import masses, scored
from stages.valuation.shallow import shallow_features

WINDOW, BATCH, KEEP = 100, 10, 30
"""Titan section 4.1: samples per round, batch, candidates."""

MEASUREMENTS = 30
"""Points of an accuracy curve."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    filter: str
    keep: int
    select: str
    weighted: bool = True
    max_batch: int | None = None
    overlap: bool = False


METHODS = {
    "random": Method("random", BATCH, "all"),
    "random-30": Method("random", KEEP, "all"),
    "all": Method("quota", KEEP, "all"),
    "stratified": Method("quota", KEEP, "stratified"),
    "auto": Method("quota", KEEP, "auto"),
    "auto to 30": Method("quota", KEEP, "auto", max_batch=KEEP),
    "auto to 30, overlapped": Method("quota", KEEP, "auto", max_batch=KEEP, overlap=True),
    "quota + titan": Method("quota", KEEP, "titan"),
    "quota + c-is": Method("quota", KEEP, "c-is"),
    "random + c-is": Method("random", KEEP, "c-is"),
    "c-is of all": Method("random", WINDOW, "c-is"),
    "titan of all": Method("random", WINDOW, "titan"),
    "importance": Method("random", WINDOW, "is"),
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
"""`random-30` trains on 30 random samples of each window, `all` on all of the filter's candidates."""

ELSEWHERE = ("random", "random-30", "stratified", "auto to 30", "quota + titan", "importance")
"""The methods that also run on the other orders of the stream."""


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


def split(x: np.ndarray, y: np.ndarray, layout: str, arch: str, arch_args: dict[str, int], source: str) -> Task:
    """At most a fifth and 600 for testing, the rest for the stream, in random order."""
    order = generator(0, "split").permutation(len(y))
    test, rest = np.split(order, [min(len(y) // 5, 600)])
    return Task(Block(x[rest], y[rest], layout), Block(x[test], y[test], layout), arch, arch_args, source)


def load(path: Path) -> tuple[np.ndarray, np.ndarray, str | None]:
    """x, y and, where `edgetrain pack` wrote it, the layout of an HDF5 file."""
    with h5py.File(path) as file:
        layout = file.attrs.get("layout")
        return file["x"][:], file["y"][:], layout.decode() if isinstance(layout, bytes) else layout


def images(path: Path | None) -> Task:
    """Packed images; Quick, Draw! drawings (10 classes); or scikit-learn's digits."""
    if path is not None:
        x, y, layout = load(path)
        shape = dict(zip(layout or "", x.shape, strict=False))
        args = {"width": 32, "channels": shape.get("C", 1), "size": shape["H"]}
        return split(x, y, layout or "NHWC", "cnn4", args, path.stem)
    drawings = real("quickdraw10.h5")
    if drawings is not None:
        return split(*load(drawings)[:2], "NHW", "cnn4", {"width": 16}, "Quick, Draw!, 10 classes")
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target.astype(np.int64)
    return split(x, y, "NHW", "cnn4", {"width": 16}, "scikit-learn digits")


def sound(path: Path | None) -> Task | None:
    """Free Spoken Digit Dataset, as pictures of log-mel energies.

    The network is that of the images: `ds-cnn`, whose normalisation is folded, hardly leaves chance within the rounds
    of this comparison when it starts from random weights.
    """
    path = path or real("fsdd.h5")
    if path is None:
        return None
    x, y, _ = load(path)
    args = {"width": 8, "frames": 49, "mel": 40, "sample_rate": 8000}
    energies = adapt(x, "NT", registry.input_spec("ds-cnn", args))[:, 0]
    low, high = energies.min(), energies.max()
    pictures = np.rint((energies - low) * 255 / (high - low)).astype(np.uint8)
    return split(pictures, y, "NHW", "cnn4", {"width": 16}, "spoken digits")


def activity(path: Path | None) -> Task:
    """Packed HARBOX or UCI HAR; or six overlapping Gaussian classes of very different frequency, shaped as HARBOX."""
    if path is not None:
        x, y, _ = load(path)
        return split(x, y, "ND", "mlp", {"dim": x.shape[1], "width": 100}, path.stem)
    rng = generator(0, "activity")
    y = rng.choice(6, 12_000, p=[0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).astype(np.int64)
    centres = rng.normal(size=(6, 900)) * 0.07
    x = (centres[y] + rng.normal(size=(len(y), 900)) * rng.uniform(0.5, 2.0, (len(y), 1))).astype(np.float32)
    return split(x, y, "ND", "mlp", {"dim": 900, "width": 100}, "synthetic activity, imbalanced")


MODALITIES: dict[str, Callable[[Path | None], Task | None]] = {"images": images, "sound": sound, "activity": activity}
ROUNDS = {"images": 300, "sound": 240, "activity": 400}
RATES = (0.1, 0.05, 0.025, 0.0125)
ORDERS = ("iid", "incremental", "noisy-x", "noisy-y")


def with_order(task: Task, order: str, seed: int) -> Task:
    """The stream in random order; `noisy-x` and `noisy-y` with noise in 40 % of its samples or labels."""
    rng = generator(seed, "order")
    block = task.stream.take(rng.permutation(len(task.stream)))
    if order == "noisy-x":
        block = replace(block, x=with_noise(np.asarray(block.x), share_of(len(block), 0.4, rng), 0.3, rng))
    elif order == "noisy-y":
        block = replace(block, y=noisy_labels(block.y, 0.4, rng))
    return replace(task, stream=block)


def endless(block: Block, order: str, rounds: int) -> Iterator[Block]:
    """Windows for so many rounds, from the stream again and again; `incremental`: of the classes that are there so far.

    These begin with one, get another after equal spans, are complete after four fifths, and stay.
    """
    classes = np.unique(block.y)
    for number in range(rounds):
        there = len(classes) if order != "incremental" else 1 + number * len(classes) * 5 // (4 * rounds)
        rows = np.flatnonzero(block.y <= classes[min(there, len(classes)) - 1])
        yield block.take(rows[(np.arange(WINDOW) + number * WINDOW) % len(rows)])


# -------------------------------------------------------------------------------------------------------------- trials


class Stopwatch:
    """Processor seconds spent in each stage; a stage's time does not include that of the stage it reads from."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("filter", "select", "update", "else"), 0.0)
        self._running = ["else"]
        self._since = time.thread_time()

    def switch(self) -> None:
        now = time.thread_time()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time spent here belongs to `name` alone."""
        self.switch()
        self._running.append(name)
        yield
        self.switch()
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


@dataclass(frozen=True)
class Trial:
    """One training run."""

    modality: str
    order: str
    method: str
    rate: float
    seed: int
    rounds: int
    checked: bool = False
    """Whether gradients of whole windows are looked at, to report bias and variance."""

    @property
    def name(self) -> str:
        checked = "-checked" if self.checked else ""
        return f"{self.modality}/{self.order}/{self.method}/{self.rate}-{self.seed}-{self.rounds}{checked}.json"


def perform(trial: Trial, task: Task, *, lag: int = 1) -> dict[str, Any]:
    """The accuracy curve with the seconds of each stage so far, what was chosen, memory, and what `Check` found."""
    method, rounds = METHODS[trial.method], trial.rounds
    task = with_order(task, trial.order, trial.seed)
    arch = (task.arch, task.arch_args)
    spec = registry.input_spec(*arch)
    first = task.stream.take(slice(0, WINDOW))
    module = calibrated(registry.build(*arch, seed=trial.seed), adapt(np.asarray(first.x), first.layout, spec))
    run = Run(Model(*arch, spec, "batchnorm", state(module)))
    backbone = deploy(run.model)
    start = Weights(backbone, None)
    versions: dict[int, Version] = {}
    watch, clock, check = Stopwatch(), UpdateClock(time.thread_time), Check()
    curve: list[dict[str, float]] = []
    every = max(rounds // MEASUREMENTS, 1)
    before = process_memory().get("process_rss_bytes", 0)

    def publish(number, tensors, head, _):
        copied = {name: value.copy() for name, value in tensors.items()}
        versions[number] = Version(number, copied, head, clock.times())
        versions.pop(number - lag - 1, None)
        clock.published()
        if number % every == 0:
            with watch.section("else"):
                share = accuracy(start.at(versions[number]), task.test)
            curve.append({"round": number, "accuracy": share, **watch.seconds})

    def weights(number):
        version = version_for(number, lag)
        return start if version == 0 else start.at(versions[version])

    def windows():
        for number, window in enumerate(endless(task.stream, trial.order, rounds)):
            if trial.checked:
                with watch.section("else"):
                    check.window(weights(number), window)
            yield window

    def candidates(blocks):
        for block in blocks:
            if trial.checked:
                with watch.section("else"):
                    check.pool(weights(block.round), block, method)
            yield block

    filtering = Filtering(window=WINDOW, keep=method.keep, strategy=method.filter)
    selection = Selection(batch=BATCH, strategy=method.select, weighted=method.weighted, max_batch=method.max_batch,
                          overlap=method.overlap)  # fmt: skip
    features = shallow_features(backbone, 1) if filtering.needs_model else None
    pool = filter_stream(watch.through("else", windows()), filtering, features=features, seed=trial.seed)
    batch = select_stream(candidates(watch.through("filter", pool)), selection, weights=weights, backbone=backbone,
                          updates=named_plan("full", backbone.graph), seed=trial.seed, clock=time.thread_time,
                          on_note=check.note)  # fmt: skip
    training = StreamTraining(plan="full", optimizing=Optimizing(learning_rate=trial.rate, schedule="step"))
    chosen = check.batches(watch.through("select", batch))
    with watch.section("update"):
        try:
            train_stream(run, clock.through(chosen), training, publish=publish)
        except TrainingStopped:  # diverged: nothing is learnt any more
            curve += [{**curve[-1], "round": r, "accuracy": 0.0} for r in range(len(curve) * every, rounds + 1, every)]
    grown = process_memory().get("process_peak_rss_bytes", 0) - before
    return {"curve": curve, "grown_bytes": grown, **check.figures()}


def accuracy(weights: Weights, block: Block) -> float:
    """Share of right answers; as few samples at once as candidates, so that memory is not that of testing."""
    hits = 0
    for part in block.slices(KEEP):
        inputs = adapt(np.asarray(part.x), part.layout, weights.backbone.input)
        scores = heads.logits(weights.head, weights.backbone.features(inputs))
        hits += int((weights.head.labels[scores.argmax(1)] == part.y).sum())
    return hits / len(block)


class Check:
    """Watches what is chosen: theory's inequalities in every round, and bias apart from variance.

    Gradients are the last layer's, in units of the variance of ten random samples of the window. The candidates' error
    is their mean gradient minus the window's; what it has in common over `BLOCK` rounds is bias, the rest variance.
    """

    BLOCK = 25

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("rounds", "c-is above is", "c-is above random"), 0)
        self.sums: dict[str, list[float]] = {}
        self.strategies: dict[str, int] = {}
        self.notes: list[str] = []
        self._window: tuple[np.ndarray, float] | None = None
        self._errors: list[np.ndarray] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def add(self, name: str, value: float) -> None:
        self.sums.setdefault(name, []).append(float(value))

    def window(self, weights: Weights, block: Block) -> None:
        view = scored(block, np.full(len(block), 1 / len(block)), weights, "last-layer", None)
        random = fine.reference_variances(view, BATCH, 0.0)["variance_random"]
        self._window = (mean_gradient(view), max(random, 1e-30))

    def pool(self, weights: Weights, block: Block, method: Method) -> None:
        mean, unit = self._window
        mass = masses(block)
        view = scored(block, mass, weights, "last-layer", None)
        least, flat, random = real_valued(view)
        self.counts["rounds"] += 1
        self.counts["c-is above is"] += least > flat * (1 + 1e-9)
        self.counts["c-is above random"] += least > random * (1 + 1e-9)
        for name, value in (("c-is of pool", least), ("is of pool", flat), ("random of pool", random)):
            self.add(name, value / unit)
        if method.select in ("random", "stratified"):
            design = fine.at_random if method.select == "random" else fine.by_label
            self.add("variance", design(view, BATCH, 0.0).variance / unit)
        error = mean_gradient(view)
        if error.shape != mean.shape:
            return  # the candidates brought a class that the window's gradient did not have
        if self._errors and self._errors[0].shape != error.shape:
            self._errors = []  # the head has grown
        self._errors.append((error - mean) / np.sqrt(unit))
        if len(self._errors) == self.BLOCK:
            errors = np.stack(self._errors)
            total, spread = (errors.mean(0) ** 2).sum(), errors.var(0, ddof=1).sum()
            self.add("filter_bias", total - spread / self.BLOCK)
            self.add("filter_variance", spread)
            self._errors = []

    def batches(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks as they are."""
        for block in blocks:
            facts = block.facts
            strategy = (
                f"{facts['strategy']} {len(block) if facts['strategy'] == 'all' else facts.get('auto_batch', '')}"
            )
            self.strategies[strategy.strip()] = self.strategies.get(strategy.strip(), 0) + 1
            if self._window is not None and "variance" in facts:
                self.add("variance", facts["variance"] / self._window[1])
            if self._window is not None and "squared_bias" in facts:
                self.add("select_bias", facts["squared_bias"] / self._window[1])
            yield block

    def figures(self) -> dict[str, Any]:
        means = {name: float(np.mean(values)) for name, values in self.sums.items()}
        return {"checks": self.counts, "moments": means, "strategies": self.strategies, "notes": self.notes}


def mean_gradient(view: fine.GradientView) -> np.ndarray:
    """The pool's mean gradient, flat."""
    gradients = view.gradients
    weighted = gradients.residuals * view.mass[:, None]
    return np.concatenate([(weighted.T @ gradients.features).ravel(), weighted.sum(axis=0)])


def real_valued(view: fine.GradientView) -> tuple[float, float, float]:
    """Least variances of a batch of `BATCH` with real-valued places: C-IS, IS and random choice."""
    classes = divide(fine.class_strata(view.labels), view.mass, view.gradients)
    whole = view.whole
    least = np.sqrt(np.maximum(classes.pulls**2 - classes.squared_sum, 0.0)).sum() ** 2 / BATCH
    flat = max(float(whole.pulls.sum() ** 2 - whole.squared_sum.sum()), 0.0) / BATCH
    return float(least), flat, fine.reference_variances(view, BATCH, 0.0)["variance_random"]


# ------------------------------------------------------------------------------------------------------------ schedule


def run_one(trial: Trial) -> None:
    """In a process of its own: pinned, one thread; the result goes into a file."""
    processor = PROCESSORS.get()
    try:
        os.sched_setaffinity(0, {processor})
        keep_freed_memory()  # as the commands do
        result = perform(trial, TASKS[trial.modality])
    finally:
        PROCESSORS.put(processor)
    path = OUT / trial.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "name": trial.name}))


TASKS: dict[str, Task] = {}
OUT = Path()
PROCESSORS: Any = None


def run_all(trials: Iterable[Trial], what: str) -> None:
    """Trials that have no result yet, the longest first, on all processors at once."""
    cost = {"c-is of all": 3, "titan of all": 3, "importance": 3, "random-30": 2, "all": 2}
    missing = [trial for trial in dict.fromkeys(trials) if not (OUT / trial.name).exists()]
    missing.sort(key=lambda trial: -cost.get(trial.method, 1) * trial.rounds)
    with multiprocessing.get_context("fork").Pool(PROCESSORS.qsize(), maxtasksperchild=1) as pool:
        for done, _ in enumerate(pool.imap_unordered(run_one, missing, chunksize=1), start=1):
            print(f"\r{what}: {done} of {len(missing)} trials", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def result_of(trial: Trial) -> dict[str, Any]:
    return json.loads((OUT / trial.name).read_text())


def tuned(modality: str, method: str, rounds: int, options: argparse.Namespace) -> float:
    """The learning rate with the best mean accuracy over the second half of the rounds on the tuning seeds."""
    trials = tuning(modality, method, rounds, options)

    def mean_accuracy(rate: float) -> float:
        return float(np.mean([titan_page.second_half(result_of(trial)) for trial in trials if trial.rate == rate]))

    return max(options.rates, key=mean_accuracy)


def tuning(modality: str, method: str, rounds: int, options: argparse.Namespace) -> list[Trial]:
    """All trials that the choice of a method's rate looks at."""
    seeds = range(1000, 1000 + options.tuning_seeds)
    return [Trial(modality, "iid", method, rate, seed, rounds) for rate in options.rates for seed in seeds]


def main() -> None:
    global OUT, PROCESSORS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", nargs="*", choices=MODALITIES, default=list(MODALITIES))
    parser.add_argument("--order", nargs="*", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="default: all for iid, six for other orders")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--elsewhere-seeds", type=int, default=3, help="where the stream is not iid")
    parser.add_argument("--tuning-seeds", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trials at once, one processor each")
    for name in MODALITIES:
        parser.add_argument(f"--{name}", type=Path, metavar="FILE.h5", help="samples that `edgetrain pack` made")
    parser.add_argument("--out", type=Path, default=Path("build/titan"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/titan.md"))
    options = parser.parse_args()
    OUT, PROCESSORS = options.out, multiprocessing.get_context("fork").Queue()
    for processor in sorted(os.sched_getaffinity(0))[: options.jobs]:
        PROCESSORS.put(processor)
    time.sleep(0.1)  # until the queue's thread has passed them on
    for name in options.modality:
        task = MODALITIES[name](getattr(options, name))
        if task is None:
            print(f"{name}: no data (set EDGETRAIN_DATA to the folder that holds data/); left out", file=sys.stderr)
        else:
            TASKS[name] = task
    rounds = {name: options.rounds or ROUNDS[name] for name in TASKS}
    methods = {order: options.methods or (list(METHODS) if order == "iid" else list(ELSEWHERE))
               for order in options.order}  # fmt: skip
    needed = list(dict.fromkeys(method for names in methods.values() for method in names))
    run_all((trial for name in TASKS for method in needed for trial in tuning(name, method, rounds[name], options)),
            "tuning")  # fmt: skip
    rates = {(name, method): tuned(name, method, rounds[name], options) for name in TASKS for method in needed}
    reported = {
        (name, order, method): [Trial(name, order, method, rates[name, method], seed, rounds[name], seed == 0)
                                for seed in range(options.seeds if order == "iid" else options.elsewhere_seeds)]
        for name in TASKS for order in options.order for method in methods[order]
    }  # fmt: skip
    run_all((trial for trials in reported.values() for trial in trials), "reported seeds")
    results = {key: [result_of(trial) for trial in trials] for key, trials in reported.items()}
    sources = {name: f"{task.source}; {task.arch} {task.arch_args}" for name, task in TASKS.items()}
    command = " ".join(["python", "examples/reproduce/titan.py", *sys.argv[1:]])
    titan_page.write(options.page, results, rates, rounds, sources, options, command)
    print(options.page)


if __name__ == "__main__":
    main()
