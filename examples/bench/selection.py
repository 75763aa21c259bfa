"""What choosing costs: filter per sample, selection on top of its forward pass, and both beside an update.

    python examples/bench/selection.py            # one thread, medians of several repeats

Bounds to keep (one core): the filter takes at most 1 ms per sample for mobilenetv2-w0.35 at 128 x 128 and 0.1 ms for
the digits model; selection takes at most 5 % on top of the forward pass of its candidates; a round's selection takes no
longer than the full update of the samples it picks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from stages.artifacts.records import Block, Model
from stages.filtering import Filtering, filter_stream, shallow_features
from stages.models import heads, registry
from stages.models.deploy import Backbone, deploy, state
from stages.models.inputs import adapt
from stages.planning.baselines import named_plan
from stages.selection import Selection, Weights, select_block
from stages.sparse.learner import Batch, StreamLearner
from stages.sparse.optimizers import Optimizing
from stages.valuation.coarse import FILTERS
from stages.valuation.fine import SELECTIONS

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


def median_s(body: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, the first two not counted."""
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        body()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[2:]))


def samples(setting: Setting, n: int) -> Block:
    """Random images of ten classes."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, *setting.size), dtype=np.uint8)
    return Block(x, np.arange(n) % CLASSES, "NHW" if len(setting.size) == 2 else "NHWC", labels=np.arange(CLASSES))


def filters(backbone: Backbone, setting: Setting, repeats: int) -> dict[str, float]:
    """Milliseconds per sample of each filter strategy."""
    window, features = samples(setting, WINDOW), shallow_features(backbone, 1)

    def once(strategy: str) -> None:
        list(filter_stream([window], Filtering(strategy=strategy), features=features))

    return {name: 1e3 * median_s(lambda name=name: once(name), repeats) / WINDOW for name in FILTERS}


def selections(backbone: Backbone, setting: Setting, repeats: int) -> dict[str, float]:
    """Milliseconds per round of each selection strategy, its forward pass included."""
    pool = samples(setting, KEEP)
    head = random_head(backbone)
    rng = np.random.default_rng(1)

    def once(strategy: str) -> None:
        select_block(pool, Selection(batch=BATCH, strategy=strategy), Weights(backbone, head), None, rng)

    return {name: 1e3 * median_s(lambda name=name: once(name), repeats) for name in SELECTIONS}


def forward_ms(backbone: Backbone, setting: Setting, repeats: int) -> float:
    """Milliseconds of the candidates' forward pass alone, input conversion included."""
    pool = samples(setting, KEEP)

    def once() -> None:
        with torch.inference_mode():
            backbone.features(adapt(np.asarray(pool.x), pool.layout, backbone.input))

    return 1e3 * median_s(once, repeats)


def update_ms(backbone: Backbone, setting: Setting, repeats: int) -> float:
    """Milliseconds of one full update from a batch of `BATCH`."""
    block = samples(setting, BATCH)
    learner = StreamLearner(backbone, named_plan("full", backbone.graph), random_head(backbone), Optimizing())
    batch = Batch(adapt(np.asarray(block.x), block.layout, backbone.input), block.y, np.full(BATCH, 0.1, np.float32))
    return 1e3 * median_s(lambda: learner.update(batch), repeats)


def random_head(backbone: Backbone):
    """A linear head of ten known classes."""
    empty = heads.empty_head(np.arange(CLASSES), None, backbone.graph.feature_dim)
    features = torch.rand(CLASSES, backbone.graph.feature_dim, generator=torch.Generator().manual_seed(0))
    return heads.imprint(empty, features, np.arange(CLASSES), np.ones(CLASSES))


def measure(setting: Setting, repeats: int) -> dict:
    """All figures of one setting, with the ratios that have bounds."""
    spec = registry.input_spec(setting.arch, setting.arch_args)
    tensors = state(registry.build(setting.arch, setting.arch_args))
    backbone = deploy(Model(setting.arch, setting.arch_args, spec, "batchnorm", tensors))
    forward, update = forward_ms(backbone, setting, repeats), update_ms(backbone, setting, repeats)
    per_sample, per_round = filters(backbone, setting, repeats), selections(backbone, setting, repeats)
    return {
        "filter_ms_per_sample": per_sample,
        "filter_bound_ms": setting.filter_bound_ms,
        "select_ms_per_round": per_round,
        "forward_ms": forward,
        "select_over_forward": per_round["titan"] / forward,
        "update_ms": update,
        "select_over_update": per_round["titan"] / update,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps({name: measure(SETTINGS[name], options.repeats) for name in options.settings}, indent=1))


if __name__ == "__main__":
    main()
