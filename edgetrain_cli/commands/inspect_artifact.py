"""The command `inspect`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrain_cli.options import In, Json, Plot
from edgetrain_cli.settings import command
from edgetrain_cli.streams import Stage

if TYPE_CHECKING:
    from stages.artifacts.records import Run


@command("inspect", writes="text")
def inspect_artifact(
    io: Stage,
    source: In = "-",
    rounds: Annotated[
        bool, typer.Option("--rounds", help="One row per round: what selection gained, and its allocation.")
    ] = False,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Show what is in an artifact or a stream.

    Every record, and what each stage added.

    Everything is read once, so damage shows as an error (exit code 65) after what could be read. --plot draws the
    rounds of a stream, or how the loss fell in a run that was trained.

      edgetrain inspect adapted.h5

      edgetrain filter < stream.h5 | edgetrain select | edgetrain inspect --rounds --plot rounds.png
    """
    from stages.artifacts.records import Run
    from stages.errors import DataError
    from stages.inspecting import describe

    if plot is not None:
        _check_plot(plot)
    found, run, failure = [], None, None
    try:
        for record in io.read_records(source):
            run = record if isinstance(record, Run) and plot is not None else run
            found.append(describe(record))
    except DataError as error:
        failure = error
    if found:
        _show(io, found, rounds, as_json)
        if plot is not None:
            _draw(found, run, rounds, plot)
    if failure is not None:
        raise failure


def _show(io: Stage, found: list[dict[str, Any]], rounds: bool, as_json: bool) -> None:
    from edgetrain_cli.tables import describe as tables
    from stages.inspecting import rounds as rounds_of

    if as_json:
        result = {"rounds": rounds_of(found)} if rounds else {"records": found}
        io.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    else:
        io.show(tables.rounds_table(rounds_of(found)) if rounds else tables.tables(found))


def _check_plot(path: str) -> None:
    from pathlib import Path

    from edgetrain_cli.plots.picture import check_plot

    check_plot(Path(path))


def _draw(found: list[dict[str, Any]], run: Run | None, rounds: bool, path: str) -> None:
    """Rounds where they are asked for or all there is, else the training of the run."""
    from pathlib import Path

    from edgetrain_cli.plots.rounds import plot_rounds
    from edgetrain_cli.plots.training import plot_training
    from stages.inspecting import rounds as rounds_of

    if rounds or run is None:
        plot_rounds(rounds_of(found), path=Path(path))
    else:
        plot_training(run, Path(path))
