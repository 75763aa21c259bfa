"""The command `import`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgetrain_cli.options import Out, Recorded, Seed
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage
from stages.settings.importing import NewModel, Tokens, Weights

if TYPE_CHECKING:
    from stages.graphs.tokens import Drops


@command("import", history=True)
def import_weights(
    io: Stage,
    model: NewModel,
    settings: Weights,
    tokens: Tokens,
    weights: Annotated[
        str | None,
        typer.Argument(metavar="WEIGHTS", help="An .onnx, .h5, .safetensors or .pth file; without it, random weights."),
    ] = None,
    trained: Annotated[
        str | None,
        typer.Option(
            "--trained", metavar="FILE", help="What an exported C program left; WEIGHTS is the run it was made of."
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="NAME",
            help="Architecture: mcunet-5fps, ..., or package.module:factory; an .onnx file needs none.",
        ),
    ] = None,
    out: Out = "-",
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="FILE", help="Class names, one per line; implies keep."),
        Recorded(),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate", metavar="FILE", help="Samples whose statistics a network from scratch normalises by."
        ),
        Recorded(),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Make a run record from a model or its weights.

    Those of another tool, or random ones. An .onnx file holds its own graph; .tflite is not read.

    Pixels are scaled to 2 * (pixel / 255) - 1 unless --preset, or --scale and --offset, say otherwise. A deep network
    from scratch hardly learns without --calibrate: training folds its BatchNorms as they are.

    Example: edgetrain import --arch mobilenetv3-small --preset torchvision weights.pth -o base.h5

    Example: edgetrain import model.onnx -o base.h5

    Example: edgetrain import --trained live.bin adapted.h5 -o back.h5

    Example: edgetrain import --drop-tokens 3,6,9 --keep-tokens 0.5 --fuse base.h5 -o short.h5
    """
    drops = tokens.drops()
    if drops is not None:
        _dropped(io, weights, drops, arch, trained, out)
        return
    if trained is not None:
        _trained(io, weights, trained, arch, out)
        return
    from stages.engines.choice import need_torch

    need_torch("import")
    from stages.importing import class_list, import_file, numbers

    importing = model.importing(
        arch or "",
        seed,
        preset=settings.preset or "",
        scale=numbers(settings.scale, "--scale"),
        offset=numbers(settings.offset, "--offset"),
        classifier=settings.classifier or ("keep" if classes else "drop"),
        classes=class_list(io.named(classes)) if classes else None,
    )
    start = None if calibrate is None else io.read_samples(calibrate)
    imported = import_file(importing, None if weights is None else io.named(weights), start)
    for note in imported.notes:
        io.note(note)
    found = imported.run.model
    io.note(f"{len(found.tensors)} tensors of {found.arch}, {found.form} form")
    io.write(imported.run, out)


def _dropped(io: Stage, given: str | None, drops: Drops, arch: str | None, trained: str | None, out: str) -> None:
    """The run with a model that drops tokens."""
    from stages.dropping import with_drops
    from stages.errors import require

    for option, value in (("--arch", arch), ("--trained", trained)):
        require(value is None, option, "with --drop-tokens, which reads a run", "the run alone", "import it first")
    require(given is not None, "--drop-tokens", "without a run", "the run whose model is to drop tokens")
    assert given is not None
    run = io.read_run(given)
    found = with_drops(run, drops)
    if any(part is not None for part in (run.profile, run.scores, run.plan)):
        io.note("profile, scores and plan were those of the model without drops: they are left out")
    io.write(found, out)


def _trained(io: Stage, exported: str | None, left: str, arch: str | None, out: str) -> None:
    """The run that an exported program was made of, with what it learnt."""
    from stages.bare_metal.live_file import read_live, trained
    from stages.bare_metal.program import source_of
    from stages.errors import require

    require(exported is not None, "--trained", "without a run", "the run that the program was exported from")
    assert exported is not None
    run = io.read_run(exported)
    source = source_of(run, allow=arch)
    slot = read_live(io.named(left).read_bytes(), source, left)
    io.note(f"live values of save {slot.number}, and the head's {len(source.head.labels)} classes")
    io.write(trained(run, source, slot), out)
