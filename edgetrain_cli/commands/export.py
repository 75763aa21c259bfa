"""The command `export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetrain_cli.options import Arch, In, check_output
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage
from stages.settings.exporting import ProgramSettings

if TYPE_CHECKING:
    from stages.artifacts.records import Run


@command("export")
def export(
    io: Stage,
    settings: ProgramSettings,
    source: In = "-",
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE|DIR", help="Where to write; - is stdout; a folder for c.")
    ] = "-",
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="safetensors|pth|onnx|c", help="Default: by the output's name."),
    ] = None,
    head: Annotated[bool, typer.Option("--head/--no-head", help="Include the head.")] = True,
    samples: Annotated[
        str | None,
        typer.Option("--samples", metavar="FILE", help="C: write these samples as the program reads them."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="C: compile it here and compare its training with Python's.")
    ] = False,
    arch: Arch = None,
) -> None:
    """Write the trained model for other tools, or as a C program.

    As .safetensors, .pth (a state dict under the model's own names) or .onnx, by the name of the output; --format c
    writes the sources of a program that predicts and trains without Python, on a host or a microcontroller: one update
    per batch of the plan's live values and the head. What it leaves comes back by `import --trained`.

    An .onnx model is run once and compared with ours. A state dict has every entry of the model that was imported,
    so it loads with strict=True; the head lies in the layer that the model ends in.

    Example: edgetrain export adapted.h5 -o adapted.onnx

    Example: edgetrain export adapted.h5 --format c --samples photos.h5 -o program
    """
    if format == "c":
        _program(io, io.read_run(source), settings, out, samples, check, arch)
        return
    from stages.errors import require
    from stages.exporting import export as export_model
    from stages.exporting import format_of

    check_output(out)
    for option, given in (("--samples", samples is not None), ("--check", check)):
        require(not given, option, "with another format", "--format c")
    wanted = format or format_of(out)
    exported = export_model(io.read_run(source).model, wanted, head=head, allow=arch)
    for note in exported.notes:
        io.note(note)
    agree = f"outputs agree to {exported.difference:.1e}" if exported.difference else "read back bit for bit"
    io.note(f"{exported.format}, {len(exported.data)} bytes; {agree}")
    io.write_bytes(exported.data, out)


def _program(
    io: Stage, run: Run, settings: ProgramSettings, out: str, samples: str | None, check: bool, arch: str | None
) -> None:
    """`--format c`."""
    import numpy as np

    from edgetrain_cli.samples import blocks_of
    from stages.artifacts.files import check_folder, write_folder
    from stages.bare_metal.program import STACK_BYTES, make_program, source_of
    from stages.bare_metal.samples import batches, made_up
    from stages.bare_metal.trial import TRIAL_SAMPLES, try_program
    from stages.errors import require
    from stages.planning.budget import format_bytes

    require(out != "-", "--out", "stdout", "a folder for the sources", "-o DIR")
    check_folder(Path(out), "edgetrain_net.h")
    how = settings.programming()
    made_from = source_of(run, allow=arch, same_bits=check)
    program = make_program(made_from, how)
    files = dict(program.files)
    lots = None if samples is None else list(batches(blocks_of(io, samples, run), made_from, how.batch))
    if lots is not None:
        files["samples.bin"] = b"".join(lot.encode() for lot in lots)
    parts = ", ".join(f"{name} {size:,}" for name, size in program.ram.items() if size)
    io.note(f"RAM {format_bytes(program.ram_bytes)} ({parts}), and up to {STACK_BYTES:,} of stack")
    io.note(f"constant data {format_bytes(program.flash_bytes)}; code comes to it")
    if run.plan is None:
        io.note("the run has no plan: the program trains the head alone")
    if check:
        rng = np.random.default_rng(0)
        lots = lots or list(made_up(made_from, TRIAL_SAMPLES * how.batch, how.batch, rng))
        trial = try_program(files, made_from, how.optimizing, lots, os.environ.get("CC"))
        differs = f"differ by {trial.largest_difference:.1e}" if trial.largest_difference else "agree bit for bit"
        io.note(
            f"compiled and run: after {trial.updates} updates its values and Python's {differs}; "
            f"{trial.right} of {trial.samples} answers alike"
        )
    write_folder(Path(out), files)
    io.note(f"{len(files)} files in {Path(out).name}; `make -C {out}` builds it")
