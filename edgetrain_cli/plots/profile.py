"""The picture of a profile: where a model's weights, compute, memory and time go, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain_cli.plots.picture import FAINT, INK, STRIPE, check_plot, save
from stages.artifacts.records import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST, SECOND = "#3a6ea5", "#e0a458"


@dataclass(frozen=True)
class Panel:
    """One row of bars: one or two values per layer, the second stacked on the first."""

    title: str
    parts: Mapping[str, NDArray[np.float64]]
    """Meaning -> value per layer (L,); a single part needs no legend."""


def plot_profile(profile: Profile, path: Path) -> None:
    """Draw the profile to `path`: bars per layer, in execution order. The same profile gives the same bytes.

    Raises as `check_plot` does.
    """
    check_plot(path)
    import matplotlib

    with matplotlib.rc_context({"font.size": 9}):
        save(draw_profile(profile), path)


def draw_profile(profile: Profile) -> Figure:
    """The figure itself; see `plot_profile`."""
    from matplotlib.figure import Figure

    panels = _panels(profile)
    width = max(8.0, 1.6 + 0.2 * len(profile.layer))
    figure = Figure(figsize=(width, 1.6 + 1.55 * len(panels)), facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.06)
    rows = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        _bars(axes, panel, profile.layer)
    rows[-1].set_xticks(range(len(profile.layer)), profile.layer, rotation=90, fontsize=7, color=INK)
    figure.suptitle(_headline(profile), x=0.01, ha="left", fontsize=11.5, fontweight="bold", color=INK)
    return figure


def _panels(profile: Profile) -> list[Panel]:
    columns = profile.columns
    panels = [
        Panel("Weights\n(thousands)", {"": columns["weights"] / 1e3}),
        Panel("Compute\n(million MACs)",
              {"forward": columns["macs"] / 1e6, "backward, if all trains": columns["backward_macs"] / 1e6}),
        Panel("Kept to train\nthe layer (KB)",
              {"its input": columns["input_bytes"] / 1024, "activation bits": columns["mask_bytes"] / 1024}),
    ]  # fmt: skip
    if "forward_s" in columns:
        measured = {"forward": columns["forward_s"] * 1e3, "backward, if all trains": columns["backward_s"] * 1e3}
        panels.append(Panel("Time here\n(ms)", measured))
    return panels


def _bars(axes: Axes, panel: Panel, layers: tuple[str, ...]) -> None:
    bottom = np.zeros(len(layers))
    for (meaning, values), color in zip(panel.parts.items(), (FIRST, SECOND), strict=False):
        axes.bar(range(len(layers)), values, bottom=bottom, color=color, width=0.8, label=meaning)
        bottom = bottom + values
    for i, (_, members) in enumerate(groupby(range(len(layers)), lambda at: layers[at].rpartition(".")[0])):
        places = list(members)
        if i % 2:
            axes.axvspan(places[0] - 0.5, places[-1] + 0.5, color=STRIPE, zorder=0)
    axes.set_ylabel(panel.title, color=INK)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.tick_params(axis="y", colors=FAINT, labelsize=8)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.parts) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, fontsize=8, frameon=False, borderpad=0)


def _headline(profile: Profile) -> str:
    totals = profile.totals
    words = [
        f"{totals['layers']} layers, {totals['weights'] / 1e6:.2f} M weights",
        f"{totals['macs'] / 1e6:.1f} M MACs forward, {totals['backward_macs'] / 1e6:.1f} M backward",
        f"inference peak {totals['inference_peak_bytes'] / 1024:,.0f} KB" + _in_the_native_engine(totals),
    ]
    if "forward_s" in totals:
        threads = "1 thread" if totals["threads"] == 1 else f"{totals['threads']} threads"
        words.append(f"forward pass {1000 * totals['forward_s']:.1f} ms with {threads}")
    return "\n".join(("; ".join(words[:2]), "; ".join(words[2:])))


def _in_the_native_engine(totals: Mapping[str, Any]) -> str:
    """The same where the native engine runs the model."""
    if "inference_arena_bytes" not in totals:
        return ""
    return f" ({totals['inference_arena_bytes'] / 1024:,.0f} KB in the native engine)"
