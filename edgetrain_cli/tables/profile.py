"""The table that `profile` and `inspect` show: cost per layer, and what the whole model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edgetrain_cli.tables.numbers import unit

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from stages.artifacts.records import Profile
    from stages.methods.scheduling import Point


class Column(NamedTuple):
    """A column of the table: where it comes from, what stands above it, and how its numbers are written."""

    name: str
    heading: str
    scale: float
    form: str


COLUMNS = (
    Column("parameters", "values", 1, ",.0f"),
    Column("macs", "forward\nM MACs", 1e6, ".3f"),
    Column("backward_macs", "backward\nM MACs", 1e6, ".3f"),
    Column("saved_bytes", "kept\nKiB", 1024, ",.1f"),
    Column("buffer_bytes", "buffers\nKiB", 1024, ",.1f"),
    Column("forward_s", "forward\nms", 1e-3, ".3f"),
    Column("backward_s", "backward\nms", 1e-3, ".3f"),
)
"""What fits 80 columns; `--json` has the rest. The last two are there where time was measured."""

TOTALS: Mapping[str, str] = {
    "parameters": "parameters",
    "macs": "forward pass",
    "backward_macs": "backward pass if all trains",
    "inference_peak_bytes": "peak of inference",
    "paper_peak_bytes": "the same as TinyTrain counts",
    "inference_arena_bytes": "the same in the native engine",
    "image_bytes": "its steps and weights",
    "full_training_bytes": "training all with Adam",
    "process_uss_bytes": "this process alone",
    "process_pss_bytes": "with its part of shared pages",
    "process_rss_bytes": "resident",
    "process_peak_rss_bytes": "most ever resident",
}
"""Total of the profile -> words."""


def profile_table(profile: Profile) -> RenderableType:
    """One row per layer, then the totals. Sizes and times are per sample; times are medians."""
    return layers_and_totals(profile.layer, profile.columns, profile.totals)


def layers_and_totals(
    layers: Sequence[str], columns: Mapping[str, Any], totals: Mapping[str, Any], most: int | None = None
) -> RenderableType:
    """The same from parts of a profile, at most so many layers of it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(title="whole model", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for words, value in total_rows(totals):
        facts.add_row(Text(words), Text(value))
    return Group(_layers(layers, columns, most), "", facts)


def frontier_table(points: Sequence[Point]) -> RenderableType:
    """One row per budget of `train-sparse --ram`."""
    from rich.table import Table

    table = Table(title="budgets of a sample's values", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("--ram\nKiB", "taken\nKiB", "kept\nKiB", "made\nagain", "paged", "more time\nms"):
        table.add_column(heading, justify="right", vertical="bottom")
    for point in points:
        sizes = (f"{size / 1024:,.0f}" for size in (point.budget_bytes, point.allocated_bytes, point.kept_bytes))
        table.add_row(*sizes, str(point.again), str(point.paged), f"{1000 * point.seconds:.3f}")
    return table


def _layers(layers: Sequence[str], columns: Mapping[str, Any], most: int | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    shown = [column for column in COLUMNS if column.name in columns]
    table = Table(title="cost per layer, one sample", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold", vertical="bottom")
    for column in shown:
        cells = [f"{value / column.scale:{column.form}}" for value in columns[column.name]]
        width = max(map(len, [*column.heading.split("\n"), *cells]))
        table.add_column(column.heading, justify="right", min_width=width, no_wrap=True, vertical="bottom")
    for i, layer in enumerate(layers[:most]):
        table.add_row(Text(layer), *(f"{columns[c.name][i] / c.scale:{c.form}}" for c in shown))
    if most is not None and len(layers) > most:
        table.add_row(f"... {len(layers) - most} more")
    return table


def total_rows(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The whole model's figures in words, as far as they are there."""
    rows = [(words, unit(name, totals[name])) for name, words in TOTALS.items() if name in totals]
    if "forward_s" not in totals:
        return [*rows, ("measured", "nothing (--no-measure)")]
    threads = "1 thread" if totals["threads"] == 1 else f"{totals['threads']} threads"
    rows += [
        ("forward pass", _time(totals["forward_s"], totals["forward_spread_s"])),
        ("full training step", _time(totals["full_step_s"], totals["full_step_spread_s"])),
        ("times", f"{threads}, median ± quartiles over {totals['repeats']}"),
        ("energy", totals["energy_source"]),
    ]
    if "forward_j" in totals:
        rows.append(("energy of a forward pass", f"{1000 * totals['forward_j']:.4g} mJ"))
        rows.append(("energy of a full training step", f"{1000 * totals['full_step_j']:.4g} mJ"))
    return rows


def _time(middle_s: float, spread_s: float) -> str:
    return f"{1000 * middle_s:.3f} ± {1000 * spread_s:.3f} ms"
