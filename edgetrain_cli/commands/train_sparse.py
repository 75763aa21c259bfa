"""The command `train-sparse`."""

from __future__ import annotations

from dataclasses import asdict
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Annotated

import typer

from edgetrain_cli.manners import Stopped
from edgetrain_cli.options import Arch, In, MetricsFile, Out, Recorded, RunFile, Seed, Writes
from edgetrain_cli.settings import command
from edgetrain_cli.status import Status, append
from edgetrain_cli.streams import Stage, read_checkpoint
from stages.settings.training import Training

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stages.artifacts.records import Array, Block, Head, LayerUpdate, Run
    from stages.sparse_training import Checkpointing, Publish, Update


@command("train-sparse", history=True)
def train_sparse(
    io: Stage,
    settings: Training,
    source: In = "-",
    support: Annotated[
        str | None,
        typer.Argument(metavar="SUPPORT", help="Samples to adapt to: blocks or a folder; without, IN is a stream."),
    ] = None,
    out: Out = "-",
    run_file: RunFile = None,
    cache_file: Annotated[
        str | None,
        typer.Option(
            "--cache-file", metavar="FILE", help="Support: keep what --cache boundary caches for the next time."
        ),
    ] = None,
    memory_schedule: Annotated[
        str | None,
        typer.Option(
            "--memory-schedule", metavar="FILE", help="Replay the schedule of memory of a run that trained with --ram."
        ),
        Recorded(),
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(
            "--live", metavar="DIR", envvar="EDGETRAIN_LIVE", help="Streams: publish versions for `select --live`."
        ),
    ] = None,
    live_keep: Annotated[
        int, typer.Option("--live-keep", metavar="N", min=2, help="Versions kept there; at least select's --lag + 2.")
    ] = 8,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="FILE", help="Streams: save the state of training here."),
        Writes(),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", metavar="N", min=1, help="Updates between saves.")
    ] = 100,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="FILE", help="Streams: go on from a checkpoint.")
    ] = None,
    replayed: Annotated[
        bool,
        typer.Option(
            "--replayed/--continued",
            help="With --resume: the stream begins anew and used blocks are passed over, or it goes on.",
        ),
    ] = True,
    holdout: Annotated[
        str | None,
        typer.Option("--holdout", metavar="FILE", help="Streams: samples to watch accuracy on."),
        Recorded(),
    ] = None,
    holdout_every: Annotated[
        int, typer.Option("--holdout-every", metavar="N", min=1, help="Updates between measurements."), Recorded()
    ] = 10,
    metrics: MetricsFile = None,
    seed: Seed = 0,
    arch: Arch = None,
) -> None:
    """Train exactly the live channels of a plan.

    On a support set or on a stream.

    With SUPPORT: few-shot adaptation with the ProtoNet loss on augmented copies of the support set; its class means
    become the head. Without: one update per block of the stream, of the live channels and a linear head, weighted as
    the blocks say. What the plan freezes stays bit-equal. SIGINT and SIGTERM finish the running update and write.

    Example: edgetrain train-sparse run.h5 support.h5 -o adapted.h5

    Example: edgetrain filter < stream.h5 | edgetrain select | edgetrain train-sparse -o adapted.h5
    """
    from edgetrain_cli.samples import block_of
    from stages.errors import require
    from stages.sparse_training import Holdout

    require(memory_schedule is None or settings.ram is None, "--memory-schedule", "together with --ram", "one of them")
    schedule = None if memory_schedule is None else _schedule_of(memory_schedule)
    if support is not None:
        for option, value in (("--checkpoint", checkpoint), ("--resume", resume), ("--holdout", holdout)):
            require(value is None, option, "together with a support set", "a stream", "leave one of the two out")
        beside = settings.cache == "boundary" or cache_file is None
        require(beside, "--cache-file", f"with --cache {settings.cache}", "--cache boundary")
        run = io.read_run(source, run_file)
        _on_support(io, run, block_of(io, support, run), settings, seed, arch, cache_file, out, metrics, schedule)
        return
    start, blocks = io.read_stream(source, run_file)
    require(start is not None, "stream", "no run record", "one before the blocks", "put it first, or give --run FILE")
    assert start is not None
    state = None if resume is None else read_checkpoint(resume)
    watched = None if holdout is None else Holdout(block=block_of(io, holdout, start), every=holdout_every)
    saving = None if checkpoint is None else _checkpointing(checkpoint, checkpoint_every)
    publish, clear, blocks = _way_back(live, start, state, live_keep, blocks)
    how = {"resume": state, "replayed": replayed, "publish": publish, "checkpoint": saving, "holdout": watched}
    _on_stream(io, start, blocks, settings, out, metrics, clear, schedule, allow=arch, **how)


def _on_stream(
    io: Stage,
    start: Run,
    blocks: Iterator[Block],
    settings: Training,
    out: str,
    metrics: str | None,
    clear: Callable[[], None],
    schedule: str | None,
    **how: object,
) -> None:
    from stages.sparse_training import TrainingStopped, train_stream

    status = Status(io, None, "training", last=True)
    config = settings.on_stream(schedule)
    io.finish_on_signals()
    watched, report = status.watch(blocks), _reporter(status, metrics)
    calls = {"stop": io.stop_requested, "on_step": report, "on_fit": io.holds, "on_note": io.note}
    try:
        result = train_stream(start, watched, config, **calls, **how)  # type: ignore[arg-type]
    except TrainingStopped as stopped:
        io.write(stopped.run, out)
        raise
    io.write(result, out)
    status.close()
    if how["checkpoint"] is None or not io.stop_requested():  # a run that is to go on needs its versions
        clear()
    if io.stop_requested():
        raise Stopped(io.stop_requested())


def _on_support(
    io: Stage,
    run: Run,
    samples: Block,
    settings: Training,
    seed: int,
    arch: str | None,
    cache_file: str | None,
    out: str,
    metrics: str | None,
    schedule: str | None,
) -> None:
    from pathlib import Path

    from stages.randomness import generator
    from stages.sparse_training import STAGE, train_support
    from stages.training.adaptation import total_iterations
    from stages.training.prefix_file import PrefixFile

    scale = 10.0 if run.model.head is None else run.model.head.scale
    config = settings.on_support(scale, schedule)
    io.finish_on_signals()
    result = train_support(
        run,
        samples,
        config,
        rng=generator(seed, STAGE),
        on_step=io.progress("adapting", total_iterations(config.adapting), "iterations"),
        stop=io.stop_requested,
        cache_file=None if cache_file is None else PrefixFile(Path(cache_file)),
        on_fit=io.holds,
        on_note=io.note,
        allow=arch,
    )
    done = result.model.version - run.model.version
    if done or not io.stop_requested():
        io.write(result, out)
    losses = list(result.metrics[STAGE]["loss"])[-done:] if done else []
    if metrics is not None:
        columns = result.metrics[STAGE]
        for row in range(len(columns["loss"]) - done, len(columns["loss"])):
            append(metrics, {name: float(values[row]) for name, values in columns.items()})
    if io.stop_requested():
        raise Stopped(io.stop_requested())
    io.did(f"{done} iterations on {len(samples)} samples", f"loss {losses[-1]:.4g}" if losses else "")
    if not done:
        io.note("no adaptation: training did not raise the accuracy on left-out samples, so only prototypes were made")


def _way_back(
    live: str | None, run: Run, state: Run | None, keep: int, blocks: Iterator[Block]
) -> tuple[Publish | None, Callable[[], None], Iterator[Block]]:
    """How versions are published in the live directory, how it is emptied when the run is complete, and the blocks.

    Versions say what the latest updates took, for `select --strategy auto`.
    """
    if not live:
        return None, lambda: None, blocks
    from pathlib import Path

    from stages.artifacts.history import model_hash
    from stages.artifacts.live import LiveDirectory
    from stages.valuation.costs import UpdateClock

    directory, clock = LiveDirectory(Path(live), model_hash(run)), UpdateClock(thread_time)
    directory.prepare(keep_up_to=None if state is None else state.model.version - run.model.version)

    def publish(number: int, tensors: Mapping[str, Array], head: Head, updates: Sequence[LayerUpdate] | None) -> None:
        directory.publish(number, tensors, head, keep=keep, update_times=clock.times(), updates=updates)
        clock.published()

    return publish, directory.clear, clock.through(blocks)


def _schedule_of(path: str) -> str:
    """The schedule of memory that a run record holds."""
    from stages.artifacts.records import Run
    from stages.artifacts.stream import open_records
    from stages.errors import DataError
    from stages.sparse_training import schedule_of

    record = next(open_records(path))
    schedule = schedule_of(record) if isinstance(record, Run) else ""
    if not schedule:
        raise DataError(path, "no schedule of memory", "a run that `train-sparse --ram` trained", "train it with --ram")
    return schedule


def _checkpointing(path: str, every: int) -> Checkpointing:
    from pathlib import Path

    from stages.artifacts.files import atomic_write
    from stages.artifacts.hdf5 import encode
    from stages.sparse_training import Checkpointing

    return Checkpointing(write=lambda record: atomic_write(Path(path), encode(record)), every=every)


def _reporter(status: Status, metrics: str | None) -> Callable[[Update], None]:
    """Each update on the status line and, as a line of JSON with the seconds since the start, in the metrics file."""
    start_s, shown = perf_counter(), {}

    def report(update: Update) -> None:
        figures = {name: value for name, value in asdict(update).items() if value == value}  # without NaN
        shown.update({name: f"{figures[name]:.4g}" for name in ("loss", "accuracy") if name in figures})
        status.show(**shown)
        if metrics is not None:
            append(metrics, {**figures, "seconds": round(perf_counter() - start_s, 6)})

    return report
