"""A backbone and its head as an ONNX model, node by node from the `Graph`.

Opset 17. Input `input` float32 (N, *shape): samples after the input adapter, which the metadata describe. Outputs:
`features` (N, D); with a head also `logits` and `probabilities` (N, C).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stages.artifacts.records import Head
from stages.errors import PartMissing
from stages.models.deploy import Backbone
from stages.models.graph import Op

OPSET = 17
IR_VERSION = 8
"""The file format that came with opset 17."""

Attributes = Callable[[Op], dict[str, Any]]


def onnx_model(backbone: Backbone, head: Head | None, metadata: dict[str, str]) -> bytes:
    """The serialised ONNX model, checked by onnx. Raises `PartMissing` without the package `onnx`."""
    try:
        import onnx
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise PartMissing("export", "the package onnx is not installed", "", "pip install 'edgetrain[onnx]'") from error
    nodes = [
        helper.make_node(kind, inputs, [output], **attributes)
        for kind, inputs, output, attributes in (*_backbone_nodes(backbone), *_head_nodes(head))
    ]
    constants = {name: value.numpy() for name, value in backbone.tensors.items()} | _head_constants(head)
    constants |= {"zero": np.float32(0), "six": np.float32(6)}
    used = {name for node in nodes for name in node.input}
    outputs = {"features": backbone.graph.feature_dim}
    if head is not None:
        outputs |= {"logits": len(head.labels), "probabilities": len(head.labels)}
    graph = helper.make_graph(
        nodes,
        "edgetrain",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["N", *backbone.input.shape])],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", size]) for name, size in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(
        graph, producer_name="edgetrain", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


Node = tuple[str, list[str], str, dict[str, Any]]
"""Operator, inputs, output, attributes."""


def _backbone_nodes(backbone: Backbone) -> list[Node]:
    nodes: list[Node] = []
    last = backbone.graph.ops[-1].name
    value = {last: "features", backbone.graph.ops[0].name: "input"}
    for op in backbone.graph.ops[1:]:
        inputs = [value.get(name, f"{name}/out") for name in op.inputs]
        output = value.get(op.name, f"{op.name}/out")
        if op.is_layer:
            inputs += [f"{op.name}.weight"] + [f"{op.name}.bias"] * op.bias
        elif op.kind == "relu6":
            inputs += ["zero", "six"]
        elif op.kind == "global_pool":
            nodes.append(("GlobalAveragePool", inputs, f"{op.name}/pooled", {}))
            inputs = [f"{op.name}/pooled"]
        kind, attributes = OPERATORS[op.kind]
        nodes.append((kind, inputs, output, attributes(op)))
    return nodes


def _window(op: Op) -> dict[str, Any]:
    return {"kernel_shape": op.kernel, "strides": op.stride, "pads": (*op.padding, *op.padding)}


def _none(op: Op) -> dict[str, Any]:
    return {}


OPERATORS: dict[str, tuple[str, Attributes]] = {
    "conv": ("Conv", lambda op: _window(op) | {"dilations": op.dilation, "group": op.groups}),
    "linear": ("Gemm", lambda op: {"transB": 1}),
    "relu": ("Relu", _none),
    "relu6": ("Clip", _none),
    "add": ("Add", _none),
    "concat": ("Concat", lambda op: {"axis": 1}),
    "flatten": ("Flatten", lambda op: {"axis": 1}),
    "max_pool": ("MaxPool", lambda op: _window(op) | {"dilations": op.dilation, "ceil_mode": int(op.ceil_mode)}),
    "avg_pool": (
        "AveragePool",
        lambda op: _window(op) | {"ceil_mode": int(op.ceil_mode), "count_include_pad": int(op.count_include_pad)},
    ),
    "global_pool": ("Flatten", lambda op: {"axis": 1}),
}
"""Kind of `graph.KINDS` in deploy form -> ONNX operator and its attributes; `global_pool` pools before it flattens."""


def _head_nodes(head: Head | None) -> list[Node]:
    if head is None:
        return []
    softmax: Node = ("Softmax", ["logits"], "probabilities", {"axis": 1})
    if head.kind == "linear":
        return [("Gemm", ["features", "head.weight", "head.bias"], "logits", {"transB": 1}), softmax]
    unit: Node = ("LpNormalization", ["features"], "head/unit", {"axis": 1, "p": 2})
    return [unit, ("Gemm", ["head/unit", "head.weight"], "logits", {"transB": 1, "alpha": float(head.scale)}), softmax]


def _head_constants(head: Head | None) -> dict[str, Any]:
    """Rows and bias; prototypes as unit vectors, so that the product is the cosine."""
    if head is None:
        return {}
    if head.kind == "linear":
        return {"head.weight": head.weight, "head.bias": head.bias}
    lengths = np.maximum(np.linalg.norm(head.weight, axis=1, keepdims=True), 1e-12)
    return {"head.weight": (head.weight / lengths).astype(np.float32)}
