"""Records to neutral trees and back: which field lies in which dataset. The inverse pairs stand side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from stages.artifacts import schema
from stages.artifacts.records import (
    LAYOUTS,
    Array,
    Block,
    End,
    Group,
    Head,
    InputSpec,
    LayerUpdate,
    Model,
    Plan,
    Preparation,
    Profile,
    Record,
    Run,
    Scores,
    Step,
    check_layout,
)
from stages.errors import DataError, SchemaError


def to_tree(record: Record) -> Group:
    """The record as a tree that fits the schema.

    Raises:
        SchemaError: the record does not fit its own schema.
    """
    kind = "run" if isinstance(record, Run) else "block"
    tree = _run_tree(record) if isinstance(record, Run) else _block_tree(record)
    schema.check(kind, tree)
    return tree


def from_tree(tree: Group, where: str = "") -> Record:
    """The record that a tree holds; a tree without `edgetrain` that has x and y is a user's own block.

    Raises:
        SchemaError: neither a run record nor a block, written by a newer version, or malformed.
    """
    kind = tree.attrs.get("edgetrain")
    if kind is None:
        if "x" in tree.arrays:
            return _block(_adopt(tree, where), where)
        raise SchemaError(
            where,
            f"HDF5 with {_names(tree)}",
            "a record of EdgeTrain, or datasets x and, where there are labels, y",
            "make one with `edgetrain pack` or `edgetrain import`",
        )
    if kind not in schema.SCHEMAS:
        raise SchemaError(f"{where}@edgetrain", f"{kind!r}", "'run' or 'block'")
    version = tree.attrs.get("schema")
    if isinstance(version, int | np.integer) and not 1 <= version <= schema.VERSION:
        raise SchemaError(f"{where}@schema", f"version {version}", f"1 to {schema.VERSION}", "update EdgeTrain")
    if kind == "block" and version == 1:
        tree = _from_version_1(tree)
    schema.check(kind, tree, where)
    return _run(tree, where) if kind == "run" else _block(tree, where)


# ------------------------------------------------------------------------------------------------------------- blocks


def _block_tree(block: Block | End) -> Group:
    head = {"edgetrain": "block", "schema": schema.VERSION}
    if isinstance(block, End):
        nothing = {"x": np.zeros(0, np.uint8), "y": np.zeros(0, np.int64)}
        return Group({**head, **block.facts, "end": block.rounds}, nothing)
    _check_block(block)
    attrs = {**block.extra.attrs, **block.facts, **head, "layout": block.layout}
    if block.round is not None:
        attrs["round"] = block.round
    attrs |= _preparation_attrs(block.prepared)
    arrays = {"x": block.x, "y": block.y, **block.columns, **_class_arrays(block), **block.extra.arrays}
    per_class = {name: values for name, values in block.per_class.items() if name != "seen"}
    groups = dict(block.extra.groups) | ({"per_class": Group(arrays=per_class)} if per_class else {})
    return Group(attrs, arrays, groups)


def _class_arrays(block: Block) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    if "seen" in block.per_class:
        arrays["seen"] = np.asarray(block.per_class["seen"], np.int64)
    if block.labels is None:
        return arrays
    if block.names is None:
        return {**arrays, "classes": block.labels}
    arrays["classes"] = text_array(block.names)
    if not np.array_equal(block.labels, np.arange(len(block.labels))):
        arrays["labels"] = block.labels
    return arrays


def _block(tree: Group, where: str) -> Block | End:
    known = schema.BLOCK[""]
    facts = {name: value for name, value in tree.attrs.items() if name not in known.attrs}
    if "end" in tree.attrs:
        return End(int(tree.attrs["end"]), facts)
    y = np.asarray(tree.arrays["y"])
    labels, names = _classes_of(tree)
    own = {"x", "y", "seen", "classes", "labels"}
    others = {name: array for name, array in tree.arrays.items() if name not in own}
    columns = {n: np.asarray(a) for n, a in others.items() if a.shape[:1] == y.shape}
    extra_arrays = {name: array for name, array in others.items() if name not in columns}
    groups = {name: group for name, group in tree.groups.items() if name != "per_class"}
    per_class = dict(tree.groups["per_class"].arrays) if "per_class" in tree.groups else {}
    if "seen" in tree.arrays:
        per_class["seen"] = np.asarray(tree.arrays["seen"])
        labels = np.arange(len(per_class["seen"])) if labels is None else labels
    layout = str(tree.attrs.get("layout") or guess_layout(tree.arrays["x"], where))
    number = tree.attrs.get("round")
    block = Block(
        x=tree.arrays["x"],
        y=y,
        layout=layout,
        columns=columns,
        labels=labels,
        names=names,
        per_class=per_class,
        round=None if number is None else int(number),
        facts=facts,
        extra=Group({}, extra_arrays, groups),
        prepared=_preparation_of(tree.attrs, where),
    )
    _check_block(block, where)
    return block


def _classes_of(tree: Group) -> tuple[Array | None, tuple[str, ...] | None]:
    classes = tree.arrays.get("classes")
    if classes is None:
        return None, None
    if classes.dtype.kind != "S":
        return np.asarray(classes, np.int64), None
    labels = np.asarray(tree.arrays.get("labels", np.arange(len(classes))), np.int64)
    return labels, text_tuple(classes)


def _check_block(block: Block, where: str = "") -> None:
    check_layout(block.layout, block.x.shape, f"{where}/x")
    if len(block.y) and int(np.min(block.y)) < -1:
        bad = int(np.flatnonzero(np.asarray(block.y) < -1)[0])
        raise DataError(
            f"{where}/y[{bad}]",
            f"label {int(block.y[bad])}",
            "a class label >= 0, or -1 for none",
            "number the classes from 0 up",
        )
    if block.names is not None and block.labels is not None:
        unknown = (np.asarray(block.y) >= 0) & ~np.isin(block.y, block.labels)
        if unknown.any():
            bad = int(np.flatnonzero(unknown)[0])
            raise DataError(
                f"{where}/y[{bad}]",
                f"label {int(block.y[bad])}",
                f"one of the {len(block.labels)} labels that `classes` names",
            )


def _adopt(tree: Group, where: str) -> Group:
    """A user's own HDF5 with x, and y unless it has no labels yet, as a block; numbers take the schema's dtypes."""
    arrays = dict(tree.arrays)
    y = np.asarray(arrays["y"]) if "y" in arrays else np.full(arrays["x"].shape[:1], -1)
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise SchemaError(f"{where}/y", f"{y.dtype} {y.shape}", "integers (N)", "pack the data with `edgetrain pack`")
    arrays["y"] = y.astype(np.int64)
    for name in ("index", "seen", "labels", "classes"):
        if name in arrays and arrays[name].dtype.kind in "iu":
            arrays[name] = np.asarray(arrays[name]).astype(np.int64)
    for name in ("score", "weight"):
        if name in arrays and arrays[name].dtype.kind == "f":
            arrays[name] = np.asarray(arrays[name]).astype(np.float32)
    attrs = {name: value for name, value in tree.attrs.items() if name not in ("round", "end", "prepared")}
    if attrs.get("layout") not in LAYOUTS:
        attrs.pop("layout", None)
    adopted = _from_version_1(Group({**attrs, "edgetrain": "block", "schema": schema.VERSION}, arrays, tree.groups))
    schema.check("block", adopted, where)
    return adopted


def _from_version_1(tree: Group) -> Group:
    """What has had another meaning in a block before version 2, under names that have none."""
    arrays, attrs = dict(tree.arrays), dict(tree.attrs)
    if "source" in arrays and arrays["source"].dtype.kind != "S":
        arrays["source_column"] = arrays.pop("source")
    if not isinstance(attrs.get("prepared", ""), str):
        attrs["prepared_fact"] = attrs.pop("prepared")
    if not isinstance(attrs.get("sample_rate_hz", 0), int | float | np.integer | np.floating):
        attrs["sample_rate_fact"] = attrs.pop("sample_rate_hz")
    return Group(attrs, arrays, tree.groups)


def _preparation_attrs(prepared: Preparation | None) -> dict[str, Any]:
    """The attributes of a block that say how its samples were prepared; the rate is one of its own."""
    if prepared is None:
        return {}
    values = preparation_json(prepared)
    rate = {name: values.pop(name) for name in ("sample_rate_hz",) if name in values}
    return {**rate, "prepared": json_text(values)} if values else rate


def _preparation_of(attrs: Mapping[str, Any], where: str) -> Preparation | None:
    values = json_value(attrs["prepared"], f"{where}@prepared") if "prepared" in attrs else {}
    rate = attrs.get("sample_rate_hz", 0)
    if not values and not rate:
        return None
    return preparation_from_json({**values, "sample_rate_hz": rate}, f"{where}@prepared")


def preparation_json(prepared: Preparation) -> dict[str, Any]:
    """What was done, as JSON values; what was not is left out."""
    plain = Preparation()
    values = {each.name: getattr(prepared, each.name) for each in fields(Preparation)}
    return {name: value for name, value in values.items() if value != getattr(plain, name)}


def preparation_from_json(values: Mapping[str, Any], where: str) -> Preparation:
    """The inverse of `preparation_json`. Raises `SchemaError` for what nobody knows how to repeat."""
    for name, value in values.items():
        kinds = _PREPARATION_TYPES.get(name)
        if kinds is None or not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise SchemaError(
                f"{where}: {name}", f"{value!r:.40}", "a preparation that this version knows", "update it"
            )
    sizes = {name: tuple(values[name]) for name in ("size", "shape") if values.get(name) is not None}
    for name, size in sizes.items():
        if not all(type(n) is int and n > 0 for n in size) or (name == "size" and len(size) != 2):
            raise SchemaError(f"{where}: {name}", f"{size!r:.40}", "positive sizes, of a picture height and width")
    return Preparation(**{**values, **sizes, "sample_rate_hz": round(values.get("sample_rate_hz", 0))})


_NUMBERS = (int, float, np.integer, np.floating)
_PREPARATION_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("of", "fit", "colour", "dtype", "layout"), (str,)),
    **dict.fromkeys(("scale", "sample_rate_hz", "seconds"), _NUMBERS),
    **dict.fromkeys(("size", "shape"), (list, tuple)),
    "invert": (bool,),
}
"""Field of `Preparation` -> what its JSON value may be."""


def guess_layout(x: Any, where: str = "") -> str:
    """The layout of an array where it cannot be anything else.

    >>> guess_layout(np.zeros((5, 28, 28), np.uint8)), guess_layout(np.zeros((5, 32, 32, 3), np.uint8))
    ('NHW', 'NHWC')

    Raises:
        DataError: more than one layout fits, or none.
    """
    shape = tuple(x.shape)
    if len(shape) == 2:
        return "NT" if x.dtype == np.int16 else "ND"
    if len(shape) == 3 and x.dtype == np.uint8:
        return "NHW"
    if len(shape) == 4:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first != last:
            return "NCHW" if first else "NHWC"
    raise DataError(
        f"{where}/x",
        f"shape {shape} without a layout",
        "one of " + ", ".join(LAYOUTS),
        "pack it with `edgetrain pack --layout`",
    )


# --------------------------------------------------------------------------------------------------------------- runs


def _run_tree(run: Run) -> Group:
    groups = {"model": model_tree(run.model)}
    if run.profile is not None:
        groups["profile"] = Group(run.profile.totals, {"layer": text_array(run.profile.layer), **run.profile.columns})
    if run.scores is not None:
        groups["scores"] = _scores_tree(run.scores)
    if run.plan is not None:
        groups["plan"] = _plan_tree(run.plan)
    if run.metrics:
        groups["metrics"] = Group(groups={stage: Group(arrays=table) for stage, table in run.metrics.items()})
    if run.history:
        groups["history"] = Group(arrays={"step": text_array([_step_text(step) for step in run.history])})
    tree = Group({"edgetrain": "run", "schema": schema.VERSION}, {}, groups)
    return _merged(run.extra, tree)


def _run(tree: Group, where: str) -> Run:
    groups = tree.groups
    return Run(
        model=_model(groups["model"], where),
        profile=_profile(groups["profile"]) if "profile" in groups else None,
        scores=_scores(groups["scores"], where) if "scores" in groups else None,
        plan=_plan(groups["plan"], where) if "plan" in groups else None,
        metrics={stage: dict(group.arrays) for stage, group in groups["metrics"].groups.items()}
        if "metrics" in groups
        else {},
        history=_steps(groups["history"], where) if "history" in groups else (),
        extra=schema.leftover("run", tree),
    )


def model_tree(model: Model) -> Group:
    """The tree of `/model`."""
    spec = model.input
    attrs: dict[str, Any] = {
        "kind": spec.kind,
        "shape": np.array(spec.shape, np.int64),
        "scale": np.array(spec.scale, np.float64),
        "offset": np.array(spec.offset, np.float64),
    }
    if spec.kind == "sound":
        attrs |= {name: getattr(spec, name) for name in ("sample_rate_hz", "window_samples", "hop_samples")}
    if spec.crop:
        attrs["crop"] = spec.crop
    if spec.interpolation != "bilinear":
        attrs["interpolation"] = spec.interpolation
    if spec.prepared is not None:
        attrs["prepared"] = json_text(preparation_json(spec.prepared))
    groups = {"input": Group(attrs), "tensors": _tensor_group(model.tensors)}
    if model.head is not None:
        groups["head"] = head_tree(model.head)
    if model.graph is not None:
        groups["graph"] = model.graph
    if model.state:
        rows = text_array([json.dumps(row, separators=(",", ":"), sort_keys=True) for row in model.state])
        groups["state"] = Group(arrays={"entry": rows})
    if model.rest:
        groups["rest"] = _tensor_group(model.rest)
    return Group(
        {"arch": model.arch, "arch_args": json_text(model.arch_args), "form": model.form, "version": model.version},
        {},
        groups,
    )


def _tensor_group(tensors: Mapping[str, Any]) -> Group:
    """Tensors as datasets; numbers without axes as attributes."""
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    scalars = {name: array[()] for name, array in arrays.items() if array.ndim == 0}
    return Group(scalars, {name: array for name, array in arrays.items() if array.ndim > 0})


def _tensors_of(group: Group) -> dict[str, Array]:
    return {**{name: np.asarray(value) for name, value in group.attrs.items()}, **group.arrays}


def _state_rows(group: Group, where: str) -> tuple[Any, ...]:
    return tuple(
        json_value(text, f"{where}/model/state/entry[{i}]") for i, text in enumerate(text_tuple(group.arrays["entry"]))
    )


def _model(group: Group, where: str) -> Model:
    spec = group.groups["input"].attrs
    tensors = group.groups["tensors"]
    form = str(group.attrs["form"])
    if form not in ("batchnorm", "deploy"):
        raise SchemaError(f"{where}/model@form", repr(form), "'batchnorm' or 'deploy'")
    sound = {name: int(spec[name]) for name in ("sample_rate_hz", "window_samples", "hop_samples") if name in spec}
    return Model(
        arch=str(group.attrs["arch"]),
        arch_args=json_value(group.attrs["arch_args"], f"{where}/model@arch_args"),
        input=InputSpec(
            kind=str(spec["kind"]),
            shape=tuple(int(n) for n in spec["shape"]),
            scale=tuple(float(v) for v in spec["scale"]),
            offset=tuple(float(v) for v in spec["offset"]),
            prepared=_preparation_in_run(spec, f"{where}/model/input@prepared"),
            crop=float(spec.get("crop", 0.0)),
            interpolation=str(spec.get("interpolation", "bilinear")),
            **sound,
        ),
        form=form,
        tensors=_tensors_of(tensors),
        head=head_from_tree(group.groups["head"], where) if "head" in group.groups else None,
        version=int(group.attrs["version"]),
        graph=group.groups.get("graph"),
        state=_state_rows(group.groups["state"], where) if "state" in group.groups else (),
        rest=_tensors_of(group.groups["rest"]) if "rest" in group.groups else {},
    )


def _preparation_in_run(attrs: Mapping[str, Any], where: str) -> Preparation | None:
    return preparation_from_json(json_value(attrs["prepared"], where), where) if "prepared" in attrs else None


def head_tree(head: Head) -> Group:
    """The tree of `/model/head`."""
    arrays = {
        "labels": np.asarray(head.labels, np.int64),
        "weight": head.weight,
        "bias": head.bias,
        "known": np.asarray(head.known, np.uint8),
    }
    if head.names is not None:
        arrays["names"] = text_array(head.names)
    return Group({"kind": head.kind, "scale": float(head.scale)}, arrays)


def head_from_tree(group: Group, where: str) -> Head:
    """The inverse of `head_tree`."""
    kind, arrays = str(group.attrs["kind"]), group.arrays
    if kind not in ("prototypes", "linear"):
        raise SchemaError(f"{where}/model/head@kind", repr(kind), "'prototypes' or 'linear'")
    return Head(
        kind=kind,
        labels=arrays["labels"],
        weight=arrays["weight"],
        bias=arrays["bias"],
        known=np.asarray(arrays["known"], bool),
        scale=float(group.attrs["scale"]),
        names=text_tuple(arrays["names"]) if "names" in arrays else None,
    )


def _profile(group: Group) -> Profile:
    columns = {name: array for name, array in group.arrays.items() if name != "layer"}
    return Profile(text_tuple(group.arrays["layer"]), columns, dict(group.attrs))


def _scores_tree(scores: Scores) -> Group:
    arrays = {
        "layer": text_array(scores.layer),
        "score": np.asarray(scores.score, np.float64),
        "fisher": np.asarray(scores.fisher, np.float64),
        "output_channels": np.array([len(part) for part in scores.output_fisher], np.int64),
        "output_fisher": _flat(scores.output_fisher, np.float32),
        "input_channels": np.array([len(part) for part in scores.input_fisher], np.int64),
        "input_fisher": _flat(scores.input_fisher, np.float32),
    }
    return Group({"criterion": scores.criterion}, arrays)


def _scores(group: Group, where: str) -> Scores:
    arrays = group.arrays
    return Scores(
        criterion=str(group.attrs["criterion"]),
        layer=text_tuple(arrays["layer"]),
        score=arrays["score"],
        fisher=arrays["fisher"],
        output_fisher=_split(arrays["output_fisher"], arrays["output_channels"], f"{where}/scores/output_fisher"),
        input_fisher=_split(arrays["input_fisher"], arrays["input_channels"], f"{where}/scores/input_fisher"),
    )


def _plan_tree(plan: Plan) -> Group:
    updates = plan.updates
    arrays = {
        "layer": text_array([update.layer for update in updates]),
        "axis": text_array([update.axis for update in updates]),
        "axis_channels": np.array([update.axis_channels for update in updates], np.int64),
        "channel_count": np.array([len(update.channels) for update in updates], np.int64),
        "channels": _flat([np.array(update.channels) for update in updates], np.int64),
        "bias_count": np.array([len(update.bias) for update in updates], np.int64),
        "bias": _flat([np.array(update.bias) for update in updates], np.int64),
        "detached": np.array([update.detached for update in updates], np.uint8),
    }
    attrs = {
        **plan.facts,
        "name": plan.name,
        "memory_bytes": plan.memory_bytes,
        "memory_model": plan.memory_model,
        "backward_macs": plan.backward_macs,
    }
    return Group(attrs, arrays)


def _plan(group: Group, where: str) -> Plan:
    arrays, known = group.arrays, schema.RUN["plan"].attrs
    channels = _split(arrays["channels"], arrays["channel_count"], f"{where}/plan/channels")
    biases = _split(arrays["bias"], arrays["bias_count"], f"{where}/plan/bias")
    detached = arrays.get("detached", np.zeros(len(arrays["layer"]), np.uint8))
    updates = tuple(
        LayerUpdate(layer, axis, tuple(int(c) for c in live), int(total), tuple(int(c) for c in bias), bool(ends))
        for layer, axis, live, total, bias, ends in zip(
            text_tuple(arrays["layer"]),
            text_tuple(arrays["axis"]),
            channels,
            arrays["axis_channels"],
            biases,
            detached,
            strict=True,
        )
    )
    for update in updates:
        _check_update(update, where)
    return Plan(
        name=str(group.attrs["name"]),
        updates=updates,
        memory_bytes=int(group.attrs["memory_bytes"]),
        memory_model=str(group.attrs["memory_model"]),
        backward_macs=int(group.attrs["backward_macs"]),
        facts={name: value for name, value in group.attrs.items() if name not in known},
    )


def _check_update(update: LayerUpdate, where: str) -> None:
    inside = all(0 <= channel < update.axis_channels for channel in update.channels)
    ascending = all(a < b for a, b in zip(update.channels, update.channels[1:], strict=False))
    if update.axis not in ("output", "input") or not inside or not ascending or min(update.bias, default=0) < 0:
        channels = f"{update.axis} channels {update.channels!r:.60}"
        raise SchemaError(
            f"{where}/plan",
            f"layer {update.layer!r} with {channels}",
            f"ascending channels from 0 to {update.axis_channels - 1} of axis output or input",
        )


def _step_text(step: Step) -> str:
    return json_text(
        {
            "command": step.command,
            "version": step.version,
            "arguments": dict(step.arguments),
            "seed": step.seed,
            "inputs": dict(step.inputs),
        }
    )


def _steps(group: Group, where: str) -> tuple[Step, ...]:
    steps = []
    for i, text in enumerate(text_tuple(group.arrays["step"])):
        value = json_value(text, f"{where}/history/step[{i}]")
        try:
            steps.append(Step(**value))
        except TypeError as error:
            raise SchemaError(f"{where}/history/step[{i}]", f"{text[:60]}", "a step of the history") from error
    return tuple(steps)


# ------------------------------------------------------------------------------------------------------ small helpers


def text_array(texts: Sequence[str]) -> Array:
    """Fixed-width UTF-8, as the dialect wants it: dtype S."""
    if not texts:
        return np.zeros(0, "S1")
    encoded = [text.encode() for text in texts]
    return np.array(encoded, dtype=f"S{max(1, *map(len, encoded))}")


def text_tuple(array: Array) -> tuple[str, ...]:
    """Fixed-width UTF-8 back to strings; bytes that are not UTF-8 become U+FFFD."""
    return tuple(bytes(item).decode(errors="replace") for item in np.asarray(array))


def json_text(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, so that equal values are equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def json_value(text: str, where: str) -> dict[str, Any]:
    """A JSON object, or a `SchemaError` that says where."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise SchemaError(where, f"{text[:60]!r}", "JSON") from error
    if not isinstance(value, dict):
        raise SchemaError(where, f"{text[:60]!r}", "a JSON object")
    return value


def _flat(parts: Sequence[Array], dtype: Any) -> Array:
    return np.concatenate([np.asarray(part, dtype) for part in parts]) if parts else np.zeros(0, dtype)


def _split(flat: Array, counts: Array, where: str) -> tuple[Array, ...]:
    counts = np.asarray(counts)
    if (counts < 0).any() or int(counts.sum()) != len(flat):
        raise SchemaError(where, f"{len(flat)} entries", f"{int(counts.sum())} by the counts beside it")
    return tuple(np.split(np.asarray(flat), np.cumsum(counts)[:-1])) if len(counts) else ()


def _merged(below: Group, above: Group) -> Group:
    groups = dict(below.groups)
    for name, group in above.groups.items():
        groups[name] = _merged(groups[name], group) if name in groups else group
    return Group({**below.attrs, **above.attrs}, {**below.arrays, **above.arrays}, groups)


def _names(tree: Group) -> str:
    names: Mapping[str, Any] = {**tree.groups, **tree.arrays}
    return ", ".join(sorted(names)[:6]) or "nothing in it"
