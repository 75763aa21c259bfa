"""The updates of a plan as text, for versions and checkpoints of training whose plan is revised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from stages.artifacts.records import LayerUpdate
from stages.errors import DataError


def updates_text(updates: Sequence[LayerUpdate]) -> str:
    """The updates as JSON."""
    return json.dumps([asdict(update) for update in updates])


def read_updates(text: str, where: str) -> tuple[LayerUpdate, ...]:
    """What `updates_text` made. Raises `DataError` for anything else; `where` is named."""
    try:
        rows = [{**row, "channels": tuple(row["channels"]), "bias": tuple(row["bias"])} for row in json.loads(text)]
        return tuple(LayerUpdate(**row) for row in rows)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(where, f"a plan that cannot be read ({error})", "the updates of a plan") from error
