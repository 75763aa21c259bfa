"""The command `train-sparse`."""

from __future__ import annotations

from dataclasses import asdict
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Annotated

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import Arch, Cpus, History, In, MaxRecord, MetricsFile, Out, Quiet, RunFile, Seed
from edgetrain_cli.status import Status, append

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from stages.artifacts.records import Array, Block, Head, Run
    from stages.sparse_training import Checkpointing, Publish, SupportTraining, Update


def train_sparse(
    source: In = "-",
    support: Annotated[
        str | None, typer.Argument(metavar="SUPPORT", help="Samples to adapt to; without it, IN is a stream.")
    ] = None,
    out: Out = "-",
    run_file: RunFile = None,
    full: Annotated[bool, typer.Option("--full", help="Train all layers, not the run's plan.")] = False,
    last_layer: Annotated[
        bool, typer.Option("--last-layer", help="Train the backbone's last layer, not the run's plan.")
    ] = False,
    micro_batch: Annotated[
        int, typer.Option("--micro-batch", min=0, help="Samples in memory at once; 0 is all. The update is the same.")
    ] = 64,
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", metavar="sgd|adam|adamw", help="Default: sgd for streams, adam for supports."),
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", min=0, help="Default: 0.02 for streams; chosen inside the support set.")
    ] = None,
    momentum: Annotated[float, typer.Option("--momentum", min=0, help="Of sgd.")] = 0.0,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0, help="Of live values only.")] = 0.0,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            metavar="constant|cosine|step",
            help="Learning rate over updates; step is x0.95 every 100 (Titan's).",
        ),
    ] = "constant",
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Updates of linear warm-up.")] = 0,
    total_updates: Annotated[int, typer.Option("--updates", min=0, help="Streams: length of the cosine schedule.")] = 0,
    clip: Annotated[
        float | None,
        typer.Option("--clip", min=0, help="Largest gradient norm; 0 is any. Default: 2 for streams, 0 for supports."),
    ] = None,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Support: passes over it.")] = 40,
    folds: Annotated[
        int, typer.Option("--folds", min=2, help="Support: parts left out in turn to choose the learning rate.")
    ] = 3,
    views: Annotated[
        int, typer.Option("--views", min=0, help="Support: augmented copies, drawn once; 0 is a fresh one each pass.")
    ] = 0,
    cache_prefix: Annotated[
        bool, typer.Option("--cache-prefix", help="Support: run frozen layers once per view; needs --views.")
    ] = False,
    cache_file: Annotated[
        str | None,
        typer.Option(
            "--cache-file", metavar="FILE", help="Support: keep what --cache-prefix caches for the next time."
        ),
    ] = None,
    detach_prototypes: Annotated[
        bool, typer.Option("--detach-prototypes", help="Support: no gradient through prototypes; cheaper.")
    ] = False,
    scale: Annotated[
        float | None, typer.Option("--scale", help="Support: of the cosine logits; default the head's, or 10.")
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(
            "--live", metavar="DIR", envvar="EDGETRAIN_LIVE", help="Streams: publish versions for `select --live`."
        ),
    ] = None,
    live_keep: Annotated[
        int, typer.Option("--live-keep", min=2, help="Versions kept there; at least select's --lag + 2.")
    ] = 8,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="FILE", help="Streams: save the state of training here.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option("--checkpoint-every", min=1, help="Updates between saves.")] = 100,
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
        str | None, typer.Option("--holdout", metavar="FILE", help="Streams: samples to watch accuracy on.")
    ] = None,
    holdout_every: Annotated[int, typer.Option("--holdout-every", min=1, help="Updates between measurements.")] = 10,
    metrics: MetricsFile = None,
    seed: Seed = 0,
    arch: Arch = None,
    max_record: MaxRecord = "1GiB",
    quiet: Quiet = False,
    history: History = True,
    cpus: Cpus = None,
) -> None:
    """Train exactly the live channels of a plan.

    On a support set or on a stream.

    With SUPPORT: few-shot adaptation with the ProtoNet loss on augmented copies of the support set; its class means
    become the head. Without: one update per block of the stream, of the live channels and a linear head, weighted as
    the blocks say. What the plan freezes stays bit-equal. SIGINT and SIGTERM finish the running update and write.

    Example: edgetrain train-sparse run.h5 support.h5 -o adapted.h5

    Example: edgetrain filter < stream.h5 | edgetrain select | edgetrain train-sparse -o adapted.h5
    """
    with pipe.stage("train-sparse", locals()) as io:
        from edgetrain_cli.samples import block_of
        from stages.errors import UsageError, require
        from stages.sparse.adaptation import LEARNING_RATES, Adapting
        from stages.sparse.optimizers import Optimizing
        from stages.sparse_training import (
            STREAM_OPTIMIZING,
            Holdout,
            StreamTraining,
            SupportTraining,
            TrainingStopped,
            train_stream,
        )

        require(not (full and last_layer), "--full", "together with --last-layer", "one of the two")
        plan = "full" if full else "last-layer" if last_layer else None
        optimizing = Optimizing(
            optimizer=optimizer or ("sgd" if support is None else "adam"),
            learning_rate=STREAM_OPTIMIZING.learning_rate if lr is None else lr,
            momentum=momentum,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_updates=warmup,
            total_updates=total_updates if support is None else iterations,
            clip_norm=clip if clip is not None else STREAM_OPTIMIZING.clip_norm if support is None else 0.0,
        )
        if support is not None:
            for option, value in (("--checkpoint", checkpoint), ("--resume", resume), ("--holdout", holdout)):
                require(value is None, option, "together with a support set", "a stream", "leave one of the two out")
            run = io.read_run(source, run_file)
            samples = block_of(io, support, run)
            adapting = Adapting(
                iterations=iterations,
                learning_rates=LEARNING_RATES if lr is None else (lr,),
                folds=folds,
                optimizing=optimizing,
                views=views,
                cache_prefix=cache_prefix,
                detach_prototypes=detach_prototypes,
                scale=_scale(run) if scale is None else scale,
                micro_batch=micro_batch,
            )
            require(cache_prefix or cache_file is None, "--cache-file", "without --cache-prefix", "both")
            config = SupportTraining(plan=plan, adapting=adapting)
            _on_support(io, run, samples, config, seed=seed, arch=arch, cache_file=cache_file, out=out, metrics=metrics)
            return
        start, blocks = io.read_stream(source, run_file)
        if start is None:
            raise UsageError("stream", "no run record", "one before the blocks", "put it first, or give --run FILE")
        status = Status(io, None, last=True)
        state = None if resume is None else pipe.read_checkpoint(resume)
        publish, clear, blocks = _way_back(live, start, state, live_keep, blocks)
        watched = None if holdout is None else Holdout(block=block_of(io, holdout, start), every=holdout_every)
        io.finish_on_signals()
        try:
            result = train_stream(
                start,
                status.watch(blocks),
                StreamTraining(plan=plan, optimizing=optimizing, micro_batch=micro_batch),
                resume=state,
                replayed=replayed,
                publish=publish,
                checkpoint=None if checkpoint is None else _checkpointing(checkpoint, checkpoint_every),
                holdout=watched,
                stop=io.stop_requested,
                on_step=_reporter(status, metrics),
                allow=arch,
            )
        except TrainingStopped as stopped:
            io.write(stopped.run, out)
            raise
        io.write(result, out)
        if checkpoint is None or not io.stop_requested():  # a run that is to go on needs its versions
            clear()
        if io.stop_requested():
            raise pipe.Stopped(io.stop_requested())


def _on_support(
    io: pipe.Stage,
    run: Run,
    samples: Block,
    config: SupportTraining,
    *,
    seed: int,
    arch: str | None,
    cache_file: str | None,
    out: str,
    metrics: str | None,
) -> None:
    from pathlib import Path

    from stages.randomness import generator
    from stages.sparse.adaptation import total_iterations
    from stages.sparse.prefix_file import PrefixFile
    from stages.sparse_training import STAGE, train_support

    io.finish_on_signals()
    progress = io.progress("iterations", total_iterations(config.adapting))
    rng = generator(seed, STAGE)
    result = train_support(
        run,
        samples,
        config,
        rng=rng,
        on_step=progress,
        stop=io.stop_requested,
        cache_file=None if cache_file is None else PrefixFile(Path(cache_file)),
        allow=arch,
    )
    done = result.model.version - run.model.version
    if done or not io.stop_requested():
        io.write(result, out)
    if metrics is not None:
        columns = result.metrics[STAGE]
        for row in range(len(columns["loss"]) - done, len(columns["loss"])):
            append(metrics, {name: float(values[row]) for name, values in columns.items()})
    if io.stop_requested():
        raise pipe.Stopped(io.stop_requested())
    if not done:
        io.note("no adaptation: training did not raise the accuracy on left-out samples, so only prototypes were made")


def _scale(run: Run) -> float:
    return 10.0 if run.model.head is None else run.model.head.scale


def _way_back(
    live: str | None, run: Run, state: Run | None, keep: int, blocks: Iterator[Block]
) -> tuple[Publish | None, Callable[[], None], Iterator[Block]]:
    """How versions are published in the live directory, how it is emptied when the run is complete, and the blocks.

    Versions say what the latest updates took, for `select --strategy auto`.
    """
    if live is None:
        return None, lambda: None, blocks
    from pathlib import Path

    from stages.artifacts.history import model_hash
    from stages.artifacts.live import LiveDirectory
    from stages.valuation.costs import UpdateClock

    directory, clock = LiveDirectory(Path(live), model_hash(run)), UpdateClock(thread_time)
    directory.prepare(keep_up_to=None if state is None else state.model.version - run.model.version)

    def publish(number: int, tensors: Mapping[str, Array], head: Head) -> None:
        directory.publish(number, tensors, head, keep=keep, update_times=clock.times())
        clock.published()

    return publish, directory.clear, clock.through(blocks)


def _checkpointing(path: str, every: int) -> Checkpointing:
    from pathlib import Path

    from stages.artifacts.files import atomic_write, check_writable
    from stages.artifacts.hdf5 import encode
    from stages.sparse_training import Checkpointing

    check_writable(Path(path))
    return Checkpointing(write=lambda record: atomic_write(Path(path), encode(record)), every=every)


def _reporter(status: Status, metrics: str | None) -> Callable[[Update], None]:
    """Each update on the status line and, as a line of JSON with the seconds since the start, in the metrics file."""
    start_s, shown = perf_counter(), {}

    def report(update: Update) -> None:
        figures = {name: value for name, value in asdict(update).items() if value == value}  # without NaN
        shown.update({name: round(figures[name], 4) for name in ("loss", "accuracy") if name in figures})
        status.show(**shown)
        if metrics is not None:
            append(metrics, {**figures, "seconds": round(perf_counter() - start_s, 6)})

    return report
