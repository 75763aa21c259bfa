"""A graph as the artifact holds it: one JSON object per operator; read with every rule of the table checked.

A file may come from anywhere, so a graph that is read is built operator by operator: known kinds only, inputs that
stand before their reader, shapes that follow from the kind's own rule, sizes within bounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from math import isfinite, prod
from typing import Any

import numpy as np

from stages.artifacts.codec import text_array, text_tuple
from stages.artifacts.records import Array, Group
from stages.errors import DataError, SchemaError
from stages.graphs.graph import Graph
from stages.operators import TABLE, Op, Shape
from stages.operators.op import Value

MOST_OPERATORS = 20_000
MOST_ELEMENTS = 2**31 - 1
"""Of one value of one sample, and of one tensor."""
MOST_NUMBERS = 65536
"""Of one attribute."""
MOST_BYTES = 2**25
"""Of all operators together: read in about a second."""
WHERE = "/model/graph"
COMMON = ("shares", "frozen", "block")
"""Fields that every kind has."""

_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(Op) if field.default is not MISSING}


def graph_tree(graph: Graph) -> Group:
    """The tree of `/model/graph`."""
    arrays: dict[str, Any] = {"operator": text_array([_row(op) for op in graph.ops])}
    return Group(arrays=arrays | ({"block": text_array(graph.blocks)} if graph.blocks else {}))


def _row(op: Op) -> str:
    row: dict[str, Any] = {"name": op.name, "kind": op.kind, "inputs": op.inputs, "shape": op.shape}
    known = {name: getattr(op, name) for name in (*op.operator.fields, *COMMON)}
    row |= {name: value for name, value in known.items() if value != _DEFAULTS[name]}
    return json.dumps(row | dict(op.args), separators=(",", ":"))


def read_graph(tree: Group, where: str = "") -> Graph:
    """The graph of a tree. Raises `SchemaError` for anything that is no graph of the table's operators."""
    where = f"{where}{WHERE}"
    rows = _texts(tree, "operator", where)
    blocks = _texts(tree, "block", where) if "block" in tree.arrays else ()
    if not 2 <= len(rows) <= MOST_OPERATORS:
        raise SchemaError(where, f"{len(rows)} operators", f"2 to {MOST_OPERATORS}")
    known: dict[str, Op] = {}
    for number, text in enumerate(rows):
        op = _operator(text, f"{where}/operator[{number}]", known, len(blocks))
        known[op.name] = op
    ops = tuple(known.values())
    _check_ends(ops, where)
    return Graph(ops, blocks)


def _texts(tree: Group, name: str, where: str) -> tuple[str, ...]:
    array = np.asarray(tree.arrays.get(name, ()))
    if array.dtype.kind != "S" or array.ndim != 1:
        raise SchemaError(f"{where}/{name}", f"{array.dtype} {array.shape}", "a list of texts")
    if len(array) > MOST_OPERATORS or array.nbytes > MOST_BYTES:
        found = f"{len(array)} texts, {array.nbytes} bytes"
        raise SchemaError(f"{where}/{name}", found, f"at most {MOST_OPERATORS} and {MOST_BYTES}")
    return text_tuple(array)


def _check_ends(ops: tuple[Op, ...], where: str) -> None:
    first, last = ops[0], ops[-1]
    if [op.name for op in ops if op.operator.given] != [first.name]:
        raise SchemaError(where, "no input first, or another one later", "one input, the first operator")
    if len(last.shape) != 1:
        raise SchemaError(where, f"an output of shape {last.shape}", "a feature vector (D,)")
    moving = {first.name}
    for op in ops[1:]:
        if not moving.isdisjoint(op.inputs):
            moving.add(op.name)
        elif op.inputs or op is last:
            raise SchemaError(where, f"{op.name} does not depend on the input", "constants and what the input changes")


def _operator(text: str, where: str, known: Mapping[str, Op], blocks: int) -> Op:
    try:
        row = json.loads(text)
        name, kind, inputs, shape = (row.pop(key) for key in ("name", "kind", "inputs", "shape"))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SchemaError(where, f"{text[:60]!r}", "an operator as JSON: name, kind, inputs, shape") from error
    _check_name(name, where, known)
    if not isinstance(kind, str) or kind not in TABLE:
        raise SchemaError(where, f"kind {kind!r:.60}", "a kind of docs/operators.md", "use a newer edgetrain")
    operator = TABLE[kind]
    if not isinstance(inputs, list) or not all(isinstance(source, str) and source in known for source in inputs):
        raise SchemaError(where, f"{name} reads {inputs!r:.80}", "operators that stand before it")
    if not operator.arity[0] <= len(inputs) <= operator.arity[1]:
        raise SchemaError(where, f"{name}: {len(inputs)} inputs", f"{operator.arity[0]} to {operator.arity[1]}")
    _check_shape(name, shape, where)
    own = {key: _field(key, row.pop(key), where) for key in (*operator.fields, *COMMON) if key in row}
    args = tuple((key, _argument(row.pop(key, None), of, f"{where} {key}")) for key, of in operator.args.items())
    if row:
        raise SchemaError(where, f"{name}: {sorted(row)[0]!r}", f"an attribute of {kind}")
    in_shapes = tuple(known[source].shape for source in inputs)
    op = Op(name, kind, tuple(inputs), tuple(shape), in_shapes, args=args, **own)
    _check_rule(op, where, known, blocks)
    return op


def _check_name(name: Any, where: str, known: Mapping[str, Op]) -> None:
    if not isinstance(name, str) or not name or len(name) > 200 or "/" in name or name in known:
        raise SchemaError(where, f"name {name!r:.80}", "a name of its own without a slash")


def _check_shape(name: str, shape: Any, where: str) -> None:
    sizes = isinstance(shape, list) and len(shape) <= 8
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape):
        raise SchemaError(where, f"{name}: shape {shape!r:.60}", "sizes above 0")
    if prod(shape) > MOST_ELEMENTS:
        raise SchemaError(where, f"{name}: shape {shape!s:.60}", f"at most {MOST_ELEMENTS:,} elements")


def _field(key: str, value: Any, where: str) -> Any:
    default = _DEFAULTS[key]
    return _argument(value, type(default), f"{where} {key}")


def _argument(value: Any, of: type, where: str) -> Value:
    """An attribute's value of one of the types that `Operator.args` names."""
    if of is tuple and isinstance(value, list) and len(value) <= MOST_NUMBERS and all(map(_is_whole, value)):
        return tuple(value)
    if of is int and _is_whole(value):
        return int(value)
    if of is float and (_is_whole(value) or (type(value) is float and isfinite(value))):
        return float(value)
    if of in (bool, str) and type(value) is of:
        return value
    raise SchemaError(where, f"{value!r:.60}", WORDS[of])


WORDS = {
    tuple: "a list of whole numbers",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
}


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number that other programs can hold too."""
    return type(value) is int and abs(value) <= MOST_ELEMENTS


def _check_rule(op: Op, where: str, known: Mapping[str, Op], blocks: int) -> None:
    """The kind's own shape rule and tensors, which raise whatever nonsense makes them."""
    if not -1 <= op.block < blocks:
        raise SchemaError(where, f"{op.name}: block {op.block}", f"-1 to {blocks - 1}")
    try:
        shape: Shape = op.operator.shape(op)
        tensors = op.operator.tensors(op)
        sizes = [prod(size) for size in tensors.values()]
        costs = op.operator.macs_of(op)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise SchemaError(where, f"{op.name}: {_line(error)}", f"attributes that fit a {op.kind}") from error
    if shape != op.shape:
        raise SchemaError(where, f"{op.name}: shape {op.shape}", f"{shape!s:.60}, which follows from its inputs")
    if costs < 0 or any(not 0 < size <= MOST_ELEMENTS for size in sizes):
        raise SchemaError(where, f"{op.name}: tensors of {sizes!s:.60} values", f"1 to {MOST_ELEMENTS:,}")
    if op.shares:
        owner = known.get(op.shares)
        if owner is None or owner.kind != op.kind or not tensors or owner.tensors != tensors:
            raise SchemaError(where, f"{op.name} shares the tensors of {op.shares!r:.60}", f"a {op.kind} with the same")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def tensor_shapes(graph: Graph) -> dict[str, Shape]:
    """Name -> shape of every tensor that a graph needs."""
    return {f"{op.name}.{what}": shape for op in graph.ops for what, shape in op.tensors.items()}


def check_tensors(expected: Mapping[str, Shape], found: Mapping[str, Array], where: str, fix: str = "") -> None:
    """Raise `DataError` for the first tensor that is missing, of another shape, or unknown."""
    for name, shape in expected.items():
        if name not in found:
            raise DataError(f"{where}/{name}", "missing", f"shape {shape}", fix)
        if found[name].shape != shape:
            raise DataError(f"{where}/{name}", f"shape {found[name].shape}", f"{shape}", fix)
    for name in found:
        if name not in expected:
            raise DataError(f"{where}/{name}", "not a tensor of this model", "", fix)
