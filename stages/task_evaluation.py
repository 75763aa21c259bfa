"""The command `evaluate` over tasks: accuracy of adaptation methods on many few-shot tasks.

Every method adapts the same backbone to the same tasks, so that methods are compared by paired differences; one row
per task and method.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from time import perf_counter

from stages.artifacts.history import model_hash
from stages.artifacts.records import Block, Run
from stages.fsl.episode_list import data_hash
from stages.fsl.episodes import Episode, check_pool, draw_episodes, pool_of
from stages.graphs.graph import Graph
from stages.graphs.keeping import value_bytes
from stages.graphs.updates import every_layer
from stages.measurement.need import to_train
from stages.measurement.room import Fit, fit
from stages.methods.registry import find_method
from stages.methods.results import Row
from stages.methods.task import Answer, make_task, plan_cost
from stages.models import heads
from stages.models.deploy import deploy
from stages.randomness import generator
from stages.settings.evaluation import Tasks as Tasks
from stages.training.adaptation import adaptation_inputs

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
    backbone = deploy(
        run.model,
        allow=allow,
        engine=config.engine,
        device=config.device,
        same_bits=config.same_bits,
        on_note=on_note,
    )
    how = config.adapting(heads.cosine_scale(run.model.head), 0)
    sizes = [config.shape.most] if episodes is None else [(len(each.support), len(each.query)) for each in episodes]
    inputs = max((adaptation_inputs(how, min(s, len(block)), min(q, len(block))) for s, q in sizes), default=0)
    other = value_bytes(backbone.graph, backbone.graph.ops[0].name, inputs)
    need = to_train(backbone, every_layer(backbone.graph), how.optimizing.state_values)
    held = fit(need, MICRO_BATCH, other_bytes=other, wanted=config.micro_batch)
    on_fit(held)
    adapting = replace(how, micro_batch=held.samples)
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
