"""The demo's table and picture, from the artifacts that it left in a folder."""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from stages.artifacts.records import Run
from stages.artifacts.stream import open_records
from stages.evaluation import evaluate
from stages.models.deploy import deploy
from stages.planning.baselines import named_plan
from stages.planning.plans import make_plan

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    "titan": ("chosen samples, planned layers", "tab:blue"),
    "random": ("random samples, planned layers", "tab:gray"),
    "full": ("chosen samples, all layers", "tab:orange"),
}


def read_run(path: Path) -> Run:
    record = next(open_records(path))
    if not isinstance(record, Run):
        raise SystemExit(f"{path}: not a run record")
    return record


def curve(run: Run, already: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Updates beyond the first `already`, and accuracy in per cent, where it was measured."""
    table = run.metrics["train-sparse"]
    measured = ~np.isnan(table["accuracy"])
    return table["version"][measured] - already, 100 * table["accuracy"][measured]


def main(folder: Path) -> None:
    runs = {method: [read_run(path) for path in sorted(folder.glob(f"{method}-*.h5"))] for method in METHODS}
    planned, adapted = read_run(folder / "run.h5"), read_run(folder / "adapted.h5")
    before = 100 * json.loads((folder / "before.json").read_text())["accuracy"]
    few_shot = 100 * evaluate(adapted, open_records(folder / "test.h5")).interval.value
    graph = deploy(planned.model).graph
    full = make_plan("full", named_plan("full", graph), graph, memory_model=planned.plan.memory_model, optimizer="sgd")
    costs = {"titan": planned.plan, "random": planned.plan, "full": full}
    Console(width=110).print(table(runs, costs, before, few_shot, adapted.model.version))
    draw(folder / "demo.png", runs, adapted, before, few_shot)
    print(f"picture: {folder / 'demo.png'}")


def drawn(run: Run, already: int) -> float:
    """Samples trained on in the updates beyond the first `already`."""
    table = run.metrics["train-sparse"]
    return float(table["samples"][table["version"] > already].sum())


def table(runs, costs, before: float, few_shot: float, already: int) -> Table:
    seeds = len(runs["titan"])
    result = Table(
        title="Accuracy on held-out digits\n"
        f"five samples per class, no training: {before:.1f} %; planned layers trained on them: {few_shot:.1f} %\n"
        f"then from the stream, {seeds} seeds:"
    )
    for heading in ("training", "half-way %", "end %", "gain", "samples used", "memory KiB", "backward k MACs"):
        result.add_column(heading, justify="left" if heading == "training" else "right")
    for method, (label, _) in METHODS.items():
        curves = np.array([curve(run)[1] for run in runs[method]])
        middle, end = curves[:, curves.shape[1] // 2], curves[:, -1]
        used = np.mean([drawn(run, already) for run in runs[method]])
        cost = costs[method]
        result.add_row(
            label,
            f"{middle.mean():.1f} ± {middle.std(ddof=1) if seeds > 1 else 0:.1f}",
            f"{end.mean():.1f} ± {end.std(ddof=1) if seeds > 1 else 0:.1f}",
            f"{end.mean() - before:+.1f}",
            f"{used:.0f}",
            f"{cost.memory_bytes / 1024:.0f}",
            f"{cost.backward_macs / 1000:,.0f}",
        )
    return result


def draw(path: Path, runs, adapted: Run, before: float, few_shot: float) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    for method, (label, colour) in METHODS.items():
        curves = [curve(run, adapted.model.version) for run in runs[method]]
        updates, accuracy = curves[0][0], np.array([values for _, values in curves])
        left.plot(updates, accuracy.mean(axis=0), color=colour, label=label)
        left.fill_between(updates, accuracy.min(axis=0), accuracy.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    left.axhline(few_shot, color="black", linestyle="--", linewidth=1, label="after the support set")
    left.axhline(before, color="black", linestyle=":", linewidth=1, label="before training")
    left.set(
        xlabel="updates from the stream (batches of 10)",
        ylabel="accuracy on held-out digits (%)",
        title="Learning from the stream",
    )
    left.legend(frameon=False)
    layers = [op.name for op in deploy(adapted.model).graph.layers]
    shares = [100 * adapted.plan[name].ratio if name in adapted.plan.layers else 0.0 for name in layers]
    right.barh(layers, [100] * len(layers), color="0.92")
    right.barh(layers, shares, color="tab:blue")
    right.invert_yaxis()
    right.set(
        xlabel="channels that train (%)", xlim=(0, 100), title=f"The plan: {adapted.plan.memory_bytes / 1024:.0f} KiB"
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
