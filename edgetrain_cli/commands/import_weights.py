"""The command `import`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli.options import Out, Recorded, Seed
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage
from stages.settings.importing import NewModel, Weights


@command("import", history=True)
def import_weights(
    io: Stage,
    arch: Annotated[
        str, typer.Option("--arch", metavar="NAME", help="Architecture: mcunet-5fps, ..., or package.module:factory.")
    ],
    model: NewModel,
    settings: Weights,
    weights: Annotated[
        str | None,
        typer.Argument(metavar="WEIGHTS", help="An .h5, .safetensors or .pth file; without it, random weights."),
    ] = None,
    out: Out = "-",
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="FILE", help="Class names, one per line; implies keep."),
        Recorded(),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Make a run record from weights.

    Those of another tool, or random ones.

    Pixels are scaled to 2 * (pixel / 255) - 1 unless --scale and --offset say otherwise.

    Example: edgetrain import --arch mcunet-5fps weights.h5 -o base.h5
    """
    from stages.engines.choice import need_torch

    need_torch("import")
    from stages.importing import class_list, import_noting, numbers, read_weights

    importing = model.importing(
        arch,
        seed,
        scale=numbers(settings.scale, "--scale"),
        offset=numbers(settings.offset, "--offset"),
        classifier=settings.classifier or ("keep" if classes else "drop"),
        classes=class_list(io.named(classes)) if classes else None,
    )
    imported = import_noting(importing, None if weights is None else read_weights(io.named(weights)))
    for note in imported.notes:
        io.note(note)
    io.note(f"{len(imported.run.model.tensors)} tensors of {arch}, {imported.run.model.form} form")
    io.write(imported.run, out)
