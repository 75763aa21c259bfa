"""Deploy form: BatchNorm folded into the weights, as a model runs on the device.

A BatchNorm directly after a convolution or linear layer that nothing else reads is folded into it. Any other BatchNorm
(pre-activation networks, after an addition) becomes a depthwise 1x1 convolution of the same name, which computes
exactly the same and is a layer like others; on feature vectors it is an error.

A user model that ends in a linear layer is a classifier. Whether that layer belongs to the backbone is read off the
tensors: without tensors of its own it is cut, and the record's head stands in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from stages.artifacts.records import Array, InputSpec, Model
from stages.errors import DataError, UsageError
from stages.models import registry
from stages.models.builder import with_blocks
from stages.models.fused import Program, channels_last_is_faster, in_chunks
from stages.models.graph import Graph, Op
from stages.models.tracing import Traced, trace_module

FOLDABLE = frozenset({"conv", "linear"})


@dataclass(frozen=True)
class Backbone:
    """A model in deploy form, ready to run: model input (N, *input.shape) -> features (N, D)."""

    graph: Graph
    tensors: dict[str, Tensor]
    """float32, contiguous, `<layer>.weight` and, where the operator has one, `<layer>.bias`."""
    input: InputSpec

    def features(self, x: Tensor) -> Tensor:
        """(N, *input.shape) float32 -> (N, D), without gradients and as fast as this machine allows.

        From the first call on the tensors must keep their values. Raises `DataError` for an input of another shape.
        """
        self.graph.check_input(x.shape)
        return in_chunks(self._program, self.graph.ops[0].name, x)[0]

    @cached_property
    def _program(self) -> Program:
        channels_last = all(map(channels_last_is_faster, self.tensors.values()))
        names = [op.name for op in self.graph.ops]
        return Program(self.graph, self.tensors, names, names[-1:], channels_last=channels_last)


# ----------------------------------------------------------------------------------------------------------- folding


def fold(graph: Graph, tensors: Mapping[str, Tensor]) -> tuple[Graph, dict[str, Tensor]]:
    """Graph and tensors without BatchNorm, the same function in evaluation mode.

    With s = gamma / sqrt(running_var + eps): weight' = s * weight, bias' = beta + s * (bias - running_mean), in
    float64, returned in the tensors' own dtype. Raises `UsageError` for a BatchNorm that can neither be folded nor
    become a convolution.
    """
    renamed: dict[str, str] = {}
    ops: dict[str, Op] = {}
    folded = {key: value for key, value in tensors.items() if _kind(graph, key) in FOLDABLE}
    for op in graph.ops:
        op = replace(op, inputs=tuple(renamed.get(name, name) for name in op.inputs))
        if op.kind != "batchnorm":
            ops[op.name] = op
            continue
        target, scale, shift = op.inputs[0], *_affine(op, tensors)
        if _folds_into(graph, graph[op.name].inputs[0]) and target in ops:
            ops[target] = replace(ops[target], bias=True)
            folded.update(_scaled(target, folded, scale, shift))
            renamed[op.name] = target
        else:
            ops[op.name] = _as_depthwise(op)
            dtype = tensors[f"{op.name}.running_mean"].dtype
            folded[f"{op.name}.weight"] = scale.reshape(-1, *(1,) * len(op.shape)).to(dtype)
            folded[f"{op.name}.bias"] = shift.to(dtype)
    return with_blocks(tuple(ops.values())), folded


def _kind(graph: Graph, key: str) -> str:
    return graph[key.rpartition(".")[0]].kind


def _affine(op: Op, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation mode as x * scale + shift, float64 (C,)."""
    gamma, beta, mean, var = (
        tensors[f"{op.name}.{what}"].double() for what in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / torch.sqrt(var + tensors[f"{op.name}.eps"])
    return scale, beta - scale * mean


def _folds_into(graph: Graph, name: str) -> bool:
    """Whether the BatchNorm that reads `name` can be merged into it: a layer whose output nothing else reads."""
    return graph[name].kind in FOLDABLE and len(graph.consumers[name]) == 1


def _scaled(layer: str, tensors: Mapping[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    weight, bias = tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias")
    by_row = scale.reshape(-1, *(1,) * (weight.dim() - 1))
    moved = shift if bias is None else shift + scale * bias.double()
    return {f"{layer}.weight": (weight.double() * by_row).to(weight.dtype), f"{layer}.bias": moved.to(weight.dtype)}


def _as_depthwise(op: Op) -> Op:
    axes = len(op.shape) - 1
    if axes == 0:
        raise UsageError(
            op.name,
            "BatchNorm on feature vectors that follows no linear layer",
            "",
            "put it after a linear layer, or before the pooling",
        )
    return replace(
        op,
        kind="conv",
        kernel=(1,) * axes,
        stride=(1,) * axes,
        padding=(0,) * axes,
        dilation=(1,) * axes,
        groups=op.in_channels,
        bias=True,
    )


# ----------------------------------------------------------------------------------------------- records and modules


@dataclass(frozen=True)
class Code:
    """A record's architecture as code: the module with its initial weights, and its trace."""

    module: nn.Module
    traced: Traced
    cut: str
    """Name of the final linear layer that the record leaves to its head; empty when there is none."""


def open_code(model: Model, *, allow: str | None = None) -> Code:
    """Build and trace the architecture that a record names. Raises `UsageError` for code that `allow` does not name."""
    module = registry.build(model.arch, model.arch_args, allow=allow)
    traced = trace_module(module, model.input.shape)
    last = final_linear(module, traced)
    return Code(module, traced, "" if f"{last}.weight" in model.tensors else last)


def final_linear(module: nn.Module, traced: Traced) -> str:
    """Name of the linear layer that a user's classifier ends in; empty for a backbone."""
    last = traced.graph.ops[-1]
    is_layer = last.kind == "linear" and traced.names[f"{last.name}.weight"] == f"{last.name}.weight"
    return last.name if is_layer and isinstance(module.get_submodule(last.name), nn.Linear) else ""


def restore(model: Model, *, allow: str | None = None) -> nn.Module:
    """The torch module of a record in `batchnorm` form with its weights: (N, *input.shape) -> features (N, D).

    A classifier that the record cut off is replaced by the identity. Raises `DataError` when weights do not fit the
    architecture, `UsageError` for another form and for code that `allow` does not name.
    """
    if model.form != "batchnorm":
        raise UsageError(
            "/model",
            f"a model in {model.form} form",
            "batchnorm form, as `edgetrain import` writes it",
            "BatchNorm is folded away by `profile`: start from the record before it",
        )
    code = open_code(model, allow=allow)
    if code.cut:
        code.module.set_submodule(code.cut, nn.Identity())
    _load(code.module, model, "")
    return code.module.eval()


def _load(module: nn.Module, model: Model, cut: str) -> None:
    """Copy a record's weights into a module, whose layer `cut` keeps its own."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items() if is_weight(name)}
    expected = {name: shape for name, shape in expected.items() if not cut or name.rpartition(".")[0] != cut}
    check_tensors(expected, model.tensors)
    weights = {name: torch.from_numpy(np.array(value)) for name, value in model.tensors.items()}
    module.load_state_dict(weights, strict=False)  # what is missing are BatchNorm's counters and `cut`


def state(module: nn.Module) -> dict[str, Array]:
    """What a record in `batchnorm` form keeps of a module: its state dict without BatchNorm's batch counters."""
    return {name: value.detach().cpu().numpy().copy() for name, value in module.state_dict().items() if is_weight(name)}


def is_weight(name: str) -> bool:
    """Whether records keep this entry of a state dict: everything but BatchNorm's batch counters."""
    return not name.endswith("num_batches_tracked")


def deploy(model: Model, *, allow: str | None = None) -> Backbone:
    """The record's backbone in deploy form, from either form.

    Raises `DataError` when tensors do not fit the architecture, `UsageError` for code that `allow` does not name.
    """
    return deploy_code(model, open_code(model, allow=allow))


def deploy_code(model: Model, code: Code) -> Backbone:
    """`deploy` for code that is open already; in `batchnorm` form its module gets the record's weights."""
    if model.form == "batchnorm":
        _load(code.module, model, code.cut)  # in place: the trace's tensors share the module's memory
    graph, tensors = fold(code.traced.graph, code.traced.tensors)
    if code.cut:
        graph = with_blocks(graph.ops[:-1])
        tensors = {name: value for name, value in tensors.items() if name.rpartition(".")[0] != code.cut}
    if model.form != "batchnorm":
        check_tensors(tensor_shapes(graph), model.tensors)
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in model.tensors.items()}
    tensors = {name: value.to(torch.float32).contiguous() for name, value in tensors.items()}
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise DataError(f"/model/tensors/{name}", "a value that is not finite", "finite weights")
    return Backbone(graph, tensors, model.input)


def store(model: Model, backbone: Backbone) -> Model:
    """The record with this backbone's tensors, in deploy form; head and version stay."""
    tensors = {name: value.detach().cpu().numpy() for name, value in backbone.tensors.items()}
    return replace(model, form="deploy", tensors=tensors, input=backbone.input)


def tensor_shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a graph in deploy form needs."""
    shapes = {f"{op.name}.weight": op.weight_shape for op in graph.layers}
    return shapes | {f"{op.name}.bias": (op.out_channels,) for op in graph.layers if op.bias}


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Array], where: str = "/model/tensors"
) -> None:
    """Raise `DataError` for the first tensor that is missing, of another shape, or unknown."""
    fix = "are --arch and --arg those of the weights?"
    for name, shape in expected.items():
        if name not in found:
            raise DataError(f"{where}/{name}", "missing", f"shape {shape}", fix)
        if found[name].shape != shape:
            raise DataError(f"{where}/{name}", f"shape {found[name].shape}", f"{shape}", fix)
    for name in found:
        if name not in expected:
            raise DataError(f"{where}/{name}", "not a tensor of this architecture", "", fix)
