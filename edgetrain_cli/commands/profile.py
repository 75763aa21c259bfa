"""The command `profile`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from edgetrain_cli.manners import figures_only
from edgetrain_cli.options import Arch, In, Json, Out, Plot, RunFile
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage
from stages.settings.profiling import Profiling


@command("profile", writes=figures_only, history=True)
def profile(
    io: Stage,
    settings: Profiling,
    source: In = "-",
    out: Out = "-",
    run_file: RunFile = None,
    plot: Plot = None,
    as_json: Json = False,
    ram: Annotated[
        bool,
        typer.Option("--ram", help="Budgets of train-sparse --ram for the run's plan, or all layers, and their price."),
    ] = False,
    page_dir: Annotated[
        str | None, typer.Option("--page-dir", metavar="DIR", help="With --ram: where values may be paged to.")
    ] = None,
    arch: Arch = None,
) -> None:
    """Measure what a model costs on this device.

    Layer by layer, in deploy form (BatchNorm folded), which the written record is in too.

    Computed per layer: parameters, multiply-accumulates (MACs) forward and backward, bytes kept for the backward pass,
    buffers. Measured: forward and backward time (median and spread), memory of the process, and energy where the
    machine has a sensor (RAPL, INA3221). Memory units are powers of 1024, as in the papers.

      edgetrain profile base.h5 -o run.h5

      edgetrain profile base.h5 --json | jq .totals.macs

      edgetrain profile run.h5 --ram --plot budgets.png

    Without -o, with --json or at a terminal, the figures go to stdout and no record is written.
    """
    from pathlib import Path

    from edgetrain_cli.plots.frontier import plot_frontier
    from edgetrain_cli.plots.picture import check_plot
    from edgetrain_cli.plots.profile import plot_profile
    from edgetrain_cli.tables.profile import frontier_table, profile_table
    from stages.errors import require
    from stages.inspecting import describe
    from stages.profiling import frontier_of, profile_run

    require(ram or page_dir is None, "--page-dir", "without --ram", "both")
    if plot is not None:
        check_plot(Path(plot))
    start = io.read_run(source, run_file)
    progress = io.progress("timing operators", unit="operators")
    run = profile_run(start, settings, allow=arch, on_step=progress, on_note=io.note)
    if run.profile is None:
        return
    if not io.text_only:
        io.write(run, out)
    budgets = frontier_of(run, settings, page_dir, allow=arch) if ram else []
    if plot is not None and ram:
        plot_frontier(budgets, Path(plot))
    elif plot is not None:
        plot_profile(run.profile, Path(plot))
    if as_json:
        figures = describe(run)["profile"] | ({"budgets": [asdict(point) for point in budgets]} if ram else {})
        io.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    else:
        io.result(profile_table(run.profile))
        if ram:
            io.result(frontier_table(budgets))
