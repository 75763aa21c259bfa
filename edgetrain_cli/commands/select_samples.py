"""The command `select`."""

from __future__ import annotations

from time import thread_time, time
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from edgetrain_cli.options import Arch, In, MetricsFile, Out, Recorded, RunFile, Seed
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage, read_checkpoint
from stages.settings.selection import AUTO, Selection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stages.artifacts.live import LiveDirectory
    from stages.artifacts.records import Run
    from stages.models.deploy import Backbone
    from stages.selection import Weights
    from stages.valuation.anytime import Anytime
    from stages.valuation.efficiency import Decision


@command("select", history=True)
def select_samples(
    io: Stage,
    settings: Selection,
    source: In = "-",
    out: Out = "-",
    run_file: RunFile = None,
    replay: Annotated[
        str | None,
        typer.Option("--replay", metavar="FILE", help="auto: choose as the run whose --metrics FILE this is."),
        Recorded(),
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(
            "--live", metavar="DIR", envvar="EDGETRAIN_LIVE", help="Pick up weights of `train-sparse --live`."
        ),
    ] = None,
    lag: Annotated[
        str,
        typer.Option("--lag", metavar="0|1|any", help="With --live: updates that weights may be behind."),
        Recorded(),
    ] = "1",
    until_ready: Annotated[
        bool,
        typer.Option(
            "--until-ready", help="With --live: score only as many candidates as there is time for (anytime)."
        ),
        Recorded(),
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="FILE", help="The checkpoint that `train-sparse --resume` goes on from."),
    ] = None,
    replayed: Annotated[
        bool, typer.Option("--replayed/--continued", help="With --resume: as for `train-sparse`.")
    ] = True,
    metrics: MetricsFile = None,
    seed: Seed = 0,
    arch: Arch = None,
) -> None:
    """Choose the batches worth training on.

    One from each block of candidates.

    Scores the candidates with the current model and draws --batch of them so that the weighted loss of the batch is an
    unbiased estimate of the loss of all, with the least variance that the pool allows. Each block carries the weights,
    the allocation over classes, and the variances of this choice, of importance sampling and of random choice.

    --until-ready stops scoring in time for the trainer, which says how long its updates take; at least one candidate of
    each class is scored, and those that were stand for the others of their class, so the estimate stays unbiased. How
    many were scored is in each block (`scored`). It depends on timing.

    --strategy auto weighs what a choice brings against what it costs, in processor time of scoring here and of updates
    there, as `train-sparse --live` says. What it chose is in each block and in --metrics; --replay does the same again.

    --send features adds columns `boundary0`, ... with the output of the layers that never train; `train-sparse` starts
    there, so frozen layers run once, on this stage's processor.

    Memory: one block of candidates and its activations, whatever the stream's length.

    Example: edgetrain filter < stream.h5 | edgetrain select --batch 10 | edgetrain train-sparse -o adapted.h5
    """
    from edgetrain_cli.status import Status
    from stages.artifacts.records import Block
    from stages.errors import require
    from stages.models.deploy import deploy
    from stages.selection import select_stream

    require(not until_ready or bool(live), "--until-ready", "without --live", "a live directory to watch")
    require(not until_ready or lag != "0", "--until-ready", "with --lag 0", "1 or more: training while scoring")
    auto = settings.strategy == AUTO
    require(replay is None or auto, "--replay", f"with --strategy {settings.strategy}", f"--strategy {AUTO}")
    passed = 0 if resume is None else _blocks_used(resume)
    run, candidates = io.read_stream(source, run_file)
    updates = None if run is None or run.plan is None else run.plan.updates
    with io.writer(out) as writer:
        if run is not None:
            writer.write(run)
        view = Scorer()
        if run is not None and (settings.needs_model or settings.send_features):
            backbone = deploy(
                run.model,
                allow=arch,
                engine=settings.engine,
                device=settings.device,
                same_bits=settings.same_bits,
                on_note=io.note,
            )
            view = _scorer(io, run, backbone, live, lag, passed, resume is not None, until_ready)
        del run  # its tensors are in `view`
        status = Status(io, metrics, "choosing batches")
        for record in select_stream(
            candidates,
            settings,
            weights=view.weights,
            updates=updates,
            backbone=None if view.start is None else view.start.backbone,
            ready=None if view.anytime is None else view.anytime.wanted,
            passed=passed,
            replayed=replayed,
            seed=seed,
            clock=thread_time,
            replay=None if replay is None else _decisions(io.named(replay)),
            on_note=io.note,
        ):
            writer.write(record)
            if view.anytime is not None:
                view.anytime.delivered()
            if isinstance(record, Block):
                status.passed(record)
    status.close()


class Scorer(NamedTuple):
    """What candidates are scored with, and when their batch is wanted; nothing where they are not scored."""

    start: Weights | None = None
    weights: Callable[[int], Weights] | None = None
    anytime: Anytime | None = None


def _scorer(
    io: Stage,
    run: Run,
    backbone: Backbone,
    live: str | None,
    lag: str,
    passed: int,
    resumes: bool,
    until_ready: bool,
) -> Scorer:
    from stages.selection import Weights

    start = Weights(backbone, run.model.head)
    directory = _directory(live, run, passed if resumes else None) if live else None
    weights = _weights(io, start, directory, lag, passed)
    if until_ready and directory is not None:
        anytime, weights = _learning(directory, weights)
        return Scorer(start, weights, anytime)
    return Scorer(start, weights)


def _decisions(metrics: Path) -> dict[int, Decision]:
    """What `auto` chose in the run that wrote these lines."""
    import json

    from stages.errors import DataError
    from stages.valuation.efficiency import recorded

    try:
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    except ValueError as error:
        raise DataError(str(metrics), f"not lines of JSON ({error})", "the --metrics FILE of an earlier run") from error
    return recorded(rows, str(metrics))


def _directory(live: str, run: Run, passed: int | None) -> LiveDirectory:
    """The live directory; on resuming without versions that the trainer will publish anew."""
    from pathlib import Path

    from stages.artifacts.history import model_hash
    from stages.artifacts.live import LiveDirectory

    directory = LiveDirectory(Path(live), model_hash(run))
    if passed is not None:
        directory.forget(passed)
    return directory


def _blocks_used(checkpoint: str) -> int:
    from stages.training.checkpoints import blocks_used

    return blocks_used(read_checkpoint(checkpoint))


def _weights(
    io: Stage, start: Weights, directory: LiveDirectory | None, lag: str, first: int
) -> Callable[[int], Weights]:
    """Round -> weights: the run's own, or those that the live directory holds for the round."""
    from stages.artifacts.live import version_for
    from stages.errors import UsageError

    if directory is None:
        io.note("no --live directory: every round is scored with the starting weights")
        return lambda number: start
    if lag == "any":
        return lambda number: start if (newest := directory.newest()) is None else start.at(newest)
    if not lag.isdecimal():
        raise UsageError("--lag", repr(lag), "0, 1, a higher number, or any")

    def weights(number: int) -> Weights:
        version = version_for(number, int(lag))
        return start if version == 0 else start.at(directory.wait(version, io.check_downstream, first=first))

    return weights


def _learning(directory: LiveDirectory, weights: Callable[[int], Weights]) -> tuple[Anytime, Callable[[int], Weights]]:
    """When batches are wanted, and the same weights; what these say of the trainer's updates is passed on."""
    from stages.valuation.anytime import Anytime

    anytime = Anytime(directory.published_s, time)

    def learn(number: int) -> Weights:
        found = weights(number)
        anytime.updates(found.update_times)
        return found

    return anytime, learn
