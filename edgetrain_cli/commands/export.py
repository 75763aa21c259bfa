"""The command `export`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import Arch, In, Out, Quiet


def export(
    source: In = "-",
    out: Out = "-",
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="safetensors|pth|onnx", help="Default: by the output's name."),
    ] = None,
    head: Annotated[bool, typer.Option("--head/--no-head", help="Include the head.")] = True,
    arch: Arch = None,
    quiet: Quiet = False,
) -> None:
    """Write the trained model for other tools.

    As .safetensors, .pth (a state dict under the model's own names) or .onnx, by the name of the output.

    The exported model is run once and compared with ours.

    Example: edgetrain export adapted.h5 -o adapted.onnx
    """
    with pipe.stage("export", locals()) as io:
        from stages.exporting import export, format_of

        run = io.read_run(source)
        exported = export(run.model, format or format_of(out), head=head, allow=arch)
        io.note(f"{exported.format}, {len(exported.data)} bytes; outputs agree to {exported.difference:.1e}")
        io.write_bytes(exported.data, out)
