"""The options that commands share, each declared once."""

from __future__ import annotations

from typing import Annotated

import typer

In = Annotated[str, typer.Argument(metavar="IN", help="Artifact or stream to read; - is stdin.")]
Out = Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Where to write; - is stdout.")]
RunFile = Annotated[
    str | None,
    typer.Option("--run", metavar="FILE", help="The run record, when the stream does not begin with it."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Every random choice follows from this.")]
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
        help="Your model's factory. Code named by an artifact is never imported, so name it here again.",
    ),
]
MaxRecord = Annotated[
    str, typer.Option("--max-record", metavar="SIZE", help="Largest record accepted from a pipe; larger is refused.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
OnBad = Annotated[str, typer.Option("--on-bad", metavar="fail|skip", help="Stop at a bad sample, or skip and count.")]
Plot = Annotated[str | None, typer.Option("--plot", metavar="FILE.png", help="Draw a picture (needs matplotlib).")]
MetricsFile = Annotated[
    str | None, typer.Option("--metrics", metavar="FILE", help="Append progress as JSON lines, for scripts.")
]
