"""The command `profile`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import Arch, Cpus, History, In, Json, MaxRecord, Out, Plot, Quiet, RunFile


def profile(
    source: In = "-",
    out: Out = "-",
    run_file: RunFile = None,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Time the layers here; without, the output never varies."),
    ] = True,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs that each median is taken over.")] = 20,
    power_watts: Annotated[
        float | None,
        typer.Option("--power-watts", metavar="W", help="Power read from a meter at the plug, for energy figures."),
    ] = None,
    plot: Plot = None,
    as_json: Json = False,
    arch: Arch = None,
    quiet: Quiet = False,
    history: History = True,
    cpus: Cpus = None,
    max_record: MaxRecord = "1GiB",
) -> None:
    """Measure what a model costs on this device.

    Layer by layer, in deploy form (BatchNorm folded), which the written record is in too.

    Computed per layer: parameters, multiply-accumulates (MACs) forward and backward, bytes kept for the backward pass,
    buffers. Measured: forward and backward time (median and spread), memory of the process, and energy where the
    machine has a sensor (RAPL, INA3221). Memory units are powers of 1024, as in the papers.

      edgetrain profile base.h5 -o run.h5

      edgetrain profile base.h5 --json | jq .totals.macs

    With --json and no -o the figures go to stdout and no record is written.
    """
    only_json = as_json and out == pipe.STDIO
    with pipe.stage("profile", locals(), writes="text" if only_json else "records") as io:
        import json
        from pathlib import Path

        from edgetrain_cli.plots.profile import check_plot, plot_profile
        from edgetrain_cli.profile_table import profile_table
        from stages.inspecting import describe
        from stages.profiling import Profiling, profile_run

        config = Profiling(measure=measure, repeats=repeats, power_watts=power_watts)
        if plot is not None:
            check_plot(Path(plot))
        run = profile_run(io.read_run(source, run_file), config, allow=arch, on_step=io.progress("operators"))
        if not only_json:
            io.write(run, out)
        if plot is not None and run.profile is not None:
            plot_profile(run.profile, Path(plot))
        if as_json:
            io.write_text(json.dumps(describe(run)["profile"], indent=1, allow_nan=False) + "\n")
        elif run.profile is not None:
            io.note_table(profile_table(run.profile))
