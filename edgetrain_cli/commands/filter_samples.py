"""The command `filter`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import Arch, Cpus, History, In, MaxRecord, MetricsFile, Out, Quiet, RunFile, Seed


def filter_samples(
    source: In = "-",
    out: Out = "-",
    run_file: RunFile = None,
    window: Annotated[
        int, typer.Option("--window", min=1, help="Samples per round; at --pace demand the fewest.")
    ] = 100,
    pace: Annotated[
        str,
        typer.Option(
            "--pace",
            metavar="window|demand",
            help="A round ends every --window samples, or as soon as the next stage has taken the one before.",
        ),
    ] = "window",
    keep: Annotated[int, typer.Option("--keep", min=1, help="Candidates per round, at most --window.")] = 30,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="quota: a random sample of each class, no forward pass. priority, rep, div, rep-div, ocs: by shallow "
            "features. random. camel: by input distance.",
        ),
    ] = "quota",
    blocks: Annotated[
        int, typer.Option("--blocks", min=1, help="Feature strategies: depth of the features, in model blocks.")
    ] = 1,
    decay: Annotated[
        float, typer.Option("--decay", help="Feature strategies: how fast a class's statistics forget; 1 never.")
    ] = 0.99,
    metrics: MetricsFile = None,
    seed: Seed = 0,
    arch: Arch = None,
    max_record: MaxRecord = "1GiB",
    quiet: Quiet = False,
    history: History = True,
    cpus: Cpus = None,
) -> None:
    """Keep the candidates of a stream worth scoring.

    One block per window of the stream.

    Reads samples (after a run record, if there is one, which is forwarded at once) and keeps --keep of every --window,
    by default a random sample of each class with the places shared evenly. Each block of candidates says how many
    samples of each class the window had (`seen`) and weighs its samples so that they stand for the whole window.
    Memory is constant however long the stream: --keep samples and a chunk of 256.

    With --pace demand the source never waits, not even while the next stage is busy: a thread takes what comes, rounds
    are as long as the next stage needs, and what does not fit is dropped and counted by class (`dropped`; `missed` are
    those that came faster than they could be scored). Up to 512 samples wait for scoring, besides the memory above.

    Example: edgetrain filter --keep 30 stream.h5 | edgetrain select | edgetrain train-sparse --run run.h5 -o out.h5
    """
    with pipe.stage("filter", locals()) as io:
        from edgetrain_cli.demand import check_pipe, serve
        from edgetrain_cli.status import Status
        from stages.artifacts.records import Block, End
        from stages.errors import require
        from stages.filtering import Filtering, filter_on_demand, filter_stream

        require(pace in ("window", "demand"), "--pace", f"{pace!r}", "window or demand")
        if pace == "demand":
            check_pipe(out)
        config = Filtering(window=window, keep=keep, strategy=strategy, decay=decay)
        run, samples = io.read_stream(source, run_file)
        features, status = None, Status(io, metrics)
        with io.writer(out) as writer:
            if run is not None:
                writer.write(run)
                if config.needs_model:
                    from stages.models.deploy import deploy
                    from stages.valuation.shallow import shallow_features

                    features = shallow_features(deploy(run.model, allow=arch), blocks)
            del run  # a stream may be endless, and its tensors are large
            if pace == "demand":
                demand = filter_on_demand(config, features=features, seed=seed, on_note=io.note)
                writer.write(End(serve(samples, demand, writer, status.passed)))
                return
            for record in filter_stream(samples, config, features=features, seed=seed, on_note=io.note):
                writer.write(record)
                if isinstance(record, Block):
                    status.passed(record)
