"""The command `join`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli.options import Out
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage


@command("join")
def join(
    io: Stage,
    sources: Annotated[list[str] | None, typer.Argument(metavar="[IN]...", help="Files of blocks; - is stdin.")] = None,
    out: Out = "-",
    by_name: Annotated[
        bool, typer.Option("--by-name", help="Renumber classes: one name, one label, whatever each part calls them.")
    ] = False,
) -> None:
    """Join blocks into one.

    In memory, in the order in which they come.

    Columns that every block has are kept; weights, scores and counts of rounds keep no meaning across rounds, so what
    counts per class is left out. Run records are not carried along.

      edgetrain join monday.h5 tuesday.h5 -o week.h5
    """
    from stages.joining import join as join_stream

    streams = [io.read_stream(source)[1] for source in sources or ["-"]]
    blocks = (block for stream in streams for block in stream)
    joined = join_stream(blocks, by_name=by_name, max_bytes=io.max_record_bytes, on_note=io.note)
    io.write(joined, out)
    io.note(f"{len(joined)} samples")
