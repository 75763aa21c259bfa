"""The picture of a comparison: accuracy against memory and against backward MACs, one point per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetrain_cli.plots.picture import COLOURS, FAINT, INK, check_plot, save
from stages.methods.results import MethodSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME_POINTS = 10.0
"""Height of a name."""
MARKERS = "os^Dv<>PX*"
"""A new one after every eight colours, so that no two of eighty methods look alike."""


def plot_methods(summaries: Sequence[MethodSummary], path: Path) -> None:
    """Draw the last data set of the summaries, which is the average where there are several.

    Every point bears its method's name. Raises as `check_plot` does.
    """
    check_plot(path)
    save(draw_methods([each for each in summaries if each.dataset == summaries[-1].dataset]), path)


def draw_methods(shown: Sequence[MethodSummary]) -> Figure:
    """The figure itself."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, max(4.2, 0.9 + 0.28 * len(shown))), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1)
    left, right = figure.subplots(1, 2, sharey=True)
    _points(left, shown, [each.memory_bytes / 2**20 for each in shown], "memory of training, MiB")
    _points(right, shown, [each.backward_macs / 1e6 for each in shown], "backward pass, million MACs per sample")
    left.set_ylabel("accuracy, %", color=INK)
    title = f"{shown[0].dataset}: {shown[0].tasks} tasks, 95 % intervals"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold", color=INK)
    return figure


def _points(axes: Axes, shown: Sequence[MethodSummary], costs: Sequence[float], label: str) -> None:
    for number, (each, cost) in enumerate(zip(shown, costs, strict=True)):
        reach = 0.0 if each.half_width != each.half_width else 100 * each.half_width
        axes.errorbar(cost, 100 * each.accuracy, yerr=reach, capsize=2, linestyle="", linewidth=0.8, **look(number))
    # methods that train nothing cost 0, which a logarithm cannot show
    positive = [cost for cost in costs if cost > 0]
    axes.set_xscale("symlog", linthresh=min(positive, default=1.0), linscale=0.8)
    axes.margins(x=0.05, y=0.08)
    axes.set_xlabel(label, color=INK)
    axes.tick_params(colors=FAINT, labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _name(axes, shown, costs)


def _name(axes: Axes, shown: Sequence[MethodSummary], costs: Sequence[float]) -> None:
    """The methods' names in a column beside the picture, as high as their points where there is room, and lines."""
    points = [100 * each.accuracy for each in shown]
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    height = (4.0 if figure is None else figure.get_figheight()) * 72 * 0.75  # the axes', in points
    gap = (high - low) * NAME_POINTS / height
    for number, y in enumerate(spread(points, gap, low, high)):
        colour = look(number)["color"]
        axes.annotate(
            shown[number].method, xy=(costs[number], points[number]), xytext=(1.03, y), va="center", fontsize=7.5,
            textcoords=axes.get_yaxis_transform(), color=INK,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.7, "shrinkB": 3,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def look(number: int) -> dict[str, Any]:
    """Colour and marker of the method at this place of the list: no two of eighty are the same."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number // len(COLOURS) % len(MARKERS)]}


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the values, in their order, at least `gap` apart, and between `low` and `high` where they fit.

    >>> spread([1.0, 1.0, 5.0], 2.0, 0.0, 9.0)
    [1.0, 3.0, 5.0]
    """
    order = sorted(range(len(values)), key=lambda at: (values[at], at))
    places = [0.0] * len(values)
    below = low - gap
    for at in order:
        places[at] = below = max(values[at], below + gap)
    above = high + gap
    for at in reversed(order):
        places[at] = above = min(places[at], above - gap)
    return places
