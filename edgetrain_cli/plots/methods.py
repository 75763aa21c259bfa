"""The picture of a comparison: accuracy against memory and against backward MACs, one point per method."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import PartMissing, UsageError
from stages.methods.results import MethodSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")
MARKERS = "os^D"
"""A new one after every ten colours."""


def check_plot(path: Path) -> None:
    """Raise what would keep `plot_methods` from drawing, before anything is computed.

    `PartMissing` without matplotlib, `UsageError` for a suffix that is not in `SUFFIXES`.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError("--plot", path.name, "a name that ends in " + ", ".join(SUFFIXES))
    if find_spec("matplotlib") is None:
        raise PartMissing("--plot", "matplotlib is not installed", "it", "pip install matplotlib")


def plot_methods(summaries: Sequence[MethodSummary], path: Path) -> None:
    """Draw the last data set of the summaries, which is the average where there are several."""
    from matplotlib.figure import Figure

    shown = [each for each in summaries if each.dataset == summaries[-1].dataset]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _points(left, shown, [each.memory_bytes / 2**20 for each in shown], "memory of training, MB")
    _points(right, shown, [each.backward_macs / 1e6 for each in shown], "backward pass, million MACs per sample")
    left.set_ylabel("accuracy, %")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{shown[0].dataset}: {shown[0].tasks} tasks, 95 % intervals")
    figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)


def _points(axes: Axes, shown: Sequence[MethodSummary], costs: Sequence[float], label: str) -> None:
    for number, (each, cost) in enumerate(zip(shown, costs, strict=True)):
        reach = 0.0 if each.half_width != each.half_width else 100 * each.half_width
        axes.errorbar(
            cost, 100 * each.accuracy, yerr=reach, capsize=3, linestyle="", label=each.method,
            color=f"C{number % 10}", marker=MARKERS[number // 10 % len(MARKERS)],
        )  # fmt: skip
    # methods that train nothing cost 0, which a logarithm cannot show
    axes.set_xscale("symlog", linthresh=min([cost for cost in costs if cost > 0], default=1.0))
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
