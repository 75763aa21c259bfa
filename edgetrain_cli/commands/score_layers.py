"""The command `score-layers`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated

import typer

from edgetrain_cli.manners import figures_only
from edgetrain_cli.options import Arch, In, Json, Out, Plot, Recorded, RunFile, Seed
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage
from stages.settings.scoring import Scoring


@command("score-layers", writes=figures_only, history=True)
def score_layers(
    io: Stage,
    settings: Scoring,
    source: In = "-",
    out: Out = "-",
    run_file: RunFile = None,
    support: Annotated[
        str | None,
        typer.Option("--support", metavar="FILE", help="Samples of the task: blocks, a folder, or a picture."),
    ] = None,
    plan_file: Annotated[
        str | None,
        typer.Option("--plan-file", metavar="FILE", help="No search: your own plan, TOML or .json."),
        Recorded(),
    ] = None,
    plot: Plot = None,
    as_json: Json = False,
    seed: Seed = 0,
    arch: Arch = None,
) -> None:
    """Choose the layers and channels that train.

    By what they matter for the samples of --support, within budgets of memory and compute.

    Measures how much the loss depends on each channel (Fisher potential, one pass over the samples), weighs that
    against what training the layer costs, and writes scores and plan into the run. Exit code 75: nothing fits; the
    message says what would. With --plan or --plan-file the plan is given, and nothing is measured unless
    --channel-rule fisher asks for it.

      edgetrain score-layers run.h5 --support support.h5 --memory 1MB --macs 15% -o run.h5

      edgetrain score-layers run.h5 --support support.h5 --select knapsack --plot plan.png -o run.h5

      edgetrain score-layers run.h5 --support support.h5 --search shortcut -o run.h5

      edgetrain score-layers run.h5 --plan mcunet-99kb -o run.h5

    Without -o, with --json or at a terminal, scores and plan go to stdout and no record is written.
    """
    from pathlib import Path

    from edgetrain_cli.plots.plan import check_plot, plot_plan
    from edgetrain_cli.plots.plan_tree import plan_tree
    from edgetrain_cli.samples import block_of
    from stages.inspecting import describe
    from stages.randomness import generator
    from stages.scoring import score_layers as score

    if plan_file is not None:
        text = io.named(plan_file).read_text("utf-8", "replace")
        settings = replace(settings, plan_text=text, plan_file=plan_file)
    run = io.read_run(source, run_file)
    if plot is not None:
        check_plot(run, Path(plot))
    samples = None if support is None else block_of(io, support, run)
    progress = io.progress("scoring layers", None if samples is None else len(samples))
    run = score(
        run,
        samples,
        settings,
        rng=generator(seed, "score-layers"),
        on_step=progress,
        on_fit=io.holds,
        on_note=io.note,
        allow=arch,
    )
    if run.plan is None:
        return
    if not io.text_only:
        io.write(run, out)
    if plot is not None:
        plot_plan(run, Path(plot))
    if as_json:
        described = describe(run)
        shown = {key: described[key] for key in ("plan", "scores")}
        io.write_text(json.dumps(shown, indent=1, allow_nan=False) + "\n")
    else:
        io.result(plan_tree(run.plan))
