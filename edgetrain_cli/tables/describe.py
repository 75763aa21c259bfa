"""Tables of what `stages.inspecting` describes; nothing is computed here but the way numbers are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from edgetrain_cli.tables.numbers import by, listed, number, unit
from edgetrain_cli.tables.profile import layers_and_totals

MAX_ROWS = 20
"""Rows of a table before the rest is only counted."""


def tables(descriptions: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Everything that a stream holds: each run in full, a single block in full, more blocks as one row each."""
    parts: list[RenderableType] = [part for one in descriptions if one["kind"] == "run" for part in run_parts(one)]
    blocks = [one for one in descriptions if one["kind"] == "block"]
    parts += block_parts(blocks[0]) if len(blocks) == 1 else stream_parts(blocks)
    parts += [Text(f"end of stream: {one['rounds']} rounds") for one in descriptions if one["kind"] == "end"]
    if any(block["round"] is not None for block in blocks) and descriptions[-1]["kind"] != "end":
        parts.append(Text(f"no end mark after round {blocks[-1]['round']}: whoever wrote this stopped early"))
    return Group(*parts)


# ------------------------------------------------------------------------------------------------------------- a run


def run_parts(run: Mapping[str, Any]) -> list[RenderableType]:
    """Model, profile, scores, plan, metrics, history: what is there."""
    parts: list[RenderableType] = [facts_table("run", _model_facts(run["model"]))]
    if run["profile"] is not None:
        found = run["profile"]
        parts.append(layers_and_totals(found["layer"], found["columns"], found["totals"], MAX_ROWS))
    if run["scores"] is not None:
        parts.append(_scores_table(run["scores"]))
    if run["plan"] is not None:
        parts.append(_plan_tree(run["plan"]))
    parts += [
        _columns_table(f"training by {stage}, step by step", columns) for stage, columns in run["metrics"].items()
    ]
    if run["history"]:
        parts.append(_history_tree(run["history"]))
    if run["extra"]:
        parts.append(Text("carried along: " + ", ".join(run["extra"])))
    return parts


def _model_facts(model: Mapping[str, Any]) -> dict[str, Any]:
    spec, head = model["input"], model["head"]
    facts = {
        "architecture": model["arch"],
        "arguments": ", ".join(f"{name}={value}" for name, value in model["arch_args"].items()) or "none",
        "form": model["form"],
        "version": f"{model['version']} updates",
        "tensors": f"{model['tensors']}, {model['values']:,} values, {unit('bytes', model['bytes'])}",
        "input": f"{spec['kind']} {by(spec['shape'])}, scale {listed(spec['scale'])}, offset {listed(spec['offset'])}",
        "head": "none yet",
    }
    if head is not None:
        names = ": " + listed(head["names"]) if head["names"] else ""
        facts["head"] = f"{head['kind']}, {head['known']} of {head['classes']} classes known{names}"
    return facts


def _scores_table(scores: Mapping[str, Any]) -> Table:
    table = _table(f"scores by {scores['criterion']}", "layer", "score", "Fisher potential")
    rows = zip(scores["layer"], scores["score"], scores["fisher"], strict=True)
    ranked = sorted(rows, key=lambda row: -(row[1] or 0))
    return _filled(table, ([layer, number(score), number(fisher)] for layer, score, fisher in ranked))


def _plan_tree(plan: Mapping[str, Any]) -> Tree:
    memory = f"{unit('bytes', plan['memory_bytes'])} by the {plan['memory_model']} model"
    tree = Tree(Text(f"plan {plan['name']}: {memory}, {unit('macs', plan['backward_macs'])} backward"))
    for update in plan["updates"]:
        live, channels = update["live_channels"], update["channels"]
        bias = f", {update['live_biases']} biases" if update["live_biases"] else ""
        what = f"{live} of {channels} {update['axis']} channels ({live / channels:.0%}){bias}"
        ends = "; passes no gradient on" if update["detached"] else ""
        tree.add(Text(f"{update['layer']}: {what if live or bias else 'frozen'}{ends}"))
    facts = {name: value for name, value in plan["facts"].items() if name in PLAN_FACTS}
    for name, words in PLAN_FACTS.items():
        if name in facts:
            tree.add(Text(f"{words}: {unit(name, facts[name])}"))
    if "workers" in plan["facts"]:
        tree.add(Text("counted for: " + counted_for(plan["facts"])))
    return tree


def counted_for(facts: Mapping[str, Any]) -> str:
    """What a plan's memory is counted for.

    >>> counted_for({"batch": 1, "workers": 2, "optimizer": "adam"})
    '1 sample at once, 2 workers, adam'
    """
    samples, workers = ("1 sample" if facts["batch"] == 1 else f"{facts['batch']} samples"), facts["workers"]
    return f"{samples} at once, {workers} worker{'s' if workers > 1 else ''}, {facts['optimizer']}"


PLAN_FACTS = {
    "budget_memory_bytes": "memory allowed",
    "budget_macs": "backward pass allowed",
    "budget_latency_s": "time allowed",
    "latency_s": "time expected",
    "full_backward_macs": "backward pass if all trained",
    "live_values": "values that train",
    "arena_training_bytes": "training in the native engine",
    "arena_bytes": "of it a worker's arena",
    "image_bytes": "beside it, steps and frozen weights",
    "samples": "samples scored",
    "loss": "their loss",
    "fisher_pass_bytes": "held while scoring",
}
"""Fact of a plan -> words; `--json` has all of them."""


def _history_tree(history: Sequence[Mapping[str, Any]]) -> Tree:
    """The stages that made a run, in order, each with what it added, its settings and its inputs."""
    tree = Tree("history")
    for step in history:
        seed = "" if step["seed"] is None else f", seed {step['seed']}"
        branch = tree.add(Text(f"{step['command']} ({step['version']}{seed}): {step['adds'] or 'nothing'}"))
        settings = ", ".join(
            f"{name.replace('_', '-')} {_said(value)}"
            for name, value in step["arguments"].items()
            if value not in (None, False, [])
        )
        inputs = ", ".join(f"{name} ({digest[:8]})" for name, digest in step["inputs"].items())
        for words in (settings, f"from {inputs}" if inputs else ""):
            if words:
                branch.add(Text(words))
    return tree


def _said(value: Any) -> str:
    return "yes" if value is True else listed(value) if isinstance(value, list) else str(value)


# -------------------------------------------------------------------------------------------------------------- blocks


def block_parts(block: Mapping[str, Any]) -> list[RenderableType]:
    """One block in full."""
    x = block["x"]
    facts = {
        "samples": f"{block['samples']:,}, {by(block['shape'][1:])} {block['dtype']}, layout {block['layout']}",
        "size": unit("bytes", block["bytes"]),
        "values": f"{number(x['min'])} to {number(x['max'])}, mean {number(x['mean'])}",
        "classes": f"{len(block['classes'])} here, {block['named_classes'] or 'none'} named",
    }
    if x["bad_samples"]:
        facts["bad samples"] = f"{x['bad_samples']} with NaN or infinity"
    if block["round"] is not None:
        facts["round"] = str(block["round"])
    parts: list[RenderableType] = [facts_table("block", {**facts, **block["facts"]}), _classes_table([block])]
    if block["columns"]:
        parts.append(_columns_table("columns", block["columns"]))
    return parts


def stream_parts(blocks: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """Many blocks: one row each, and their classes together."""
    if not blocks:
        return []
    total = sum(block["samples"] for block in blocks)
    table = _table(
        f"{len(blocks)} blocks, {total:,} samples", "", "samples", "shape", "dtype", "values", "classes", "columns"
    )
    rows = (
        [
            str(position if block["round"] is None else f"round {block['round']}"),
            str(block["samples"]),
            f"{by(block['shape'][1:])} {block['layout']}",
            block["dtype"],
            f"{number(block['x']['min'])} to {number(block['x']['max'])}",
            str(len(block["classes"])),
            ", ".join(block["columns"]),
        ]
        for position, block in enumerate(blocks)
    )
    return [_filled(table, rows), _classes_table(blocks)]


def _classes_table(blocks: Sequence[Mapping[str, Any]]) -> Table:
    counts: dict[tuple[int, str], int] = {}
    for block in blocks:
        for entry in block["classes"]:
            key = (entry["label"], entry["name"])
            counts[key] = counts.get(key, 0) + entry["samples"]
    most = max(counts.values(), default=1)
    table = _table("classes", "label", "name", "samples", "")
    rows = ([str(k[0]), k[1], str(n), "▇" * max(1, round(24 * n / most))] for k, n in sorted(counts.items()))
    return _filled(table, rows)


def _columns_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table(title, "name", "type", "entries", "first", "last", "min", "mean", "max")
    rows = []
    for name, column in columns.items():
        figures = [number(column[key]) if key in column else "" for key in ("first", "last", "min", "mean", "max")]
        kind = column["dtype"] if "min" in column else f"{column['dtype']}, {column['distinct']} distinct"
        rows.append([name, kind, str(column["length"]), *figures])
    return _filled(table, rows)


def rounds_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What selection gained in each round, and how it spread the batch over the classes."""
    title = "rounds: the gradient's variance, and its ratio to what others would have"
    table = _table(title, "round", "samples", "strategy", "variance", "to IS", "to random", "allocation")
    lines = (
        [
            str(row["round"]),
            str(row["samples"]),
            row["strategy"] or "",
            number(row["variance"]),
            number(row["to_is"]),
            number(row["to_random"]),
            " ".join(f"{name}:{count}" for name, count in (row["allocation"] or row["seen"]).items() if count),
        ]
        for row in rows
    )
    return _filled(table, lines)


def facts_table(title: str, facts: Mapping[str, Any]) -> Table:
    """Name and value, one under another."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(Text(name), Text(unit(name, value)))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _filled(table: Table, rows: Iterable[Sequence[str]]) -> Table:
    left = 0
    for position, row in enumerate(rows):
        if position < MAX_ROWS:
            table.add_row(*(Text(cell) for cell in row))
        else:
            left += 1
    if left:
        table.add_row(f"... {left} more")
    return table
