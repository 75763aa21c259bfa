"""The command `select`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import Arch, Cpus, History, In, MaxRecord, Out, Quiet, RunFile, Seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from stages.artifacts.records import Run
    from stages.selection import Weights


def select_samples(
    source: In = "-",
    out: Out = "-",
    run_file: RunFile = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Draws per round; duplicates are merged.")] = 10,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="Unbiased: titan, c-is, is (scored), stratified, random, all (not scored); auto chooses among them by "
            "variance and cost. Rivals: high-loss, low-loss, entropy, ocs (scored), camel.",
        ),
    ] = "titan",
    importance: Annotated[
        str,
        typer.Option(
            "--importance",
            help="Whose gradient counts: last-layer (closed form), live (what the plan trains; slow), full (slowest).",
        ),
    ] = "last-layer",
    epsilon: Annotated[
        float, typer.Option("--epsilon", min=0, max=1, help="Uniform share in the probabilities; bounds the weights.")
    ] = 0.2,
    unweighted: Annotated[
        bool, typer.Option("--unweighted", help="All draws weigh alike: the paper's other reading, biased.")
    ] = False,
    max_batch: Annotated[
        int | None, typer.Option("--max-batch", min=1, help="auto: largest batch it may choose; none: --batch.")
    ] = None,
    update_cost: Annotated[
        float | None,
        typer.Option("--update-cost", help="auto: forward passes that training on a sample costs; none: by the plan."),
    ] = None,
    overlap: Annotated[
        bool, typer.Option("--overlap", help="auto: training runs at the same time, on another processor.")
    ] = False,
    live: Annotated[
        str | None,
        typer.Option(
            "--live", metavar="DIR", envvar="EDGETRAIN_LIVE", help="Pick up weights of `train-sparse --live`."
        ),
    ] = None,
    lag: Annotated[
        str, typer.Option("--lag", metavar="0|1|any", help="With --live: updates that weights may be behind.")
    ] = "1",
    seed: Seed = 0,
    arch: Arch = None,
    max_record: MaxRecord = "1GiB",
    quiet: Quiet = False,
    history: History = True,
    cpus: Cpus = None,
) -> None:
    """Choose the batch worth training on from each block of candidates.

    Scores the candidates with the current model and draws --batch of them so that the weighted loss of the batch is an
    unbiased estimate of the loss of all, with the least variance that the pool allows. Each block carries the weights,
    the allocation over classes, and the variances of this choice, of importance sampling and of random choice.

    Example: edgetrain filter < stream.h5 | edgetrain select --batch 10 | edgetrain train-sparse -o adapted.h5
    """
    with pipe.stage("select", locals()) as io:
        from stages.selection import Selection, select_stream

        config = Selection(
            batch=batch,
            strategy=strategy,
            importance=importance,
            epsilon=epsilon,
            weighted=not unweighted,
            max_batch=max_batch,
            update_cost=update_cost,
            overlap=overlap,
        )
        run, candidates = io.read_stream(source, run_file)
        updates = None if run is None or run.plan is None else run.plan.updates
        with io.writer(out) as writer:
            if run is not None:
                writer.write(run)
            weights = _weights(io, run, arch, live, lag) if config.needs_model and run is not None else None
            progress = io.progress("rounds")
            for record in select_stream(
                candidates, config, weights=weights, updates=updates, seed=seed, on_note=io.note, on_step=progress
            ):
                writer.write(record)


def _weights(io: pipe.Stage, run: Run, arch: str | None, live: str | None, lag: str) -> Callable[[int], Weights]:
    """Round -> weights: the run's own, or those that the live directory holds for the round."""
    from pathlib import Path

    from stages.artifacts.history import model_hash
    from stages.artifacts.live import LiveDirectory, version_for
    from stages.errors import UsageError
    from stages.models.deploy import deploy
    from stages.selection import Weights

    start = Weights(deploy(run.model, allow=arch), run.model.head)
    if live is None:
        io.note("no --live directory: every round is scored with the starting weights")
        return lambda number: start
    directory = LiveDirectory(Path(live), model_hash(run))
    if lag == "any":
        return lambda number: start if (newest := directory.newest()) is None else start.at(newest)
    if not lag.isdecimal():
        raise UsageError("--lag", repr(lag), "0, 1, a higher number, or any")

    def weights(number: int) -> Weights:
        version = version_for(number, int(lag))
        return start if version == 0 else start.at(directory.wait(version, io.check_downstream))

    return weights
