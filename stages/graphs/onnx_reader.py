"""An ONNX file as a torch module that `graphs.capture` reads: one submodule per node, named as in the file.

What a node computes is in the table (`Operator.from_onnx`). What depends on no input is computed here, node by node,
with the reference implementation that the package onnx brings; sizes are whole numbers throughout, so that shape
arithmetic (Shape, Gather, Concat, Reshape) leaves no trace in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from stages.artifacts.records import Array
from stages.errors import DataError, EdgeTrainError, PartMissing, UsageError
from stages.operators import TABLE, Shape
from stages.operators.op import Reading

OPSETS = range(11, 22)
"""Versions of the operator set that are read."""
MOST_FOLDED_ELEMENTS = 2**28
"""Of one computed constant."""
QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")
RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
FIX_OPSET = "convert it with onnx.version_converter"


@dataclass
class Step:
    """One node as it is read."""

    kind: str
    """ONNX's operator type."""
    inputs: list[str]
    """Names of values; empty for one that is left out."""
    outputs: list[str]
    attributes: dict[str, Any]
    name: str = ""
    proto: Any = None
    """The node itself, where it was not made here."""
    branches: tuple[Branch, ...] = ()
    """Of a choice between two: what runs where the condition holds, and where not."""


@dataclass
class Branch:
    """One side of a choice."""

    steps: list[Step]
    outputs: list[str]


@dataclass
class Parsed:
    """A file's graph."""

    steps: list[Step]
    known: dict[str, Array]
    """Values that no input changes."""
    trained: set[str]
    """Those of `known` that come from the file's initialisers: what training changed."""
    input: str
    shape: tuple[int | None, ...]
    """Declared sizes of the input, the batch first; None for one that is left open."""
    outputs: list[str]
    opset: int
    metadata: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------ parsing


def parse(data: bytes, where: str) -> Parsed:
    """The graph of a serialised ONNX model, its constants folded.

    Raises `DataError` for what is no ONNX model of opsets 11 to 21, `UsageError` for what a training toolkit cannot
    read (quantised, custom, with control flow or tensors in other files), `PartMissing` without the package onnx.
    """
    onnx = _package()
    try:
        return _parsed(onnx, data, where)
    except EdgeTrainError:
        raise
    except Exception as error:  # whatever a corrupt file makes onnx and protobuf raise
        raise DataError(where, f"not valid: {_line(error)}", "an ONNX model") from error


def _parsed(onnx: Any, data: bytes, where: str) -> Parsed:
    model = _decoded(onnx, data, where)
    opset = _opset(model, where)
    _refuse_external(model, where)
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    _refuse_nodes(model.graph.node, where)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise DataError(where, f"not valid: {_line(error)}", "an ONNX model") from error
    graph = model.graph
    initial = {tensor.name for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in initial]
    if len(given) != 1:
        names = ", ".join(value.name for value in given) or "none"
        raise UsageError(where, f"{len(given)} inputs ({names})", "a model of one input")
    parsed = Parsed(
        [], {}, set(), given[0].name, _sizes(onnx, given[0], where), [value.name for value in graph.output], opset,
        {prop.key: prop.value for prop in model.metadata_props},
    )  # fmt: skip
    _take_graph(parsed, graph, where)
    return parsed


def _package() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.reference
    except ImportError as error:
        raise PartMissing("import", "the package onnx is not installed", "", "pip install 'edgetrain[onnx]'") from error
    return onnx


def _decoded(onnx: Any, data: bytes, where: str) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError) as error:
        raise DataError(
            where, "not an ONNX model, or cut short", "a file that starts and ends as it was saved"
        ) from error
    if not model.graph.node:
        raise DataError(where, "no operators", "an ONNX model")
    return model


def _opset(model: Any, where: str) -> int:
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    found = versions.get("ai.onnx")
    if found is None:
        raise DataError(where, "no opset", "an ONNX model that states its opset")
    if found not in OPSETS:
        raise DataError(where, f"opset {found}", f"{OPSETS[0]} to {OPSETS[-1]}", FIX_OPSET)
    return int(found)


def _refuse_external(model: Any, where: str) -> None:
    """A tensor in another file could be any file of this machine, so none is read, wherever it stands."""
    for tensor in _all_tensors(model.graph, model.functions):
        if tensor.data_location == tensor.EXTERNAL:
            fix = "onnx.save(onnx.load(path), path) puts them into the file"
            raise UsageError(where, f"{tensor.name} lies in another file", "tensors in the file itself", fix)
    if model.graph.sparse_initializer:
        raise UsageError(where, "sparse tensors", "plain ones")


def _all_tensors(graph: Any, functions: Iterable[Any] = ()) -> Iterator[Any]:
    """Tensors of a graph, of its nodes' attributes, and of graphs in them."""
    yield from graph.initializer
    for node in (*graph.node, *(node for function in functions for node in function.node)):
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _all_tensors(inner)


def _refuse_nodes(nodes: Iterable[Any], where: str) -> None:
    for node in nodes:
        name = f"{where}: {node.name or node.output[0]}"
        if node.domain not in ("", "ai.onnx"):
            raise UsageError(name, f"custom operator {node.domain}.{node.op_type}", "operators of ONNX itself")
        if node.op_type in QUANTISED or node.op_type.startswith("QLinear"):
            raise UsageError(name, f"a quantised model ({node.op_type})", "float weights", "import the float model")
        if node.op_type in RANDOM:
            raise UsageError(name, f"random numbers ({node.op_type})", "a function of the input alone")


def _sizes(onnx: Any, value: Any, where: str) -> tuple[int | None, ...]:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise UsageError(where, f"input {value.name} has no shape", "a tensor of stated shape", "state it: --input")
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in kind.shape.dim)


def _take_graph(parsed: Parsed, graph: Any, where: str) -> None:
    """Initialisers and nodes; a node of known inputs is computed at once, a branch that is known is taken."""
    from onnx import numpy_helper

    for tensor in graph.initializer:
        parsed.known[tensor.name] = _plain(numpy_helper.to_array(tensor))
        if tensor.data_type in (1, 10, 11, 16):  # the floating-point types
            parsed.trained.add(tensor.name)
    for node in graph.node:
        _take_node(parsed, node, where)


def _take_node(parsed: Parsed, node: Any, where: str) -> None:
    at = f"{where}: {node.name or node.output[0]}"
    if not all(isinstance(text, str) for text in (node.op_type, node.name, *node.input, *node.output)):
        raise DataError(where, "a name that is no text", "an ONNX model")
    if node.op_type == "If":
        _take_choice(parsed, node, where)
        return
    if any(attribute.type in (5, 10) for attribute in node.attribute):  # a graph, or several
        raise UsageError(
            at, f"control flow ({node.op_type})", "operators alone", "export the model without branches and loops"
        )
    from onnx import helper

    attributes = {a.name: _decoded_attribute(helper.get_attribute_value(a)) for a in node.attribute}
    step = Step(node.op_type, list(node.input), list(node.output), attributes, node.name, node)
    if any(name and name not in parsed.known for name in step.inputs):
        parsed.steps.append(step)
        return
    arrays = [parsed.known[name] if name else None for name in step.inputs]
    found = computed(step, arrays, parsed.opset, at)
    parsed.known |= dict(zip(step.outputs, found, strict=False))
    if not parsed.trained.isdisjoint(step.inputs):
        parsed.trained.update(name for name, value in zip(step.outputs, found, strict=False) if value.dtype.kind == "f")


def _take_choice(parsed: Parsed, node: Any, where: str) -> None:
    """Both sides of an `If`; which one runs depends on sizes, and is known when they are."""
    graphs = {attribute.name: attribute.g for attribute in node.attribute}
    branches = []
    for side in ("then_branch", "else_branch"):
        inner = replace(parsed, steps=[])
        _refuse_nodes(graphs[side].node, where)
        _take_graph(inner, graphs[side], where)
        branches.append(Branch(inner.steps, [value.name for value in graphs[side].output]))
    parsed.steps.append(Step("If", list(node.input), list(node.output), {}, node.name, node, tuple(branches)))


def _decoded_attribute(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _plain(array: Array) -> Array:
    """Floats of any width as float32."""
    kind = np.asarray(array)
    if kind.dtype.kind == "f" or kind.dtype.name == "bfloat16":
        return np.array(kind, np.float32)
    return kind


def computed(step: Step, arrays: Sequence[Array | None], opset: int, where: str) -> list[Array]:
    """The results of a node of known inputs, by onnx's reference implementation."""
    from onnx import helper, reference

    elements = sum(array.size for array in arrays if array is not None)
    names = [f"in{i}" if array is not None else "" for i, array in enumerate(arrays)]
    node = step.proto
    given = {name: array for name, array in zip(names, arrays, strict=True) if array is not None}
    alone = helper.make_node(node.op_type, names, list(step.outputs))
    alone.attribute.extend(node.attribute)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in step.outputs if name]
    model = helper.make_model(
        helper.make_graph([alone], "one", inputs, outputs), opset_imports=[helper.make_opsetid("", opset)]
    )
    try:
        if elements > MOST_FOLDED_ELEMENTS:
            raise ValueError(f"{elements} elements")
        found = reference.ReferenceEvaluator(model).run(None, given)
    except Exception as error:  # whatever a malformed node makes it raise
        raise DataError(where, f"{step.kind} cannot be computed: {_line(error)}", "constants that fit it") from error
    return [_plain(np.asarray(value)) for value in found]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


# --------------------------------------------------------------------------------------------------------- the module


class Node(nn.Module):
    """One node with its tensors; calling it runs the table's rule. What rules may ask stands here."""

    def __init__(self, step: Step, reading: Reading, opset: int, name: str) -> None:
        super().__init__()
        self.kind, self.attributes, self.opset, self.name = step.kind, step.attributes, opset, name
        self.results = len([output for output in step.outputs if output])
        self._rule = reading.rule
        self.places: dict[int, str] = {}
        """Input by number -> the tensor that stands there."""

    def forward(self, *inputs: Any) -> Any:
        own = [getattr(self, self.places[i]) if i in self.places else value for i, value in enumerate(inputs)]
        while own and own[-1] is None:
            own.pop()
        try:
            return self._rule(self, *own)
        except UsageError:
            raise
        except Exception as error:  # whatever torch makes of operands that do not fit
            raise UsageError(
                self.name, f"{self.kind} cannot be computed: {_line(error)}", "operands that fit"
            ) from error

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def refuse(self, found: str, expected: str, fix: str = "") -> NoReturn:
        """Raise `UsageError` that names the node."""
        raise UsageError(self.name, f"{self.kind}: {found}", expected, fix)

    def whole(self, x: Any) -> list[int]:
        """The entries of a known list of whole numbers. Refuses what depends on the input."""
        if isinstance(x, Tensor):
            self.refuse("numbers that depend on the input's values", "fixed ones")
        return [int(i) for i in np.asarray(x).reshape(-1)]

    def axes(self, x: Any = None, rank: int = 0) -> list[int]:
        """The attribute `axes`, or the input that newer opsets have in its place, each from 0 where a rank is given."""
        found = self.get("axes") if x is None else self.whole(x)
        found = [] if found is None else list(found)
        return [axis % rank for axis in found] if rank else found

    def number(self, x: Any) -> float:
        """A known number."""
        if isinstance(x, Tensor):
            self.refuse("a number that depends on the input's values", "a fixed one")
        array = np.asarray(x)
        if array.size != 1:
            self.refuse(f"{array.size} numbers", "one")
        return float(array.reshape(-1)[0])

    def tensor(self, x: Any, like: Tensor) -> Any:
        """An operand beside an activation: a known number as such, known arrays as tensors."""
        if isinstance(x, Tensor):
            return x
        array = np.asarray(x)
        if array.size == 1 and array.ndim <= like.ndim:
            return array.reshape(-1)[0].item()
        return torch.from_numpy(np.array(array))


class OnnxNet(nn.Module):
    """A file's graph as a module: (N, *shape) -> its outputs."""

    def __init__(self, parsed: Parsed, *, channels_last: bool) -> None:
        super().__init__()
        self._parsed, self.takes_channels_last = parsed, channels_last
        self.outputs = tuple(parsed.outputs)
        self._fixed_batch = parsed.shape[0] or 0 if parsed.shape else 0
        readings = _readings()
        self._paths: dict[int, str] = {}
        """Identity of a step -> the path of its module."""
        names = _Names()
        held: dict[tuple[str, str], nn.Parameter | Tensor] = {}
        for step in _all_steps(parsed.steps):
            reading = readings.get(step.kind)
            node = Node(step, reading or Reading(KNOWN.get(step.kind, _not_read)), parsed.opset, names.shown(step))
            tensors = _tensors_of(step, reading, node, parsed)
            path = names.taken(_layer_name(step, tensors, node) if tensors else names.base(step))
            for what, (source, array) in tensors.items():
                _register(node, what, source, array, parsed, held)
            self._paths[id(step)] = path
            _place(self, path, node)

    def forward(self, x: Tensor) -> Any:
        batch = x.shape[0]
        if self.takes_channels_last:
            x = x.permute(0, 2, 3, 1)
        values: dict[str, Any] = {**self._parsed.known, self._parsed.input: x}
        self._run(self._parsed.steps, values, batch)
        outputs = [values.get(name) for name in self._parsed.outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _run(self, steps: Sequence[Step], values: dict[str, Any], batch: int) -> None:
        for step in steps:
            inputs = [values.get(name) if name else None for name in step.inputs]
            node: Any = self.get_submodule(self._paths[id(step)])
            if step.kind == "Expand" and isinstance(inputs[0], np.ndarray) and inputs[0].any():
                inputs[0] = torch.from_numpy(inputs[0])  # one for each sample: capture sees that they are alike
            if step.branches:
                branch = step.branches[0 if node.number(inputs[0]) else 1]
                self._run(branch.steps, values, batch)
                found: Any = [values[name] for name in branch.outputs]
            elif any(isinstance(value, Tensor) for value in inputs) or node.places or step.proto is None:
                if step.kind in ("Reshape", "Expand"):
                    inputs[1] = _batched(inputs[1], inputs[0], batch, self._fixed_batch, step.kind)
                found = node(*inputs)
            else:
                found = computed(step, inputs, self._parsed.opset, node.name)
            found = found if isinstance(found, list | tuple) else [found]
            values |= dict(zip(step.outputs, found, strict=False))


def _all_steps(steps: Sequence[Step]) -> Iterator[Step]:
    for step in steps:
        yield step
        for branch in step.branches:
            yield from _all_steps(branch.steps)


def _batched(target: Any, x: Any, batch: int, fixed: int, kind: str) -> Any:
    """A shape that was written for a fixed number of samples, for as many as there are."""
    if isinstance(target, Tensor) or not isinstance(x, Tensor):
        return target
    sizes = np.array(target)
    written = fixed or 1
    if batch == written or not len(sizes) or sizes[0] != written:
        return target
    if -1 not in sizes and kind == "Reshape" and np.prod(sizes) * batch == x.numel() * written:
        sizes[0] = batch  # nothing else could be meant
    elif fixed and (kind == "Expand" or -1 in sizes):
        sizes[0] = batch
    return sizes


def _not_read(node: Node, *inputs: Any) -> NoReturn:
    raise UsageError(node.name, f"operator {node.kind}", "one of docs/operators.md")


# ----------------------------------------------------------------------------------------- what makes numbers of shapes


def _shape(node: Node, x: Tensor) -> Array:
    return np.array(x.shape, np.int64)[node.get("start", 0) : node.get("end", None)]


def _size(node: Node, x: Tensor) -> Array:
    return np.array(x.numel(), np.int64)


KNOWN = {"Shape": _shape, "Size": _size}
"""Nodes whose results are numbers, known as soon as the sizes are."""


def _readings() -> dict[str, Reading]:
    return {kind: reading for operator in TABLE.values() for kind, reading in operator.from_onnx.items()}


def readable() -> list[str]:
    """The node types that are read."""
    return sorted([*_readings(), *KNOWN])


# -------------------------------------------------------------------------------------------------------------- names


class _Names:
    """Paths of modules, each once."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def base(self, step: Step) -> str:
        """A node's own name; without one, that of its output; without a telling one, its type."""
        path = _path(step.name or step.outputs[0].removesuffix("/out"))
        folder, dot, last = path.rpartition(".")
        if last.startswith(step.kind):  # `Relu`, `Relu_1`
            path = f"{folder}{dot}{last.lower()}"
        return path if any(part[0].isalpha() for part in path.split(".") if part) else f"{step.kind.lower()}_{path}"

    def shown(self, step: Step) -> str:
        return step.name or next((name for name in step.outputs if name), step.kind)

    def taken(self, base: str) -> str:
        path = base if base not in self._taken else next(
            name for i in range(1, len(self._taken) + 2) if (name := f"{base}_{i}") not in self._taken
        )  # fmt: skip
        self._taken.add(path)
        return path


def _path(name: str) -> str:
    """A name as a module's path: slashes part as dots do; a part that repeats what stands before it stands for both.

    >>> _path("/blocks/blocks.00/Relu"), _path("/stem/Conv")
    ('blocks.00.Relu', 'stem.Conv')
    """
    parts: list[str] = []
    for part in "".join(c if c.isalnum() or c in "._-/" else "_" for c in name).split("/"):
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts += [part] if part else []
    return ".".join(part for part in ".".join(parts).split(".") if part) or "node"


def _layer_name(step: Step, tensors: Mapping[str, tuple[str, Array]], node: Node) -> str:
    """A layer's name: that of its weight (`blocks.0.conv.weight`), or the node's."""
    for what in ("weight", "running_mean"):
        source = tensors.get(what, ("", None))[0]
        if source.endswith(f".{what}"):
            return _path(source.removesuffix(f".{what}"))
    base = _Names().base(step)
    folder, _, last = base.rpartition(".")
    return folder if folder and last == step.kind.lower() else base


def _place(root: nn.Module, path: str, node: Node) -> None:
    """Put a node where its path says, among the nodes that lie there already."""
    *folders, last = path.split(".")
    parent = root
    for folder in folders:
        if not hasattr(parent, folder):
            parent.add_module(folder, nn.Module())
        parent = getattr(parent, folder)
    if last in parent._modules:  # a folder that was made for others
        for name, child in parent._modules[last].named_children():  # type: ignore[union-attr]
            node.add_module(name, child)
    parent.add_module(last, node)


# ------------------------------------------------------------------------------------------------------------ tensors


def _tensors_of(step: Step, reading: Reading | None, node: Node, parsed: Parsed) -> dict[str, tuple[str, Array]]:
    """The fixed inputs that become tensors of the node: what they are called -> the file's name and the values."""
    found: dict[str, tuple[str, Array]] = {}
    called = reading.tensors if reading is not None else ()
    for i, name in enumerate(step.inputs):
        array = parsed.known.get(name)
        what = called[i] if i < len(called) else "-" if called else "value"
        if array is None or what == "-" or array.dtype.kind != "f" or (what == "value" and array.size == 1):
            continue
        what = what if what not in found else f"{what}{i}"
        found[what] = (name, array)
        node.places[i] = what
    if reading is not None and reading.prepare is not None and found:
        arrays = {what: array for what, (_, array) in found.items()}
        reading.prepare(node, arrays)
        found = {what: (found.get(what, ("", array))[0], array) for what, array in arrays.items()}
    return found


def _register(
    node: Node, what: str, source: str, array: Array, parsed: Parsed, held: dict[tuple[str, str], Any]
) -> None:
    """A tensor of the node: a parameter where training changed it; shared with the nodes that share it in the file."""
    key = (source, f"{what} {array.shape}")
    trains = (source in parsed.trained or not source) and not what.startswith("running_")
    if source and key in held:
        tensor = held[key]
    else:
        tensor = torch.from_numpy(np.array(array, np.float32, order="C"))
        tensor = nn.Parameter(tensor) if trains else tensor
        held[key] = tensor
    if isinstance(tensor, nn.Parameter):
        node.register_parameter(what, tensor)
    else:
        node.register_buffer(what, tensor)


# ---------------------------------------------------------------------------------------------------------- the whole


def module_of(parsed: Parsed, shape: Shape, where: str) -> OnnxNet:
    """The module for samples (C, H, W), (C, T) or (D,) as the file or its user says.

    A file that takes pictures channels last (H, W, C) gets them so. Raises `UsageError` where the shape is not the
    file's.
    """
    declared = parsed.shape[1:]
    if _fits(declared, shape):
        return OnnxNet(parsed, channels_last=False)
    if len(shape) == 3 and _fits(declared, (*shape[1:], shape[0])):
        return OnnxNet(parsed, channels_last=True)
    expected = " x ".join("?" if size is None else str(size) for size in declared)
    raise UsageError("--input", f"samples of shape {shape}", f"{expected}, as {where} declares")


def _fits(declared: Sequence[int | None], shape: Sequence[int]) -> bool:
    return len(declared) == len(shape) and all(d in (None, s) for d, s in zip(declared, shape, strict=True))


def sample_shape(parsed: Parsed, where: str) -> Shape:
    """Shape of a sample as the file declares it, pictures channels first. Raises `UsageError` where it is left open."""
    declared = parsed.shape[1:]
    if not declared or None in declared:
        shown = " x ".join("?" if size is None else str(size) for size in declared) or "nothing"
        raise UsageError(
            where, f"an input of open shape, {shown} per sample", "its sizes", "state them: --input 3x224x224"
        )
    shape = tuple(int(size) for size in declared if size is not None)
    few = (1, 3, 4)
    if len(shape) == 3 and shape[2] in few and shape[0] not in few:
        return (shape[2], *shape[:2])
    return shape


# ---------------------------------------------------------------------------------------------------------- comparing

AGREEMENT = 1e-3
"""Largest difference from onnxruntime's outputs, relative to their size: rounding, not another function (float32,
hundreds of layers)."""
TRIAL_SAMPLES = 3


def compare(data: bytes, module: OnnxNet, shape: Shape, where: str, entries: int = 0) -> float | None:
    """Largest difference between the module's outputs and onnxruntime's for random samples, relative to their size.

    `entries`: samples are whole numbers below it; 0 for any numbers.

    None where onnxruntime is not installed. Raises `DataError` for another function.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, one for each thing that a file may have wrong
        raise DataError(where, f"onnxruntime refuses it: {_line(error)}", "a model that runs") from error
    given = session.get_inputs()[0]
    kind: dict[str, Any] = {
        "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(int64)": np.int64,
        "tensor(int32)": np.int32,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    batch = given.shape[0] if isinstance(given.shape[0], int) else TRIAL_SAMPLES
    samples = max(TRIAL_SAMPLES, batch)
    x = rng.standard_normal((samples, *shape)).astype(np.float32)
    if entries or given.type.startswith("tensor(int"):
        x = rng.integers(0, entries or 2, x.shape).astype(np.float32)
    theirs_x = np.moveaxis(x, 1, -1) if module.takes_channels_last else x
    worst, judge = 0.0, _Judge(data)
    for start in range(0, samples - batch + 1, batch):
        part = np.ascontiguousarray(theirs_x[start : start + batch]).astype(kind.get(given.type, np.float32))
        try:
            theirs = session.run(None, {given.name: part})
        except Exception as error:
            raise DataError(where, f"onnxruntime cannot run it: {_line(error)}", "a model that runs") from error
        with torch.no_grad():
            own = torch.from_numpy(x[start : start + batch])
            ours = module(own.to(torch.int64) if given.type.startswith("tensor(int") else own)
        ours = ours if isinstance(ours, tuple) else (ours,)
        for number, (name, mine, expected) in enumerate(zip(module.outputs, ours, theirs, strict=True)):
            difference = _difference(mine, expected)
            if not difference <= AGREEMENT and not _difference(mine, judge(given.name, part)[number]) <= AGREEMENT:
                found = f"{name} differs from onnxruntime's by {difference:.2g} of its size"
                raise DataError(where, found, "the same", "please report this model")
            worst = max(worst, difference)
    return worst


class _Judge:
    """onnx's own reference implementation, asked where two others disagree: it is slow."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __call__(self, name: str, x: Array) -> list[Array]:
        from onnx import reference

        return [np.asarray(value) for value in reference.ReferenceEvaluator(self._data).run(None, {name: x})]


def _difference(ours: Any, theirs: Array) -> float:
    """Largest difference relative to the size of the values; infinite of other shapes, 0 of what is no numbers."""
    found, theirs = np.asarray(ours.numpy() if isinstance(ours, Tensor) else ours), np.asarray(theirs)
    if theirs.dtype.kind != "f" or not theirs.size or not np.isfinite(theirs).all():
        return 0.0
    if found.shape != theirs.shape:
        return float("inf")
    return float(np.abs(found - theirs).max()) / (float(np.abs(theirs).max()) or 1.0)
