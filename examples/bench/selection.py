"""What choosing costs: filter per sample, selection on top of its forward pass, and both beside an update.

    python examples/bench/selection.py            # one thread, about a minute; writes docs/results/selection.md

Contestants take turns, so that whatever else the machine does meets all of them; a ratio is the median of the ratios
within a turn. Seconds are processor seconds of one thread.

Bounds to keep (one core): the filter takes at most 1 ms per sample for mobilenetv2-w0.35 at 128 x 128 and 0.1 ms for
the digits model; selection takes at most 5 % on top of the forward pass of its candidates; a round's selection takes at
most 0.4 of the torch engine's full update of the samples it picks.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # numpy reads them when imported

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgetrain_cli.libraries import keep_freed_memory
from stages.artifacts.records import Block, Head, Model
from stages.engines.choice import Engine
from stages.filtering import Filtering, filter_stream
from stages.models import heads, registry
from stages.models.deploy import Backbone, deploy
from stages.models.inputs import adapt
from stages.models.modules import state
from stages.planning.baselines import named_plan
from stages.selection import Selection, Weights, select_block
from stages.training.learner import Batch, StreamLearner
from stages.training.optimizers import Optimizing
from stages.valuation.coarse import FILTERS
from stages.valuation.fine import SELECTIONS
from stages.valuation.forward import Forward
from stages.valuation.shallow import shallow_features

CLASSES, WINDOW, KEEP, BATCH = 10, 100, 30, 10


@dataclass(frozen=True)
class Setting:
    """A network and the size of the images it gets."""

    arch: str
    arch_args: dict[str, int]
    size: tuple[int, ...]
    filter_bound_ms: float


SETTINGS = {
    "digits": Setting("cnn4", {"width": 32}, (28, 28), 0.1),
    "mobilenetv2": Setting("mobilenetv2-w0.35", {}, (128, 128, 3), 1.0),
}


Body = Callable[[], object]


def turns(bodies: dict[str, Body], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each body in each turn; two turns of warming up are left out."""
    seconds: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(repeats + 2):
        for name, body in bodies.items():
            began = time.thread_time()
            body()
            seconds[name].append(time.thread_time() - began)
    return {name: np.array(values[2:]) for name, values in seconds.items()}


def samples(setting: Setting, n: int) -> Block:
    """Random images of ten classes."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, *setting.size), dtype=np.uint8)
    return Block(x, np.arange(n) % CLASSES, "NHW" if len(setting.size) == 2 else "NHWC",
                 columns={"index": np.arange(n)}, labels=np.arange(CLASSES))  # fmt: skip


def random_head(backbone: Backbone) -> Head:
    """A linear head of ten known classes."""
    empty = heads.empty_head(np.arange(CLASSES), None, backbone.graph.feature_dim)
    features = np.random.default_rng(0).random((CLASSES, backbone.graph.feature_dim), np.float32)
    return heads.imprint(empty, features, np.arange(CLASSES), np.ones(CLASSES))


def filters(backbone: Backbone, setting: Setting) -> dict[str, Body]:
    """A window of samples through each filter strategy."""
    window, features = samples(setting, WINDOW), shallow_features(backbone, 1)
    return {name: lambda name=name: list(filter_stream([window], Filtering(strategy=name), features=features))
            for name in FILTERS}  # fmt: skip


def rounds(backbone: Backbone, setting: Setting) -> dict[str, Body]:
    """The forward pass of the candidates, a full update of a batch, and a round of each selection strategy."""
    pool, batch, plan = samples(setting, KEEP), samples(setting, BATCH), named_plan("full", backbone.graph)
    weights, mass, rng = Weights(backbone, random_head(backbone)), np.full(KEEP, 1 / KEEP), np.random.default_rng(1)
    forward = Forward(backbone, plan)
    x = adapt(np.asarray(batch.x), batch.layout, backbone.input)

    def update(engine: str) -> Body:
        base = replace(backbone, engine=Engine(engine))
        learner = StreamLearner(base, plan, weights.head, Optimizing(learning_rate=1e-6))
        return lambda: learner.update(Batch(x, batch.y, np.full(BATCH, 0.1, np.float32)))

    def select(strategy: str) -> None:
        config = Selection(batch=BATCH, strategy=strategy)
        known = (weights, forward) if config.needs_model else (None, None)
        select_block(pool, config, known[0], plan, rng, forward=known[1])

    chosen = {name: lambda name=name: select(name) for name in SELECTIONS}
    updates = {"update": update("native"), "update, torch engine": update("torch")}
    return {"forward": lambda: forward.look(pool, mass, weights, rng=rng), **updates, **chosen}


def measure(setting: Setting, repeats: int) -> dict[str, dict[str, np.ndarray]]:
    """Seconds of every filter and of every part of a round, turn by turn."""
    spec = registry.input_spec(setting.arch, setting.arch_args)
    tensors = state(registry.build(setting.arch, setting.arch_args))
    backbone = deploy(Model(setting.arch, setting.arch_args, spec, "batchnorm", tensors))
    return {"filter": turns(filters(backbone, setting), repeats), "round": turns(rounds(backbone, setting), repeats)}


# ---------------------------------------------------------------------------------------------------------------- page


def verdict(value: float, bound: float) -> str:
    return f"{value:.3g} | {bound:g} | {'yes' if value <= bound else 'no'}"


def section(name: str, setting: Setting, found: dict[str, dict[str, np.ndarray]]) -> str:
    """The tables of one setting."""
    per_sample = {name: 1e3 * float(np.median(values)) / WINDOW for name, values in found["filter"].items()}
    parts = found["round"]
    over_forward = {each: float(np.median(parts[each] / parts["forward"])) - 1 for each in SELECTIONS}
    over_update = {each: float(np.median(parts[each] / parts["update"])) for each in SELECTIONS}
    over_torch = float(np.median(parts["titan"] / parts["update, torch engine"]))
    lines = [
        f"## {name}: {setting.arch}, {' x '.join(map(str, setting.size))}\n",
        "| | found | bound | kept |\n|---|--:|--:|---|",
        f"| filter `quota` (default), ms per sample | {verdict(per_sample['quota'], setting.filter_bound_ms)} |",
        f"| the slowest filter, ms per sample | {verdict(max(per_sample.values()), setting.filter_bound_ms)} |",
        f"| `select` on top of its forward pass, % | {verdict(100 * over_forward['titan'], 5)} |",
        f"| a round of `select` over the torch engine's full update | {verdict(over_torch, 0.4)} |",
        f"| the same over the native engine's | {verdict(over_update['titan'], 1)} |",
        "",
        "| filter | ms per sample |\n|---|--:|",
        *(f"| {each} | {value:.4f} |" for each, value in per_sample.items()),
        "",
        f"| part of a round | ms | on top of the forward pass of {KEEP}, % | over an update of {BATCH} |",
        "|---|--:|--:|--:|",
        *(
            f"| {each} | {1e3 * float(np.median(parts[each])):.2f} | | |"
            for each in ("forward", "update", "update, torch engine")
        ),
    ]
    for each in SELECTIONS:
        extra = f"{100 * over_forward[each]:.1f}" if SELECTIONS[each].needs == "gradients" else ""
        lines.append(f"| {each} | {1e3 * float(np.median(parts[each])):.2f} | {extra} | {over_update[each]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--page", type=Path, default=Path("docs/results/selection.md"))
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    keep_freed_memory()  # as the commands do
    sections = [section(name, SETTINGS[name], measure(SETTINGS[name], options.repeats)) for name in options.settings]
    intro = (
        "# What choosing costs\n\n"
        f"Written by `python examples/bench/selection.py`: one thread, {options.repeats} turns, Python "
        f"{platform.python_version()}. {WINDOW} samples per window, {KEEP} candidates, "
        f"batches of {BATCH}, {CLASSES} classes; the update trains all layers. Medians of processor seconds.\n\n"
        "What `select` adds to its forward pass hardly depends on the network (inner products, exact allocation, the "
        "block): little beside a network of some size, much beside the smallest.\n"
    )
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text("\n".join([intro, *sections]))
    print(options.page.read_text())


if __name__ == "__main__":
    main()
