"""The picture of a plan: what each layer is worth and costs, which ones train, how much of the budgets they use."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgetrain_cli.plots.picture import FAINT, INK, save
from edgetrain_cli.plots.picture import check_plot as check_path
from stages.artifacts.records import Plan, Profile, Run, Scores
from stages.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHOSEN, PALE, REST, SHADE, FLOW = "#c8324a", "#efb9c1", "#9fb0c0", "#ececee", "#fdf3e3"
Vector = NDArray[np.float64]
CRITERIA = {
    "score": "Score: Fisher\nper weight and MAC",
    "fisher-memory": "Fisher per\nweight",
    "fisher-compute": "Fisher per\nMAC",
    "l2": "Norm of the\nweights",
    "random": "Random\nnumber",
}
"""What the criterion's bars show, in words; a criterion not listed is shown by its name."""


@dataclass(frozen=True)
class Panel:
    """One row of bars: a value per layer of the model; NaN where the layer was not inspected."""

    title: str
    values: Vector
    fills: bool = False
    """Whether a chosen bar is coloured only up to its live share: for costs, not for worth."""


@dataclass(frozen=True)
class Budget:
    """How much of one budget the plan uses."""

    name: str
    used: float
    allowed: float
    unit: str


def check_plot(run: Run, path: Path) -> None:
    """Raise what would keep `plot_plan` from drawing, before anything is computed.

    `PartMissing` without matplotlib, `UsageError` for a run without profile or a suffix that is not in `SUFFIXES`.
    """
    check_path(path)
    if run.profile is None:
        raise UsageError("--plot", "the run has no profile to draw costs from", "", "run `edgetrain profile` before")


def plot_plan(run: Run, path: Path) -> None:
    """Draw the plan of a run that has one to `path` (.png, .svg or .pdf).

    A row of bars each for what the criterion gave, the Fisher potential, the weights and the MACs of every layer in
    execution order; chosen layers are coloured, and labelled with the share of their channels that trains; below lie
    the budgets. The same run gives the same bytes. Raises as `check_plot` does.
    """
    check_plot(run, path)
    import matplotlib

    with matplotlib.rc_context({"font.size": 9}):
        save(draw_plan(run), path)


def draw_plan(run: Run) -> Figure:
    """The figure itself; see `plot_plan`."""
    from matplotlib.figure import Figure

    profile, plan, scores = run.profile, run.plan, run.scores
    if profile is None or plan is None:
        raise UsageError("--plot", "a run without " + ("profile" if profile is None else "plan"), "both")
    panels, budgets = _panels(profile, scores), _budgets(plan)
    heights = [1.45] * len(panels) + [0.34] * len(budgets)
    figure = Figure(figsize=(max(9.6, 1.4 + 0.215 * len(profile.layer)), 1.9 + sum(heights)), facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.05, w_pad=0.05)
    rows = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(rows, panels, strict=False):
        _bars(axes, panel, plan, profile.layer)
    _layer_names(rows[len(panels) - 1], profile.layer, plan)
    for axes, budget in zip(rows[len(panels) :], budgets, strict=True):
        _gauge(axes, budget)
    _legend(rows[0], plan, unseen=scores is not None and len(scores.layer) < len(profile.layer))
    figure.suptitle(_headline(profile, plan), x=0.006, ha="left", fontsize=13, fontweight="bold", color=INK)
    rows[0].set_title(_cost(plan), loc="left", fontsize=9.5, color=FAINT, pad=24, linespacing=1.4)
    return figure


def _panels(profile: Profile, scores: Scores | None) -> list[Panel]:
    costs = [
        Panel("Weights\n(thousands)", profile.columns["weights"] / 1e3, fills=True),
        Panel("Compute\n(million MACs)", profile.columns["macs"] / 1e6, fills=True),
    ]
    if scores is None:
        return costs
    worth = [Panel("Fisher\npotential", _per_layer(profile, scores.layer, scores.fisher))]
    if scores.criterion != "fisher":
        worth.insert(
            0, Panel(CRITERIA.get(scores.criterion, scores.criterion), _per_layer(profile, scores.layer, scores.score))
        )
    return worth + costs


def _per_layer(profile: Profile, layers: tuple[str, ...], values: Vector) -> Vector:
    """Values of the inspected layers at their places among all layers; NaN elsewhere."""
    known = dict(zip(layers, values, strict=True))
    return np.array([known.get(layer, np.nan) for layer in profile.layer])


def _bars(axes: Axes, panel: Panel, plan: Plan, layers: tuple[str, ...]) -> None:
    ratios = {update.layer: update.ratio for update in plan.live}
    chosen = np.array([layer in ratios for layer in layers])
    live = np.array([ratios.get(layer, 0.0) for layer in layers]) if panel.fills else chosen
    axes.bar(range(len(layers)), panel.values, color=[PALE if c else REST for c in chosen], width=0.78)
    axes.bar(range(len(layers)), panel.values * live, color=CHOSEN, width=0.78)
    for at in np.flatnonzero(chosen & np.isfinite(panel.values)):
        label = f"{100 * ratios[layers[at]]:.0f}" if ratios[layers[at]] else "b"
        axes.annotate(label, (at, panel.values[at]), (0, 2), textcoords="offset points", ha="center", fontsize=7.5,
                      color=CHOSEN, fontweight="bold")  # fmt: skip
    axes.axvspan(np.flatnonzero(chosen)[0] - 0.5, len(layers) - 0.5, color=FLOW, zorder=0)
    unseen = np.flatnonzero(np.isnan(panel.values))
    if len(unseen):
        axes.axvspan(unseen[0] - 0.5, unseen[-1] + 0.5, color=SHADE, zorder=0)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(0, 1.2 * float(np.nanmax(panel.values, initial=0.0)) or 1.0)
    axes.set_ylabel(panel.title, color=INK, fontsize=9)
    axes.set_xticks([])
    axes.tick_params(axis="y", colors=FAINT, labelsize=8)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    axes.spines[["top", "right"]].set_visible(False)


def _layer_names(axes: Axes, layers: tuple[str, ...], plan: Plan) -> None:
    """Two rows of labels: what stands after the last dot, upright; below it, once per block, what stands before."""
    parts = [layer.rpartition(".") for layer in layers]
    axes.set_xticks(range(len(layers)), [leaf for *_, leaf in parts], rotation=90, fontsize=7.5, color=FAINT)
    axes.tick_params(axis="x", length=0, pad=3)
    for label, layer in zip(axes.get_xticklabels(), layers, strict=True):
        if layer in plan.layers:
            label.set(color=CHOSEN, fontweight="bold")
    groups = [(name, [at for at, _ in members]) for name, members in groupby(enumerate(parts), lambda part: part[1][0])]
    lines = 1 + round(0.55 * max(len(leaf) for *_, leaf in parts))
    below = axes.secondary_xaxis(location=0)
    below.set_xticks([np.mean(members) for _, members in groups],
                     ["\n" * lines + name for name, _ in groups], fontsize=6.5, color=INK)  # fmt: skip
    below.tick_params(length=0)
    edges = axes.secondary_xaxis(location=0)
    edges.set_xticks([members[0] - 0.5 for _, members in groups] + [len(layers) - 0.5], labels=[])
    edges.tick_params(length=8.4 * lines + 14, width=0.6, color="#c9d1d8")


def _gauge(axes: Axes, budget: Budget) -> None:
    share = budget.used / budget.allowed
    axes.barh([0], [1], color=SHADE, edgecolor=FAINT, linewidth=0.8, height=0.6)
    axes.barh([0], [min(share, 1)], color=CHOSEN, height=0.6)
    text = f"{budget.used:#.3g} of {budget.allowed:#.3g} {budget.unit}   ({100 * share:.1f} %)"
    axes.text(1.01, 0, text, va="center", fontsize=9, color=INK)
    axes.set_yticks([0], [budget.name], fontsize=9, color=INK)
    axes.set_xlim(0, 1.45)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _budgets(plan: Plan) -> list[Budget]:
    facts = plan.facts
    found = [
        ("budget_memory_bytes", f"Memory\n({plan.memory_model} model)", plan.memory_bytes, "MB", 2**20),
        ("budget_macs", "Backward MACs\n(per sample)", plan.backward_macs, "million", 1e6),
        ("budget_latency_s", "Time per step", facts.get("latency_s", 0.0), "ms", 1e-3),
    ]
    return [Budget(name, used / size, facts[key] / size, unit) for key, name, used, unit, size in found if key in facts]


def _legend(axes: Axes, plan: Plan, *, unseen: bool) -> None:
    from matplotlib.patches import Patch

    only_biases = "" if all(update.channels for update in plan.live) else "; b: biases only"
    entries = [
        Patch(color=CHOSEN, label=f"trains (number: % of its channels{only_biases})"),
        Patch(color=REST, label="stays frozen"),
        Patch(color=FLOW, label="gradients pass through"),
    ]
    if unseen:
        entries.append(Patch(color=SHADE, label="not inspected"))
    axes.legend(handles=entries, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, fontsize=9,
                borderaxespad=0.2, handlelength=1.2, columnspacing=1.5)  # fmt: skip


def _headline(profile: Profile, plan: Plan) -> str:
    weights = dict(zip(profile.layer, profile.columns["weights"], strict=True))
    live = sum(round(update.ratio * weights[update.layer]) for update in plan.updates)
    share = 100 * live / sum(weights.values())
    biases = sum(len(update.bias) for update in plan.updates)
    what = f"{live:,} of the model's weights ({share:.2g} %)" + (f" and {biases:,} biases" if biases else "")
    return f"{len(plan.live)} of {len(profile.layer)} layers train: {what}"


def _cost(plan: Plan) -> str:
    text = f"Plan {plan.name}: {plan.memory_bytes / 2**20:#.3g} MB of memory by the {plan.memory_model} model, "
    text += f"{plan.backward_macs / 1e6:#.3g} million MACs per backward pass"
    full = plan.facts.get("full_backward_macs")
    text += f" ({100 * plan.backward_macs / full:.2g} % of training everything)" if full else ""
    return text + _in_the_native_engine(plan)


def _in_the_native_engine(plan: Plan) -> str:
    """What it allocates for the plan, where it runs the model."""
    facts = plan.facts
    if "arena_training_bytes" not in facts:
        return ""
    sizes = (facts[name] / 2**20 for name in ("arena_training_bytes", "arena_bytes", "image_bytes"))
    training, arena, image = (f"{size:#.3g} MB" for size in sizes)
    return f"\nNative engine: {training} to train, of it {arena} a worker's arena; {image} of steps and frozen weights"
