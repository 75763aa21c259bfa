"""Inspect: what a record holds, as plain values with stable keys, ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import singledispatch
from typing import Any

import numpy as np

from stages.artifacts.codec import preparation_json
from stages.artifacts.records import Array, Block, End, Group, Head, Model, Plan, Profile, Record, Run, Samples, Scores

ADDS: Mapping[str, str] = {
    "pretrain-fsl": "model, metrics",
    "import": "model",
    "profile": "model in deploy form, profile",
    "score-layers": "scores, plan",
    "train-sparse": "model version and head, metrics",
}
"""Stage -> what it adds to a run record."""

SLICE = 256
"""Samples looked at at once."""


@singledispatch
def describe(record: Record) -> dict[str, Any]:
    """What a record holds; a block's samples are all read once, so damage shows."""
    raise TypeError(f"not a record: {type(record).__name__}")


@describe.register
def _(run: Run) -> dict[str, Any]:
    return {
        "kind": "run",
        "model": _model(run.model),
        "profile": None if run.profile is None else _profile(run.profile),
        "scores": None if run.scores is None else _scores(run.scores),
        "plan": None if run.plan is None else _plan(run.plan),
        "metrics": {
            stage: {name: _range(values) for name, values in table.items()} for stage, table in run.metrics.items()
        },
        "history": [
            {
                "command": step.command,
                "version": step.version,
                "seed": step.seed,
                "arguments": plain(step.arguments),
                "inputs": dict(step.inputs),
                "adds": ADDS.get(step.command, ""),
            }
            for step in run.history
        ],
        "extra": _paths(run.extra),
    }


@describe.register
def _(block: Block) -> dict[str, Any]:
    labels, counts = np.unique(block.y[block.y >= 0], return_counts=True)
    return {
        "kind": "block",
        "round": block.round,
        "samples": len(block),
        "shape": [int(size) for size in block.x.shape],
        "dtype": str(block.x.dtype),
        "layout": block.layout,
        "prepared": None if block.prepared is None else preparation_json(block.prepared),
        "bytes": math.prod(block.x.shape) * np.dtype(block.x.dtype).itemsize,
        "x": sample_range(block.x),
        "classes": [
            {"label": int(label), "name": block.name_of(int(label)), "samples": int(count)}
            for label, count in zip(labels, counts, strict=True)
        ],
        "unlabelled": int(np.sum(block.y < 0)),
        "named_classes": 0 if block.names is None else len(block.names),
        "columns": {name: _range(values) for name, values in sorted(block.columns.items())},
        "per_class": {
            name: {
                block.name_of(int(label)): plain(value) for label, value in zip(_labels(block), values, strict=False)
            }
            for name, values in sorted(block.per_class.items())
        },
        "facts": plain(block.facts),
        "extra": _paths(block.extra),
    }


@describe.register
def _(end: End) -> dict[str, Any]:
    return {"kind": "end", "rounds": end.rounds, "facts": plain(end.facts)}


def rounds(descriptions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per round of a stream: how many samples, variances and their ratios, the allocation over classes.

    Ratios say what selection gains: `to_random` 0.25 is the gradient variance that random selection reaches only with
    four times as many samples. `batch` is what `select --strategy auto` chose.
    """
    rows = []
    for block in descriptions:
        if block.get("round") is None:
            continue
        facts = block["facts"]
        variance, random = facts.get("variance"), facts.get("variance_random")
        rows.append(
            {
                "round": block["round"],
                "samples": block["samples"],
                "strategy": facts.get("strategy", facts.get("filter")),
                "batch": facts.get("auto_batch"),
                "variance": variance,
                "variance_is": facts.get("variance_is"),
                "variance_random": random,
                "to_is": _ratio(variance, facts.get("variance_is")),
                "to_random": _ratio(variance, random),
                "allocation": block["per_class"].get("allocation", {}),
                "seen": block["per_class"].get("seen", {}),
            }
        )
    return rows


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def sample_range(x: Samples) -> dict[str, Any]:
    """Least, mean and greatest finite value, and how many samples hold NaN or infinity; reads `SLICE` at a time."""
    low, high, total, count, bad = math.inf, -math.inf, 0.0, 0, 0
    for start in range(0, len(x), SLICE):
        values = np.asarray(x[start : start + SLICE])
        finite = np.isfinite(values)
        bad += int((~finite.reshape(len(values), -1).all(axis=1)).sum())
        good = values[finite]
        if good.size:
            low, high = min(low, float(good.min())), max(high, float(good.max()))
            total, count = total + float(good.sum(dtype=np.float64)), count + good.size
    found = {"min": low, "mean": total / count, "max": high} if count else {"min": None, "mean": None, "max": None}
    return {**found, "bad_samples": bad}


def plain(value: Any) -> Any:
    """Numpy values, tuples and mappings as JSON knows them; NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _model(model: Model) -> dict[str, Any]:
    arrays = [np.asarray(tensor) for tensor in model.tensors.values()]
    spec = model.input
    sound = {name: getattr(spec, name) for name in ("sample_rate_hz", "window_samples", "hop_samples")}
    return {
        "arch": model.arch,
        "arch_args": plain(model.arch_args),
        "form": model.form,
        "version": model.version,
        "tensors": len(arrays),
        "values": int(sum(array.size for array in arrays)),
        "bytes": int(sum(array.nbytes for array in arrays)),
        "input": {
            "kind": spec.kind,
            "shape": list(spec.shape),
            "scale": list(spec.scale),
            "offset": list(spec.offset),
            **(sound if spec.kind == "sound" else {}),
            **({"crop": spec.crop, "interpolation": spec.interpolation} if spec.kind == "image" else {}),
            "prepared": None if spec.prepared is None else preparation_json(spec.prepared),
        },
        "head": None if model.head is None else _head(model.head),
    }


def _head(head: Head) -> dict[str, Any]:
    return {
        "kind": head.kind,
        "classes": len(head.labels),
        "known": int(np.count_nonzero(head.known)),
        "features": int(head.weight.shape[1]),
        "scale": float(head.scale),
        "labels": plain(head.labels),
        "names": None if head.names is None else list(head.names),
    }


def _profile(profile: Profile) -> dict[str, Any]:
    columns = {name: _values(values) for name, values in sorted(profile.columns.items())}
    return {"totals": plain(profile.totals), "layer": list(profile.layer), "columns": columns}


def _scores(scores: Scores) -> dict[str, Any]:
    return {
        "criterion": scores.criterion,
        "layer": list(scores.layer),
        "score": plain(scores.score),
        "fisher": plain(scores.fisher),
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "memory_bytes": plan.memory_bytes,
        "memory_model": plan.memory_model,
        "backward_macs": plan.backward_macs,
        "facts": plain(plan.facts),
        "updates": [
            {
                "layer": update.layer,
                "axis": update.axis,
                "live_channels": len(update.channels),
                "channels": update.axis_channels,
                "live_biases": len(update.bias),
                "detached": update.detached,
            }
            for update in plan.updates
        ],
    }


def _range(values: Array) -> dict[str, Any]:
    """A column in brief."""
    found: dict[str, Any] = {"dtype": str(values.dtype), "length": len(values)}
    if values.dtype.kind not in "biuf":
        return {**found, "distinct": len(np.unique(values))}
    finite = values[np.isfinite(values)]
    if not finite.size:
        return {**found, "min": None, "mean": None, "max": None, "first": None, "last": None}
    return {
        **found,
        "min": plain(finite.min()),
        "mean": float(finite.mean(dtype=np.float64)),
        "max": plain(finite.max()),
        "first": plain(finite.flat[0]),
        "last": plain(finite.flat[-1]),
    }


def _values(values: Array) -> Any:
    return plain(values) if values.dtype.kind != "S" else [bytes(item).decode(errors="replace") for item in values]


def _labels(block: Block) -> Array:
    if block.labels is not None:
        return block.labels
    return np.arange(max((len(values) for values in block.per_class.values()), default=0))


def _paths(group: Group, above: str = "") -> list[str]:
    """Names of what a record carries along without knowing it."""
    own = [f"{above}@{name}" for name in group.attrs] + [f"{above}/{name}" for name in group.arrays]
    return sorted(own + [path for name, child in group.groups.items() for path in _paths(child, f"{above}/{name}")])
