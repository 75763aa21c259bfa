"""The operators that a traced module may hold: one small rule per torch module, function or method.

A rule reads the call's own arguments (its signature is torch's) and emits operators of `graph.KINDS`. Anything without
a rule is an error that names the operator and the module it stands in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from stages.errors import UsageError
from stages.models import translate_layers as layers
from stages.models import translate_plain as plain
from stages.models.builder import Builder, called

Rule = Callable[..., None]
"""(builder, node, *arguments of the call); for modules (builder, node, module, x)."""


def translate(b: Builder, node: fx.Node) -> None:
    """Emit what one torch.fx node computes. Raises `UsageError` for operators without a rule."""
    if node.op == "placeholder":
        _placeholder(b, node)
    elif node.op == "call_module":
        rule = MODULES.get(type(b.module(node)))
        _call(rule, b, node, type(b.module(node)).__name__, b.module(node), *node.args, **node.kwargs)
    elif node.op in ("call_function", "call_method") and b.shape(node) is not None:
        table: dict[Any, Rule] = FUNCTIONS if node.op == "call_function" else METHODS
        _call(table.get(node.target), b, node, called(node), *node.args, **node.kwargs)
    # what remains computes no activation: weights (get_attr), sizes, the output mark


def _call(rule: Rule | None, b: Builder, node: fx.Node, name: str, *args: Any, **kwargs: Any) -> None:
    if rule is None:
        raise UsageError(
            b.where(node),
            f"operator {name}",
            "convolution, linear, BatchNorm, ReLU, ReLU6, pooling, addition, concatenation, flatten, dropout",
            "rewrite that part of the model",
        )
    try:
        rule(b, node, *args, **kwargs)
    except TypeError as error:
        raise UsageError(b.where(node), f"{name} is called in an unsupported way: {error}") from error


def _placeholder(b: Builder, node: fx.Node) -> None:
    if not b.ops:
        b.emit(node, "input", (), name="model_input" if hasattr(b.captured, "input") else "input")
    elif node.users:
        raise UsageError("the model's forward", f"a second input {node.target}", "one input tensor")


def _module_pool(rule: Rule, *names: str) -> Rule:
    def module_rule(b: Builder, node: fx.Node, m: Any, input: Any) -> None:
        rule(b, node, input, **{name: getattr(m, name) for name in names if hasattr(m, name)})

    return module_rule


_MAX_POOL = _module_pool(plain.max_pool, "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVG_POOL = _module_pool(
    plain.avg_pool, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
)
_ADAPTIVE = _module_pool(plain.adaptive_pool, "output_size")


def _without_module(rule: Rule) -> Rule:
    return lambda b, node, m, input: rule(b, node, input)


MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d), layers.conv_module),
    nn.Linear: layers.linear_module,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d), layers.norm_module),
    nn.ReLU: _without_module(plain.elementwise("relu")),
    nn.ReLU6: _without_module(plain.elementwise("relu6")),
    nn.Hardtanh: lambda b, node, m, input: plain.hardtanh(b, node, input, m.min_val, m.max_val),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d), _MAX_POOL),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d), _AVG_POOL),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), _ADAPTIVE),
    nn.Flatten: _without_module(plain.reshape),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d), _without_module(plain.drop)),
}

FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys((F.conv1d, F.conv2d), layers.conv),
    F.linear: layers.linear,
    F.batch_norm: layers.norm,
    **dict.fromkeys((F.relu, torch.relu, torch.relu_), plain.elementwise("relu")),
    F.relu6: plain.elementwise("relu6"),
    **dict.fromkeys((torch.clamp, torch.clip), plain.clamp),
    F.hardtanh: plain.hardtanh,
    **dict.fromkeys((operator.add, operator.iadd, torch.add), plain.add),
    **dict.fromkeys((torch.cat, torch.concat), plain.concat),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze), plain.reshape),
    torch.mean: plain.mean,
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d), plain.adaptive_pool),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, torch.max_pool1d, torch.max_pool2d), plain.max_pool),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d), plain.avg_pool),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d), plain.drop),
}

METHODS: dict[str, Rule] = {
    **dict.fromkeys(("relu", "relu_"), plain.elementwise("relu")),
    **dict.fromkeys(("clamp", "clamp_", "clip"), plain.clamp),
    **dict.fromkeys(("add", "add_"), plain.add),
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze"), plain.reshape),
    "mean": plain.mean,
    **dict.fromkeys(("contiguous", "clone"), plain.drop),
}
