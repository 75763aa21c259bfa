"""The command `pretrain-fsl`."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import Cpus, History, MetricsFile, OnBad, Out, Quiet, Seed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stages.artifacts.records import Block, Run
    from stages.fsl.team import Team
    from stages.fsl.trainer import Progress


def pretrain_fsl(
    data: Annotated[
        list[str] | None, typer.Argument(metavar="DATA...", help="Sample blocks; every file is one data set.")
    ] = None,
    out: Out = "-",
    arch: Annotated[
        str | None, typer.Option("--arch", metavar="NAME", help="Architecture, or package.module:factory.")
    ] = None,
    arg: Annotated[
        list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="Argument of the architecture; repeatable.")
    ] = None,
    size: Annotated[int | None, typer.Option("--size", min=1, help="Side of the input image in pixels.")] = None,
    input: Annotated[str | None, typer.Option("--input", help="Input of your own model, such as 3x32x32.")] = None,
    init: Annotated[
        str | None, typer.Option("--init", metavar="FILE", help="Start from these weights, or from a run record.")
    ] = None,
    glyphs: Annotated[
        bool, typer.Option("--glyphs", help="One data set more: letters drawn from the fonts of matplotlib.")
    ] = False,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of episodes.")] = 100,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps per epoch.")] = 2000,
    per_step: Annotated[int, typer.Option("--per-step", min=1, help="Episodes per step.")] = 1,
    ways: Annotated[int, typer.Option("--ways", help="Classes of an episode.")] = 5,
    shots: Annotated[int, typer.Option("--shots", help="Support samples per class.")] = 5,
    queries: Annotated[int, typer.Option("--queries", help="Query samples per class.")] = 15,
    repeat: Annotated[
        bool, typer.Option("--repeat/--no-repeat", help="Repeat (augmented) samples of classes that have too few.")
    ] = True,
    lr: Annotated[
        float | None, typer.Option("--lr", min=0, help="Highest learning rate; default 5e-5 with --init, else 0.1.")
    ] = None,
    warmup_epochs: Annotated[
        int | None, typer.Option("--warmup-epochs", min=0, help="Default 5 with --init, else none.")
    ] = None,
    warmup_lr: Annotated[float, typer.Option("--warmup-lr", min=0, help="Rate at the start of the warm-up.")] = 1e-6,
    least_lr: Annotated[float, typer.Option("--least-lr", min=0, help="Rate at the end.")] = 1e-6,
    momentum: Annotated[float, typer.Option("--momentum", min=0, help="Of SGD.")] = 0.9,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0)] = 0.0,
    scale: Annotated[float, typer.Option("--scale", help="First value of the learnable cosine scale.")] = 10.0,
    batchnorm: Annotated[
        str | None,
        typer.Option(
            "--batchnorm",
            metavar="frozen|train",
            help="Statistics; default frozen with --init, else train.",
        ),
    ] = None,
    augment: Annotated[
        str, typer.Option("--augment", metavar="NAME", help="none, colour, photo or handwriting.")
    ] = "handwriting",
    supervised_epochs: Annotated[
        int, typer.Option("--supervised-epochs", min=0, help="First train a classifier over all classes.")
    ] = 0,
    supervised_batch: Annotated[int, typer.Option("--supervised-batch", help="Its batch size.")] = 128,
    supervised_lr: Annotated[float, typer.Option("--supervised-lr", help="Its highest learning rate.")] = 0.05,
    validation: Annotated[
        str | None, typer.Option("--validation", metavar="FILE", help="Samples of other classes to validate on.")
    ] = None,
    validation_share: Annotated[
        float, typer.Option("--validation-share", help="Share of the classes held out where there is no --validation.")
    ] = 0.1,
    validation_tasks: Annotated[
        int, typer.Option("--validation-tasks", min=0, help="0: no validation, the last weights are written.")
    ] = 100,
    validation_ways: Annotated[int, typer.Option("--validation-ways", help="Classes of a validation task.")] = 5,
    validation_shots: Annotated[int, typer.Option("--validation-shots", help="Its support samples per class.")] = 5,
    validation_queries: Annotated[int, typer.Option("--validation-queries", help="Its queries per class.")] = 5,
    patience: Annotated[
        int, typer.Option("--patience", min=0, help="End after so many epochs without a better validation; 0: never.")
    ] = 0,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="FILE", help="Save the state of training after every epoch.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="FILE", help="Go on from a checkpoint, to the same bits.")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where to compute.")] = "cpu",
    on_bad: OnBad = "fail",
    metrics: MetricsFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    history: History = True,
    cpus: Cpus = None,
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
    arguments = {name: value for name, value in locals().items() if name != "device"}
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    with pipe.stage("pretrain-fsl", {**arguments, "quiet": quiet or rank > 0}) as io, ExitStack() as stack:
        from pathlib import Path

        from stages.errors import require
        from stages.fsl.episodes import FixedShape
        from stages.fsl.schedule import WarmCosine
        from stages.fsl.team import ALONE, joined
        from stages.pretraining import Pretraining, Supervised, Validation, pretrain

        require(bool(data) or glyphs, "DATA", "no data set", "files of sample blocks, or --glyphs")
        require(on_bad in ("fail", "skip"), "--on-bad", repr(on_bad), "fail or skip")
        scratch = init is None
        config = Pretraining(
            schedule=WarmCosine(
                epochs=epochs,
                rate=(0.1 if scratch else 5e-5) if lr is None else lr,
                warmup_epochs=(0 if scratch else min(5, epochs)) if warmup_epochs is None else warmup_epochs,
                warmup_rate=warmup_lr,
                least_rate=least_lr,
            ),
            steps=steps,
            per_step=per_step,
            shape=FixedShape(ways=ways, shots=shots, queries=queries, repeat=repeat),
            scale=scale,
            momentum=momentum,
            weight_decay=weight_decay,
            batchnorm=batchnorm or ("train" if scratch else "frozen"),
            augmentation=augment,
            supervised=Supervised(epochs=supervised_epochs, batch=supervised_batch, rate=supervised_lr),
            validation=Validation(
                tasks=validation_tasks,
                shape=FixedShape(ways=validation_ways, shots=validation_shots, queries=validation_queries),
                share=validation_share,
                patience=patience,
            ),
            skip_small=on_bad == "skip",
        )
        run = _initial(io, init, arch, arg or [], size, input, seed)
        blocks = [io.read_samples(path) for path in data or []]
        if glyphs:
            blocks.append(_glyphs(io, run))
        others = None if validation is None else io.read_samples(validation)
        team = ALONE
        if processes > 1:
            team = stack.enter_context(joined(rank, processes, cuda=device.startswith("cuda")))
        result = pretrain(
            run,
            blocks,
            config,
            seed=seed,
            validation=others,
            resume=None if resume is None else _read_checkpoint(Path(resume)),
            save=_save(checkpoint, metrics),
            on_step=_reporter(io, config.total_steps),
            device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device,
            team=team,
            allow=arch,
        )
        _finish(io, result, out, team)


def _initial(
    io: pipe.Stage, init: str | None, arch: str | None, arg: list[str], size: int | None, input: str | None, seed: int
) -> Run:
    """The run record that training starts from: random weights, a file of weights, or a run record."""
    from stages.artifacts import hdf5
    from stages.errors import UsageError
    from stages.importing import Importing, arguments, import_model, input_from_text, read_weights

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
    settings = Importing(
        arch=arch,
        arch_args=arguments(arg, size),
        input=None if input is None else input_from_text(input),
        seed=seed,
    )
    return import_model(settings, None if path is None else read_weights(path))


def _glyphs(io: pipe.Stage, run: Run) -> Block:
    """Glyph images of the model's own size."""
    from stages.data.synthetic import Glyphs
    from stages.data.synthetic import glyphs as render
    from stages.errors import require

    spec = run.model.input
    require(spec.kind == "image", "--glyphs", f"a model of {spec.kind}", "one of images")
    block = render(Glyphs(size=min(spec.shape[1:])))
    io.note(f"{len(block)} glyph images of {len(block.names or ())} letters")
    return block


def _read_checkpoint(path: Path) -> Run:
    from stages.artifacts.records import Run
    from stages.artifacts.stream import open_records
    from stages.errors import DataError

    record = next(open_records(path))
    if not isinstance(record, Run):
        raise DataError(path.name, "sample blocks", "a checkpoint", "name what --checkpoint wrote")
    return record


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


def _reporter(io: pipe.Stage, total: int) -> Callable[[Progress], None]:
    show = io.progress("episodes", total)

    def report(progress: Progress) -> None:
        figures = {"loss": progress.loss, "accuracy": progress.accuracy}
        show(progress.steps, **{name: f"{value:.3f}" for name, value in figures.items() if value == value})

    return report


def _finish(io: pipe.Stage, result: Run, out: str, team: Team) -> None:
    from stages.pretraining import STAGE

    if not team.leads:
        return
    table = result.metrics[STAGE]
    best = max(table["validation_accuracy"])
    if best == best:
        io.note(f"{len(table['epoch'])} epochs, best validation accuracy {best:.1%}")
    io.write(result, out)
