"""The command `export`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli.options import Arch, In, Out
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage


@command("export")
def export(
    io: Stage,
    source: In = "-",
    out: Out = "-",
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="safetensors|pth|onnx", help="Default: by the output's name."),
    ] = None,
    head: Annotated[bool, typer.Option("--head/--no-head", help="Include the head.")] = True,
    arch: Arch = None,
) -> None:
    """Write the trained model for other tools.

    As .safetensors, .pth (a state dict under the model's own names) or .onnx, by the name of the output.

    An .onnx model is run once and compared with ours. A state dict has every entry of the model that was imported,
    so it loads with strict=True; the head lies in the layer that the model ends in.

    Example: edgetrain export adapted.h5 -o adapted.onnx
    """
    from stages.exporting import export as export_model
    from stages.exporting import format_of

    wanted = format or format_of(out)
    exported = export_model(io.read_run(source).model, wanted, head=head, allow=arch)
    for note in exported.notes:
        io.note(note)
    agree = f"outputs agree to {exported.difference:.1e}" if exported.difference else "read back bit for bit"
    io.note(f"{exported.format}, {len(exported.data)} bytes; {agree}")
    io.write_bytes(exported.data, out)
