"""The command `evaluate`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain, count
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrain_cli.options import Arch, In, Json, Plot, RunFile, Seed, Writes
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage
from stages.settings.evaluation import Tasks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stages.artifacts.records import Block, Run
    from stages.fsl.episodes import Episode
    from stages.methods.results import Row


@command("evaluate", writes="text")
def evaluate(
    io: Stage,
    settings: Tasks,
    source: In = "-",
    samples: Annotated[
        list[str] | None,
        typer.Argument(metavar="SAMPLES...", help="Labelled blocks or folders; default: the stream after IN."),
    ] = None,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="Where the result goes; - is stdout."), Writes()
    ] = "-",
    run_file: RunFile = None,
    support: Annotated[
        str | None, typer.Option("--support", metavar="FILE", help="Answer by class means of these samples.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="METHOD", help="What differences are taken to; default the last.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option("--rows", metavar="FILE", help="Write one JSON line per task and method."),
        Writes(),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the tasks that the file of --rows has, and do the others.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="IN and SAMPLES are files of --rows, of shards or methods: join them.")
    ] = False,
    write_tasks: Annotated[
        str | None, typer.Option("--write-tasks", metavar="FILE", help="Write the list of tasks."), Writes()
    ] = None,
    read_tasks: Annotated[
        str | None, typer.Option("--read-tasks", metavar="FILE", help="Take the tasks from such a list.")
    ] = None,
    plot: Plot = None,
    as_json: Json = False,
    seed: Seed = 0,
    arch: Arch = None,
) -> None:
    """Accuracy with its 95 % interval.

    Of a run record on samples, or of adaptation methods over many few-shot tasks.

    On samples the record's head answers, or class means of --support. With --tasks every method adapts the backbone to
    the same tasks, drawn as Meta-Dataset draws them or with fixed --ways; the table shows paired differences.

    Methods: none, full, last-layer, last-K (layers), bias, sparse-update, tinytrain, shortcut, transductive, tinytl,
    adapter-drop-75, adapter-drop-50, adapter-drop-25, and every named plan of score-layers.

    Example: edgetrain evaluate adapted.h5 query.h5

    Example: edgetrain evaluate base.h5 omniglot.h5 --tasks 200 --methods none,full,sparse-update,tinytrain

    Example: edgetrain evaluate --merge shard0.jsonl shard1.jsonl
    """
    from pathlib import Path

    from edgetrain_cli.plots.picture import check_plot
    from stages.errors import require

    tasks = settings.tasks is not None
    if plot is not None:
        check_plot(Path(plot))
    require(plot is None or merge or tasks, "--plot", "without tasks", "--tasks or --merge")
    require(not (merge and tasks), "--merge", "together with --tasks", "one of them")
    require(not resume or rows is not None, "--resume", "without --rows", "the file of --rows that was begun")
    if merge:
        _report(io, _merged(io, [source, *(samples or [])]), against, as_json, plot, out)
    elif not tasks:
        _on_samples(io, source, samples, run_file, support, settings, as_json, arch, out)
    else:
        require(support is None, "--support", "together with --tasks", "one of them: tasks have their own support")
        require(bool(samples), "SAMPLES", "none", "one file of samples per data set")
        run = io.read_run(source, run_file)
        sets = _data_sets(io, samples or [], run)
        found = _on_tasks(io, run, sets, settings, seed, rows, resume, write_tasks, read_tasks, arch)
        _report(io, found, against, as_json, plot, out)


def _data_sets(io: Stage, paths: Sequence[str], run: Run) -> dict[str, Block]:
    """Data sets by their files' names; by their paths where two names are the same."""
    from pathlib import Path

    from edgetrain_cli.samples import block_of
    from stages.errors import require

    require(len(set(paths)) == len(paths), "SAMPLES", "one twice", "each data set once")
    stems = [Path(path).stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else paths
    return {name: block_of(io, path, run) for name, path in zip(names, paths, strict=True)}


# --------------------------------------------------------------------------------------------------------- on samples


def _on_samples(
    io: Stage,
    source: str,
    samples: list[str] | None,
    run_file: str | None,
    support: str | None,
    settings: Tasks,
    as_json: bool,
    arch: str | None,
    out: str,
) -> None:
    from edgetrain_cli.samples import block_of, blocks_of
    from edgetrain_cli.tables.accuracy import accuracy_json, accuracy_table
    from stages.errors import UsageError
    from stages.evaluation import evaluate as evaluate_run

    if samples:
        run: Run | None = io.read_run(source, run_file)
        blocks: Iterator[Block] = iter(())
    else:
        run, blocks = io.read_stream(source, run_file)
    if run is None:
        raise UsageError("stream", "no run record", "one before the blocks", "name one with --run")
    shown = None if support is None else block_of(io, support, run)
    if samples:
        like = None if shown is None else shown.prepared
        blocks = chain.from_iterable(blocks_of(io, path, run, like=like) for path in samples)
    result = evaluate_run(
        run,
        blocks,
        support=shown,
        chunk=settings.micro_batch,
        on_step=io.progress("evaluating"),
        on_fit=io.holds,
        on_note=io.note,
        allow=arch,
        engine=settings.engine,
        device=settings.device,
        same_bits=settings.same_bits,
    )
    io.did(f"{result.samples:,} samples", f"{result.interval.value:.1%} right", f"loss {result.loss:.4g}")
    if as_json:
        io.write_text(json.dumps(accuracy_json(result), indent=1) + "\n", out)
    else:
        io.show(accuracy_table(result), out)


# ----------------------------------------------------------------------------------------------------------- on tasks


def _on_tasks(
    io: Stage,
    run: Run,
    sets: Mapping[str, Block],
    config: Tasks,
    seed: int,
    rows: str | None,
    resume: bool,
    write_tasks: str | None,
    read_tasks: str | None,
    arch: str | None,
) -> list[Row]:
    """All rows of all data sets, each written to `rows` as soon as it is done."""
    from pathlib import Path

    from stages.errors import require
    from stages.methods.results import results_file
    from stages.task_evaluation import evaluate_tasks, identity

    listed = write_tasks is not None or read_tasks is not None
    require(not listed or len(sets) == 1, "--write-tasks, --read-tasks", f"{len(sets)} data sets", "one")
    progress = io.progress("adapting", len(config.numbers) * len(config.methods) * len(sets), "tasks x methods")
    found: list[Row] = []
    done = count(1)
    with ExitStack() as stack:
        known: list[Row] = []
        add = None
        if rows is not None:
            what = identity(run, sets, config, seed)
            known, add = stack.enter_context(results_file(Path(rows), what, resume=resume))

        def on_row(row: Row) -> None:
            if add is not None:
                add(row)
            progress(len(known) + next(done))

        for name, block in sets.items():
            episodes = _task_list(io, block, config, seed, write_tasks, read_tasks)
            found += evaluate_tasks(
                run,
                block,
                config,
                seed=seed,
                dataset=name,
                episodes=episodes,
                known=known,
                on_row=on_row,
                on_fit=io.holds,
                on_note=io.note,
                allow=arch,
            )
    return found


def _task_list(
    io: Stage, block: Block, config: Tasks, seed: int, write_tasks: str | None, read_tasks: str | None
) -> list[Episode] | None:
    """The tasks of a list that was named, or those that would be drawn, written to a file; None: draw them."""
    from dataclasses import replace
    from pathlib import Path

    from stages.artifacts.files import atomic_write
    from stages.artifacts.hdf5 import encode_tree, read_tree
    from stages.errors import DataError
    from stages.fsl.episode_list import data_hash, from_tree, to_tree
    from stages.task_evaluation import draw_tasks

    if read_tasks is not None:
        with io.named(read_tasks).open("rb") as file:
            episodes = from_tree(read_tree(file, read_tasks), data_hash(block), len(block), read_tasks)
        if len(episodes) < (config.tasks or 0):
            raise DataError(read_tasks, f"{len(episodes)} tasks", f"{config.tasks}", "ask for fewer with --tasks")
        return episodes
    if write_tasks is None:
        return None
    episodes = list(draw_tasks(block, replace(config, shard=(0, 1)), seed))
    atomic_write(Path(write_tasks), encode_tree(to_tree(episodes, data_hash(block))))
    return episodes


def _merged(io: Stage, paths: Sequence[str]) -> list[Row]:
    from stages.methods.results import merge_results, read_results

    files = [io.named(path) for path in paths]
    return merge_results((file.name, *read_results(file.read_text("utf-8", "replace"), file.name)) for file in files)


def _report(io: Stage, rows: list[Row], against: str | None, as_json: bool, plot: str | None, out: str) -> None:
    from pathlib import Path

    from edgetrain_cli.plots.methods import plot_methods
    from edgetrain_cli.tables.accuracy import methods_table
    from stages.methods.results import summarise

    reference = against or rows[-1].method if rows else ""
    summaries = summarise(rows, reference)
    if as_json:
        tables = {"against": reference, "summary": [asdict(each) for each in summaries]}
        io.write_text(json.dumps(_without_nan(tables), indent=1) + "\n", out)
    else:
        io.show(methods_table(summaries, reference), out)
    if plot is not None:
        plot_methods(summaries, Path(plot))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if value != value else value
