"""The command `import`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import History, Out, Quiet, Seed


def import_weights(
    arch: Annotated[
        str, typer.Option("--arch", metavar="NAME", help="Architecture: mcunet-5fps, ..., or package.module:factory.")
    ],
    weights: Annotated[
        str | None,
        typer.Argument(metavar="WEIGHTS", help="An .h5, .safetensors or .pth file; without it, random weights."),
    ] = None,
    out: Out = "-",
    arg: Annotated[
        list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="Argument of the architecture; repeatable.")
    ] = None,
    size: Annotated[int | None, typer.Option("--size", min=1, help="Side of the input image in pixels.")] = None,
    input: Annotated[
        str | None,
        typer.Option(
            "--input", help="Input of your own model: 3x32x32, 9x128 (signals), 900 (features), 49x40@16000 (log-mel)."
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            "--classifier",
            metavar="keep|drop|features",
            help="The final linear layer: the record's head, nothing (default), or part of the features.",
        ),
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", metavar="FILE", help="Class names, one per line; implies keep.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", help="Model input = raw * scale + offset; one number or one per channel.")
    ] = None,
    offset: Annotated[str | None, typer.Option("--offset", help="See --scale.")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    history: History = True,
) -> None:
    """Make a run record from weights.

    Those of another tool, or random ones.

    Pixels are scaled to 2 * (pixel / 255) - 1 unless --scale and --offset say otherwise.

    Example: edgetrain import --arch mcunet-5fps weights.h5 -o base.h5
    """
    with pipe.stage("import", locals()) as io:
        from stages.importing import (
            Importing,
            arguments,
            class_list,
            import_model,
            input_from_text,
            numbers,
            read_weights,
        )

        settings = Importing(
            arch=arch,
            arch_args=arguments(arg or [], size),
            input=None if input is None else input_from_text(input),
            scale=numbers(scale, "--scale"),
            offset=numbers(offset, "--offset"),
            classifier=classifier or ("keep" if classes else "drop"),
            classes=class_list(io.named(classes)) if classes else None,
            seed=seed,
        )
        found = None if weights is None else read_weights(io.named(weights))
        run = import_model(settings, found)
        io.note(f"{len(run.model.tensors)} tensors of {arch}, {run.model.form} form")
        io.write(run, out)
