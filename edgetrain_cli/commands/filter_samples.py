"""The command `filter`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import Arch, Cpus, History, In, MaxRecord, Out, Quiet, RunFile, Seed


def filter_samples(
    source: In = "-",
    out: Out = "-",
    run_file: RunFile = None,
    window: Annotated[int, typer.Option("--window", min=1, help="Samples per round.")] = 100,
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
    seed: Seed = 0,
    arch: Arch = None,
    max_record: MaxRecord = "1GiB",
    quiet: Quiet = False,
    history: History = True,
    cpus: Cpus = None,
) -> None:
    """Keep the candidates worth scoring: one block per window of a stream.

    Reads samples (after a run record, if there is one, which is forwarded at once) and keeps --keep of every --window,
    by default a random sample of each class with the places shared evenly. Each block of candidates says how many
    samples of each class the window had (`seen`) and weighs its samples so that they stand for the whole window.
    Memory is constant: --keep samples and one chunk, however long the stream.

    Example: edgetrain filter --keep 30 stream.h5 | edgetrain select | edgetrain train-sparse --run run.h5 -o out.h5
    """
    with pipe.stage("filter", locals()) as io:
        from stages.filtering import Filtering, filter_stream, shallow_features

        config = Filtering(window=window, keep=keep, strategy=strategy, decay=decay)
        run, samples = io.read_stream(source, run_file)
        features = None
        with io.writer(out) as writer:
            if run is not None:
                writer.write(run)
                if config.needs_model:
                    from stages.models.deploy import deploy

                    features = shallow_features(deploy(run.model, allow=arch), blocks)
            progress = io.progress("rounds")
            for record in filter_stream(
                samples, config, features=features, seed=seed, on_note=io.note, on_step=progress
            ):
                writer.write(record)
