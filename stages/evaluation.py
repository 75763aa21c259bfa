"""The command `evaluate`: accuracy of a run record on labelled samples, and of adaptation methods over many tasks.

On samples: the record's head answers, or class means of a support set do. Over tasks: every method adapts the same
backbone to the same tasks, so that methods are compared by paired differences; one row per task and method.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from time import perf_counter

import numpy as np

from stages.artifacts.history import model_hash
from stages.artifacts.records import Array, Block, Head, Run
from stages.cost.model import cost_table, inference_peak_bytes
from stages.data.blocks import check_prepared
from stages.errors import DataError, UsageError
from stages.fsl.episode_list import data_hash
from stages.fsl.episodes import Episode, check_pool, draw_episodes, pool_of
from stages.fsl.intervals import Interval, wilson
from stages.graphs.graph import Graph
from stages.graphs.keeping import value_bytes
from stages.losses import cross_entropy
from stages.measurement.room import Fit, fit
from stages.methods.registry import find_method
from stages.methods.results import Row
from stages.methods.task import Answer, make_task, plan_cost
from stages.models import heads
from stages.models.deploy import Backbone, deploy
from stages.models.inputs import adapt_block
from stages.randomness import generator
from stages.settings.evaluation import Tasks as Tasks
from stages.training.adaptation import adaptation_inputs

CHUNK = 256
"""Most samples that are answered at once, unless told otherwise."""

# ------------------------------------------------------------------------------------------------ accuracy on samples


@dataclass(frozen=True)
class ClassAccuracy:
    """One class's share of right answers."""

    label: int
    name: str
    samples: int
    hits: int

    @property
    def interval(self) -> Interval:
        return wilson(self.hits, self.samples)


@dataclass(frozen=True)
class Accuracy:
    """Right answers on labelled samples, by class."""

    classes: tuple[ClassAccuracy, ...]
    loss: float
    """Mean cross-entropy."""

    @property
    def samples(self) -> int:
        return sum(each.samples for each in self.classes)

    @property
    def hits(self) -> int:
        return sum(each.hits for each in self.classes)

    @property
    def interval(self) -> Interval:
        """Share of right answers with Wilson's 95 % interval."""
        return wilson(self.hits, self.samples)


def evaluate(
    run: Run,
    blocks: Iterable[Block],
    *,
    support: Block | None = None,
    chunk: int | None = None,
    on_step: Callable[[int], None] = lambda done: None,
    on_fit: Callable[[Fit], None] = lambda fit: None,
    on_note: Callable[[str], None] = lambda text: None,
    allow: str | None = None,
    engine: str = "auto",
    device: str = "cpu",
) -> Accuracy:
    """Accuracy on labelled samples, `chunk` of them in memory at a time (None: as many as fit).

    `on_step` gets the number done, `on_fit` how many are in memory at once; `engine` runs the backbone on
    `device`; `on_note` hears where it is another one than a user would expect.

    With `support` its class means answer, instead of the record's head.

    Raises:
        DataError: no samples, samples that the model cannot read, or a class that the head does not know.
        UsageError: no head and no support.
    """
    backbone = deploy(run.model, allow=allow, engine=engine, device=device, on_note=on_note)
    held = fit(0, inference_peak_bytes(backbone.graph), chunk or CHUNK, wanted=chunk)
    on_fit(held)
    chunk = held.samples
    head = _support_head(backbone, run.model.head, support, chunk) if support is not None else run.model.head
    if head is None or not len(head.labels):
        fix = "adapt it with `edgetrain train-sparse`, or name labelled samples with --support"
        raise UsageError("/model/head", "the model knows no class", "classes to tell apart", fix)
    learnt = backbone.input.prepared if support is None else support.prepared
    counts = {int(label): np.zeros(2, np.int64) for label in head.labels}
    names: dict[int, str] = {}
    loss, done = 0.0, 0
    for block in (part for whole in blocks for part in whole.slices(chunk)):
        check_prepared(block.prepared, learnt, "samples", "those that the model learnt from", backbone.input)
        rows, scores = _scores(backbone, head, block)
        loss += float(cross_entropy(scores, rows)[0].sum())
        for row, right in zip(rows.tolist(), (scores.argmax(1) == rows).tolist(), strict=True):
            counts[int(head.labels[row])] += (1, right)
        names.update(heads.class_names(block) or {})
        done += len(block)
        on_step(done)
    if not done:
        raise DataError("samples", "none", "labelled samples to evaluate on")
    return Accuracy(tuple(_class_rows(head, counts, names)), loss / done)


def _scores(backbone: Backbone, head: Head, block: Block) -> tuple[Array, Array]:
    """Head rows (N,) of the samples' classes, and class scores (N, C)."""
    features = backbone.features(adapt_block(block, backbone.input))
    return heads.rows(head, block.y, heads.class_names(block)), heads.logits(head, features)


def _support_head(backbone: Backbone, known: Head | None, support: Block, chunk: int) -> Head:
    """Class means of a support set, with the cosine scale that the record has learned."""
    if not len(support):
        raise DataError("support", "no samples", "at least one per class")
    parts = [adapt_block(part, backbone.input) for part in support.slices(chunk)]
    features = np.concatenate([backbone.features(part) for part in parts])
    return heads.prototype_head(features, support.y, heads.class_names(support), scale=heads.cosine_scale(known))


def _class_rows(head: Head, counts: Mapping[int, Array], names: Mapping[int, str]) -> Iterator[ClassAccuracy]:
    for row, (label, (samples, hits)) in enumerate(sorted(counts.items())):
        name = head.names[row] if head.names else names.get(label, str(label))
        if samples:
            yield ClassAccuracy(label, name, int(samples), int(hits))


# ---------------------------------------------------------------------------------------------------- methods on tasks


MICRO_BATCH = 100
"""Most samples of a task that are in memory at once, unless told otherwise."""


def evaluate_tasks(
    run: Run,
    block: Block,
    config: Tasks,
    *,
    seed: int,
    dataset: str = "",
    episodes: Sequence[Episode] | None = None,
    known: Iterable[Row] = (),
    on_row: Callable[[Row], None] = lambda row: None,
    on_fit: Callable[[Fit], None] = lambda fit: None,
    on_note: Callable[[str], None] = lambda text: None,
    allow: str | None = None,
) -> list[Row]:
    """Every method on every task of the shard; `on_row` gets each row as it is done.

    What is among `known` (rows of this very evaluation, perhaps of other data sets too) is not done again.

    Task t of a seed, and the random numbers that methods draw on it, are the same for all methods, in every shard and
    on every machine. `episodes` gives the tasks instead of drawing them.

    Raises:
        DataError: too few classes or samples for the tasks, or samples that the model cannot read.
        UsageError: a method that this backbone cannot be adapted with.
        BudgetError: a method's budget that nothing fits.
    """
    backbone = deploy(run.model, allow=allow, engine=config.engine, device=config.device, on_note=on_note)
    scale = heads.cosine_scale(run.model.head)
    kept = sum(row.saved_bytes for row in cost_table(backbone.graph))
    sizes = [config.shape.most] if episodes is None else [(len(each.support), len(each.query)) for each in episodes]
    inputs = max((adaptation_inputs(min(s, len(block)), min(q, len(block))) for s, q in sizes), default=0)
    other = value_bytes(backbone.graph, backbone.graph.ops[0].name, inputs)
    held = fit(kept, inference_peak_bytes(backbone.graph), MICRO_BATCH, other_bytes=other, wanted=config.micro_batch)
    on_fit(held)
    adapting = config.adapting(scale, held.samples)
    methods = {name: find_method(name) for name in config.methods}
    drawn = draw_tasks(block, config, seed) if episodes is None else (episodes[i] for i in config.numbers)
    have = {(row.task, row.method): row for row in known if row.dataset == dataset}
    rows = []
    for number, episode in zip(config.numbers, drawn, strict=True):
        task = None
        for name, method in methods.items():
            if (number, name) in have:
                rows.append(have[number, name])
                continue
            task = task or make_task(block, episode, backbone)
            started = perf_counter()
            answer = method(backbone, task, adapting, generator(seed, "adapt", number))
            seconds = perf_counter() - started if config.measure else 0.0
            row = _row(backbone.graph, dataset, number, name, episode, answer, seconds)
            rows.append(row)
            on_row(row)
    return rows


def identity(run: Run, sets: Mapping[str, Block], config: Tasks, seed: int) -> dict[str, object]:
    """What says which results can stand side by side: model, samples, tasks, settings, seed; and the methods, which
    parts of one evaluation may differ in."""
    common = asdict(replace(config, shard=(0, 1), measure=True, micro_batch=None))
    del common["methods"]
    return {
        "model": model_hash(run),
        "samples": {name: data_hash(block) for name, block in sets.items()},
        "settings": sha256(json.dumps(common, sort_keys=True).encode()).hexdigest(),
        "tasks": config.tasks,
        "methods": list(config.methods),
        "seed": seed,
    }


def draw_tasks(block: Block, config: Tasks, seed: int) -> Iterator[Episode]:
    """The tasks of the shard. Raises `DataError` where the samples do not suffice."""
    pool = pool_of(block, group=config.group, hierarchical=config.hierarchical)
    pool, _ = check_pool(pool, config.shape, skip=config.on_bad == "skip")
    return draw_episodes(pool, config.shape, seed, config.numbers)


def _row(graph: Graph, dataset: str, number: int, method: str, episode: Episode, answer: Answer, seconds: float) -> Row:
    right = answer.predicted == episode.query_labels
    cost = answer.cost or plan_cost(graph, answer.updates)
    return Row(
        dataset=dataset,
        task=number,
        method=method,
        accuracy=float(right.mean()),
        ways=episode.ways,
        support=len(episode.support),
        query=len(episode.query),
        learning_rate=answer.learning_rate,
        **asdict(cost),
        seconds=seconds,
    )
