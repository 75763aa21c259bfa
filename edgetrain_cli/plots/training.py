"""A picture of training: how the loss fell, and how the accuracy rose where it was watched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgetrain_cli.plots.picture import COLOURS, FAINT, INK, check_plot, save
from edgetrain_cli.plots.rounds import SMOOTH, running_median
from stages.artifacts.records import Array, Run
from stages.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 60
"""Updates up to which each is a dot."""
ACCURACIES = {"accuracy": "right answers on the samples watched", "validation_accuracy": "right answers in validation"}


def plot_training(run: Run, path: Path) -> None:
    """Draw the metrics of every stage that trained the run to `path`.

    Raises `DataError` for a run that was never trained, and what `check_plot` raises.
    """
    check_plot(path)
    save(draw_training(run), path)


def draw_training(run: Run) -> Figure:
    """The figure itself: one row per stage, the loss to the left and accuracies, if there are any, to the right."""
    from matplotlib.figure import Figure

    tables = {stage: table for stage, table in run.metrics.items() if "loss" in table and len(table["loss"])}
    if not tables:
        raise DataError("run record", "no metrics", "a run that `train-sparse` or `pretrain-fsl` trained")
    watched = any(name in table for table in tables.values() for name in ACCURACIES)
    figure = Figure(figsize=(9.6 if watched else 6.4, 0.6 + 2.8 * len(tables)), facecolor="white")
    figure.set_layout_engine("constrained")
    rows = figure.subplots(len(tables), 2 if watched else 1, squeeze=False)
    for axes, (stage, table) in zip(rows, tables.items(), strict=True):
        _loss(axes[0], stage, table)
        if watched:
            _accuracy(axes[1], table)
    return figure


def _steps(table: Mapping[str, Array]) -> tuple[Array, str]:
    for name, words in (("version", "updates"), ("epoch", "epochs")):
        if name in table:
            return np.asarray(table[name]), words
    return np.arange(len(table["loss"])), "steps"


def _loss(axes: Axes, stage: str, table: Mapping[str, Array]) -> None:
    steps, words = _steps(table)
    losses = np.asarray(table["loss"], float)
    few = len(losses) <= FEW
    axes.plot(steps, losses, color=COLOURS[0], alpha=1.0 if few else 0.3, linewidth=1.2 if few else 0.6,
              marker="o" if few else None, markersize=3)  # fmt: skip
    if not few:
        axes.plot(steps, running_median(losses, len(losses) // SMOOTH), color=COLOURS[0], linewidth=1.6)
    finite = losses[np.isfinite(losses)]
    said = f" {finite[0]:.3g} to {finite[-1]:.3g}" if len(finite) else ""
    _dress(axes, f"{stage}: loss{said}", words, "loss")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylim(bottom=0)


def _accuracy(axes: Axes, table: Mapping[str, Array]) -> None:
    steps, words = _steps(table)
    names = [name for name in ACCURACIES if name in table and np.isfinite(table[name]).any()]
    if not names:
        axes.set_visible(False)
        return
    values = 100 * np.asarray(table[names[0]], float)
    known = np.isfinite(values)
    axes.plot(steps[known], values[known], color=COLOURS[2], marker="o", markersize=3, linewidth=1.2)
    _dress(axes, ACCURACIES[names[0]] + f": {values[known][-1]:.1f} %", words, "%")


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=FAINT, labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
