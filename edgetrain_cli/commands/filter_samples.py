"""The command `filter`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli.options import Arch, In, MetricsFile, Out, Recorded, RunFile, Seed
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage
from stages.settings.filtering import Filtering

Pace = Annotated[
    str,
    typer.Option(
        "--pace",
        metavar="window|demand",
        help="A round ends every --window samples, or as soon as the next stage has taken the one before.",
    ),
    Recorded(),
]


@command("filter", history=True)
def filter_samples(
    io: Stage,
    settings: Filtering,
    source: In = "-",
    out: Out = "-",
    run_file: RunFile = None,
    pace: Pace = "window",
    metrics: MetricsFile = None,
    seed: Seed = 0,
    arch: Arch = None,
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
    from edgetrain_cli.demand import check_pipe, serve
    from edgetrain_cli.status import Status
    from stages.artifacts.records import Block, End
    from stages.errors import require
    from stages.filtering import filter_on_demand, filter_stream, model_features

    require(pace in ("window", "demand"), "--pace", f"{pace!r}", "window or demand")
    if pace == "demand":
        check_pipe(out)
    run, samples = io.read_stream(source, run_file)
    status = Status(io, metrics, "keeping candidates")
    with io.writer(out) as writer:
        features = None
        if run is not None:
            writer.write(run)
            features = model_features(run.model, settings, allow=arch, on_note=io.note)
        del run  # a stream may be endless, and its tensors are large
        if pace == "demand":
            demand = filter_on_demand(settings, features=features, seed=seed, on_note=io.note)
            writer.write(End(serve(samples, demand, writer, status.passed)))
        else:
            for record in filter_stream(samples, settings, features=features, seed=seed, on_note=io.note):
                writer.write(record)
                if isinstance(record, Block):
                    status.passed(record)
    status.close()
