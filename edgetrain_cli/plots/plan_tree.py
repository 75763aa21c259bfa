"""A plan as a tree for the terminal: blocks, layers, which of their channels train, how much of the budgets is used.

    Plan greedy: 2 of 42 layers train, 7,104 values
    ├── blocks.10
    │   ├── expand     ▁▃█▅▁▁▂█▁▄▁▁▇▁▁▂▁▁▃▁  60 of 240 output channels (25 %)
    │   └── depthwise  ████████████████████  240 of 240 output channels (100 %)
    └── total
        ├── memory     ███████████████████░  0.998 of 1 MiB (99.8 %)
        ├── backward   ██████████████████░░  6.19 of 6.74 M MACs (92 %)
        ├── worth      99.7 % of what the best plan within the budgets has
        └── native     0.31 MiB, and 1.79 MiB of frozen weights

One character of a channel bar stands for an equal run of neighbouring channels; its height is their live share.
"""

from __future__ import annotations

from itertools import groupby
from math import ceil

from rich.text import Text
from rich.tree import Tree

from stages.artifacts.records import LayerUpdate, Plan

WIDTH = 20
HEIGHTS = "·▁▂▃▄▅▆▇█"


def plan_tree(plan: Plan) -> Tree:
    """The tree of a plan as `stages.scoring` makes it."""
    trained = f"{len(plan.live)} of {plan.facts['model_layers']} layers train, {plan.facts['live_values']:,} values"
    tree = Tree(Text(f"Plan {plan.name}: {trained}", style="bold"))
    column = max(len("backward"), *(len(update.layer.rpartition(".")[2]) for update in plan.live))
    for block, updates in groupby(plan.live, lambda update: update.layer.rpartition(".")[0]):
        branch = tree.add(Text(block)) if block else tree
        for update in updates:
            branch.add(_layer(update, column))
    costs = tree.add(f"total, memory by the {plan.memory_model} model")
    for line in _costs(plan, column):
        costs.add(line)
    return tree


def _layer(update: LayerUpdate, column: int) -> Text:
    name, live = update.layer.rpartition(".")[2].ljust(column), len(update.channels)
    text = f"{live} of {update.axis_channels} {update.axis} channels ({100 * update.ratio:.3g} %)"
    biases = f"{len(update.bias)} biases" if update.bias else ""
    shown = ", ".join(part for part in (text if live else "", biases) if part)
    return Text.assemble(f"{name}  ", (channel_bar(update), "red"), f"  {shown}")


def channel_bar(update: LayerUpdate, width: int = WIDTH) -> str:
    """Where the live channels lie: each character covers a run of channels, as high as the share of it that trains.

    A run with any live channel shows, and only a whole one is full.
    """
    width = min(width, update.axis_channels)
    totals, lives = [0] * width, [0] * width
    for channel in range(update.axis_channels):
        totals[channel * width // update.axis_channels] += 1
    for channel in update.channels:
        lives[channel * width // update.axis_channels] += 1
    top = len(HEIGHTS) - 1
    heights = [
        top if live == total else min(top - 1, ceil(live / total * top))
        for live, total in zip(lives, totals, strict=True)
    ]
    return "".join(HEIGHTS[height] for height in heights).ljust(WIDTH)


def _costs(plan: Plan, column: int) -> list[Text]:
    facts = plan.facts
    rows: list[tuple[str, float | None, float | None, float, str]] = [
        ("memory", plan.memory_bytes, facts.get("budget_memory_bytes"), 2**20, "MiB"),
        ("backward", plan.backward_macs, facts.get("budget_macs"), 1e6, "M MACs"),
        ("time", facts.get("latency_s"), facts.get("budget_latency_s"), 1e-3, "ms per sample"),
    ]
    lines = [_cost(name.ljust(column), used, budget, size, unit) for name, used, budget, size, unit in rows if used]
    if facts.get("optimum_score"):
        share = 100 * facts["score"] / facts["optimum_score"]
        lines.append(Text(f"{'worth'.ljust(column)}  {share:.3g} % of what the best plan within the budgets has"))
    elif "score" in facts:
        lines.append(Text(f"{'worth'.ljust(column)}  {facts['score']:.3g}; the search for the optimum was given up"))
    if "arena_training_bytes" in facts:
        training, image = (facts[name] / 2**20 for name in ("arena_training_bytes", "image_bytes"))
        lines.append(Text(f"{'native'.ljust(column)}  {training:.3g} MiB, and {image:.3g} MiB of frozen weights"))
    if "fisher_pass_bytes" in facts:
        lines.append(Text(f"{'scoring'.ljust(column)}  held {facts['fisher_pass_bytes'] / 2**20:.3g} MiB"))
    return lines


def _cost(name: str, used: float, budget: float | None, size: float, unit: str) -> Text:
    if budget is None:
        return Text(f"{name}  {_short(used / size)} {unit}")
    filled = int(WIDTH * used / budget)
    return Text.assemble(
        f"{name}  ",
        ("█" * filled + "░" * (WIDTH - filled), "cyan"),
        f"  {_short(used / size)} of {_short(budget / size)} {unit} ({100 * used / budget:.3g} %)",
    )


def _short(value: float) -> str:
    """Three digits that count, or all of a larger whole part."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
