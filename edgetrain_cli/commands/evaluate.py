"""The command `evaluate`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain, count
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import Arch, Cpus, In, Json, MaxRecord, OnBad, Plot, Quiet, RunFile, Seed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.table import Table

    from stages.artifacts.records import Block, Run
    from stages.evaluation import Accuracy, Tasks
    from stages.fsl.episodes import Episode
    from stages.methods.results import MethodSummary, Row


def evaluate(
    source: In = "-",
    samples: Annotated[
        list[str] | None,
        typer.Argument(metavar="SAMPLES...", help="Labelled sample blocks; default: the stream after IN."),
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Where the result goes; - is stdout.")] = "-",
    run_file: RunFile = None,
    support: Annotated[
        str | None, typer.Option("--support", metavar="FILE", help="Answer by class means of these samples.")
    ] = None,
    tasks: Annotated[
        int | None, typer.Option("--tasks", min=1, metavar="N", help="Compare methods on N few-shot tasks of SAMPLES.")
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Comma-separated; settings as tinytrain:rule=random+ratios=0.5.")
    ] = "none,last-layer,full,tinytrain",
    against: Annotated[
        str | None, typer.Option("--against", metavar="METHOD", help="What differences are taken to; default the last.")
    ] = None,
    ways: Annotated[int | None, typer.Option("--ways", help="Fixed number of classes; default Meta-Dataset's.")] = None,
    shots: Annotated[int, typer.Option("--shots", help="With --ways: support samples per class.")] = 5,
    queries: Annotated[int, typer.Option("--queries", help="Queries per class, at most.")] = 10,
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="COL", help="No value on both sides of a task; class+COL: within classes."),
    ] = None,
    max_ways: Annotated[int | None, typer.Option("--max-ways", min=2, help="Most classes of a task; 50.")] = None,
    max_support: Annotated[
        int | None, typer.Option("--max-support", min=2, help="Most support samples of a task; 500.")
    ] = None,
    hierarchical: Annotated[
        bool, typer.Option("--hierarchical", help="Each task within one family of classes named family/class.")
    ] = False,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Of adaptation.")] = 40,
    lr: Annotated[
        float | None, typer.Option("--lr", min=0, help="Fixed; default: chosen inside each support set.")
    ] = None,
    folds: Annotated[int, typer.Option("--folds", min=2, help="Parts of the support to choose the rate with.")] = 3,
    detach_prototypes: Annotated[
        bool, typer.Option("--detach-prototypes", help="No gradient through prototypes.")
    ] = False,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Samples in memory at once.")] = 100,
    shard: Annotated[
        str, typer.Option("--shard", metavar="I/N", help="Only tasks I, I+N, I+2N, ...; join them with --merge.")
    ] = "0/1",
    rows: Annotated[
        str | None, typer.Option("--rows", metavar="FILE", help="Write one JSON line per task and method.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the tasks that the file of --rows has, and do the others.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="IN and SAMPLES are files of --rows, of shards or methods: join them.")
    ] = False,
    write_tasks: Annotated[
        str | None, typer.Option("--write-tasks", metavar="FILE", help="Write the list of tasks.")
    ] = None,
    read_tasks: Annotated[
        str | None, typer.Option("--read-tasks", metavar="FILE", help="Take the tasks from such a list.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Seconds per task; without, two runs write equal rows.")
    ] = True,
    plot: Plot = None,
    as_json: Json = False,
    on_bad: OnBad = "fail",
    seed: Seed = 0,
    arch: Arch = None,
    max_record: MaxRecord = "1GiB",
    quiet: Quiet = False,
    cpus: Cpus = None,
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
    with pipe.stage("evaluate", locals(), writes="text") as io:
        from pathlib import Path

        from edgetrain_cli.plots.methods import check_plot
        from edgetrain_cli.samples import block_of
        from stages.errors import require

        if plot is not None:
            check_plot(Path(plot))
        for file in filter(None, (rows, write_tasks)):
            pipe.check_output(file, binary=False)
        require(plot is None or merge or tasks is not None, "--plot", "without tasks", "--tasks or --merge")
        require(not (merge and tasks), "--merge", "together with --tasks", "one of them")
        require(not resume or rows is not None, "--resume", "without --rows", "the file of --rows that was begun")
        if merge:
            _report(io, _merged(io, [source, *(samples or [])]), against, as_json, plot, out)
            return
        if tasks is None:
            _on_samples(io, source, samples, run_file, support, micro_batch, as_json, arch, out)
            return
        from stages.evaluation import Tasks
        from stages.fsl.episodes import FixedShape, VariousShape
        from stages.sparse.adaptation import LEARNING_RATES, Adapting

        require(on_bad in ("fail", "skip"), "--on-bad", repr(on_bad), "fail or skip")
        require(support is None, "--support", "together with --tasks", "one of them: tasks have their own support")
        capped = max_ways is not None or max_support is not None
        require(not capped or ways is None, "--max-ways, --max-support", "together with --ways", "one of them")
        usual = VariousShape()
        most_support = max_support or usual.most_support
        most_ways = min(max_ways or usual.most_ways, most_support)
        various = VariousShape(
            least_ways=min(usual.least_ways, most_ways),
            most_ways=most_ways,
            most_support=most_support,
            most_queries=queries,
        )
        config = Tasks(
            tasks=tasks,
            methods=tuple(methods.split(",")),
            shape=various if ways is None else FixedShape(ways=ways, shots=shots, queries=queries),
            group=group,
            hierarchical=hierarchical,
            skip_small=on_bad == "skip",
            adapting=Adapting(
                iterations=iterations,
                learning_rates=LEARNING_RATES if lr is None else (lr,),
                folds=folds,
                detach_prototypes=detach_prototypes,
                micro_batch=micro_batch,
            ),
            shard=_shard(shard),
            measure=measure,
        )
        require(bool(samples), "SAMPLES", "none", "one file of samples per data set")
        run = io.read_run(source, run_file)
        stems = [Path(path).stem for path in samples or []]
        distinct = stems if len(set(stems)) == len(stems) else list(samples or [])
        require(len(set(distinct)) == len(distinct), "SAMPLES", "one twice", "each data set once")
        sets = {name: block_of(io, path, run) for name, path in zip(distinct, samples or [], strict=True)}
        found = _on_tasks(io, run, sets, config, seed, rows, resume, write_tasks, read_tasks, arch)
        _report(io, found, against, as_json, plot, out)


# --------------------------------------------------------------------------------------------------------- on samples


def _on_samples(
    io: pipe.Stage,
    source: str,
    samples: list[str] | None,
    run_file: str | None,
    support: str | None,
    chunk: int,
    as_json: bool,
    arch: str | None,
    out: str,
) -> None:
    from edgetrain_cli.samples import block_of, blocks_of
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
    progress = io.progress("samples")
    result = evaluate_run(run, blocks, support=shown, chunk=chunk, on_step=progress, allow=arch)
    if as_json:
        io.write_text(json.dumps(_accuracy_json(result), indent=1) + "\n", out)
    else:
        _write_table(io, _accuracy_table(result), out)


def _accuracy_json(result: Accuracy) -> dict[str, Any]:
    classes = [
        {"label": each.label, "name": each.name, "samples": each.samples, **each.interval._asdict()}
        for each in result.classes
    ]
    value, low, high = result.interval
    return {
        "accuracy": value,
        "low": low,
        "high": high,
        "samples": result.samples,
        "loss": result.loss,
        "classes": [{("accuracy" if key == "value" else key): item for key, item in row.items()} for row in classes],
    }


def _accuracy_table(result: Accuracy) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"accuracy, 95 % interval (Wilson); mean loss {result.loss:.4g}", title_justify="left")
    for name, side in (("class", "left"), ("samples", "right"), ("accuracy %", "right"), ("interval", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    lines = [(each.name, each.samples, each.interval) for each in result.classes]
    for name, samples, interval in [*lines, ("all", result.samples, result.interval)]:
        bounds = f"{100 * interval.low:.1f} .. {100 * interval.high:.1f}"
        table.add_row(Text(name), str(samples), f"{100 * interval.value:.1f}", bounds, end_section=name == lines[-1][0])
    return table


# ----------------------------------------------------------------------------------------------------------- on tasks


def _shard(text: str) -> tuple[int, int]:
    from stages.errors import UsageError

    first, _, step = text.partition("/")
    if not (first.isdigit() and step.isdigit()):
        raise UsageError("--shard", repr(text), "i/n, such as 0/8")
    return int(first), int(step)


def _on_tasks(
    io: pipe.Stage,
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
    from stages.evaluation import evaluate_tasks, identity
    from stages.methods.results import results_file

    listed = write_tasks is not None or read_tasks is not None
    require(not listed or len(sets) == 1, "--write-tasks, --read-tasks", f"{len(sets)} data sets", "one")
    progress = io.progress("tasks", len(config.numbers) * len(config.methods) * len(sets))
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
                run, block, config, seed=seed, dataset=name, episodes=episodes, known=known, on_row=on_row, allow=arch
            )
    return found


def _task_list(
    io: pipe.Stage, block: Block, config: Tasks, seed: int, write_tasks: str | None, read_tasks: str | None
) -> list[Episode] | None:
    """The tasks of a list that was named, or those that would be drawn, written to a file; None: draw them."""
    from dataclasses import replace
    from pathlib import Path

    from stages.artifacts.files import atomic_write
    from stages.artifacts.hdf5 import encode_tree, read_tree
    from stages.errors import DataError
    from stages.evaluation import draw_tasks
    from stages.fsl.episode_list import data_hash, from_tree, to_tree

    if read_tasks is not None:
        with io.named(read_tasks).open("rb") as file:
            episodes = from_tree(read_tree(file, read_tasks), data_hash(block), len(block), read_tasks)
        if len(episodes) < config.tasks:
            raise DataError(read_tasks, f"{len(episodes)} tasks", f"{config.tasks}", "ask for fewer with --tasks")
        return episodes
    if write_tasks is None:
        return None
    episodes = list(draw_tasks(block, replace(config, shard=(0, 1)), seed))
    atomic_write(Path(write_tasks), encode_tree(to_tree(episodes, data_hash(block))))
    return episodes


def _merged(io: pipe.Stage, paths: Sequence[str]) -> list[Row]:
    from stages.methods.results import merge_results, read_results

    files = [io.named(path) for path in paths]
    return merge_results((file.name, *read_results(file.read_text("utf-8", "replace"), file.name)) for file in files)


def _report(io: pipe.Stage, rows: list[Row], against: str | None, as_json: bool, plot: str | None, out: str) -> None:
    from stages.methods.results import summarise

    reference = against or rows[-1].method if rows else ""
    summaries = summarise(rows, reference)
    if as_json:
        tables = {"against": reference, "summary": [asdict(each) for each in summaries]}
        io.write_text(json.dumps(_without_nan(tables), indent=1) + "\n", out)
    else:
        _write_table(io, _summary_table(summaries, reference), out)
    if plot is not None:
        from pathlib import Path

        from edgetrain_cli.plots.methods import plot_methods

        plot_methods(summaries, Path(plot))


_LEGEND = "MB: memory by the `paper` model. saved KB: by the `saved` model. MMAC: backward, per sample. s: per task."


def _summary_table(summaries: Sequence[MethodSummary], reference: str) -> Table:
    from rich.table import Table

    title = f"accuracy over tasks, 95 % intervals; differences are paired, to {reference}"
    table = Table(title=title, title_justify="left", caption=_LEGEND, caption_justify="left")
    table.add_column("data", no_wrap=True)
    table.add_column("method", overflow="fold")
    for name in ("tasks", "accuracy %", "difference", "MB", "saved KB", "MMAC", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, each in enumerate(summaries):
        last = i + 1 == len(summaries) or summaries[i + 1].dataset != each.dataset
        table.add_row(
            each.dataset,
            each.method,
            str(each.tasks),
            _with_interval(each.accuracy, each.half_width),
            "" if each.method == reference else _with_interval(each.difference, each.difference_half_width, "+"),
            f"{each.memory_bytes / 2**20:.2f}",
            f"{each.saved_bytes / 2**10:.0f}",
            f"{each.backward_macs / 1e6:.2f}",
            f"{each.seconds:.2f}",
            end_section=last,
        )
    return table


def _with_interval(value: float, half: float, sign: str = "") -> str:
    reach = "" if half != half else f" ± {100 * half:.1f}"
    return f"{100 * value:{sign}.1f}{reach}"


def _write_table(io: pipe.Stage, table: Table, out: str) -> None:
    from edgetrain_cli import console

    if out == pipe.STDIO:
        io.show(table)
    else:
        io.write_text(console.render(table, to_terminal=False), out)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if value != value else value
