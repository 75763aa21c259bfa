"""The options that commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.settings.declared import DEVICE, ENGINE, SAME_BITS

STDIO = "-"


class Writes:
    """Marks an option that names a file to write: whether it can be is checked before anything is computed."""


class Recorded:
    """Marks an option outside the stages' settings that the history keeps, since it affects the result."""


class Former:
    """Marks an option that runs of today need no more; it says so and goes with the next version."""

    note = "--arch: runs carry their graph and ignore it; only runs of an older version still need it"


def check_output(path: str | None) -> None:
    """Refuse a file that cannot be written before anything is computed."""
    from stages.artifacts.files import check_writable

    if path is not None and path != STDIO:
        check_writable(Path(path))


In = Annotated[str, typer.Argument(metavar="IN", help="Artifact or stream to read; - is stdin.")]
Out = Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Where to write; - is stdout."), Writes()]
RunFile = Annotated[
    str | None,
    typer.Option("--run", metavar="FILE", help="The run record, when the stream does not begin with it."),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, help="Every random choice follows from this."), Recorded()
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr; errors only.")]
History = Annotated[bool, typer.Option("--history/--no-history", help="Record this step in the run's history.")]
Cpus = Annotated[
    str | None,
    typer.Option("--cpus", metavar="0,2", help="Pin to these processors and use as many threads."),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="MODULE:FACTORY",
        help="For a run that an older version wrote of your own model; newer ones carry their graph and ignore it.",
    ),
    Former(),
]
MaxRecord = Annotated[
    str, typer.Option("--max-record", metavar="SIZE", help="Largest record accepted from a pipe; larger is refused.")
]
SameBits = Annotated[bool, typer.Option("--same-bits", help=SAME_BITS)]
Engine = Annotated[str, typer.Option("--engine", metavar="auto|native|torch", help=ENGINE)]
Device = Annotated[str, typer.Option("--device", metavar="cpu|cuda", help=DEVICE)]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
OnBad = Annotated[str, typer.Option("--on-bad", metavar="fail|skip", help="Stop at a bad sample, or skip and count.")]
Plot = Annotated[
    str | None, typer.Option("--plot", metavar="FILE.png", help="Draw a picture (needs matplotlib)."), Writes()
]
MetricsFile = Annotated[
    str | None,
    typer.Option("--metrics", metavar="FILE", help="Append progress as JSON lines, for scripts."),
    Writes(),
]
