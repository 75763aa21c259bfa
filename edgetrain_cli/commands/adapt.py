"""The command `adapt`: a recipe of `run`."""

from __future__ import annotations

from typing import Annotated

import typer


def adapt(base: Annotated[str, typer.Argument(metavar="BASE", help="A run record: where to start from.")]) -> None:
    """From photos to a model: profile, plan, train and check."""
