"""The tables of `evaluate`: accuracy by class, and methods side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from stages.evaluation import Accuracy
    from stages.methods.results import MethodSummary


def accuracy_json(result: Accuracy) -> dict[str, Any]:
    """The whole result for programs."""
    classes = [
        {"label": each.label, "name": each.name, "samples": each.samples, **each.interval._asdict()}
        for each in result.classes
    ]
    value, low, high = result.interval
    return {
        "accuracy": value,
        "low": low,
        "high": high,
        "samples": result.samples,
        "loss": result.loss,
        "classes": [{("accuracy" if key == "value" else key): item for key, item in row.items()} for row in classes],
    }


def accuracy_table(result: Accuracy) -> Table:
    """One row per class, then all samples together."""
    from rich.table import Table
    from rich.text import Text

    title = Text(f"share of right answers, with 95 % interval (Wilson); mean loss {result.loss:.4g}")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("class", overflow="fold")
    for name in ("samples", "accuracy %", "interval"):
        table.add_column(name, justify="right", no_wrap=True)
    lines = [(each.name, each.samples, each.interval) for each in result.classes]
    for name, samples, interval in [*lines, ("all", result.samples, result.interval)]:
        bounds = f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
        table.add_row(Text(name), f"{samples:,}", f"{100 * interval.value:.1f}", bounds)
    return table


LEGEND = (
    "memory: of training, as TinyTrain counts it, MiB. kept: what the backward pass keeps, KiB. MMAC: million "
    "multiply-accumulates of the backward pass, per sample. s: seconds per task."
)


def methods_table(summaries: Sequence[MethodSummary], reference: str) -> Table:
    """Methods side by side, and how they differ on the same tasks."""
    from rich.table import Table
    from rich.text import Text

    title = Text(f"accuracy over tasks with 95 % intervals; differences are paired, to {reference}")
    table = Table(
        title=title, title_justify="left", caption=Text(LEGEND), caption_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    table.add_column("data", overflow="fold", min_width=4)
    table.add_column("method", overflow="fold", min_width=10)
    for name in ("tasks", "accuracy\n%", "difference", "memory\nMiB", "kept\nKiB", "MMAC", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, each in enumerate(summaries):
        last = i + 1 == len(summaries) or summaries[i + 1].dataset != each.dataset
        table.add_row(
            Text(each.dataset),
            Text(each.method),
            str(each.tasks),
            _with_interval(each.accuracy, each.half_width),
            "" if each.method == reference else _with_interval(each.difference, each.difference_half_width, "+"),
            f"{each.memory_bytes / 2**20:.2f}",
            f"{each.saved_bytes / 2**10:.0f}",
            f"{each.backward_macs / 1e6:.2f}",
            f"{each.seconds:.2f}",
            end_section=last,
        )
    return table


def _with_interval(value: float, half: float, sign: str = "") -> str:
    reach = "" if half != half else f" ± {100 * half:.1f}"
    return f"{100 * value:{sign}.1f}{reach}"
