"""What all pictures have in common: which files they may be, how they are written, and their colours."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import PartMissing, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
INK, FAINT, STRIPE = "#22303c", "#66747f", "#f3f4f6"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""Okabe and Ito's, which the colour-blind can tell apart."""


def check_plot(path: Path) -> None:
    """Raise what would keep a picture from being drawn, before anything is computed.

    `PartMissing` without matplotlib, `UsageError` for a suffix that is not in `SUFFIXES`.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError("--plot", f"{path.name!r}", "a name ending in " + " or ".join(SUFFIXES))
    if find_spec("matplotlib") is None:
        raise PartMissing("--plot", "matplotlib is not installed", "", "pip install 'edgetrain[plot]'")


def save(figure: Figure, path: Path) -> None:
    """Write the picture whole or not at all; the same figure gives the same bytes."""
    import io

    import matplotlib

    from stages.artifacts.files import atomic_write

    clockless = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "edgetrain"}):
        figure.savefig(buffer, format=path.suffix[1:], dpi=140, metadata=clockless)
    atomic_write(path, buffer.getvalue())
