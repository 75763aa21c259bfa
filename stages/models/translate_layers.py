"""Rules for the operators with weights: convolution, linear layer, BatchNorm, as modules and as functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from stages.errors import UsageError
from stages.models.builder import Builder, per_axis
from stages.models.graph import Shape

Found = dict[str, tuple[Tensor, str | None]]
"""A layer's tensors by torch's argument name, each with its name in the state dict (None for constants)."""


def _hold(b: Builder, node: fx.Node, name: str, found: Found) -> str:
    """Keep a layer's tensors under its name; returns the name."""
    if any(op.name == name for op in b.ops):
        raise UsageError(
            b.where(node), f"{name} is called twice", "one call per layer with weights", "give each use its own layer"
        )
    for what, (tensor, origin) in found.items():
        b.hold(f"{name}.{what}", tensor, origin, node)
    return name


def _of_module(module: nn.Module, path: str, *names: str) -> Found:
    found = {name: getattr(module, name) for name in names}
    return {name: (tensor, f"{path}.{name}") for name, tensor in found.items() if tensor is not None}


def _of_nodes(b: Builder, user: fx.Node, kind: str, **nodes: Any) -> tuple[str, Found]:
    """Name and tensors of a layer that is called as a function, its weights being attributes of modules.

    The layer is named after what its weight belongs to (`block.weight` -> `block`, `block.w1` -> `block.w1`).
    """
    found: Found = {}
    for what, node in nodes.items():
        if node is None:
            continue
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            raise UsageError(b.where(user), f"{what} is computed", "a parameter of the model")
        owner, _, attribute = str(node.target).rpartition(".")
        found[what] = (getattr(b.captured.get_submodule(owner), attribute), str(node.target))
    first = next(name for _, name in found.values() if name is not None)
    owner, _, attribute = first.rpartition(".")
    if attribute in ("weight", "running_mean"):
        return owner or b.fresh(user, kind), found
    return first, found


def conv_module(b: Builder, node: fx.Node, m: Any, input: Any) -> None:
    if m.padding_mode != "zeros":
        raise UsageError(b.where(node), f"padding_mode {m.padding_mode!r}", "zeros")
    name = _hold(b, node, str(node.target), _of_module(m, str(node.target), "weight", "bias"))
    _emit_conv(b, node, input, name, m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.bias is not None)


def conv(
    b: Builder,
    node: fx.Node,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None:
    name, found = _of_nodes(b, node, "conv", weight=weight, bias=bias)
    kernel = tuple(found["weight"][0].shape[2:])
    _hold(b, node, name, found)
    _emit_conv(b, node, input, name, kernel, stride, padding, dilation, groups, bias is not None)


def _emit_conv(
    b: Builder,
    node: fx.Node,
    x: Any,
    name: str,
    kernel: Shape,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    bias: bool,
) -> None:
    axes = len(kernel)
    dilation = per_axis(dilation, axes)
    if isinstance(padding, str):
        padding = _same_padding(b, node, padding, kernel, dilation)
    b.emit(
        node,
        "conv",
        (x,),
        name=name,
        kernel=tuple(kernel),
        stride=per_axis(stride, axes),
        padding=per_axis(padding, axes),
        dilation=dilation,
        groups=groups,
        bias=bias,
    )


def _same_padding(b: Builder, node: fx.Node, padding: str, kernel: Shape, dilation: Shape) -> Shape:
    """`same` and `valid` as numbers; `same` with an odd total would pad the two sides differently."""
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    if any(amount % 2 for amount in total):
        raise UsageError(b.where(node), f"padding 'same' with kernel {tuple(kernel)}", "equal padding on both sides")
    return tuple(amount // 2 for amount in total)


def linear_module(b: Builder, node: fx.Node, m: Any, input: Any) -> None:
    name = _hold(b, node, str(node.target), _of_module(m, str(node.target), "weight", "bias"))
    _emit_linear(b, node, input, name, m.bias is not None)


def linear(b: Builder, node: fx.Node, input: Any, weight: Any, bias: Any = None) -> None:
    name, found = _of_nodes(b, node, "linear", weight=weight, bias=bias)
    _emit_linear(b, node, input, _hold(b, node, name, found), bias is not None)


def _emit_linear(b: Builder, node: fx.Node, x: Any, name: str, bias: bool) -> None:
    if len(b.source(x, node).shape) != 1:
        raise UsageError(
            b.where(node),
            f"a linear layer on {b.source(x, node).shape}",
            "a vector per sample",
            "flatten or pool first",
        )
    b.emit(node, "linear", (x,), name=name, bias=bias)


def norm_module(b: Builder, node: fx.Node, m: Any, input: Any) -> None:
    if m.running_mean is None:
        raise UsageError(b.where(node), "BatchNorm without running statistics", "track_running_stats=True")
    path = str(node.target)
    _emit_norm(b, node, input, path, _of_module(m, path, "weight", "bias", "running_mean", "running_var"), m.eps)


def norm(
    b: Builder,
    node: fx.Node,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    if training or running_mean is None:
        raise UsageError(b.where(node), "batch_norm with the batch's own statistics", "training=self.training")
    tensors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    name, found = _of_nodes(b, node, "batchnorm", **tensors)
    _emit_norm(b, node, input, name, found, eps)


def _emit_norm(b: Builder, node: fx.Node, x: Any, name: str, found: Found, eps: float) -> None:
    mean = found["running_mean"][0]
    found.setdefault("weight", (torch.ones_like(mean), None))
    found.setdefault("bias", (torch.zeros_like(mean), None))
    found["eps"] = (torch.tensor(eps, dtype=torch.float64), None)
    b.emit(node, "batchnorm", (x,), name=_hold(b, node, name, found))
