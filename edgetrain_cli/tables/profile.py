"""The table that `profile` shows: cost per layer, and what the whole model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from edgetrain_cli.tables.describe import unit

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stages.artifacts.records import Profile


class Column(NamedTuple):
    """A column of the table: where it comes from, what stands above it, and how its numbers are written."""

    name: str
    heading: str
    scale: float
    form: str


COMPUTED = (
    Column("parameters", "parameters", 1, ",.0f"),
    Column("macs", "forward\nM MACs", 1e6, ".3f"),
    Column("backward_macs", "backward\nM MACs", 1e6, ".3f"),
    Column("saved_bytes", "kept\nKiB", 1024, ",.1f"),
    Column("buffer_bytes", "buffers\nKiB", 1024, ",.1f"),
)
MEASURED = (
    Column("forward_s", "forward\nms", 1e-3, ".3f"),
    Column("forward_spread_s", "±", 1e-3, ".3f"),
    Column("backward_s", "backward\nms", 1e-3, ".3f"),
    Column("backward_spread_s", "±", 1e-3, ".3f"),
)

TOTALS: Mapping[str, str] = {
    "parameters": "parameters",
    "macs": "forward pass",
    "backward_macs": "backward pass, everything training",
    "inference_peak_bytes": "inference peak (tensors alive at once)",
    "paper_peak_bytes": "inference peak as TinyTrain counts it",
    "full_training_bytes": "training everything, stock framework, Adam",
    "process_uss_bytes": "this process: its own memory",
    "process_pss_bytes": "this process: with its share of shared pages",
    "process_rss_bytes": "this process: resident",
    "process_peak_rss_bytes": "this process: most ever resident",
}
"""Total of the profile -> words."""


def profile_table(profile: Profile) -> RenderableType:
    """One row per layer, then the totals. Sizes and times are per sample; times are medians with their spread."""
    from rich.console import Group
    from rich.table import Table

    columns = (*COMPUTED, *(MEASURED if "forward_s" in profile.columns else ()))
    table = Table(title="cost per layer, one sample", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True, vertical="bottom")
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True, vertical="bottom")
    for i, layer in enumerate(profile.layer):
        table.add_row(layer, *(f"{profile.columns[c.name][i] / c.scale:{c.form}}" for c in columns))
    facts = Table(title="whole model", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for words, value in total_rows(profile.totals):
        facts.add_row(words, value)
    return Group(table, "", facts)


def total_rows(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The whole model's figures in words, as far as they are there."""
    rows = [(words, unit(name, totals[name])) for name, words in TOTALS.items() if name in totals]
    if "forward_s" not in totals:
        return [*rows, ("measured", "nothing (--no-measure)")]
    threads = "1 thread" if totals["threads"] == 1 else f"{totals['threads']} threads"
    conditions = f"{threads}, {totals['repeats']} repeats; median ± interquartile range"
    rows += [
        ("forward pass, measured", _time(totals["forward_s"], totals["forward_spread_s"])),
        ("full training step, measured (stock autograd)", _time(totals["full_step_s"], totals["full_step_spread_s"])),
        ("measured with", conditions),
        ("energy", totals["energy_source"]),
    ]
    if "forward_j" in totals:
        rows.append(("energy of a forward pass", f"{1000 * totals['forward_j']:.4g} mJ"))
        rows.append(("energy of a full training step", f"{1000 * totals['full_step_j']:.4g} mJ"))
    return rows


def _time(middle_s: float, spread_s: float) -> str:
    return f"{1000 * middle_s:.3f} ± {1000 * spread_s:.3f} ms"
