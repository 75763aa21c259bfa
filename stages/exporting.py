"""`export`: what was trained, in a form that others read: .safetensors, .pth state dict, .onnx."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from stages.artifacts.records import Array, Head, Model
from stages.errors import DataError, PartMissing, UsageError, require
from stages.models import heads
from stages.models.deploy import Backbone, Code, deploy_code, open_code
from stages.models.onnx_graph import onnx_model
from stages.models.unfold import unfold
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
    """Largest absolute difference of features and logits on a few random inputs."""


def format_of(name: str) -> str:
    """Format by file name. Raises `UsageError` for another suffix."""
    suffix = name[name.rfind(".") :] if "." in name else ""
    require(suffix in FORMATS, "--out", name, "a name that ends in " + ", ".join(FORMATS), "or state --format")
    return FORMATS[suffix]


def export(model: Model, format: str, *, head: bool = True, allow: str | None = None) -> Exported:
    """The model in one of the formats, run once and compared with ours.

    State dicts (`pth`, `safetensors`) have the names of the model's own code and load into it with strict=True; a
    linear head lies in the layer that the code ends in, else under `classifier.weight|bias`; prototypes lie under
    `prototypes.weight|scale`. `head=False` leaves it out. Raises `UsageError` for what a format cannot express,
    `PartMissing` without onnx, `DataError` when the exported model computes something else.
    """
    require(format in FORMATS.values(), "--format", repr(format), ", ".join(sorted(set(FORMATS.values()))))
    model = model if head else replace(model, head=None)
    _check_head(model.head)
    code = open_code(model, allow=allow)
    backbone = deploy_code(model, code)
    x = _trial(backbone)
    ours = _outputs(backbone.features(x), model.head)
    if format == "onnx":
        data = onnx_model(backbone, model.head, _metadata(model))
        theirs = _run_onnx(data, x)
    else:
        state = state_dict(model, code, backbone)
        data = _pth(state) if format == "pth" else safetensors.torch.save(state, _metadata(model))
        theirs = _run_state(model, code, _read(data, format), x)
    return Exported(data, format, _compare(ours, theirs))


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


def state_dict(model: Model, code: Code, backbone: Backbone) -> dict[str, Tensor]:
    """The model's weights and head under the names of its own code; BatchNorm layers included (see `unfold`)."""
    if model.form == "batchnorm":
        state = {name: value.detach().clone() for name, value in code.module.state_dict().items()}
    else:
        state = unfold(code.module, code.traced, backbone.graph, backbone.tensors)
    state = {name: value for name, value in state.items() if not code.cut or name.rpartition(".")[0] != code.cut}
    return state if model.head is None else state | _head_tensors(model.head, code)


def _head_tensors(head: Head, code: Code) -> dict[str, Tensor]:
    """A linear head under the names of the layer that the code ends in, else as `classifier`; prototypes as such."""
    weight, bias = torch.tensor(head.weight), torch.tensor(head.bias)
    if head.kind == "prototypes":
        return {"prototypes.weight": weight, "prototypes.scale": torch.tensor([head.scale])}
    layer = code.cut or "classifier"
    if not code.cut or f"{layer}.bias" in code.traced.names:
        return {f"{layer}.weight": weight, f"{layer}.bias": bias}
    if bool(bias.any()):
        raise UsageError(layer, "a layer without bias cannot hold the head's", "bias=True", "export to .onnx instead")
    return {f"{layer}.weight": weight}


def _pth(state: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _read(data: bytes, format: str) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(data), weights_only=True) if format == "pth" else safetensors.torch.load(data)


# ---------------------------------------------------------------------------------------------------------- comparing


def _trial(backbone: Backbone) -> Tensor:
    rng = generator(0, "export")
    return torch.from_numpy(rng.uniform(-1, 1, (TRIAL_SAMPLES, *backbone.input.shape)).astype(np.float32))


def _outputs(features: Tensor, head: Head | None) -> dict[str, Array]:
    outputs = {"features": features.numpy()}
    return outputs if head is None else outputs | {"logits": heads.logits(head, features).numpy()}


def _run_onnx(data: bytes, x: Tensor) -> dict[str, Array]:
    try:
        import onnxruntime
    except ImportError as error:
        raise PartMissing(
            "export", "the package onnxruntime is not installed", "", "pip install 'edgetrain[onnx]'"
        ) from error
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": x.numpy()}), strict=True))


def _run_state(model: Model, code: Code, state: Mapping[str, Tensor], x: Tensor) -> dict[str, Array]:
    """Outputs of the model's own code with the exported weights; whatever the code held before is overwritten."""
    if code.cut:
        code.module.set_submodule(code.cut, nn.Identity())
    code.module.load_state_dict({name: state[name] for name in code.module.state_dict()})
    with torch.no_grad():
        features = code.module(x)
    if model.head is None:
        return _outputs(features, None)
    layer = "prototypes" if model.head.kind == "prototypes" else code.cut or "classifier"
    bias = state.get(f"{layer}.bias", torch.zeros(len(model.head.labels)))
    return _outputs(features, replace(model.head, weight=state[f"{layer}.weight"].numpy(), bias=bias.numpy()))


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
