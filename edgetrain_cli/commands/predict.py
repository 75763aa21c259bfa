"""The command `predict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrain_cli.options import STDIO, Arch, Device, Engine, In, Out, RunFile, SameBits
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stages.artifacts.records import Head
    from stages.predicting import Predictions


def _writes(arguments: Mapping[str, Any]) -> str:
    from stages.predicting import format_of

    return "records" if format_of(arguments["out"], arguments["format"]) == "hdf5" else "text"


@command("predict", writes=_writes)
def predict(
    io: Stage,
    source: In = "-",
    samples: Annotated[
        str | None,
        typer.Argument(
            metavar="SAMPLES",
            help="Blocks, a folder, a picture or a recording; default: the stream after IN.",
        ),
    ] = None,
    out: Out = "-",
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="table|csv|jsonl|hdf5", help="Default: by the output's name, else a table."),
    ] = None,
    support: Annotated[
        str | None, typer.Option("--support", metavar="FILE", help="Labelled samples whose classes to tell apart.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=1, help="Most rows of a table.")] = 40,
    micro_batch: Annotated[
        int, typer.Option("--micro-batch", metavar="N", min=1, help="Samples computed at once.")
    ] = 64,
    engine: Engine = "auto",
    same_bits: SameBits = False,
    device: Device = "cpu",
    arch: Arch = None,
    run_file: RunFile = None,
) -> None:
    """Label samples, a folder of pictures or a single one.

    Files are prepared as those were that the model learnt from.

    With the probability of every class, as a table, CSV, JSON lines or HDF5.

    HDF5 output is the samples with the columns `predicted` and `probability`, a block per micro-batch (`edgetrain
    join` makes one of them).

    Example: edgetrain predict adapted.h5 photos/ -o answers.csv
    """
    from edgetrain_cli.samples import block_of, blocks_of
    from stages import predicting
    from stages.models.deploy import deploy

    form = predicting.format_of(out, format)
    if samples is None:
        run, blocks = io.read_stream(source, run_file)
        run = predicting.known(run)
    else:
        run, blocks = io.read_run(source, run_file), iter(())
    backbone = deploy(run.model, allow=arch, engine=engine, device=device, same_bits=same_bits, on_note=io.note)
    shown = None if support is None else block_of(io, support, run)
    learnt = run.model.input.prepared if shown is None else shown.prepared
    head = predicting.head_for(run.model, backbone, shown, micro_batch)
    if samples is not None:
        blocks = blocks_of(io, samples, run, labelled=False, like=learnt)
    chunks = predicting.chunks_of_blocks(blocks, micro_batch)
    answers = predicting.predict(backbone, head, chunks, learnt=learnt, on_step=io.progress("predicting"))
    if form == "table":
        _show(io, answers, head, rows, out)
    else:
        _write(io, answers, head, form, out)


def _write(io: Stage, answers: Iterable[Predictions], head: Head, form: str, out: str) -> None:
    """All answers, piece by piece as they come."""
    from stages.predicting import csv_header, csv_lines, json_lines, with_columns

    with io.writer(out) as writer:
        if form == "csv":
            writer.write_text(csv_header(head))
        for answer in answers:
            if form == "hdf5":
                writer.write(with_columns(answer))
            else:
                writer.write_text(csv_lines(answer, head) if form == "csv" else json_lines(answer, head))


def _show(io: Stage, answers: Iterable[Predictions], head: Head, most: int, out: str) -> None:
    """A table of the first `most` answers, the rest only counted; in a file all of them."""
    from rich.table import Table
    from rich.text import Text

    from stages import predicting

    table = Table("sample", "predicted", "label", "probability", box=None, padding=(0, 2, 0, 0))
    total = 0
    for answer in answers:
        for sample, name, true, probability in predicting.rows(answer, head):
            total += 1
            if total <= most or out != STDIO:
                table.add_row(Text(sample, overflow="fold"), Text(name), Text(true), f"{probability:.3f}")
    io.show(table, out)
    if total > most and out == STDIO:
        io.note(f"{total} samples, the first {most} shown; --rows shows more, --format csv all")
