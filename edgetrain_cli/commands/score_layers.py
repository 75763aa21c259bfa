"""The command `score-layers`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import Arch, Cpus, History, In, Json, MaxRecord, Out, Plot, Quiet, RunFile, Seed


def score_layers(
    source: In = "-",
    out: Out = "-",
    run_file: RunFile = None,
    support: Annotated[
        str | None, typer.Option("--support", metavar="FILE", help="Samples of the task: a file of blocks.")
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan", metavar="NAME", help="No search: full, last-layer, last-3, bias, mcunet-99kb and other schemes."
        ),
    ] = None,
    plan_file: Annotated[
        str | None, typer.Option("--plan-file", metavar="FILE", help="No search: your own plan, TOML or .json.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Budget: 1MB, 512KiB, ... Default 1MB; none with --plan."),
    ] = None,
    macs: Annotated[
        str | None,
        typer.Option(
            "--macs",
            metavar="N|SHARE",
            help="Budget of backward MACs per sample: 6.5M, or a share of full training's. Default 15%; none with "
            "--plan.",
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option("--latency", metavar="TIME", help="Budget of a step per sample, by the profile: 200ms."),
    ] = None,
    memory_model: Annotated[
        str, typer.Option("--memory-model", help="What --memory counts: paper, saved, peak.")
    ] = "paper",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples that training keeps in memory at once.")] = 1,
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="Whose state --memory counts: adam, adamw, momentum, sgd.")
    ] = "adam",
    search: Annotated[
        str,
        typer.Option(
            "--search",
            metavar="tinytrain|shortcut",
            help="How to search. tinytrain: as published. shortcut: block entries by Fisher information, gradients "
            "past residual branches; more accurate at the same cost. Each option below changes one part of it.",
        ),
    ] = "tinytrain",
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            metavar="NAME",
            help="A layer's worth: score (tinytrain), fisher (shortcut), fisher-memory, fisher-compute, l2, random.",
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            "--select",
            metavar="NAME",
            help="greedy (tinytrain), strict-prefix, knapsack (the optimum; shortcut), exhaustive.",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="all|entries",
            help="Candidates: all layers (tinytrain), or the first of each block that mixes channels (shortcut).",
        ),
    ] = None,
    gradient: Annotated[
        str | None,
        typer.Option(
            "--gradient",
            metavar="exact|shortcut",
            help="Through all layers (tinytrain), or past those of residual branches (shortcut). Also with --plan.",
        ),
    ] = None,
    channels: Annotated[str, typer.Option("--channels", help="Which channels train: output or input ones.")] = "output",
    ratio: Annotated[
        list[float] | None,
        typer.Option(
            "--ratio",
            help="Share of a layer's channels; repeat for a choice. tinytrain: 1, 1/2, 1/4, 1/8; shortcut: 1, 1/2.",
        ),
    ] = None,
    channel_rule: Annotated[
        str | None,
        typer.Option("--channel-rule", help="The best channels: fisher, l2, random. Default fisher; l2 with --plan."),
    ] = None,
    train_bias: Annotated[bool, typer.Option("--train-bias", help="Biases of live channels train too.")] = False,
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Inspect the last so many blocks.")] = 6,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="prototypes|linear", help="Whose loss counts. Default: as the run's head."),
    ] = None,
    micro_batch: Annotated[
        int, typer.Option("--micro-batch", min=1, help="Samples in memory at once; the result is the same.")
    ] = 1,
    plot: Plot = None,
    as_json: Json = False,
    seed: Seed = 0,
    arch: Arch = None,
    max_record: MaxRecord = "1GiB",
    quiet: Quiet = False,
    history: History = True,
    cpus: Cpus = None,
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

    With --json and no -o scores and plan go to stdout and no record is written.
    """
    only_json = as_json and out == pipe.STDIO
    with pipe.stage("score-layers", locals(), writes="text" if only_json else "records") as io:
        import json
        from pathlib import Path

        from edgetrain_cli.plots.plan import check_plot, plot_plan
        from edgetrain_cli.plots.plan_tree import plan_tree
        from edgetrain_cli.samples import block_of
        from stages.inspecting import describe
        from stages.randomness import generator
        from stages.scoring import Scoring
        from stages.scoring import score_layers as score

        config = Scoring(
            plan=plan,
            plan_text=None if plan_file is None else io.named(plan_file).read_text("utf-8", "replace"),
            plan_file=plan_file or "",
            memory=memory,
            macs=macs,
            latency=latency,
            memory_model=memory_model,
            batch=batch,
            optimizer=optimizer,
            search=search,
            criterion=criterion,
            layers=layers,
            gradient=gradient,
            select=select,
            channels=channels,
            ratios=tuple(ratio) if ratio else None,
            channel_rule=channel_rule,
            train_bias=train_bias,
            blocks=blocks,
            head=head,
            micro_batch=micro_batch,
        )
        run = io.read_run(source, run_file)
        if plot is not None:
            check_plot(run, Path(plot))
        samples = None if support is None else block_of(io, support, run)
        progress = io.progress("samples", None if samples is None else len(samples))
        run = score(run, samples, config, rng=generator(seed, "score-layers"), on_step=progress, allow=arch)
        if not only_json:
            io.write(run, out)
        if plot is not None:
            plot_plan(run, Path(plot))
        if as_json:
            described = describe(run)
            io.write_text(
                json.dumps({key: described[key] for key in ("plan", "scores")}, indent=1, allow_nan=False) + "\n"
            )
        elif run.plan is not None:
            io.note_table(plan_tree(run.plan))
