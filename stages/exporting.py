"""`export`: what was trained, in a form that others read: .safetensors, .pth state dict, .onnx."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import safetensors.numpy

from stages.artifacts.records import Array, Head, Model
from stages.engines.choice import need_torch
from stages.engines.parameter import Floats
from stages.errors import DataError, PartMissing, UsageError, require
from stages.graphs.onnx_writer import onnx_model, unit_rows
from stages.models import heads
from stages.models.deploy import Backbone, deploy, with_graph
from stages.models.state import user_state
from stages.randomness import generator

FORMATS = {".safetensors": "safetensors", ".pth": "pth", ".pt": "pth", ".onnx": "onnx"}
"""File suffix -> format."""
TOLERANCE = 1e-4
"""Largest accepted difference between our outputs and the exported model's, relative to outputs above 1."""
TRIAL_SAMPLES = 4


@dataclass(frozen=True)
class Exported:
    """A model as the bytes of a file, and how far its outputs are from ours."""

    data: bytes
    format: str
    difference: float
    """ONNX: largest absolute difference of features and logits on a few random inputs; state dicts are bit-equal."""
    notes: tuple[str, ...] = ()
    """What a user should know."""


def format_of(name: str) -> str:
    """Format by file name. Raises `UsageError` for another suffix."""
    suffix = name[name.rfind(".") :] if "." in name else ""
    require(suffix in FORMATS, "--out", name, "a name that ends in " + ", ".join(FORMATS), "or state --format")
    return FORMATS[suffix]


def export(model: Model, format: str, *, head: bool = True, allow: str | None = None) -> Exported:
    """The model in one of the formats, read back and compared with ours.

    State dicts (`pth`, `safetensors`) have the names of the model that was imported and load into it with strict=True.
    The head lies in the layer that the model ends in, prototypes as rows of a linear layer that decides alike; where
    the model ends in its features, the head stands beside them as `classifier.weight|bias`. Without a head that layer
    holds what was loaded. Raises `UsageError` for what a format cannot express, `PartMissing` without onnx,
    `DataError` when the exported model computes something else.
    """
    require(format in FORMATS.values(), "--format", repr(format), ", ".join(sorted(set(FORMATS.values()))))
    model = with_graph(model if head else replace(model, head=None), allow=allow)
    _check_head(model.head)
    backbone = deploy(model)
    if format != "onnx":
        state, notes = state_dict(model)
        if any(op.kind == "drop_tokens" for op in backbone.graph.ops):
            notes += ("a state dict holds weights alone: the model it loads into drops no tokens; .onnx does",)
        data = _pth(state) if format == "pth" else safetensors.numpy.save(state, _metadata(model))
        return Exported(data, format, _compare_states(state, _read(data, format)), notes)
    x = _trial(backbone)
    data = onnx_model(backbone.graph, backbone.tensors, model.head, _metadata(model))
    return Exported(data, format, _compare(_outputs(backbone.features(x), model.head), _run_onnx(data, x)))


def _check_head(head: Head | None) -> None:
    if head is not None and not head.known.all():
        row = int(np.flatnonzero(~head.known)[0])
        name = head.names[row] if head.names else head.labels[row]
        raise UsageError(
            "/model/head",
            f"class {name} was never seen",
            "a head that knows its classes",
            "train on samples of it, or export with --no-head",
        )


def _metadata(model: Model) -> dict[str, str]:
    """What a reader needs beside the weights: one JSON text under `edgetrain` (several keys have no fixed order)."""
    facts: dict[str, Any] = {
        "arch": model.arch,
        "arch_args": dict(model.arch_args),
        "input": asdict(model.input),
        "version": model.version,
    }
    if model.head is not None:
        labels = model.head.labels.tolist()
        facts |= {"labels": labels, "classes": list(model.head.names or map(str, labels))}
    return {"edgetrain": json.dumps(facts, sort_keys=True)}


# ------------------------------------------------------------------------------------------------------- state dicts


def state_dict(model: Model) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The model's weights and head under the names of the model that was imported, and what its user should know.

    BatchNorm layers are included (`models.state`). Raises `UsageError` for weights that are computed from others in a
    way that cannot be turned back.
    """
    computed = [row["computed"] for row in model.state if "computed" in row]
    if computed:
        raise UsageError(
            computed[0],
            "a weight that the model computes from others (a parametrisation)",
            "a weight of its own",
            "call torch.nn.utils.parametrize.remove_parametrizations before the import, or export to .onnx",
        )
    arrays = user_state(model, model.tensors)
    classifier, notes = _classifier_entries(model)
    arrays |= classifier
    return {name: np.array(array, order="C") for name, array in arrays.items()}, notes


def _classifier_entries(model: Model) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The entries of the layer that the head stands for, and what to say about them."""
    places = {row["classifier"]: row["name"] for row in model.state if "classifier" in row}
    loaded = {name: model.rest[name] for name in places.values()}
    if model.head is None or not len(model.head.labels):
        return loaded, ()
    weight, bias = _linear_rows(model.head)
    if not places:
        note = "the model ends in its features: the head stands beside them, load with strict=False or use --no-head"
        return {"classifier.weight": weight, "classifier.bias": bias}, (note,)
    found = {places["weight"]: weight}
    if "bias" in places:
        found[places["bias"]] = bias
    elif bias.any():
        layer = places["weight"].rpartition(".")[0]
        raise UsageError(layer, "a layer without bias cannot hold the head's", "bias=True", "export to .onnx instead")
    rows = len(loaded[places["weight"]])
    if len(weight) == rows:
        return found, ()
    layer = places["weight"].rpartition(".")[0]
    return found, (
        f"{layer} has {len(weight)} rows where the imported model has {rows}: build it for {len(weight)} classes",
    )


def _linear_rows(head: Head) -> tuple[Array, Array]:
    """The head as weight (C, D) and bias (C,) of a linear layer; of prototypes one that decides alike.

    The cosine's scale times unit rows gives scale * cosine * |features|: the same order of the classes for a sample.
    """
    if head.kind == "linear":
        return head.weight, head.bias
    return np.float32(head.scale) * unit_rows(head.weight), np.zeros(len(head.weight), np.float32)


def _pth(state: Mapping[str, Array]) -> bytes:
    need_torch("export to .pth")
    import torch

    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, buffer)
    return buffer.getvalue()


def _read(data: bytes, format: str) -> dict[str, Array]:
    if format != "pth":
        return safetensors.numpy.load(data)
    import torch

    return {name: value.numpy() for name, value in torch.load(io.BytesIO(data), weights_only=True).items()}


def _compare_states(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> float:
    different = [name for name in ours if name not in theirs or not np.array_equal(ours[name], theirs[name])]
    if different or len(ours) != len(theirs):
        raise DataError("export", f"{different[:1]} read back differ", "the same bits", "please report it")
    return 0.0


# ---------------------------------------------------------------------------------------------------------- comparing


def _trial(backbone: Backbone) -> Floats:
    rng = generator(0, "export")
    return rng.uniform(-1, 1, (TRIAL_SAMPLES, *backbone.input.shape)).astype(np.float32)


def _outputs(features: Floats, head: Head | None) -> dict[str, Array]:
    outputs: dict[str, Array] = {"features": features}
    return outputs if head is None else outputs | {"logits": heads.logits(head, features)}


def _run_onnx(data: bytes, x: Floats) -> dict[str, Array]:
    try:
        import onnxruntime
    except ImportError as error:
        raise PartMissing(
            "export", "the package onnxruntime is not installed", "", "pip install 'edgetrain[onnx]'"
        ) from error
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": x}), strict=True))


def _compare(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> float:
    worst = 0.0
    for name, expected in ours.items():
        difference = float(np.abs(expected - theirs[name]).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise DataError(
                "export",
                f"{name} differ by {difference:.2g} from ours",
                f"at most {TOLERANCE}",
                "please report it; another format may work",
            )
        worst = max(worst, difference)
    return worst
