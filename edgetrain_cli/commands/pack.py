"""The command `pack`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli.options import OnBad, Out, Seed
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage
from stages.settings.packing import Choosing, Reading


@command("pack")
def pack(
    io: Stage,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="A folder, a file, or a pair x.npy y.npy.")],
    reading: Reading,
    choosing: Choosing,
    out: Out = "-",
    seed: Seed = 0,
    on_bad: OnBad = "fail",
) -> None:
    """Turn your data into sample blocks.

    Folders of images or .wav, tables, .npz, .npy, HDF5, published data sets.

    A few-shot support set and its query set are two shares of one seed, disjoint by construction:

      edgetrain pack birds/ --size 84 --per-class 5 -o support.h5

      edgetrain pack birds/ --size 84 --skip-per-class 5 -o query.h5

    docs/data.md has a line for each of many data sets.
    """
    from pathlib import Path

    from stages.data.sources import open_source
    from stages.packing import BadSamples, choose
    from stages.packing import pack as pack_source
    from stages.randomness import generator

    packing, bad, rng = choosing.packing(), BadSamples(on_bad), generator(seed, "pack")
    opening = reading.opening(skip_empty=on_bad == "skip", labelled=not choosing.unlabelled)
    source = open_source([Path(path) for path in sources], opening)
    rows = choose(source, packing, rng)
    step = io.progress("packing", len(rows))
    with io.writer(out) as writer:
        for block in pack_source(source, packing, rng, rows=rows, on_bad=bad, on_step=step):
            writer.write(block)
    for line in source.notes.lines():
        io.note(line)
    io.did(f"{len(rows) - bad.count:,} samples")
    if bad.count:
        io.note(f"skipped {bad.count} of {len(rows)} samples; the first: {bad.first}")
