"""The picture of a stream of rounds: what selection gained, what was chosen, how batches spread over the classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain_cli.plots.picture import COLOURS, FAINT, INK, check_plot, save
from stages.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
"""One of `stages.inspecting.rounds`."""

OWN, IS, RANDOM = "#0072B2", "#E69F00", "#666666"

BINS = 160
"""Most columns of the map of classes; more rounds are averaged."""
SMOOTH = 40
"""Parts of the picture's width that running medians look at."""
FEW = 30
"""Rounds up to which each is a dot."""


def plot_rounds(rows: Sequence[Row], path: Path) -> None:
    """Draw `stages.inspecting.rounds` to `path`; the same rounds give the same bytes.

    Raises `DataError` without rounds, and what `check_plot` raises.
    """
    check_plot(path)
    import matplotlib

    if not rows:
        raise DataError(str(path), "no rounds to draw", "a stream that `filter` or `select` made")
    with matplotlib.rc_context({"font.size": 9}):
        save(draw_rounds(rows), path)


def draw_rounds(rows: Sequence[Row]) -> Figure:
    """The figure itself: up to three panels over rounds, those that the stream has something for."""
    from matplotlib.figure import Figure

    scored = [row for row in rows if row["variance_random"] is not None]
    chosen = [_choice(row) for row in rows]
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    if scored:
        panels.append((2.6, lambda axes: _variances(axes, scored)))
    if len(set(chosen)) > 1:
        panels.append((0.5, lambda axes: _choices(axes, rows, chosen)))
    classes = _classes(rows)
    if classes:
        panels.append((min(0.6 + 0.17 * len(classes), 3.2), lambda axes: _spread(axes, rows, classes)))
    if not panels:
        raise DataError("stream", "rounds that say nothing of classes or variances", "what `filter` or `select` made")
    heights = [height for height, _ in panels]
    figure = Figure(figsize=(9.5, 1.0 + sum(heights) + 0.35 * len(panels)), facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.06)
    stack = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (_, draw) in zip(stack, panels, strict=True):
        draw(axes)
        axes.tick_params(colors=FAINT, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    stack[-1].set_xlabel("round", color=INK)
    stack[-1].locator_params(axis="x", integer=True)
    stack[-1].set_xlim(rows[0]["round"] - 0.5, rows[-1]["round"] + 0.5)
    figure.suptitle(_headline(rows, scored), x=0.01, ha="left", fontsize=10.5, fontweight="bold", color=INK)
    return figure


def _variances(axes: Axes, rows: Sequence[Row]) -> None:
    rounds = [row["round"] for row in rows]
    lines = {"random choice": ("variance_random", RANDOM, "--"), "importance sampling": ("variance_is", IS, "-."),
             "this choice": ("variance", OWN, "-")}  # fmt: skip
    for name, (column, colour, style) in lines.items():
        values = np.array([row[column] or np.nan for row in rows], dtype=float)
        axes.plot(rounds, values, color=colour, alpha=0.25, linewidth=0.6)
        smooth = running_median(values, len(values) // SMOOTH)
        dots = "o" if len(values) <= FEW else None
        axes.plot(rounds, smooth, style, color=colour, linewidth=1.6, marker=dots, markersize=3, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("gradient variance\nof the same batch", color=INK)
    axes.tick_params(axis="y", which="minor", labelsize=7, labelcolor=FAINT)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=3, fontsize=8, frameon=False, borderpad=0)


def _choices(axes: Axes, rows: Sequence[Row], chosen: Sequence[str]) -> None:
    """A strip: what was chosen in each round."""
    colours = dict(zip(dict.fromkeys(chosen), COLOURS * (1 + len(chosen) // len(COLOURS)), strict=False))
    at = 0
    for name, members in groupby(chosen):
        length = len(list(members))
        first, last = rows[at]["round"], rows[at + length - 1]["round"]
        label = name if name not in chosen[:at] else None
        axes.axvspan(first - 0.5, last + 0.5, color=colours[name], linewidth=0, label=label)
        at += length
    axes.set_yticks([])
    axes.set_ylabel("choice", color=INK)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.95), ncols=6, fontsize=8, frameon=False, borderpad=0,
                handlelength=1.0)  # fmt: skip


def _spread(axes: Axes, rows: Sequence[Row], classes: Sequence[str]) -> None:
    """A map of classes over rounds: draws per round, the mean over neighbouring rounds where there are many."""
    counts = np.array([[_spread_of(row).get(name, 0) for row in rows] for name in classes], dtype=float)
    width = -(-len(rows) // BINS)
    parts = [np.arange(start, min(start + width, len(rows))) for start in range(0, len(rows), width)]
    means = np.stack([counts[:, part].mean(axis=1) for part in parts], axis=1)
    edges = np.array([rows[part[0]]["round"] - 0.5 for part in parts] + [rows[-1]["round"] + 0.5])
    image = axes.pcolormesh(edges, np.arange(len(classes) + 1) - 0.5, means, cmap="cividis", vmin=0, rasterized=True)
    axes.set_yticks(range(len(classes)), classes)
    axes.invert_yaxis()
    axes.set_ylabel("class", color=INK)
    drawn = any(row["allocation"] for row in rows)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=12)
    bar.set_label("draws\nper round" if drawn else "samples seen\nper round", color=INK, fontsize=8)
    bar.ax.tick_params(labelsize=7, colors=FAINT)
    bar.outline.set_visible(False)


def _headline(rows: Sequence[Row], scored: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row["strategy"] for row in rows if row["strategy"]))
    words = f"{len(rows):,} rounds" + (f": {', '.join(names)}" if names else "")
    below = {"random choice": "to_random", "importance sampling": "to_is"}
    gains = {name: [1 / row[key] for row in scored if row[key]] for name, key in below.items()}
    said = [f"{np.median(values):.2g}x below {name}" for name, values in gains.items() if values]
    return words + (f"\ngradient variance {', '.join(said)} (medians)" if said else "")


def _choice(row: Row) -> str:
    return f"{row['strategy']}, batch {row['batch']}" if row["batch"] is not None else str(row["strategy"])


def _classes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in _spread_of(row)))


def _spread_of(row: Row) -> Mapping[str, int]:
    found: Mapping[str, int] = row["allocation"] or row["seen"]
    return found


def running_median(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The median of each value and `width` neighbours on either side; NaN where there is nothing."""
    found = np.full(len(values), np.nan)
    for at in range(len(values)):
        near = values[max(at - width, 0) : at + width + 1]
        if np.isfinite(near).any():
            found[at] = np.nanmedian(near)
    return found
