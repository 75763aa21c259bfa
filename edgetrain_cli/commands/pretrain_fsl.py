"""The command `pretrain-fsl`."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrain_cli.options import MetricsFile, Out, Recorded, Seed, Writes
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage, read_checkpoint
from stages.settings.importing import NewModel
from stages.settings.pretraining import Pretraining

if TYPE_CHECKING:
    from collections.abc import Callable

    from stages.artifacts.records import Block, Run
    from stages.fsl.trainer import Progress

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
"""Of this process among those that train together, as torchrun says."""


@command("pretrain-fsl", history=True)
def pretrain_fsl(
    io: Stage,
    model: NewModel,
    settings: Pretraining,
    data: Annotated[
        list[str] | None, typer.Argument(metavar="DATA...", help="Sample blocks; every file is one data set.")
    ] = None,
    out: Out = "-",
    arch: Annotated[
        str | None,
        typer.Option("--arch", metavar="NAME", help="Architecture, or package.module:factory."),
        Recorded(),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option("--init", metavar="FILE", help="Start from these weights, or from a run record."),
        Recorded(),
    ] = None,
    glyphs: Annotated[
        bool,
        typer.Option("--glyphs", help="One data set more: letters drawn from the fonts of matplotlib."),
        Recorded(),
    ] = False,
    validation: Annotated[
        str | None,
        typer.Option("--validation", metavar="FILE", help="Samples of other classes to validate on."),
        Recorded(),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="FILE", help="Save the state of training after every epoch."),
        Writes(),
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="FILE", help="Go on from a checkpoint, to the same bits.")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where to compute.")] = "cpu",
    metrics: MetricsFile = None,
    seed: Seed = 0,
) -> None:
    """Meta-train a backbone for few-shot learning.

    ProtoNet with cosine similarity, from imported weights or from scratch.

    The defaults are those of P>M>F: 100 epochs of 2000 episodes, SGD with warm-up and cosine, a learnable cosine scale.
    With --init BatchNorm keeps its statistics. The best weights on validation tasks are written. Several processes
    share out the episodes of a step under torchrun; rank 0 writes.

    Example: edgetrain pretrain-fsl --arch mcunet-5fps --init weights.h5 omniglot.h5 -o base.h5

    Example: edgetrain pretrain-fsl --arch cnn4-w32 --size 32 --glyphs --epochs 8 --steps 50 --ways 20 -o base.h5

    Example: torchrun --nproc-per-node 2 -m edgetrain_cli pretrain-fsl ... --per-step 2 -o base.h5
    """
    from stages.engines.choice import need_torch
    from stages.errors import require

    need_torch("pretrain-fsl")
    from stages.fsl.team import ALONE, joined
    from stages.pretraining import pretrain

    io.quiet = io.quiet or RANK > 0
    require(bool(data) or glyphs, "DATA", "no data set", "files of sample blocks, or --glyphs")
    settings = replace(settings, scratch=init is None)
    run = _initial(io, init, arch, model, seed)
    blocks = [io.read_samples(path) for path in data or []]
    if glyphs:
        blocks.append(_glyphs(io, run))
    with ExitStack() as stack:
        team = ALONE
        if PROCESSES > 1:
            team = stack.enter_context(joined(RANK, PROCESSES, cuda=device.startswith("cuda")))
        result = pretrain(
            run,
            blocks,
            settings,
            seed=seed,
            validation=None if validation is None else io.read_samples(validation),
            resume=None if resume is None else read_checkpoint(resume, "pretrain-fsl"),
            save=_save(checkpoint, metrics),
            on_step=_reporter(io, settings.total_steps),
            device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device,
            team=team,
            allow=arch,
        )
        if team.leads:
            _finish(io, result, out)


def _initial(io: Stage, init: str | None, arch: str | None, model: NewModel, seed: int) -> Run:
    """The run record that training starts from: random weights, a file of weights, or a run record."""
    from stages.artifacts import hdf5
    from stages.errors import UsageError
    from stages.importing import import_model, read_weights

    path = None if init is None else io.named(init)
    if path is not None and path.is_file():
        with path.open("rb") as file:
            stored = file.read(8) == hdf5.SIGNATURE
            file.seek(0)
            is_run = stored and "edgetrain" in hdf5.read_tree(file, path.name).attrs
        if is_run:
            return io.read_run(str(path))
    if arch is None:
        raise UsageError("--arch", "missing", "the architecture, unless --init names a run record")
    return import_model(model.importing(arch, seed), None if path is None else read_weights(path))


def _glyphs(io: Stage, run: Run) -> Block:
    """Glyph images of the model's own size."""
    from stages.data.synthetic import Glyphs
    from stages.data.synthetic import glyphs as render
    from stages.errors import require

    spec = run.model.input
    require(spec.kind == "image", "--glyphs", f"a model of {spec.kind}", "one of images")
    block = render(Glyphs(size=min(spec.shape[1:])))
    io.note(f"{len(block)} glyph images of {len(block.names or ())} letters")
    return block


def _save(checkpoint: str | None, metrics: str | None) -> Callable[[Run], None]:
    """Writes the checkpoint and appends the epoch's figures, after every epoch."""
    from pathlib import Path

    from stages.artifacts.files import atomic_write
    from stages.artifacts.hdf5 import encode
    from stages.pretraining import STAGE

    def save(record: Run) -> None:
        if checkpoint is not None:
            atomic_write(Path(checkpoint), encode(record))
        if metrics is not None:
            row = {name: _json_number(values[-1]) for name, values in record.metrics[STAGE].items()}
            with Path(metrics).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return save


def _json_number(value: Any) -> float | None:
    """JSON has no NaN."""
    return None if value != value else float(value)


def _reporter(io: Stage, total: int) -> Callable[[Progress], None]:
    show = io.progress("meta-training", total, "steps")

    def report(progress: Progress) -> None:
        figures = {"loss": progress.loss, "accuracy": progress.accuracy}
        show(progress.steps, **{name: f"{value:.3f}" for name, value in figures.items() if value == value})

    return report


def _finish(io: Stage, result: Run, out: str) -> None:
    from stages.fsl.trainer import BIT_MAC_SHARE
    from stages.pretraining import STAGE

    table = result.metrics[STAGE]
    best = max(table["validation_accuracy"])
    if best == best:
        io.note(f"{len(table['epoch'])} epochs, best validation accuracy {best:.1%}")
    if BIT_MAC_SHARE in table:
        share = sum(table[BIT_MAC_SHARE]) / len(table[BIT_MAC_SHARE])
        io.note(f"bit-weighted multiply-accumulates: {share:.2%} of float32's, a count; simulating them saved no time")
    io.write(result, out)
