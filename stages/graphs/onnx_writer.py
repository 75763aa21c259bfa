"""A backbone and its head as an ONNX model, operator by operator from the table.

Opset 17. Input `input` float32 (N, *shape): samples after the input adapter, which the metadata describe. Outputs:
`features` (N, D); with a head also `logits` and `probabilities` (N, C).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from stages.artifacts.records import Array, Head
from stages.errors import PartMissing, UsageError
from stages.graphs.graph import Graph
from stages.operators import Op, Shape

OPSET = 17
IR_VERSION = 8
"""The file format that came with opset 17."""


class Writer:
    """The nodes and constants of a graph, as the table's ONNX rules write them."""

    def __init__(self, graph: Graph, tensors: Mapping[str, Array]) -> None:
        self.graph, self.tensors = graph, tensors
        self.nodes: list[tuple[str, list[str], str | tuple[str, ...], dict[str, Any]]] = []
        """Operator, inputs, output or outputs, attributes."""
        self.constants: dict[str, Array] = {}
        self._names = {graph.ops[0].name: "input", graph.output: "features"}
        for op in graph.ops[1:]:
            if op.operator.onnx is None:
                raise UsageError(op.name, f"kind {op.kind!r} has no ONNX form in a deployed graph", "deploy form")
            op.operator.onnx(op, self)

    def node(self, kind: str, inputs: Iterable[str], output: str | tuple[str, ...], **attributes: Any) -> None:
        """Append a node."""
        self.nodes.append((kind, list(inputs), output, attributes))

    def refuse(self, op: Op, found: str, expected: str) -> NoReturn:
        """Raise `UsageError` for what opset 17 cannot express."""
        raise UsageError(op.name, f"ONNX has no {found}", expected, "export to .pth or .safetensors")

    # ------------------------------------------------------------------------------------------------------- names

    def output(self, op: Op) -> str:
        """Name of the operator's value."""
        return self._names.get(op.name, f"{op.name}/out")

    def inner(self, op: Op, what: str) -> str:
        """Name of a value inside the operator."""
        return f"{op.name}/{what}"

    def rename(self, op: Op, name: str) -> None:
        """The operator's value is known under this name."""
        self._names[op.name] = name

    def inputs(self, op: Op) -> list[str]:
        """Names of the operator's inputs."""
        return [self.output(self.graph[name]) for name in op.inputs]

    def read_by(self, op: Op, kind: str) -> bool:
        """Whether an operator of that kind reads the operator's value."""
        return any(self.graph[name].kind == kind for name in self.graph.consumers[op.name])

    def ranked_inputs(self, op: Op) -> list[str]:
        """Inputs with as many axes as the output: what is missing stands behind the batch."""
        found = []
        for i, (name, shape) in enumerate(zip(self.inputs(op), op.in_shapes, strict=True)):
            missing = len(op.shape) - len(shape)
            if missing:
                self.node("Unsqueeze", [name, self.integers(range(1, 1 + missing))], self.inner(op, f"wide{i}"))
                name = self.inner(op, f"wide{i}")
            found.append(name)
        return found

    def batched_inputs(self, op: Op) -> list[str]:
        """Inputs, constants repeated for every sample."""
        found = []
        for i, (source, name) in enumerate(zip(op.inputs, self.inputs(op), strict=True)):
            if source in self.graph.constants:
                self.node("Expand", [name, self.sizes(op.in_shapes[i])], self.inner(op, f"batched{i}"))
                name = self.inner(op, f"batched{i}")
            found.append(name)
        return found

    def sizes(self, shape: Shape) -> str:
        """The value's whole shape, the number of samples as it is when the model runs."""
        size, whole = "input/size", f"input/size{'x'.join(map(str, ('', *shape)))}"
        made = {output for _, _, output, _ in self.nodes}
        if size not in made:
            self.node("Shape", ["input"], "input/shape")
            self.node("Slice", ["input/shape", self.integers([0]), self.integers([1])], size)
        if whole not in made:
            self.node("Concat", [size, self.integers(shape)], whole, axis=0)
        return whole

    # --------------------------------------------------------------------------------------------------- constants

    def weights(self, op: Op) -> list[str]:
        """Names of the operator's weight and bias."""
        return [self.given(f"{op.owner}.{what}") for what in ("weight", *(["bias"] if op.bias else []))]

    def given(self, key: str) -> str:
        """One of the graph's tensors as a constant."""
        self.constants[key] = self.tensors[key]
        return key

    def array(self, key: str) -> Array:
        """One of the graph's tensors."""
        return self.tensors[key]

    def constant(self, op: Op, what: str, value: Array) -> str:
        """A constant of the operator's own."""
        name = self.inner(op, what)
        self.constants[name] = np.ascontiguousarray(value, np.float32)
        return name

    def number(self, value: float) -> str:
        """A number."""
        name = f"number/{float(value)!r}"
        self.constants[name] = np.array(value, np.float32)
        return name

    def integers(self, values: Iterable[int]) -> str:
        """A list of whole numbers."""
        array = np.array(list(values), np.int64)
        name = "integers/" + "_".join(map(str, array))
        self.constants[name] = array
        return name

    def constant_of_integers(self, op: Op, what: str, values: Iterable[int]) -> str:
        """A longer list of whole numbers, of the operator's own."""
        name = self.inner(op, what)
        self.constants[name] = np.array(list(values), np.int64)
        return name

    def masked(self, op: Op, products: str, *, causal: bool) -> str:
        """Attention's products with the future left out."""
        queries, keys = op.in_shapes[0][-2], op.in_shapes[1][-2]
        blank = np.where(np.tril(np.ones((queries, keys), bool)), 0.0, -np.inf)
        self.node("Add", [products, self.constant(op, "future", blank)], self.inner(op, "past"))
        return self.inner(op, "past")


def onnx_model(graph: Graph, tensors: Mapping[str, Array], head: Head | None, metadata: dict[str, str]) -> bytes:
    """The serialised ONNX model of a deployed graph, checked by onnx.

    Raises `PartMissing` without the package `onnx`, `UsageError` for what opset 17 cannot express.
    """
    try:
        import onnx
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise PartMissing("export", "the package onnx is not installed", "", "pip install 'edgetrain[onnx]'") from error
    writer = Writer(graph, tensors)
    head_nodes = _head_nodes(head)
    nodes = [
        helper.make_node(kind, inputs, [out] if isinstance(out, str) else out, **attributes)
        for kind, inputs, out, attributes in writer.nodes
    ]
    nodes += [helper.make_node(kind, inputs, [out], **attributes) for kind, inputs, out, attributes in head_nodes]
    constants = writer.constants | _head_constants(head)
    used = {name for node in nodes for name in node.input}
    outputs = {"features": graph.feature_dim}
    if head is not None:
        outputs |= {"logits": len(head.labels), "probabilities": len(head.labels)}
    built = helper.make_graph(
        nodes,
        "edgetrain",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["N", *graph.input_shape])],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", size]) for name, size in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(
        built, producer_name="edgetrain", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


Node = tuple[str, list[str], str, dict[str, Any]]
"""Operator, inputs, output, attributes."""


def _head_nodes(head: Head | None) -> list[Node]:
    if head is None:
        return []
    softmax: Node = ("Softmax", ["logits"], "probabilities", {"axis": 1})
    if head.kind == "linear":
        return [("Gemm", ["features", "logits/weight", "logits/bias"], "logits", {"transB": 1}), softmax]
    unit: Node = ("LpNormalization", ["features"], "logits/unit", {"axis": 1, "p": 2})
    return [
        unit,
        ("Gemm", ["logits/unit", "logits/weight"], "logits", {"transB": 1, "alpha": float(head.scale)}),
        softmax,
    ]


def _head_constants(head: Head | None) -> dict[str, Any]:
    """Rows and bias; prototypes as unit vectors, so that the product is the cosine."""
    if head is None:
        return {}
    if head.kind == "linear":
        return {"logits/weight": head.weight, "logits/bias": head.bias}
    return {"logits/weight": unit_rows(head.weight)}


def unit_rows(weight: Array) -> Array:
    """Rows of length 1, float32."""
    lengths = np.maximum(np.linalg.norm(weight, axis=1, keepdims=True), 1e-12)
    return np.asarray(weight / lengths, np.float32)
