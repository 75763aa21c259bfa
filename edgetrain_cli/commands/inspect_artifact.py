"""The command `inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import In, Json, MaxRecord, Plot

if TYPE_CHECKING:
    from collections.abc import Callable


def inspect_artifact(
    source: In = "-",
    rounds: Annotated[
        bool, typer.Option("--rounds", help="One row per round: what selection gained, and its allocation.")
    ] = False,
    as_json: Json = False,
    plot: Plot = None,
    max_record: MaxRecord = "1GiB",
) -> None:
    """Show what is in an artifact or a stream.

    Every record, and what each stage added.

    Everything is read once, so damage shows as an error (exit code 65) after what could be read.

      edgetrain inspect adapted.h5

      edgetrain filter < stream.h5 | edgetrain select | edgetrain inspect --rounds --plot rounds.png
    """
    with pipe.stage("inspect", locals(), writes="text") as io:
        import json

        from edgetrain_cli import describe_tables
        from stages.errors import DataError, require
        from stages.inspecting import describe
        from stages.inspecting import rounds as rounds_of

        require(plot is None or rounds, "--plot", "without --rounds", "both")
        picture = None if plot is None else _picture(plot)
        found, failure = [], None
        try:
            for record in io.read_records(source):
                found.append(describe(record))
        except DataError as error:
            failure = error
        if found and as_json:
            result = {"rounds": rounds_of(found)} if rounds else {"records": found}
            io.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        elif found:
            table = describe_tables.rounds_table(rounds_of(found)) if rounds else describe_tables.tables(found)
            io.show(table)
        if picture is not None:
            picture(rounds_of(found))
        if failure is not None:
            raise failure


def _picture(path: str) -> Callable[[list[dict[str, Any]]], None]:
    """What draws rounds into a file, after a look at whether it can."""
    from functools import partial
    from pathlib import Path

    from edgetrain_cli.plots.profile import check_plot
    from edgetrain_cli.plots.rounds import plot_rounds

    check_plot(Path(path))
    return partial(plot_rounds, path=Path(path))
