"""The picture of budgets: how much memory a sample's values take, and what a smaller budget costs in time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain_cli.plots.picture import COLOURS, FAINT, INK, check_plot, save
from stages.methods.scheduling import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_frontier(points: Sequence[Point], path: Path) -> None:
    """Draw the budgets to `path`. Raises as `check_plot` does."""
    check_plot(path)
    import matplotlib

    with matplotlib.rc_context({"font.size": 9}):
        save(draw_frontier(points), path)


def draw_frontier(points: Sequence[Point]) -> Figure:
    """The figure itself; see `plot_frontier`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), facecolor="white")
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    lines = {
        "at its most": [point.allocated_bytes for point in points],
        "kept between the passes": [point.kept_bytes for point in points],
    }
    for number, (words, sizes) in enumerate(lines.items()):
        kib = [size / 1024 for size in sizes]
        axes.plot(kib, [1000 * p.seconds for p in points], "o-", color=COLOURS[number], markersize=4, label=words)
    for point in points:
        if point.again or point.paged:
            words = f"{point.again} again" + (f", {point.paged} paged" if point.paged else "")
            place = point.allocated_bytes / 1024, 1000 * point.seconds
            axes.annotate(words, place, textcoords="offset points", xytext=(5, 4), fontsize=7, color=FAINT)
    axes.set_xlabel("values of one sample (KiB)", color=INK)
    axes.set_ylabel("more time of a step (ms)", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle("Less memory for a step of training", x=0.01, ha="left", fontweight="bold", color=INK)
    return figure
